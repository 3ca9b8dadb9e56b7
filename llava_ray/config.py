"""Typed configuration: every field has a bound, a sentence and an environment variable.

Precedence, highest first: the arguments of the Serve config file or command line, environment
variables `LLAVA_RAY_<FIELD>`, the defaults below. Unknown names are refused.
"""

import difflib
import os
from collections.abc import Iterable
from pathlib import PurePosixPath
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

DEMO_MODEL = "demo"
"""The name under which the embedded model is asked for and served."""

EngineName = Literal["torch", "vllm", "sglang", "echo"]


class Section(BaseModel):
    """Base of all parts of a configuration: unknown names are errors."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown(cls, values: Any) -> Any:
        return refuse_unknown(values, cls.model_fields)


class ModelConfig(Section):
    """One model: what is loaded, by which engine, on what, and how it scales."""

    path: str = Field(
        default=DEMO_MODEL,
        min_length=1,
        description="Folder or hub name of the weights; 'demo' is the embedded model.",
    )
    name: str = Field(
        default="",
        description="Name in the API and on the page; by default the last part of the path.",
    )
    engine: EngineName = Field(
        default="torch",
        description="What computes: torch (CPU and GPU), vllm, sglang, or echo (a fake).",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto",
        description="Precision of the weights; auto: bfloat16 where the device computes in it, "
        "float32 elsewhere.",
    )
    device: str = Field(
        default="auto", description="auto, cpu, cuda or cuda:N; auto takes a GPU if any."
    )
    template: str | None = Field(
        default=None,
        min_length=1,
        description="Name of a conversation template (vicuna_v1, llava_v0, mistral_instruct, ...), "
        "or own: the checkpoint's chat template; default: what its files point to.",
    )
    context_length: int | None = Field(
        default=None,
        ge=16,
        description="Longest prompt plus answer in tokens; default: the model's own.",
    )
    max_batch_size: int = Field(default=32, ge=1, le=1024, description="Requests computed at once.")
    cache_tokens: int = Field(
        default=16384,
        ge=64,
        description="Size of the key-value cache in tokens, over all requests.",
    )
    messages_per_s: int = Field(
        default=100,
        ge=1,
        description="Pieces of answers that a replica sends each second, over all its streams; "
        "tokens in between are joined. Each piece costs about 1 ms of CPU on its way through Ray.",
    )
    num_cpus: float = Field(
        default=1.0, ge=0, description="CPUs that Ray sets aside for each replica."
    )
    num_gpus: float = Field(
        default=0.0, ge=0, description="GPUs that Ray sets aside for each replica."
    )
    num_threads: int | None = Field(
        default=None,
        ge=1,
        description="Threads of torch on the CPU; default: all cores for one replica, num_cpus "
        "where there may be several.",
    )
    min_replicas: int = Field(default=1, ge=0, description="Replicas kept when nobody asks.")
    max_replicas: int = Field(default=1, ge=1, description="Replicas at most, under load.")
    target_ongoing_requests: int = Field(
        default=16, ge=1, description="Requests for each replica at which Ray starts another."
    )
    max_ongoing_requests: int = Field(
        default=64, ge=1, description="Requests that one replica accepts; more wait in the queue."
    )
    max_queued_requests: int = Field(
        default=256, ge=-1, description="Requests that wait at the gateway before it answers 503."
    )

    @model_validator(mode="after")
    def _fill_name(self) -> "ModelConfig":
        if not self.name:
            self.name = "llava-ray-demo" if self.path == DEMO_MODEL else _last_part(self.path)
        if self.max_replicas < self.min_replicas:
            raise ValueError(
                f"max_replicas ({self.max_replicas}) is below min_replicas ({self.min_replicas})"
            )
        return self


class LimitsConfig(Section):
    """What a request may bring; more is refused at the door."""

    max_body_bytes: int = Field(default=32 << 20, ge=1024, description="Bytes of one HTTP body.")
    max_images: int = Field(default=16, ge=0, description="Pictures in one conversation.")
    max_image_bytes: int = Field(
        default=16 << 20, ge=64, description="Bytes of one encoded picture."
    )
    max_image_pixels: int = Field(
        default=40_000_000, ge=1, description="Width times height of a picture."
    )
    max_messages: int = Field(default=256, ge=1, description="Messages in one conversation.")


class EvaluateConfig(Section):
    """An evaluation: which model answers which tasks, how, and what counts as enough."""

    model: str = Field(
        default=DEMO_MODEL, min_length=1, description="Folder or hub name of the weights."
    )
    endpoint: str | None = Field(
        default=None, description="Ask this OpenAI-compatible server in place of loading a model."
    )
    app: str | None = Field(
        default=None, description="Ask this live Serve application in place of loading a model."
    )
    model_name: str = Field(default="", description="Name of the model at the server.")
    tasks: list[str] = Field(min_length=1, description="Names of tasks (scienceqa_img, pope, ...).")
    data: str = Field(min_length=1, description="Folder of the benchmarks, or of one task.")
    output: str = Field(min_length=1, description="Folder of results; what it holds is resumed.")
    engine: EngineName = Field(default="torch", description="torch, vllm, sglang or echo.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="Precision of the weights."
    )
    template: str | None = Field(default=None, min_length=1, description="Conversation template.")
    num_actors: int = Field(default=1, ge=1, description="Engines side by side.")
    num_cpus: float = Field(default=1.0, ge=0, description="CPUs that Ray sets aside an actor.")
    num_gpus: float = Field(default=0.0, ge=0, description="GPUs that Ray sets aside an actor.")
    concurrency: int = Field(
        default=32, ge=1, le=1024, description="Questions that an actor asks at once."
    )
    limit: int | None = Field(default=None, ge=1, description="Ask only the first so many.")
    min_coverage: float = Field(
        default=0.99,
        ge=0,
        le=1,
        description="Share of questions that must be scored for a headline number.",
    )

    @model_validator(mode="after")
    def _check_source(self) -> "EvaluateConfig":
        if self.endpoint and self.app:
            raise ValueError("endpoint and app are two ways to ask: give one")
        return self

    def describe_model(self) -> ModelConfig:
        """The model that an actor loads."""
        return ModelConfig(
            path=self.model,
            engine=self.engine,
            dtype=self.dtype,
            template=self.template,
            max_batch_size=self.concurrency,
            num_cpus=self.num_cpus,
            max_replicas=self.num_actors,
        )


class ServeConfig(BaseSettings):
    """The application: `serve run llava_ray.app:build_app model=... engine=...`.

    `model` and `engine` describe one model in short; `models` describes one or several at length.
    """

    model_config = SettingsConfigDict(
        env_prefix="LLAVA_RAY_", env_nested_delimiter="__", extra="forbid"
    )

    model: str = Field(
        default=DEMO_MODEL, min_length=1, description="Folder or hub name of the weights."
    )
    engine: EngineName = Field(default="torch", description="torch, vllm, sglang or echo.")
    models: list[ModelConfig] = Field(
        default_factory=list, description="Models served side by side; replaces model and engine."
    )
    page: bool = Field(
        default=True, description="Serve the Gradio page at / together with the API."
    )
    limits: LimitsConfig = Field(
        default_factory=LimitsConfig, description="What a request may bring."
    )

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown(cls, values: Any) -> Any:
        prefix = "LLAVA_RAY_"
        variables = [name.removeprefix(prefix) for name in os.environ if name.startswith(prefix)]
        known = [name.upper() for name in cls.model_fields]
        refuse_unknown([name.split("__")[0] for name in variables], known, prefix)
        return refuse_unknown(values, cls.model_fields)

    @model_validator(mode="after")
    def _check_models(self) -> "ServeConfig":
        if not self.models:
            self.models = [ModelConfig(path=self.model, engine=self.engine)]
        names = [model.name for model in self.models]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"two models are named {twice}: give each a `name` of its own")
        return self


def refuse_unknown(values: Any, known: Iterable[str], prefix: str = "") -> Any:
    """Return `values` as they are; raise a ValueError with "did you mean" for an unknown name."""
    known = sorted(known)
    for name in values if isinstance(values, dict | list) else ():
        if name not in known:
            close = difflib.get_close_matches(str(name), known, n=1)
            hint = f"did you mean {prefix}{close[0]}?" if close else f"there are {', '.join(known)}"
            raise ValueError(f"unknown setting {prefix}{name}: {hint}")
    return values


def _last_part(path: str) -> str:
    return PurePosixPath(path.split("://")[-1].rstrip("/")).name or path
