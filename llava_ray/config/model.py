"""The settings of one model: its weights, the engine that runs it, its device and its replicas."""

import math
import os
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, StringConstraints, model_validator

from llava_ray.config.section import Section

DEMO_MODEL = "demo"
"""The path that stands for the embedded model."""

EngineName = Literal["torch", "vllm", "sglang", "echo"]
DtypeName = Literal["auto", "float32", "bfloat16", "float16"]
QuantizationName = Literal["none", "int8"]


def check_quantization(engine: EngineName, quantization: QuantizationName) -> None:
    """Raise a ValueError if `quantization` is set for an engine that has its own setting for it."""
    if quantization != "none" and engine in ("vllm", "sglang"):
        raise ValueError(
            f"quantization={quantization} works with engine='torch' only, not with "
            f"engine={engine!r}: set engine_options.quantization instead"
        )


NumGpus = Annotated[float, Field(ge=0)] | Literal["auto"]

_PARALLEL = {
    "vllm": ("tensor_parallel_size", "pipeline_parallel_size"),
    "sglang": ("tp_size", "tensor_parallel_size", "pp_size", "pipeline_parallel_size"),
}
"""Options of an engine that multiply the GPUs of one replica."""


def count_gpus_of_replica(
    engine: EngineName,
    *,
    device: str = "auto",
    quantization: QuantizationName = "none",
    engine_options: Mapping[str, Any] | None = None,
) -> int:
    """Return the GPUs that one replica computes on in a cluster that has some."""
    if engine == "echo" or device == "cpu" or quantization == "int8":
        return 0
    options = engine_options or {}
    return math.prod(int(options.get(name) or 1) for name in _PARALLEL.get(engine, ()))


def check_num_gpus(num_gpus: NumGpus, engine: EngineName, *, used: int) -> None:
    """Raise a ValueError if `num_gpus` differs from the GPUs that a replica computes on.

    Args:
        num_gpus: the setting.
        engine: of the replica.
        used: what `count_gpus_of_replica` returns.
    """
    if num_gpus in ("auto", 0):
        return
    if not used:
        raise ValueError(
            f"num_gpus={num_gpus:g} reserves GPUs for a replica that computes on CPUs "
            "(engine=echo, device=cpu or quantization=int8): set num_gpus=0"
        )
    if num_gpus > 1 and num_gpus != int(num_gpus):
        raise ValueError(f"num_gpus={num_gpus:g}: more than one GPU must be a whole number")
    if (num_gpus if num_gpus > 1 else 1) == used:
        return
    if engine == "torch":
        raise ValueError(
            f"num_gpus={num_gpus:g}: a replica of the torch engine computes on one GPU. Set "
            "num_gpus=1 and max_replicas, or engine=vllm with tensor_parallel_size"
        )
    raise ValueError(
        f"num_gpus={num_gpus:g}, but {engine} computes on {used} (tensor times pipeline parallel "
        "size): set both to the same number"
    )


PYTHON_VARIABLES = {"vllm": "LLAVA_RAY_VLLM_PYTHON", "sglang": "LLAVA_RAY_SGLANG_PYTHON"}
"""Engine -> environment variable with the Python interpreter of that engine's own environment."""


class ModelConfig(Section):
    """One model: its weights, the engine that runs it, its device and its replicas."""

    renamed: ClassVar = {"picture_cache_mb": "image_cache_mb"}

    path: str = Field(
        default=DEMO_MODEL,
        min_length=1,
        description="Folder, hub name or address (s3://...) of the weights. 'demo' is the embedded "
        "model.",
    )
    name: str = Field(
        default="",
        description="Name of the model in the API and on the page. Default: the name of its "
        "folder; of a training run's export, the name of the run.",
    )
    adapters: dict[Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.-]+$")], str] = Field(
        default_factory=dict,
        description="LoRA adapters that are served with the model: adapter name to folder, hub "
        "name or address. A request selects one with the model name NAME:ADAPTER.",
    )
    engine: EngineName = Field(
        default="torch",
        description="Inference engine: torch (CPU and GPU), vllm, sglang, or echo, a fake that "
        "repeats the question.",
    )
    engine_options: dict[str, Any] = Field(
        default_factory=dict,
        description="Options of the vllm and sglang engines: python (the interpreter of their own "
        "environment), start_timeout_s, environment (variables to set), and any "
        "argument of the engine itself.",
    )
    echo_delay_s: float = Field(
        default=0.0, ge=0, description="Seconds that the echo engine waits before each word."
    )
    dtype: DtypeName = Field(
        default="auto",
        description="Precision of the weights and of the key-value cache. auto: bfloat16 where the "
        "device computes in it at full speed, otherwise float16 on GPUs and float32 on CPUs. A CPU "
        "without fast bfloat16 computes in float32 and keeps 16-bit weights in memory.",
    )
    quantization: QuantizationName = Field(
        default="none",
        description="int8: the torch engine multiplies the language model's matrices in 8 bits on "
        "CPUs. This needs a quarter of float32's memory and is faster, but the answers differ "
        "slightly. In bfloat16 an answer never depends on the requests beside it; in float32 the "
        "order of a sum may change its last digits, as it does without int8. none: no "
        "quantization.",
    )
    device: str = Field(
        default="auto",
        description="Device of the torch engine: auto, cpu, cuda or cuda:N. auto is the GPU that "
        "Ray gave to the replica, otherwise the CPU; outside Ray, a GPU if torch sees one.",
    )
    template: str | None = Field(
        default=None,
        min_length=1,
        description="Name of the conversation template (vicuna_v1, llava_v0, mistral_instruct, "
        "...), or own for the checkpoint's own chat template. Default: what the "
        "checkpoint's files indicate.",
    )
    context_length: int | None = Field(
        default=None,
        ge=16,
        description="Maximum length of prompt plus answer, in tokens. Default: the model's own "
        "context length.",
    )
    max_batch_size: Annotated[int, Field(ge=1, le=1024)] | Literal["auto"] = Field(
        default="auto",
        description="Maximum number of sequences in a batch of the engine. auto: on a GPU one for "
        "each 256 tokens of the cache, at most 256; 32 on a CPU; with vllm and sglang their own "
        "default.",
    )
    cache_tokens: Annotated[int, Field(ge=64)] | Literal["auto"] = Field(
        default="auto",
        description="Size of the key-value cache in tokens, shared by all running requests. auto: "
        "on a GPU what fits in 90 % of its memory, beside the weights and a step of the largest "
        "size, which is run to measure it; 16384 on a CPU; with vllm and sglang their own default.",
    )
    prefix_cache: bool = Field(
        default=True,
        description="Keep the key-value cache of finished requests until its space is needed, so "
        "that a prompt with the same beginning is not computed again: the next turn of "
        "a conversation, or another question about the same image.",
    )
    image_cache_mb: int = Field(
        default=256,
        ge=0,
        description="Size in MiB of the torch engine's cache of encoded images. A cached image is "
        "not encoded again, wherever it stands in the prompt. 0 turns the cache off.",
    )
    messages_per_s: int = Field(
        default=100,
        ge=1,
        description="Maximum number of stream chunks that a replica sends per second over all its "
        "streams; a single stream gets at most a third of them. Tokens that arrive in "
        "between are joined into one chunk. Each chunk costs gateway and proxy 1 to 2 "
        "ms of CPU time.",
    )
    num_cpus: float = Field(
        default=1.0, ge=0, description="CPUs that Ray reserves for each replica."
    )
    num_gpus: NumGpus = Field(
        default="auto",
        description="GPUs that Ray reserves for each replica; it computes on these and no others. "
        "auto: 1 (with vllm and sglang, tensor times pipeline parallel size) if the cluster has "
        "GPUs or its autoscaler can start machines with GPUs, otherwise 0. Below 1, replicas share "
        "a GPU and its memory.",
    )
    num_threads: int | None = Field(
        default=None,
        ge=1,
        description="Threads of the torch engine on a CPU. Default: all cores if max_replicas is "
        "1, otherwise num_cpus.",
    )
    min_replicas: int = Field(
        default=1,
        ge=0,
        description="Replicas that are kept when there are no requests. 0 lets the model scale to "
        "zero.",
    )
    max_replicas: int = Field(default=1, ge=1, description="Maximum number of replicas under load.")
    target_ongoing_requests: int = Field(
        default=16,
        ge=1,
        description="Average number of running requests per replica above which Ray Serve starts "
        "another replica.",
    )
    max_ongoing_requests: int = Field(
        default=64,
        ge=1,
        description="Maximum number of requests that a gateway sends to one replica at the same "
        "time. Further requests wait at the gateway.",
    )
    max_queued_requests: int = Field(
        default=256,
        ge=-1,
        description="Maximum number of requests that wait for the model at a gateway. Further "
        "requests are answered with status 503. -1: no maximum.",
    )

    @property
    def names(self) -> list[str]:
        """The names that a request may use: the model's own, and one for each adapter."""
        return [self.name, *(f"{self.name}:{adapter}" for adapter in self.adapters)]

    @property
    def gpus_if_any(self) -> int:
        """What `num_gpus: auto` stands for in a cluster that has GPUs."""
        return count_gpus_of_replica(
            self.engine,
            device=self.device,
            quantization=self.quantization,
            engine_options=self.engine_options,
        )

    @property
    def gpu_share(self) -> float:
        """Part of a GPU that belongs to one replica."""
        is_part = self.num_gpus != "auto" and 0 < self.num_gpus < 1
        return float(self.num_gpus) if is_part else 1.0

    @model_validator(mode="after")
    def _fill_name(self) -> "ModelConfig":
        if not self.name:
            self.name = "llava-ray-demo" if self.path == DEMO_MODEL else _last_part(self.path)
        check_quantization(self.engine, self.quantization)
        check_num_gpus(self.num_gpus, self.engine, used=self.gpus_if_any)
        if self.max_replicas < self.min_replicas:
            raise ValueError(
                f"max_replicas ({self.max_replicas}) is below min_replicas ({self.min_replicas})"
            )
        return self


def _last_part(path: str) -> str:
    """Return the name of a folder; the export of a training run has the name of the run."""
    folder = PurePosixPath(path.split("://")[-1].rstrip("/"))
    if folder.name == "export" and folder.parent.name:
        folder = folder.parent
    return folder.name or path


def count_threads(config: ModelConfig) -> int:
    """Return the number of threads for the torch engine on a CPU.

    A single replica uses all cores. Where several replicas may share a machine, each uses only
    its own CPUs: threads that outnumber the cores wait for one another and lose most of the speed.
    """
    if config.num_threads:
        return config.num_threads
    if config.max_replicas > 1:
        return max(1, int(config.num_cpus))
    return len(os.sched_getaffinity(0))
