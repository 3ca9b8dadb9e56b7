"""One served model: what is loaded, by which engine, on what, and how it scales."""

import os
from pathlib import PurePosixPath
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, StringConstraints, model_validator

from llava_ray.config.section import Section

DEMO_MODEL = "demo"
"""The name under which the embedded model is asked for and served."""

EngineName = Literal["torch", "vllm", "sglang", "echo"]
DtypeName = Literal["auto", "float32", "bfloat16", "float16"]
QuantizationName = Literal["none", "int8"]


def check_quantization(engine: EngineName, quantization: QuantizationName) -> None:
    """Raise a ValueError for an engine that has a quantization of its own."""
    if quantization != "none" and engine in ("vllm", "sglang"):
        raise ValueError(
            f"quantization={quantization} is the torch engine's; engine={engine!r} has its own: "
            "name it in engine_options.quantization"
        )


PYTHON_VARIABLES = {"vllm": "LLAVA_RAY_VLLM_PYTHON", "sglang": "LLAVA_RAY_SGLANG_PYTHON"}
"""The environment variables that name the Python of these engines' own environments."""


class ModelConfig(Section):
    """One model: what is loaded, by which engine, on what, and how it scales."""

    renamed: ClassVar = {"picture_cache_mb": "image_cache_mb"}

    path: str = Field(
        default=DEMO_MODEL,
        min_length=1,
        description="Folder or hub name of the weights; 'demo' is the embedded model.",
    )
    name: str = Field(
        default="",
        description="Name in the API and on the page; by default the last part of the path.",
    )
    adapters: dict[Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.-]+$")], str] = Field(
        default_factory=dict,
        description="LoRA adapters beside the weights: name to folder, hub name or address. "
        "A request asks for one as NAME:ADAPTER.",
    )
    engine: EngineName = Field(
        default="torch",
        description="What computes: torch (CPU and GPU), vllm, sglang, or echo (a fake).",
    )
    engine_options: dict[str, Any] = Field(
        default_factory=dict,
        description="For vllm and sglang: python (of their environment), start_timeout_s, "
        "environment (variables), and any argument of the engine's own.",
    )
    echo_delay_s: float = Field(
        default=0.0, ge=0, description="Seconds that the echo engine takes for each word."
    )
    dtype: DtypeName = Field(
        default="auto",
        description="Precision of weights, keys and values; auto: bfloat16 where the device "
        "computes in it, float32 elsewhere. A CPU that is slow in bfloat16 computes in float32, "
        "with weights of 16 bits in memory.",
    )
    quantization: QuantizationName = Field(
        default="none",
        description="int8: the torch engine computes the language model's products in 8 bits, on "
        "CPUs: a quarter of float32's memory, faster, and answers that differ a little. Where the "
        "rest is computed in bfloat16, no answer depends on the requests beside it; in float32, "
        "the order of a sum may change its last digits, as without int8.",
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
    prefix_cache: bool = Field(
        default=True,
        description="Keep what was computed of ended requests while its place is free, for prompts "
        "that begin alike: the next turn of a conversation, another question about an image.",
    )
    image_cache_mb: int = Field(
        default=256,
        ge=0,
        description="Memory of the torch engine for encoded images, in MiB: one that was asked "
        "about before is not encoded again, wherever it stands in the prompt; 0 keeps none.",
    )
    messages_per_s: int = Field(
        default=100,
        ge=1,
        description="Pieces of answers that a replica sends each second, over all its streams; "
        "and of one stream at most a third of them; tokens in between are joined. Each piece costs "
        "gateway and proxy 1 to 2 ms of CPU.",
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
        default=64,
        ge=1,
        description="Requests that one replica accepts from a gateway; more wait in its queue.",
    )
    max_queued_requests: int = Field(
        default=256, ge=-1, description="Requests that wait at the gateway before it answers 503."
    )

    @property
    def names(self) -> list[str]:
        """Under which it can be asked: its own, and one for each adapter."""
        return [self.name, *(f"{self.name}:{adapter}" for adapter in self.adapters)]

    @model_validator(mode="after")
    def _fill_name(self) -> "ModelConfig":
        if not self.name:
            self.name = "llava-ray-demo" if self.path == DEMO_MODEL else _last_part(self.path)
        check_quantization(self.engine, self.quantization)
        if self.max_replicas < self.min_replicas:
            raise ValueError(
                f"max_replicas ({self.max_replicas}) is below min_replicas ({self.min_replicas})"
            )
        return self


def _last_part(path: str) -> str:
    return PurePosixPath(path.split("://")[-1].rstrip("/")).name or path


def count_threads(config: ModelConfig) -> int:
    """All cores for one replica; only its own where several may share a machine.

    Threads that outnumber the cores wait for one another, which costs most of the speed.
    """
    if config.num_threads:
        return config.num_threads
    if config.max_replicas > 1:
        return max(1, int(config.num_cpus))
    return len(os.sched_getaffinity(0))
