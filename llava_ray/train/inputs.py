"""A batch of `data` -> the inputs of the model, with an image in every one.

Weights that ZeRO divides among workers are fetched by all of them together, and gradients are
summed over all of them: a worker whose batch has no image must go through tower and projector
too, or the others wait for it for ever. It gets a grey image from which nothing is learned.

Shapes: B samples, T tokens.
"""

from collections.abc import Mapping
from typing import Any

import torch

from llava_ray.data.loader.collate import Batch
from llava_ray.template import IGNORED

Inputs = dict[str, torch.Tensor]


def encode_blank_image(core: Any) -> Inputs:
    """Return the inputs of a grey image without words, [1, T]."""
    from PIL import Image

    side = core.model.config.vision_config.image_size
    inputs = core.encode(core.processor.image_token, [Image.new("RGB", (side, side), "grey")])
    names = ("input_ids", "attention_mask", "pixel_values", "image_sizes", "batch_num_images")
    return {name: inputs[name] for name in names if name in inputs}


def prepare_inputs(batch: Batch, blank: Mapping[str, torch.Tensor]) -> Inputs:
    """Return a batch's inputs; `labels` among them."""
    inputs = batch.to_tensors()
    if "pixel_values" in inputs:
        return inputs
    labels = torch.full_like(blank["input_ids"], IGNORED)
    extra = {**blank, "labels": labels}
    if not batch.sample_ids:
        return extra
    for name, filling in (("input_ids", 0), ("attention_mask", 0), ("labels", IGNORED)):
        inputs[name] = _stack(inputs[name], extra[name], filling)
    return {**extra, **inputs}


def count_learned(inputs: Mapping[str, torch.Tensor]) -> int:
    """Return how many tokens of a batch are learned; a text's first cannot be."""
    return int((inputs["labels"][:, 1:] != IGNORED).sum())


def _stack(rows_BT: torch.Tensor, extra_BT: torch.Tensor, filling: int) -> torch.Tensor:
    length = max(rows_BT.shape[1], extra_BT.shape[1])
    padded = [
        torch.nn.functional.pad(rows, (0, length - rows.shape[1]), value=filling)
        for rows in (rows_BT, extra_BT)
    ]
    return torch.cat(padded)
