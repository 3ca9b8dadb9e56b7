"""Samples -> what a model is trained on: token ids, labels and pixels.

Uses the same template, tokenizer and image preprocessing as `model.loading`, but no weights, so it
runs in any CPU process. `stream` encodes with it, and `convert` counts tokens.

Shapes: T tokens, N images, C H W pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from llava_ray.config import LimitsConfig
from llava_ray.data.shards import ShardRow
from llava_ray.errors import SampleError
from llava_ray.images import decode
from llava_ray.model.anyres import count_image_tokens
from llava_ray.model.open_checkpoint import OpenedCheckpoint, open_checkpoint
from llava_ray.model.processor import encode_images, tiles_only_one
from llava_ray.model.processor_check import check_processor
from llava_ray.template import IGNORED, IMAGE_PLACEHOLDER, Template
from llava_ray.template.tokens import EncodedConversation
from llava_ray.types import Sample

Size = tuple[int, int]
"""Width and height of an image in pixels, after EXIF rotation."""


@dataclass(frozen=True)
class EncodedSample:
    """A sample encoded for a model.

    Attributes:
        sample_id: of the sample.
        input_ids: [T]; `image_token_id` is repeated for every token of an image.
        labels: [T]; `IGNORED` where nothing is learned.
        images: the model's other inputs: `pixel_values` [N, C, H, W], or with anyres
            [N, tiles, C, H, W] and `image_sizes` [N, 2]; empty without images.
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
        template: renders the conversations.
        config: transformers' configuration of the model.
        counts_as_llava: number image tokens as LLaVA's own code does.
        max_length: maximum length of a sample in tokens.
        truncates: longer samples are truncated; otherwise they are an error.
    """

    processor: Any
    template: Template
    config: Any
    counts_as_llava: bool
    max_length: int
    truncates: bool

    @property
    def image_token_id(self) -> int:
        """The token id that stands for one feature of an image."""
        return self.config.image_token_id

    @property
    def pad_token_id(self) -> int:
        """The token id that fills up the shorter samples of a batch."""
        tokenizer = self.processor.tokenizer
        found = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        return next(id_ for id_ in found if id_ is not None)

    def encode(self, row: ShardRow, limits: LimitsConfig) -> EncodedSample:
        """Return a sample of a shard, encoded.

        Raises:
            SampleError: it is too long, or the template does not accept it.
            ImageError: an image cannot be decoded.
        """
        ids, labels, images = self._read(row, limits)
        encoded = encode_images(self.processor, images) if images else {}
        arrays = {name: np.asarray(values) for name, values in encoded.items()}
        return EncodedSample(row.sample.sample_id, ids, labels, arrays)

    def measure(self, row: ShardRow, limits: LimitsConfig) -> int:
        """Return how many tokens a sample has as `encode` returns it, and raise what that raises.

        Images are decoded, but not preprocessed.
        """
        return len(self._read(row, limits)[0])

    def tokenize(self, sample: Sample) -> EncodedConversation:
        """Return ids and labels with one `IMAGE_PLACEHOLDER` per image.

        Raises:
            SampleError: the template does not accept it.
        """
        return self.template.encode(
            sample.messages,
            self.processor.tokenizer,
            sample_id=sample.sample_id,
            num_images=len(sample.images),
        )

    def count_tokens(self, sample: Sample, image_sizes: Sequence[Size]) -> int:
        """Return the number of tokens in a sample, image tokens included.

        Raises:
            SampleError: the template does not accept it.
        """
        return _measure(self.tokenize(sample), self.count_image_tokens(image_sizes))

    def count_image_tokens(self, image_sizes: Sequence[Size]) -> list[int]:
        """Return the number of tokens of each image of a sample."""
        sizes = [(height, width) for width, height in image_sizes]
        if self.counts_as_llava:
            return [count_image_tokens(self.config, size) for size in sizes]
        if not sizes:
            return []
        if len(sizes) > 1 and tiles_only_one(self.processor):
            return [self.processor.num_image_tokens + 1] * len(sizes)  # a tile and a newline
        return self.processor._get_num_multimodal_tokens(image_sizes=sizes).num_image_tokens

    def _truncate(
        self, read: EncodedConversation, row: ShardRow, counts: Sequence[int]
    ) -> tuple[EncodedConversation, Sequence[int]]:
        """Return the beginning of a sample that fits, and the numbers of tokens of its images.

        An image that is left alone may take more tokens than it took beside others.
        """
        while True:
            read = _truncate(read, counts, self.max_length, row.sample.sample_id)
            num_images = read.input_ids.count(IMAGE_PLACEHOLDER)
            left = self.count_image_tokens(row.image_sizes[:num_images])
            if left == list(counts[:num_images]):
                return read, left
            counts = left

    def _read(
        self, row: ShardRow, limits: LimitsConfig
    ) -> tuple[np.ndarray, np.ndarray, list[Image.Image]]:
        """Return ids, labels and images of a sample, truncated if it has to be."""
        read = self.tokenize(row.sample)
        counts = self.count_image_tokens(row.image_sizes)
        num_tokens = _measure(read, counts)
        if num_tokens > self.max_length:
            if not self.truncates:
                raise SampleError(
                    f"sample {row.sample.sample_id!r} has {num_tokens} tokens, more than "
                    f"max_length {self.max_length}: raise it, or set over_long=truncate",
                    reason="too_long",
                )
            read, counts = self._truncate(read, row, counts)
        ids, labels, num_images = self._expand(read, counts)
        images = [
            decode(data, limits=limits)
            for data in row.sample.images[:num_images]
            if isinstance(data, bytes)
        ]
        return ids, labels, images

    def _expand(
        self, read: EncodedConversation, counts: Sequence[int]
    ) -> tuple[np.ndarray, np.ndarray, int]:
        """Return ids and labels with each placeholder expanded, and the number of images in use.

        Truncation may have removed placeholders; their images are dropped with them.
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
    """Return the encoder for a checkpoint; only the headers of its weights are read.

    Args:
        path: the checkpoint; see `model.load_model`.
        base: the base model of a projector or an adapter.
        vision_tower: the vision tower, for checkpoints in LLaVA's own layout.
        template: name of a conversation template; default: the checkpoint's.
        max_length: maximum length in tokens; default: the model's context length.
        truncates: truncate longer samples, before an image that does not fit.

    Raises:
        ConfigError: it is not a checkpoint, or its parts do not fit together.
    """
    opened = open_checkpoint(path, base=base, vision_tower=vision_tower, template=template)
    return make_encoder(opened, max_length=max_length, truncates=truncates)


def make_encoder(
    opened: OpenedCheckpoint, *, max_length: int | None = None, truncates: bool = False
) -> Encoder:
    """Return the encoder for a checkpoint that is opened already; see `load_encoder`."""
    check_processor(opened.checkpoint, opened.processor, opened.architecture.config)
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
    """Return the beginning of a sample that fits; images are kept whole or dropped."""
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
            f"sample {sample_id!r} has no learned tokens within the first {limit}: raise "
            "max_length, or remove the sample",
            reason="too_long",
        )
    return cut
