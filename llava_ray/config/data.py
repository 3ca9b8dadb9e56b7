"""The settings of `llava-ray convert` (raw data to shards) and of the shards a run trains on."""

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from llava_ray.config.limits import LimitsConfig
from llava_ray.config.section import Section


class ConvertConfig(Section):
    """A conversion of raw data to shards: input, output, and which samples are rejected."""

    renamed: ClassVar = {"pictures": "images"}

    source: str = Field(description="Kind of raw data: llava, scienceqa, coco, hf, ...")
    input: str = Field(
        min_length=1, description="Folder, file or address (s3://...) of the raw data."
    )
    output: str = Field(
        min_length=1, description="Folder or address to which the shards are written."
    )
    images: str | None = Field(
        default=None, description="Folder of the images. Default: where the source keeps them."
    )
    split: str = Field(
        default="",
        description="Split of the data to convert, such as train. Default: the one that the source "
        "uses for training.",
    )
    prompt_format: str = Field(
        default="",
        description="Form of the conversations, for sources that offer several: QCM-LEA, QCM-LEPA, "
        "CQM-A, ... of ScienceQA; pretrain or instruct of COCO.",
    )
    model: str | None = Field(
        default=None,
        description="Checkpoint whose tokenizer counts the tokens of each sample. Default: tokens "
        "are not counted.",
    )
    template: str | None = Field(
        default=None,
        description="Conversation template for counting tokens. Default: the checkpoint's own.",
    )
    max_tokens: int | None = Field(
        default=None,
        ge=16,
        description="Reject samples with more tokens than this. Needs model. Default: no limit.",
    )
    max_chars: int = Field(
        default=200_000, ge=1, description="Reject samples with more characters of text than this."
    )
    max_rejects: str = Field(
        default="1%",
        pattern=r"^\d+(\.\d+)?%?$",
        description="The conversion fails when more rows than this are rejected: a number, or a "
        "share such as 1%.",
    )
    duplicate_ids: Literal["reject", "rename"] = Field(
        default="reject",
        description="What happens to a different sample with an id that was seen before: it is "
        "rejected, or renamed by adding a digest of its content. An identical sample "
        "is always rejected.",
    )
    rows_per_shard: int = Field(default=1000, ge=1, le=100_000, description="Rows in each shard.")
    num_workers: int | None = Field(
        default=None,
        ge=1,
        description="Processes that read and check images in parallel. Default: one for each CPU.",
    )
    overwrite: bool = Field(default=False, description="Replace the contents of the output folder.")
    limits: LimitsConfig = Field(
        default_factory=LimitsConfig,
        description="Maximum size, pixels and number of images of a sample. Samples that exceed "
        "them are rejected.",
    )

    @model_validator(mode="after")
    def _check_counting(self) -> "ConvertConfig":
        if self.model is None and (self.max_tokens or self.template):
            raise ValueError(
                "max_tokens and template need a tokenizer to count with: set model as well"
            )
        return self


class DatasetConfig(Section):
    """One set of shards in a mixture, and how much of it each epoch uses."""

    path: str = Field(
        min_length=1, description="Folder or address of shards that llava-ray convert wrote."
    )
    weight: float = Field(
        default=1.0,
        gt=0,
        le=100,
        description="How many times each sample appears in an epoch. With 0.25, every epoch draws "
        "a different quarter of the samples.",
    )
    max_samples: int | None = Field(
        default=None,
        ge=1,
        description="Use only this many samples, the same ones in every epoch. Default: all.",
    )
    seed: int = Field(
        default=0, ge=0, description="Random seed for the samples that weight and max_samples draw."
    )


class DataConfig(Section):
    """The data of a training run: its shards, their order, and the processes that read them."""

    datasets: list[DatasetConfig] = Field(
        min_length=1, description="Sets of shards that are mixed."
    )
    batch_size: int = Field(
        default=128, ge=1, description="Samples in a training step, over all workers."
    )
    seed: int = Field(default=0, ge=0, description="Random seed of the order of samples.")
    grouping: Literal["none", "modality", "length"] = Field(
        default="modality",
        description="What the samples of a batch have in common. none: nothing. modality: all have "
        "images or none has, as with LLaVA's group_by_modality_length. length: a "
        "similar number of tokens, image tokens included.",
    )
    max_length: int | None = Field(
        default=None,
        ge=16,
        description="Maximum length of a sample in tokens. Default: the model's context length.",
    )
    over_long: Literal["drop", "truncate"] = Field(
        default="drop",
        description="What happens to samples longer than max_length. drop: they are left out and "
        "recorded. truncate: they are cut at the end, but never inside an image.",
    )
    num_readers: int = Field(
        default=2,
        ge=0,
        le=256,
        description="Processes that prepare batches for each training worker. 0: the worker "
        "prepares them itself.",
    )
    reader_cpus: float = Field(
        default=1.0, ge=0, description="CPUs that Ray reserves for each reader process."
    )
    num_ahead: int = Field(
        default=4,
        ge=1,
        le=256,
        description="Batches that are prepared in advance for each training worker.",
    )
    limits: LimitsConfig = Field(
        default_factory=LimitsConfig, description="Maximum size and pixels of an image."
    )
