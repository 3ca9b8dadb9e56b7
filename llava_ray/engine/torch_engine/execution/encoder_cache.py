"""The encoder cache: image features, computed in batches and kept by the images' content.

An image that was seen before does not go through the vision tower again, wherever it stands in the
new prompt, even if the keys and values of the old prompt have been evicted.

Shapes: N images, P image tokens an image, D hidden.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple

import torch

from llava_ray.engine.torch_engine.scheduling.sequence import Sequence

IMAGES_AT_ONCE = 16
"""Largest batch of images for the vision tower; bounds its memory."""


class ImageKey(NamedTuple):
    """Images with equal keys have equal features.

    Attributes:
        name: a number for the content; see `content_hash`.
        adapter: with which it was encoded; empty: the model itself.
    """

    name: int
    adapter: str


ImageInputs = dict[str, torch.Tensor]
"""An image as the model takes it: pixels, and sizes where there are tiles; each [1, ...]."""

Encode = Callable[[str, ImageInputs], list[torch.Tensor]]
"""From an adapter and N images' inputs, [N, ...], to their features, N of [P, D]."""


class EncoderCache:
    """Encodes the images of sequences that are new. May be used by several threads at once.

    Args:
        encode: calls the vision tower.
        max_bytes: memory for features; the least recently used are evicted; 0: no cache.
    """

    def __init__(self, encode: Encode, *, max_bytes: int) -> None:
        self._encode, self._max_bytes = encode, max_bytes
        self._kept: OrderedDict[ImageKey, torch.Tensor] = OrderedDict()
        self._num_bytes = 0
        self._lock = threading.Lock()

    def read(self, sequences: list[Sequence]) -> tuple[int, int]:
        """Replace the pixels in sequences' `inputs` by features, [N * P, D].

        Returns:
            How many images were encoded, and how many were known.
        """
        features: dict[ImageKey, torch.Tensor] = {}
        wanted: dict[ImageKey, ImageInputs] = {}
        keys = {sequence: _list_keys(sequence) for sequence in sequences}
        for sequence, own in keys.items():
            for index, key in enumerate(own):
                if key in features or key in wanted:
                    continue
                if (kept := self._find(key)) is not None:
                    features[key] = kept
                else:
                    inputs = sequence.inputs.items()
                    wanted[key] = {name: each[index : index + 1] for name, each in inputs}
        for batch in _group(wanted):
            features |= self._encode_batch(batch)
        for sequence, own in keys.items():
            sequence.inputs = torch.cat([features[key] for key in own])
        return len(wanted), sum(map(len, keys.values())) - len(wanted)

    def _encode_batch(self, batch: dict[ImageKey, ImageInputs]) -> dict[ImageKey, torch.Tensor]:
        adapter = next(iter(batch)).adapter
        names = next(iter(batch.values()))
        inputs = {name: torch.cat([each[name] for each in batch.values()]) for name in names}
        new = dict(zip(batch, self._encode(adapter, inputs), strict=True))
        for key, features_PD in new.items():
            self._keep(key, features_PD)
        return new

    def _find(self, key: ImageKey) -> torch.Tensor | None:
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
            return self._kept.get(key)

    def _keep(self, key: ImageKey, features_PD: torch.Tensor) -> None:
        size = features_PD.nbytes
        if size > self._max_bytes:
            return
        with self._lock:
            if key in self._kept:  # encoded by two threads at once
                return
            self._kept[key] = features_PD.clone()  # by itself, and not all of its batch
            self._num_bytes += size
            while self._num_bytes > self._max_bytes:
                _, oldest = self._kept.popitem(last=False)
                self._num_bytes -= oldest.nbytes


def _list_keys(sequence: Sequence) -> list[ImageKey]:
    num_images = len(sequence.inputs["pixel_values"])
    assert len(sequence.image_names) == num_images
    return [ImageKey(name, sequence.adapter) for name in sequence.image_names]


def _group(wanted: dict[ImageKey, ImageInputs]) -> list[dict[ImageKey, ImageInputs]]:
    """Return what goes through the tower together: one adapter's images, if each has one tile."""
    groups: list[dict[ImageKey, ImageInputs]] = []
    for adapter in {key.adapter: None for key in wanted}:
        mine = {key: inputs for key, inputs in wanted.items() if key.adapter == adapter}
        plain = [key for key, inputs in mine.items() if is_plain(inputs)]
        groups += [{key: mine[key]} for key in mine if key not in plain]
        groups += [
            {key: mine[key] for key in plain[start : start + IMAGES_AT_ONCE]}
            for start in range(0, len(plain), IMAGES_AT_ONCE)
        ]
    return groups


def is_plain(inputs: ImageInputs) -> bool:
    """Return whether an image has one tile, without the layout of those that have more."""
    is_beside_others = "batch_num_images" in inputs and int(inputs["batch_num_images"][0]) > 1
    return inputs["pixel_values"].ndim == 4 or is_beside_others
