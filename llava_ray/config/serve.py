"""The settings of the Serve application: `llava-ray serve` and `llava_ray.app:build_app`."""

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
    NumGpus,
    QuantizationName,
)
from llava_ray.config.page import ModerationConfig
from llava_ray.config.section import Section, refuse_unknown

WORKER_ADDRESS = (
    r"^https?://([A-Za-z0-9_.-]+|\[[0-9a-fA-F:.]+\])(:([0-9]{1,5}|\*))?(/[A-Za-z0-9_./~-]*)?$"
)
"""Pattern of an allowed worker's URL. The port may be `*`; everything else matches literally."""


class LlavaProtocolConfig(Section):
    """Compatibility with LLaVA's own controller protocol, for its existing clients and workers."""

    enabled: bool = Field(
        default=True,
        description="Answer LLaVA's own clients (its page, test_message) the way LLaVA's "
        "controller does.",
    )
    address: str = Field(
        default="",
        pattern=r"^(https?://[^\s/]+.*[^/])?$",
        description="URL at which LLaVA's clients reach this gateway. Default: the URL that they "
        "used for the request.",
    )
    workers: list[Annotated[str, StringConstraints(pattern=WORKER_ADDRESS)]] = Field(
        default_factory=list,
        description="URLs of LLaVA model workers that may register: http://host:port, or "
        "http://host:* for any port. No other worker is ever called. Empty: none may "
        "register.",
    )
    worker_timeout_s: float = Field(
        default=60.0,
        gt=0,
        description="Seconds without a heartbeat after which a worker counts as gone. Workers send "
        "one every 15 s.",
    )
    dispatch_method: Literal["shortest_queue", "lottery"] = Field(
        default="shortest_queue",
        description="How to choose among several workers of one model. shortest_queue: the one "
        "with the shortest queue relative to its speed. lottery: at random, weighted "
        "by speed.",
    )


_OTHER_VARIABLES = {CLIENT_KEY_VARIABLE, *PYTHON_VARIABLES.values()}
"""Environment variables that have the prefix but are not settings of the application."""


class ServeConfig(BaseSettings):
    """The application: `serve run llava_ray.app:build_app model=... engine=...`.

    description="Models that are served side by side. Replaces model, name, engine, dtype, "
    "quantization and num_gpus.",
    """

    model_config = SettingsConfigDict(
        env_prefix="LLAVA_RAY_",
        env_nested_delimiter="__",
        extra="forbid",
        hide_input_in_errors=True,  # an API key may be in it
    )

    model: str = Field(
        default=DEMO_MODEL,
        min_length=1,
        description="Folder, hub name or address of the weights. 'demo' is the embedded model.",
    )
    name: str = Field(
        default="",
        description="Name of the model in the API and on the page. Default: the name of its "
        "folder; of a training run's export, the name of the run.",
    )
    engine: EngineName = Field(
        default="torch",
        description="Inference engine: torch (CPU and GPU), vllm, sglang, or echo, a fake that "
        "repeats the question.",
    )
    dtype: DtypeName = Field(
        default="auto",
        description="Precision of the weights: auto, float32, bfloat16 or float16. auto: bfloat16 "
        "where the device computes in it at full speed, otherwise float16 (GPU) or float32 (CPU).",
    )
    quantization: QuantizationName = Field(
        default="none",
        description="int8: multiply the language model's matrices in 8 bits on CPUs. none: no "
        "quantization.",
    )
    num_gpus: NumGpus = Field(
        default="auto",
        description="GPUs that Ray reserves for each replica. auto: 1 if the cluster has GPUs or "
        "its autoscaler can start machines with GPUs, otherwise 0.",
    )
    models: list[ModelConfig] = Field(
        default_factory=list,
        description="Models that are served side by side. Replaces model, name, engine, dtype, "
        "quantization and num_gpus.",
    )
    num_gateways: int = Field(
        default=1, ge=1, le=64, description="Number of gateway replicas. Each has its own queues."
    )
    page: bool = Field(
        default=True, description="Serve the Gradio page at / together with the API."
    )
    feedback_dir: str | None = Field(
        default=None,
        min_length=1,
        description="Folder in which the page logs conversations and votes. Default: nothing is "
        "logged.",
    )
    moderation: ModerationConfig = Field(
        default_factory=ModerationConfig, description="Moderation of questions from the page."
    )
    limits: LimitsConfig = Field(default_factory=LimitsConfig, description="Limits on one request.")
    llava_protocol: LlavaProtocolConfig = Field(
        default_factory=LlavaProtocolConfig,
        description="Support for LLaVA's own clients and model workers.",
    )
    api_keys: Annotated[list[KeyConfig], NoDecode] = Field(
        default_factory=list,
        description="API keys, one of which every request must carry. Default: no key is needed. "
        "In the environment variable, give the keys themselves as name=key, separated "
        "by commas.",
    )
    api_keys_file: str | None = Field(
        default=None, description="YAML or JSON file with a list of further keys, hashed."
    )
    page_key: SecretStr | None = Field(
        default=None,
        description="API key with which the page at / sends its requests, for everyone who can "
        "open it.",
    )
    cors_origins: list[str] = Field(
        default_factory=list,
        description="Origins of web sites, such as https://example.org, whose scripts may call the "
        "API. * allows all.",
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
            raise ValueError(f"two API keys are named {twice}: give each its own name")
        return self

    @model_validator(mode="after")
    def _check_models(self) -> "ServeConfig":
        if not self.models:
            self.models = [
                ModelConfig(
                    path=self.model,
                    name=self.name,
                    engine=self.engine,
                    dtype=self.dtype,
                    quantization=self.quantization,
                    num_gpus=self.num_gpus,
                )
            ]
        names = [name for model in self.models for name in model.names]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"two models are named {twice}: give each its own `name`")
        return self
