"""Raw data into shards, and shards into training."""

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from llava_ray.config.limits import LimitsConfig
from llava_ray.config.section import Section


class ConvertConfig(Section):
    """A conversion: which raw data becomes which shards, and what is refused."""

    renamed: ClassVar = {"pictures": "images"}

    source: str = Field(description="Kind of raw data: llava, scienceqa, coco, hf, ...")
    input: str = Field(min_length=1, description="Folder, file or address of the raw data.")
    output: str = Field(min_length=1, description="Folder or address of the shards.")
    images: str | None = Field(
        default=None, description="Folder of the images; by default where the source has it."
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
        default=None, ge=1, description="Processes that read and check images; default: the CPUs."
    )
    overwrite: bool = Field(default=False, description="Replace what the output holds.")
    limits: LimitsConfig = Field(
        default_factory=LimitsConfig, description="Bytes, pixels and number of images allowed."
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
        description="What a batch has in common: nothing; all images or all text, as LLaVA's "
        "group_by_modality_length; or the length, tokens of images included.",
    )
    max_length: int | None = Field(
        default=None, ge=16, description="Longest sample in tokens; default: the model's context."
    )
    over_long: Literal["drop", "truncate"] = Field(
        default="drop",
        description="Longer samples are left out and recorded, or cut at the end, never inside an "
        "image.",
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
        default_factory=LimitsConfig, description="Bytes and pixels of an image allowed."
    )
