"""A checkpoint, opened once: what it is, its tensors, processor, architecture and template.

path -> checkpoint (what the files say it is) -> stored tensors (headers only) -> processor
-> architecture (what to build) -> template

The one place with that sequence. Loading, `doctor`, export, the encoder of training and the checks
before a run all take an `OpenedCheckpoint`, and each reads of it what it needs. No weights are read
here.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from llava_ray.model.architecture import Architecture, describe_model, read_hf_config
from llava_ray.model.checkpoint.inspect import Checkpoint, inspect_checkpoint
from llava_ray.model.checkpoint.llava_format import read_pinpoints
from llava_ray.model.checkpoint.quantized import check_quantization
from llava_ray.model.checkpoint.weights import StoredTensor, open_weights
from llava_ray.model.choose_template import check_template_name, choose_template
from llava_ray.model.processor import load_processor
from llava_ray.template import Template


@dataclass(frozen=True, eq=False)
class OpenedCheckpoint:
    """A checkpoint and what is read of its files; made by `open_checkpoint`.

    Everything but `checkpoint` is read the first time that it is used, and kept. Each may raise a
    `ConfigError` then, which names the file and says what to do about it.

    Attributes:
        checkpoint: what the files say that it is.
        template_name: the conversation template that the caller asked for; None: the checkpoint's.
    """

    checkpoint: Checkpoint
    template_name: str | None = None

    @cached_property
    def stored(self) -> dict[str, StoredTensor]:
        """The tensors by their names in memory; each is read from its file when it is indexed.

        They are plain numbers: quantized weights are refused.
        """
        stored = open_weights(self.checkpoint.weights)
        check_quantization(self.checkpoint, stored)
        return stored

    @cached_property
    def processor(self) -> Any:
        """transformers' processor: the tokenizer and the preprocessing of images."""
        if self.checkpoint.format == "hf":
            return load_processor(self.checkpoint, config=self.config)
        pinpoints = None
        if self.checkpoint.aspect_mode == "anyres":
            pinpoints = read_pinpoints(self.checkpoint.folder, self.checkpoint.config)
        return load_processor(self.checkpoint, pinpoints=pinpoints)

    @cached_property
    def config(self) -> Any:
        """transformers' configuration of the model."""
        if self.checkpoint.format == "hf":
            return read_hf_config(self.checkpoint)
        return self.architecture.config

    @cached_property
    def architecture(self) -> Architecture:
        """The configuration and class of the model, and the shapes of its tensors."""
        return self.describe_model(self.processor.image_token_id)

    def describe_model(self, image_token_id: int) -> Architecture:
        """Return the architecture with an image token of that id, without reading the processor."""
        is_hf = self.checkpoint.format == "hf"
        return describe_model(
            self.checkpoint,
            self.stored,
            image_token_id,
            config=self.config if is_hf else None,
        )

    @cached_property
    def template(self) -> Template:
        """The conversation template."""
        return choose_template(self.checkpoint, self.processor, self.template_name)

    @property
    def context_length(self) -> int:
        """The longest prompt and answer together, in tokens."""
        return read_context_length(self.config.text_config)


def open_checkpoint(
    path: str | Path,
    *,
    base: str | Path | None = None,
    vision_tower: str | Path | None = None,
    template: str | None = None,
) -> OpenedCheckpoint:
    """Return the checkpoint at `path`; only its configuration files are read at this point.

    Args:
        path: a folder, a hub name, an address that fsspec knows, or "demo" for the embedded model.
        base: the model that a projector, an adapter or a delta belongs to.
        vision_tower: folder or hub name of the vision tower, for checkpoints in LLaVA's own format.
        template: name of a conversation template, or "own" for the one that the checkpoint brings;
            default: the one that the files point to.

    Raises:
        ConfigError: there is no checkpoint, a file that it needs is missing, or the template is not
            known.
        MissingPackageError: the address needs a package that is not installed.
    """
    check_template_name(template)  # before a checkpoint is downloaded
    checkpoint = inspect_checkpoint(path, base=base, vision_tower=vision_tower)
    return OpenedCheckpoint(checkpoint, template)


def read_context_length(text_config: Any) -> int:
    """Return how many tokens a language model was made for."""
    length = getattr(text_config, "max_position_embeddings", None)
    return length or text_config.max_seq_len  # MPT's name
