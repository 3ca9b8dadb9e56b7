"""Encoded samples -> one batch: padded ids, stacked pixels.

Last step of `stream`. Batches travel between processes as NumPy arrays, which Ray does not copy,
and become tensors in the training worker.

Shapes: B samples, T tokens, N images, C H W pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from llava_ray.data.loader.encode import EncodedSample
from llava_ray.data.loader.order import Position
from llava_ray.template import IGNORED


@dataclass(frozen=True)
class DroppedSample:
    """A sample that was left out of its batch: its id, the reason and a message."""

    sample_id: str
    reason: str
    message: str


@dataclass(frozen=True)
class Batch:
    """A micro-batch of one worker.

    A batch without samples, because all were dropped or the step had too few, holds one padding
    token that is not learned, so that every worker takes every step.

    Attributes:
        arrays: the model's inputs: `input_ids`, `labels`, `attention_mask` [B, T]; with images
            `pixel_values` [N, C, H, W]; with anyres [N, tiles, C, H, W] and `image_sizes` [N, 2];
            for LLaVA-OneVision `batch_num_images`, one for each sample that has images.
        sample_ids: of the B samples.
        dropped: samples that were left out.
        is_last: whether it is the worker's last micro-batch of its step.
        resume_at: the position after its step, which a checkpoint saves.
    """

    arrays: dict[str, np.ndarray]
    sample_ids: tuple[str, ...]
    dropped: tuple[DroppedSample, ...] = ()
    is_last: bool = True
    resume_at: Position = field(default=Position(0, 0, 0, 0))

    def to_tensors(self) -> dict[str, torch.Tensor]:
        """Return the model's inputs as tensors on the CPU."""
        return {name: torch.from_numpy(np.array(array)) for name, array in self.arrays.items()}


def collate(examples: Sequence[EncodedSample], *, pad_token_id: int) -> dict[str, np.ndarray]:
    """Return the arrays of a batch; ids are padded on the right, labels with `IGNORED`.

    Images keep the order of the samples. With anyres, missing tiles are filled with zeros.
    """
    rows = [(e.input_ids, e.labels) for e in examples] or [
        (np.array([pad_token_id]), np.array([IGNORED]))
    ]
    num_tokens = max(len(ids) for ids, _ in rows)
    ids_BT = np.full((len(rows), num_tokens), pad_token_id, np.int64)
    labels_BT = np.full((len(rows), num_tokens), IGNORED, np.int64)
    mask_BT = np.zeros((len(rows), num_tokens), np.int64)
    for i, (ids, labels) in enumerate(rows):
        ids_BT[i, : len(ids)] = ids
        labels_BT[i, : len(ids)] = labels
        mask_BT[i, : len(ids)] = 1
    arrays = {"input_ids": ids_BT, "labels": labels_BT, "attention_mask": mask_BT}
    with_images = [example.images for example in examples if example.images]
    for name in with_images[0] if with_images else ():
        arrays[name] = _stack([images[name] for images in with_images])
    return arrays


def _stack(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """Concatenate arrays along the first axis; tiles (axis 1) are padded with zeros."""
    if arrays[0].ndim < 5:
        return np.concatenate(arrays)
    num_tiles = max(array.shape[1] for array in arrays)
    joined = np.zeros((sum(map(len, arrays)), num_tiles, *arrays[0].shape[2:]), arrays[0].dtype)
    first = 0
    for array in arrays:
        joined[first : first + len(array), : array.shape[1]] = array
        first += len(array)
    return joined
