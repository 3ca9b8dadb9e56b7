"""Samples -> what a model of one checkpoint is trained on: ids, labels and pixels.

The same template, tokenizer and image preprocessing as in `model.core`, without the weights, so
that it runs in any CPU process. `stream` encodes with it, and `convert` counts tokens.

Shapes: T tokens, N images, C H W pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llava_ray.config import LimitsConfig
from llava_ray.data.shards import ShardRow
from llava_ray.errors import SampleError
from llava_ray.images import decode
from llava_ray.model.anyres import count_image_tokens
from llava_ray.model.open_checkpoint import OpenedCheckpoint, open_checkpoint
from llava_ray.model.processor import encode_images
from llava_ray.template import IGNORED, IMAGE_PLACEHOLDER, Template
from llava_ray.template.tokens import EncodedConversation
from llava_ray.types import Sample

Size = tuple[int, int]
"""Width and height of an image, upright."""


@dataclass(frozen=True)
class EncodedSample:
    """A sample as a model is trained on it.

    Attributes:
        sample_id: names it.
        input_ids: T ids, an image's `image_token_id` as often as it has tokens.
        labels: T ids, or `IGNORED` where nothing is learned.
        images: the model's other inputs: `pixel_values` [N, C, H, W], or [N, tiles, C, H, W] with
            `image_sizes` [N, 2]; empty without images.
    """

    sample_id: str
    input_ids: np.ndarray
    labels: np.ndarray
    images: dict[str, np.ndarray]


@dataclass(frozen=True)
class Encoder:
    """Encodes samples for one checkpoint; see `load_encoder`.

    Attributes:
        processor: transformers' processor.
        template: writes the conversations.
        config: transformers' configuration of the model.
        counts_as_llava: images have as many tokens as in LLaVA's own code.
        max_length: the longest sample, in tokens.
        truncates: a longer one is cut; otherwise it is an error.
    """

    processor: Any
    template: Template
    config: Any
    counts_as_llava: bool
    max_length: int
    truncates: bool

    @property
    def image_token_id(self) -> int:
        """The id that stands for a piece of an image."""
        return self.config.image_token_id

    @property
    def pad_token_id(self) -> int:
        """The id behind the end of the shorter samples of a batch."""
        tokenizer = self.processor.tokenizer
        found = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        return next(id_ for id_ in found if id_ is not None)

    def encode(self, row: ShardRow, limits: LimitsConfig) -> EncodedSample:
        """Return a sample of a shard encoded.

        Raises:
            SampleError: it is too long, or its template does not take it.
            ImageError: an image cannot be decoded.
        """
        read = self.tokenize(row.sample)
        counts = self.count_image_tokens(row.image_sizes)
        num_tokens = _measure(read, counts)
        if num_tokens > self.max_length:
            if not self.truncates:
                raise SampleError(
                    f"sample {row.sample.sample_id!r} has {num_tokens} tokens, more than "
                    f"max_length {self.max_length}: raise it, or truncate",
                    reason="too_long",
                )
            read = _truncate(read, counts, self.max_length, row.sample.sample_id)
        ids, labels, num_images = self._expand(read, counts)
        images = [
            decode(data, limits=limits)
            for data in row.sample.images[:num_images]
            if isinstance(data, bytes)
        ]
        encoded = encode_images(self.processor, images) if images else {}
        arrays = {name: np.asarray(values) for name, values in encoded.items()}
        return EncodedSample(row.sample.sample_id, ids, labels, arrays)

    def tokenize(self, sample: Sample) -> EncodedConversation:
        """Return ids and labels with one `IMAGE_PLACEHOLDER` an image.

        Raises:
            SampleError: it cannot be encoded.
        """
        return self.template.encode(
            sample.messages,
            self.processor.tokenizer,
            sample_id=sample.sample_id,
            num_images=len(sample.images),
        )

    def count_tokens(self, sample: Sample, image_sizes: Sequence[Size]) -> int:
        """Return how many tokens a sample has, those of its images included.

        Raises:
            SampleError: it cannot be encoded.
        """
        return _measure(self.tokenize(sample), self.count_image_tokens(image_sizes))

    def count_image_tokens(self, image_sizes: Sequence[Size]) -> list[int]:
        """Return how many tokens each image is to the model."""
        sizes = [(height, width) for width, height in image_sizes]
        if self.counts_as_llava:
            return [count_image_tokens(self.config, size) for size in sizes]
        if not sizes:
            return []
        return self.processor._get_num_multimodal_tokens(image_sizes=sizes).num_image_tokens

    def _expand(
        self, read: EncodedConversation, counts: Sequence[int]
    ) -> tuple[np.ndarray, np.ndarray, int]:
        """Return ids and labels with every image at its length, and how many images there are.

        A sample keeps at most as many images as have a place.
        """
        ids, labels = np.asarray(read.input_ids), np.asarray(read.labels)
        is_image = ids == IMAGE_PLACEHOLDER
        num_images = int(is_image.sum())
        repeats = np.ones(len(ids), dtype=np.int64)
        repeats[is_image] = counts[:num_images]
        ids = np.where(is_image, self.image_token_id, ids)
        return np.repeat(ids, repeats), np.repeat(labels, repeats), num_images


def load_encoder(
    path: str,
    *,
    base: str | None = None,
    vision_tower: str | None = None,
    template: str | None = None,
    max_length: int | None = None,
    truncates: bool = False,
) -> Encoder:
    """Return the encoder for a checkpoint; of its weights only the headers are read.

    Args:
        path: see `model.load_model`, as base, vision_tower and template.
        base: the model below a projector or an adapter.
        vision_tower: the tower, of the original layout.
        template: name of a conversation template.
        max_length: the longest sample in tokens; default: the model's context.
        truncates: cut longer samples at the end, before an image that does not fit.

    Raises:
        ConfigError: it is no checkpoint, or does not hold together.
    """
    opened = open_checkpoint(path, base=base, vision_tower=vision_tower, template=template)
    return make_encoder(opened, max_length=max_length, truncates=truncates)


def make_encoder(
    opened: OpenedCheckpoint, *, max_length: int | None = None, truncates: bool = False
) -> Encoder:
    """Return the encoder for a checkpoint that is opened already; see `load_encoder`."""
    return Encoder(
        processor=opened.processor,
        template=opened.template,
        config=opened.architecture.config,
        counts_as_llava=opened.checkpoint.format == "llava",
        max_length=max_length or opened.context_length,
        truncates=truncates,
    )


def _measure(read: EncodedConversation, counts: Sequence[int]) -> int:
    return len(read.input_ids) - len(counts) + sum(counts)


def _truncate(
    read: EncodedConversation, counts: Sequence[int], limit: int, sample_id: str
) -> EncodedConversation:
    """Return the beginning of a sample that fits, cut before an image rather than inside it."""
    left = iter(counts)
    length = kept = 0
    for id_ in read.input_ids:
        length += next(left) if id_ == IMAGE_PLACEHOLDER else 1
        if length > limit:
            break
        kept += 1
    cut = EncodedConversation(read.input_ids[:kept], read.labels[:kept])
    if all(label == IGNORED for label in cut.labels):
        raise SampleError(
            f"sample {sample_id!r}: nothing that is learned is left of it within {limit} tokens: "
            "raise max_length, or leave it out",
            reason="too_long",
        )
    return cut
