"""What a request, or a sample, may bring; and whether images are fetched from the web."""

from ipaddress import IPv4Network, IPv6Network
from typing import Annotated

from pydantic import Field

from llava_ray.config.section import Section


class FetchConfig(Section):
    """Images from the web: none are fetched until `hosts` names some."""

    hosts: list[str] = Field(
        default_factory=list,
        description="Hosts from which images are fetched: example.org, *.example.org for those "
        "below it, * for every public one; by default none.",
    )
    ports: list[Annotated[int, Field(ge=1, le=65535)]] = Field(
        default=[80, 443], description="Ports that such an address may name."
    )
    networks: list[IPv4Network | IPv6Network] = Field(
        default_factory=list,
        description="Address ranges, like 10.1.0.0/16, that are not public and from which "
        "images may come all the same.",
    )
    timeout_s: float = Field(
        default=10, gt=0, le=300, description="Seconds for an image, redirects included."
    )
    max_redirects: int = Field(default=3, ge=0, le=10, description="Redirects on the way to it.")
    max_at_once: int = Field(
        default=64, ge=1, description="Images fetched at once; more wait, within their time."
    )
    max_per_host: int = Field(default=8, ge=1, description="Of these, from one host.")


class LimitsConfig(Section):
    """What a request may bring; more is refused at the door."""

    max_body_bytes: int = Field(default=32 << 20, ge=1024, description="Bytes of one HTTP body.")
    max_images: int = Field(default=16, ge=0, description="Images in one conversation.")
    max_image_bytes: int = Field(default=16 << 20, ge=64, description="Bytes of one encoded image.")
    max_image_pixels: int = Field(
        default=40_000_000, ge=1, description="Width times height of an image."
    )
    max_messages: int = Field(default=256, ge=1, description="Messages in one conversation.")
    max_answers: int = Field(
        default=64, ge=1, le=1024, description="Answers to one request: n times its prompts."
    )
    max_tokens: int | None = Field(
        default=None,
        ge=1,
        description="Tokens in one answer; by default as many as the model's context holds.",
    )
    max_in_flight: int = Field(
        default=1000, ge=1, description="Requests that a gateway works on at once; more get 503."
    )
    max_wait_s: float = Field(
        default=30, gt=0, description="Seconds that a request waits for a busy model; then 503."
    )
    request_timeout_s: float = Field(
        default=600,
        gt=0,
        description="Seconds that a request may take in all; then 504. The header "
        "X-Request-Timeout asks for less.",
    )
    fetch: FetchConfig = Field(
        default_factory=FetchConfig, description="Images that are fetched from the web."
    )

    @property
    def drain_s(self) -> float:
        """Seconds after which every request that was begun is over, and its end is noticed.

        For so long what Serve replaces, or needs no more, may go on; it ends with its last request.
        """
        return self.request_timeout_s + 10
