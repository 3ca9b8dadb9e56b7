"""Anyres: joins the features of an image's tiles into one sequence, and computes its length.

Used by the model (`modeling`) and by `LoadedModel.encode`, which must agree. The rules are LLaVA's
`prepare_inputs_labels_for_multimodal`: `mm_patch_merge_type` flat, spatial, spatial_unpad.

Shapes: T tiles of an image (the first is the whole image), P patches of a tile, D hidden, H W
rows and columns of the grid of patches.
"""

from typing import Any

import torch
from transformers.image_processing_utils import select_best_resolution


def count_image_tokens(config: Any, image_size: tuple[int, int]) -> int:
    """Return how many tokens an image has in a model of LLaVA's format.

    Args:
        config: the model's.
        image_size: height and width of the image.
    """
    side = config.vision_config.image_size // config.vision_config.patch_size
    has_cls = config.vision_config.model_type == "clip_vision_model"
    num_patches = side**2 + int(has_cls and config.vision_feature_select_strategy == "full")
    if config.model_type != "llava_next":
        return num_patches + ("unpad" in config.mm_patch_merge_type)  # a newline
    height, width = (
        size // config.vision_config.image_size
        for size in select_best_resolution(image_size, config.image_grid_pinpoints)
    )
    if config.mm_patch_merge_type != "spatial_unpad":
        return num_patches * (1 + height * width)
    rows, columns = side * height, side * width
    top, left = measure_padding(image_size, (rows, columns))
    return num_patches + (rows - 2 * top) * (columns - 2 * left + 1)


def join_tiles(
    features_TPD: torch.Tensor,
    image_size: tuple[int, int],
    *,
    pinpoints: list[list[int]],
    tile_size: int,
    merge_type: str,
    newline_D: torch.Tensor | None,
) -> torch.Tensor:
    """Return the features of one image's tiles as one sequence, [tokens, D], the whole image first.

    Args:
        features_TPD: the features of each tile.
        image_size: height and width of the original image.
        pinpoints: the sizes [height, width] that images may be resized to.
        tile_size: height and width of a tile, in pixels.
        merge_type: "flat" (tile after tile), "spatial" (row after row of the grid of tiles) or
            "spatial_unpad" (the same without the rows or columns that are padding).
        newline_D: put after each row for "spatial_unpad", and after an image without tiles.
    """
    if merge_type == "flat":
        return features_TPD.flatten(0, 1)
    whole_PD, tiles_TPD = features_TPD[0], features_TPD[1:]
    if not len(tiles_TPD):
        parts = [whole_PD] if newline_D is None else [whole_PD, newline_D[None].to(whole_PD)]
        return torch.cat(parts)
    grid_HWD = _lay_out(tiles_TPD, image_size, pinpoints, tile_size)
    if merge_type == "spatial_unpad":
        top, left = measure_padding(image_size, (grid_HWD.shape[0], grid_HWD.shape[1]))
        height, width = grid_HWD.shape[:2]
        grid_HWD = grid_HWD[top : height - top, left : width - left]
        if newline_D is not None:
            newline_H1D = newline_D.to(grid_HWD).expand(len(grid_HWD), 1, -1)
            grid_HWD = torch.cat([grid_HWD, newline_H1D], dim=1)
    return torch.cat([whole_PD, grid_HWD.flatten(0, 1)])


def measure_padding(image_size: tuple[int, int], grid_size: tuple[int, int]) -> tuple[int, int]:
    """Return how many rows and columns at each edge of the grid are padding.

    LLaVA rounds the image's scaled side down; transformers first rounds it to seven digits, which
    differs by one now and then.

    Args:
        image_size: height and width of the image.
        grid_size: height and width of the grid that it was fitted into.
    """
    (image_height, image_width), (height, width) = image_size, grid_size
    if image_width / image_height > width / height:
        scale = width / image_width
        return (height - int(image_height * scale)) // 2, 0
    scale = height / image_height
    return 0, (width - int(image_width * scale)) // 2


def _lay_out(
    tiles_TPD: torch.Tensor,
    image_size: tuple[int, int],
    pinpoints: list[list[int]],
    tile_size: int,
) -> torch.Tensor:
    """Return the patches of all tiles on one grid, [rows, columns, D]."""
    height, width = select_best_resolution(image_size, pinpoints)
    num_rows, num_columns = height // tile_size, width // tile_size
    side = int(tiles_TPD.shape[1] ** 0.5)
    grid = tiles_TPD.unflatten(1, (side, side)).unflatten(0, (num_rows, num_columns))
    return grid.transpose(1, 2).flatten(2, 3).flatten(0, 1)
