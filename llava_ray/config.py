"""Typed configuration: every field has a bound, a sentence and an environment variable.

Precedence, highest first: the arguments of the Serve config file or command line, environment
variables `LLAVA_RAY_<FIELD>`, the defaults below. Unknown names are refused.
"""

import difflib
import hashlib
import os
import re
from collections.abc import Iterable
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

DEMO_MODEL = "demo"
"""The name under which the embedded model is asked for and served."""

CLIENT_KEY_VARIABLE = "LLAVA_RAY_API_KEY"
"""The environment variable with the key that `llava_ray.client` sends."""

MIN_KEY_LENGTH = 20

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
    prefix_cache: bool = Field(
        default=True,
        description="Keep what was computed of ended requests while its place is free, for prompts "
        "that begin alike: the next turn of a conversation, another question about a picture.",
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


class FetchConfig(Section):
    """Pictures from the web: none are fetched until `hosts` names some."""

    hosts: list[str] = Field(
        default_factory=list,
        description="Hosts from which pictures are fetched: example.org, *.example.org for those "
        "below it, * for every public one; by default none.",
    )
    ports: list[Annotated[int, Field(ge=1, le=65535)]] = Field(
        default=[80, 443], description="Ports that such an address may name."
    )
    networks: list[IPv4Network | IPv6Network] = Field(
        default_factory=list,
        description="Address ranges, like 10.1.0.0/16, that are not public and from which "
        "pictures may come all the same.",
    )
    timeout_s: float = Field(
        default=10, gt=0, le=300, description="Seconds for a picture, redirects included."
    )
    max_redirects: int = Field(default=3, ge=0, le=10, description="Redirects on the way to it.")
    max_at_once: int = Field(
        default=64, ge=1, description="Pictures fetched at once; more wait, within their time."
    )
    max_per_host: int = Field(default=8, ge=1, description="Of these, from one host.")


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
    max_answers: int = Field(
        default=16, ge=1, le=128, description="Answers to one request: n, times its prompts."
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
        default_factory=FetchConfig, description="Pictures that are fetched from the web."
    )


class ConvertConfig(Section):
    """A conversion: which raw data becomes which shards, and what is refused."""

    source: str = Field(description="Kind of raw data: llava, scienceqa, coco, hf, ...")
    input: str = Field(min_length=1, description="Folder, file or address of the raw data.")
    output: str = Field(min_length=1, description="Folder or address of the shards.")
    pictures: str | None = Field(
        default=None, description="Folder of the pictures; by default where the source has it."
    )
    split: str = Field(default="", description="Which part of the data; by default the source's.")
    prompt_format: str = Field(
        default="",
        description="Form of the conversations, of sources that have several: ScienceQA's QCM-LEA, "
        "QCM-LEPA, CQM-A, ...; COCO's pretrain and instruct.",
    )
    model: str | None = Field(
        default=None, description="Checkpoint for which tokens are counted; default: none are."
    )
    template: str | None = Field(
        default=None, description="Conversation template, in place of the checkpoint's own."
    )
    max_tokens: int | None = Field(
        default=None, ge=16, description="Longer samples are rejected; needs a model to count with."
    )
    max_chars: int = Field(
        default=200_000, ge=1, description="Samples with more text than this are rejected."
    )
    max_rejects: str = Field(
        default="1%",
        pattern=r"^\d+(\.\d+)?%?$",
        description="Rejected rows, a number or a share, at which the conversion fails.",
    )
    duplicate_ids: Literal["reject", "rename"] = Field(
        default="reject",
        description="What becomes of another sample with an id that was there before; rename adds "
        "a digest of its content. The same sample again is always rejected.",
    )
    rows_per_shard: int = Field(default=1000, ge=1, le=100_000, description="Rows of one shard.")
    num_workers: int | None = Field(
        default=None, ge=1, description="Processes that read and check pictures; default: the CPUs."
    )
    overwrite: bool = Field(default=False, description="Replace what the output holds.")
    limits: LimitsConfig = Field(
        default_factory=LimitsConfig, description="Bytes, pixels and number of pictures allowed."
    )

    @model_validator(mode="after")
    def _check_counting(self) -> "ConvertConfig":
        if self.model is None and (self.max_tokens or self.template):
            raise ValueError("max_tokens and template need a model that tokens are counted for")
        return self


class DatasetConfig(Section):
    """One set of shards in a mixture."""

    path: str = Field(min_length=1, description="Folder or address that `convert` wrote.")
    weight: float = Field(
        default=1.0,
        gt=0,
        le=100,
        description="How often an epoch has each sample; of 0.25 another quarter each epoch.",
    )
    max_samples: int | None = Field(
        default=None, ge=1, description="Only so many, the same in every epoch."
    )
    seed: int = Field(default=0, ge=0, description="Which ones weight and max_samples draw.")


class DataConfig(Section):
    """What a training run reads, in which order, and who prepares it."""

    datasets: list[DatasetConfig] = Field(min_length=1, description="Sets of shards, mixed.")
    batch_size: int = Field(default=128, ge=1, description="Samples of a step, over all workers.")
    seed: int = Field(default=0, ge=0, description="The same seed, the same order.")
    grouping: Literal["none", "modality", "length"] = Field(
        default="modality",
        description="What a batch has in common: nothing; all pictures or all text, as LLaVA's "
        "group_by_modality_length; or the length, tokens of pictures included.",
    )
    max_length: int | None = Field(
        default=None, ge=16, description="Longest sample in tokens; default: the model's context."
    )
    over_long: Literal["drop", "truncate"] = Field(
        default="drop",
        description="Longer samples are left out and recorded, or cut at the end, never inside a "
        "picture.",
    )
    num_readers: int = Field(
        default=2,
        ge=0,
        le=256,
        description="Processes that prepare batches, for each training worker; 0: itself.",
    )
    reader_cpus: float = Field(default=1.0, ge=0, description="CPUs that Ray keeps for each.")
    num_ahead: int = Field(
        default=4, ge=1, le=256, description="Batches that wait prepared, for each worker."
    )
    limits: LimitsConfig = Field(
        default_factory=LimitsConfig, description="Bytes and pixels of a picture allowed."
    )


def hash_key(key: str) -> str:
    """Return what is kept of an API key. It is 256 random bits, so no slow hash is needed."""
    return hashlib.sha256(key.encode()).hexdigest()


class KeyConfig(Section):
    """An API key and what it may use, counted by each gateway for itself.

    Read from a text, `name=key` or the key alone, it is hashed at once.
    """

    name: str = Field(
        pattern=r"^[A-Za-z0-9_.-]{1,64}$", description="Whose it is: in the log, usage, metrics."
    )
    sha256: str = Field(pattern="^[0-9a-f]{64}$", description="What `llava-ray keys new` printed.")
    is_admin: bool = Field(default=False, description="Sees the usage of all keys.")
    requests_per_min: int | None = Field(default=None, ge=1, description="Requests in a minute.")
    tokens_per_min: int | None = Field(
        default=None, ge=1, description="Tokens of prompts and answers in a minute."
    )
    tokens_per_day: int | None = Field(
        default=None, ge=1, description="Tokens of prompts and answers in a day."
    )
    max_in_flight: int | None = Field(default=None, ge=1, description="Requests at once.")

    @model_validator(mode="before")
    @classmethod
    def _hash_plain(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        name, _, key = value.strip().rpartition("=")
        if len(key) < MIN_KEY_LENGTH:
            raise ValueError(
                f"an API key has {len(key)} characters: take at least {MIN_KEY_LENGTH} random "
                "ones, as `llava-ray keys new NAME` makes them"
            )
        sha256 = hash_key(key)
        return {"name": name or f"key-{sha256[:6]}", "sha256": sha256}


class ServeConfig(BaseSettings):
    """The application: `serve run llava_ray.app:build_app model=... engine=...`.

    `model` and `engine` describe one model in short; `models` describes one or several at length.
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
    models: list[ModelConfig] = Field(
        default_factory=list, description="Models served side by side; replaces model and engine."
    )
    page: bool = Field(
        default=True, description="Serve the Gradio page at / together with the API."
    )
    limits: LimitsConfig = Field(
        default_factory=LimitsConfig, description="What a request may bring."
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
            if name.startswith(prefix) and name != CLIENT_KEY_VARIABLE
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
            self.api_keys += _read_keys(Path(self.api_keys_file))
            self.api_keys_file = None
        names = [key.name for key in self.api_keys]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"two API keys are named {twice}: give each a name of its own")
        return self

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


def _read_keys(path: Path) -> list[KeyConfig]:
    try:
        entries = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"cannot read api_keys_file {str(path)!r}: {error}") from error
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(
            f"{str(path)!r} is not a list of keys: write lines like - {{name: me, sha256: ...}}, "
            "as `llava-ray keys new me` prints them"
        )
    return [KeyConfig.model_validate(entry) for entry in entries]


def _last_part(path: str) -> str:
    return PurePosixPath(path.split("://")[-1].rstrip("/")).name or path
