"""Checkpoints in LLaVA's own format, one of each kind, compared with the reference's logits."""

from pathlib import Path

import torch
from PIL import Image

from llava_ray.model.loading import LoadedModel, load_model
from tests.support.llava_checkpoints import Original
from tests.support.tiny_checkpoint import make_image

GOLDEN = Path(__file__).parents[1] / "golden"
PROMPT = "look: <image>\nand this <image> what is it?"


def load(folder: Path, **options) -> LoadedModel:
    return load_model(folder, dtype="float32", device="cpu", **options)


def images() -> list[Image.Image]:
    return [make_image(), make_image(1, width=31, height=97)]


def assert_same_logits(core: LoadedModel, original: Original) -> None:
    inputs = core.encode(PROMPT, images())
    with torch.inference_mode():
        found = core.model(**inputs).logits[0]
    expected = original.logits(PROMPT, images())
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


KINDS = {
    "llama, square": Original(),
    "pad": Original(aspect="pad"),
    "linear projector": Original(projector="linear"),
    "no projector": Original(projector="identity"),
    "three-layer projector": Original(projector="mlp3x_gelu"),
    "class token of the last layer": Original(feature="cls_patch", layer=-1),
    "between marks": Original(start_end=True),
    "mistral": Original(text="mistral"),
    "qwen2": Original(text="qwen2"),
    "mpt": Original(text="mpt"),
    "siglip": Original(tower="siglip"),
    "siglip, pad": Original(tower="siglip", aspect="pad", layer=-1),
    "anyres, flat": Original(aspect="anyres", merge="flat"),
    "anyres, flat, class token": Original(aspect="anyres", merge="flat", feature="cls_patch"),
    "anyres, spatial": Original(aspect="anyres", merge="spatial"),
    "anyres, unpad": Original(aspect="anyres", merge="spatial_unpad"),
    "anyres, unpad, mistral": Original(text="mistral", aspect="anyres", merge="spatial_unpad"),
    "square, unpad": Original(merge="spatial_unpad"),
    "NeXT, square, unpad": Original(merge="spatial_unpad", extra={"mm_newline_position": "grid"}),
    "NeXT, pad, unpad, qwen2": Original(text="qwen2", aspect="pad", merge="spatial_unpad"),
    "anyres, unpad, mpt, linear": Original(
        text="mpt", projector="linear", aspect="anyres", merge="spatial_unpad"
    ),
}
