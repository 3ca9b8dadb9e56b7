"""The Serve application as a whole."""

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, SecretStr, StringConstraints, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from llava_ray.config.keys import CLIENT_KEY_VARIABLE, KeyConfig, read_keys
from llava_ray.config.limits import LimitsConfig
from llava_ray.config.model import (
    DEMO_MODEL,
    PYTHON_VARIABLES,
    DtypeName,
    EngineName,
    ModelConfig,
    QuantizationName,
)
from llava_ray.config.page import ModerationConfig
from llava_ray.config.section import Section, refuse_unknown

WORKER_ADDRESS = (
    r"^https?://([A-Za-z0-9_.-]+|\[[0-9a-fA-F:.]+\])(:([0-9]{1,5}|\*))?(/[A-Za-z0-9_./~-]*)?$"
)
"""Of a worker that may register; the port may be a star, the rest is taken by the letter."""


class LlavaProtocolConfig(Section):
    """The protocol of LLaVA's own controller and workers, for clients and workers in use."""

    enabled: bool = Field(
        default=True,
        description="Answer LLaVA's own clients (its page, test_message) as its controller does.",
    )
    address: str = Field(
        default="",
        pattern=r"^(https?://[^\s/]+.*[^/])?$",
        description="Where clients reach this gateway; default: the address that they asked.",
    )
    workers: list[Annotated[str, StringConstraints(pattern=WORKER_ADDRESS)]] = Field(
        default_factory=list,
        description="Addresses of LLaVA's own workers that may register, http://host:port or "
        "http://host:*; no other is ever called. Empty: none may.",
    )
    worker_timeout_s: float = Field(
        default=60.0,
        gt=0,
        description="A worker that sent no heart beat for so long is gone; they come every 15 s.",
    )
    dispatch_method: Literal["shortest_queue", "lottery"] = Field(
        default="shortest_queue",
        description="Which of several workers of a model answers: the one with the shortest "
        "queue for its speed, or one drawn by speed.",
    )


_OTHER_VARIABLES = {CLIENT_KEY_VARIABLE, *PYTHON_VARIABLES.values()}
"""Variables with our prefix that are no settings of the application's."""


class ServeConfig(BaseSettings):
    """The application: `serve run llava_ray.app:build_app model=... engine=...`.

    `model`, `engine`, `dtype` and `quantization` describe one model in short; `models` describes
    one or several at length.
    """

    model_config = SettingsConfigDict(
        env_prefix="LLAVA_RAY_",
        env_nested_delimiter="__",
        extra="forbid",
        hide_input_in_errors=True,  # it may be a key
    )

    model: str = Field(
        default=DEMO_MODEL, min_length=1, description="Folder or hub name of the weights."
    )
    engine: EngineName = Field(default="torch", description="torch, vllm, sglang or echo.")
    dtype: DtypeName = Field(default="auto", description="Precision of the weights.")
    quantization: QuantizationName = Field(
        default="none", description="int8: computed in 8 bits, on CPUs."
    )
    models: list[ModelConfig] = Field(
        default_factory=list,
        description="Models served side by side; replaces model, engine, dtype and quantization.",
    )
    num_gateways: int = Field(
        default=1, ge=1, le=64, description="Gateways that answer, each with its own queues."
    )
    page: bool = Field(
        default=True, description="Serve the Gradio page at / together with the API."
    )
    feedback_dir: str | None = Field(
        default=None,
        min_length=1,
        description="Folder in which the page logs conversations and votes; default: none are.",
    )
    moderation: ModerationConfig = Field(
        default_factory=ModerationConfig, description="Who checks questions from the page."
    )
    limits: LimitsConfig = Field(
        default_factory=LimitsConfig, description="What a request may bring."
    )
    llava_protocol: LlavaProtocolConfig = Field(
        default_factory=LlavaProtocolConfig, description="For LLaVA's own clients and workers."
    )
    api_keys: Annotated[list[KeyConfig], NoDecode] = Field(
        default_factory=list,
        description="API keys, one of which a request must have; by default none is needed. In the "
        "environment: the keys themselves, as name=key, separated by commas.",
    )
    api_keys_file: str | None = Field(
        default=None, description="YAML or JSON file with a list of more such keys, hashed."
    )
    page_key: SecretStr | None = Field(
        default=None, description="Key with which the page at / asks, on behalf of all who see it."
    )
    cors_origins: list[str] = Field(
        default_factory=list,
        description="Web sites, like https://example.org, whose scripts may call the API; * for "
        "all.",
    )

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown(cls, values: Any) -> Any:
        prefix = "LLAVA_RAY_"
        variables = [
            name.removeprefix(prefix)
            for name in os.environ
            if name.startswith(prefix) and name not in _OTHER_VARIABLES
        ]
        known = [name.upper() for name in cls.model_fields]
        refuse_unknown([name.split("__")[0] for name in variables], known, prefix)
        return refuse_unknown(values, cls.model_fields)

    @field_validator("api_keys", mode="before")
    @classmethod
    def _split_keys(cls, value: Any) -> Any:
        return re.split(r"[\s,]+", value.strip(" ,\n")) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _read_keys(self) -> "ServeConfig":
        if self.api_keys_file is not None:
            self.api_keys += read_keys(Path(self.api_keys_file))
            self.api_keys_file = None
        names = [key.name for key in self.api_keys]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"two API keys are named {twice}: give each a name of its own")
        return self

    @model_validator(mode="after")
    def _check_models(self) -> "ServeConfig":
        if not self.models:
            self.models = [
                ModelConfig(
                    path=self.model,
                    engine=self.engine,
                    dtype=self.dtype,
                    quantization=self.quantization,
                )
            ]
        names = [name for model in self.models for name in model.names]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"two models are named {twice}: give each a `name` of its own")
        return self
