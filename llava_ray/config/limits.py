"""Limits on requests and samples, and the policy for fetching images from URLs."""

from ipaddress import IPv4Network, IPv6Network
from typing import Annotated, Literal

from pydantic import Field

from llava_ray.config.section import Section


class FetchConfig(Section):
    """Which image URLs are fetched; none until `hosts` allows some."""

    hosts: list[str] = Field(
        default_factory=list,
        description="Hosts from which images may be fetched: example.org, *.example.org for its "
        "subdomains, or * for every public host. Default: none, so image URLs are "
        "refused.",
    )
    ports: list[Annotated[int, Field(ge=1, le=65535)]] = Field(
        default=[80, 443], description="Ports that an image URL may use."
    )
    networks: list[IPv4Network | IPv6Network] = Field(
        default_factory=list,
        description="Non-public IP ranges, such as 10.1.0.0/16, from which images may be fetched "
        "nevertheless.",
    )
    timeout_s: float = Field(
        default=10,
        gt=0,
        le=300,
        description="Maximum time to fetch one image, in seconds, including redirects.",
    )
    max_redirects: int = Field(
        default=3, ge=0, le=10, description="Maximum number of redirects for one image."
    )
    max_at_once: int = Field(
        default=64,
        ge=1,
        description="Maximum number of images that are fetched at the same time. Further ones "
        "wait, and the wait counts towards timeout_s.",
    )
    max_per_host: int = Field(
        default=8,
        ge=1,
        description="Maximum number of images that are fetched from one host at the same time.",
    )


class LimitsConfig(Section):
    """Limits on one request, and what happens to what exceeds them."""

    max_body_bytes: int = Field(
        default=32 << 20, ge=1024, description="Maximum size of an HTTP request body, in bytes."
    )
    max_images: int = Field(
        default=16, ge=0, description="Maximum number of images in one conversation."
    )
    max_image_bytes: int = Field(
        default=16 << 20, ge=64, description="Maximum size of one encoded image, in bytes."
    )
    max_image_pixels: int = Field(
        default=40_000_000,
        ge=1,
        description="Maximum number of pixels of one image (width times height).",
    )
    max_messages: int = Field(
        default=256, ge=1, description="Maximum number of messages in one conversation."
    )
    max_answers: int = Field(
        default=64,
        ge=1,
        le=1024,
        description="Maximum number of answers to one request: n times its number of prompts.",
    )
    max_tokens: int | None = Field(
        default=None,
        ge=1,
        description="Maximum number of tokens in one answer. Default: what the model's context "
        "leaves.",
    )
    excess_max_tokens: Literal["cut", "refuse"] = Field(
        default="cut",
        description="What happens to a request whose max_tokens is more than this limit, or more "
        "than the context leaves. cut: the answer ends there, with finish_reason length. refuse: "
        "status 400.",
    )
    unknown_fields: Literal["ignore", "refuse"] = Field(
        default="ignore",
        description="What happens to a field of a request that this server does not know. ignore: "
        "it has no effect, and the header x-llava-ray-ignored names it. refuse: status 400.",
    )
    max_in_flight: int = Field(
        default=1000,
        ge=1,
        description="Maximum number of requests that a gateway handles at the same time. Further "
        "requests are answered with status 503.",
    )
    max_wait_s: float = Field(
        default=30,
        gt=0,
        description="Maximum time that a request waits for a busy model, in seconds, before it is "
        "answered with status 503.",
    )
    request_timeout_s: float = Field(
        default=600,
        gt=0,
        description="Maximum total time of a request, in seconds, before it is stopped with status "
        "504. The header X-Request-Timeout can only lower it.",
    )
    fetch: FetchConfig = Field(
        default_factory=FetchConfig, description="Which images the gateway fetches from URLs."
    )

    @property
    def drain_s(self) -> float:
        """How long Serve lets a replica that it replaces finish its requests, in seconds.

        By then every running request has ended or timed out, and the replica has noticed.
        """
        return self.request_timeout_s + 10
