"""LLaVA-OneVision's golden: a tiny checkpoint, and what LLaVA-NeXT's own code gave for it.

The weights are random and the outputs those of its float32 forward: prompts with one image, which
is laid out in tiles, and with two and four, which take one tile each.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

GOLDEN = Path(__file__).parents[1] / "golden" / "onevision"
CHECKPOINT = GOLDEN / "checkpoint"


@dataclass(frozen=True)
class Record:
    """One prompt, its images, and the original's outputs."""

    prompt: str
    images: tuple[Image.Image, ...]
    image_tokens: list[int]
    sequence_length: int
    logits: np.ndarray  # of the last 16 positions
    greedy_ids: list[int]


def read_records() -> list[Record]:
    arrays = np.load(GOLDEN / "golden.npz")
    return [
        Record(
            record["prompt"],
            tuple(Image.open(GOLDEN / name).convert("RGB") for name in record["images"]),
            record["image_tokens"],
            record["sequence_length"],
            arrays[f"logits_{record['index']}"],
            arrays[f"greedy_{record['index']}"].tolist()[1:],
        )
        for record in json.loads((GOLDEN / "golden.json").read_text())["records"]
    ]
