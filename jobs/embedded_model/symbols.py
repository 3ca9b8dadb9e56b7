"""Scenes as symbols: the true properties of every cell.

The tower is trained to predict them for every patch, and the language model is trained to read
them, before the two are connected. Shapes: B scenes, F fields, P patches; a field's value is an
index, and 0 means 'nothing'.
"""

from collections.abc import Sequence

import numpy as np
import torch

from llava_ray.demo import scenes

PATCHES_PER_CELL = 2  # along one side
IGNORED = -100  # the value of properties without a name
DIGITS = tuple("0123456789")
FIELDS: dict[str, tuple[str, ...]] = {
    "category": ("", "shape", *scenes.CATEGORIES, "number"),
    "name": ("", *scenes.SHAPES, *scenes.THINGS),
    "colour": ("", *scenes.COLOURS),
    "size": ("", *scenes.SIZES),
    "tens": ("", *DIGITS),
    "units": ("", *DIGITS),
}
WIDTHS = tuple(len(values) for values in FIELDS.values())
_INDEX = [{value: index for index, value in enumerate(values)} for values in FIELDS.values()]


def spell(scene: scenes.Scene) -> np.ndarray:
    """Return the values of all cells of a scene, int64 [9, F]."""
    cells = np.zeros((scenes.GRID**2, len(FIELDS)), np.int64)
    for item in scene.items:
        is_number = item.kind == "number"
        words = (
            item.category,
            "" if is_number else item.name,
            item.colour or "",
            "" if is_number else item.size,
            item.name[-2:-1] if is_number else "",
            item.name[-1] if is_number else "",
        )
        cells[item.cell] = [
            IGNORED if word == scenes.UNNAMED else index[word]
            for index, word in zip(_INDEX, words, strict=True)
        ]
    return cells


def spell_patches(batch: Sequence[scenes.Scene]) -> torch.Tensor:
    """Return the values of all patches of several scenes, int64 [B, P, F]."""
    cells = torch.from_numpy(np.stack([spell(scene) for scene in batch]))
    grid = cells.unflatten(1, (scenes.GRID, scenes.GRID))
    for side in (1, 2):
        grid = grid.repeat_interleave(PATCHES_PER_CELL, side)
    return grid.flatten(1, 2)


def pixels(batch: Sequence[scenes.Scene]) -> torch.Tensor:
    """Draw scenes as the image processor gives them to the tower, float [B, 3, H, W], -1 to 1."""
    images = np.stack([np.asarray(scenes.draw(scene)) for scene in batch])
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous().float().div_(127.5).sub_(1)
