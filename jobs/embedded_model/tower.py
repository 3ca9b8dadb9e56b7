"""Stage one: the vision tower by itself, trained to predict what is in every patch.

This replaces CLIP's training. The predictions are made by linear heads on the layer that the
projector will read; the heads are not part of the model.
"""

import random
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from transformers import CLIPVisionConfig, CLIPVisionModel

from jobs.embedded_model import symbols
from jobs.embedded_model.pace import Pace, Stage, autocast, resume
from llava_ray.demo import scenes

PATCH = scenes.CELL // symbols.PATCHES_PER_CELL
BATCH = 32
RATE = 1e-3
DISGUISED = 0.35  # fraction of shapes in crowded images whose colour or outline has no name
PLAIN = 0.5  # fraction of images with a few plain shapes of any size


def build_tower() -> CLIPVisionModel:
    """Return a CLIP tower; as in LLaVA, its last layer is not used."""
    config = CLIPVisionConfig(
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=7,
        num_attention_heads=4,
        image_size=scenes.PIXELS,
        patch_size=PATCH,
        projection_dim=256,
    )
    return CLIPVisionModel(config)


def read_tower(tower: CLIPVisionModel, pixels: torch.Tensor) -> torch.Tensor:
    """Return features of all patches, [B, P, D]: `hidden_states[-2]` without the class token."""
    body = getattr(tower, "vision_model", tower)
    hidden = body.pre_layrnorm(body.embeddings(pixels))
    for layer in body.encoder.layers[:-1]:
        hidden = layer(hidden, attention_mask=None)
    return hidden[:, 1:]


class Labeller(nn.Module):
    """A tower with a linear head for each field."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = build_tower()
        self.heads = nn.Linear(self.tower.config.hidden_size, sum(symbols.WIDTHS))

    def forward(self, pixels: torch.Tensor) -> list[torch.Tensor]:
        """Return the logits of every field, each [B, P, values]."""
        return list(self.heads(read_tower(self.tower, pixels)).float().split(symbols.WIDTHS, -1))


def make_images(
    rng: random.Random, size: int, *, disguised: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return crowded and plain images with a label for every patch.

    Returns:
        Pixels [B, 3, H, W] and values [B, P, F].
    """
    batch = [
        scenes.make_plain_scene(rng) if rng.random() < PLAIN else _make_crowd(rng, disguised)
        for _ in range(size)
    ]
    return symbols.pixels(batch), symbols.spell_patches(batch)


def _make_crowd(rng: random.Random, disguised: float) -> scenes.Scene:
    count = rng.choices((0, 1, 3, 5, 7, 9), weights=(1, 1, 1, 2, 2, 10))[0]
    scene = scenes.make_scene(rng, num_items=count) if count else scenes.make_empty_scene(rng)
    return scenes.disguise(rng, scene, disguised)


def train_tower(checkpoint: Path, pace: Pace) -> None:
    """Train, continuing from `checkpoint` if it exists, and save there."""
    rng = pace.begin("tower")
    model = Labeller()
    resume(model, checkpoint)
    stage = Stage("tower", model, checkpoint, pace, rate=RATE, weight_decay=0.05)
    while not stage.is_over:
        pixels, values = make_images(rng, BATCH, disguised=DISGUISED)
        with autocast():
            logits = model(pixels)
        stage.step(_label_loss(logits, values), **_error_rates(logits, values))


def _label_loss(logits: list[torch.Tensor], values: torch.Tensor) -> torch.Tensor:
    losses = (
        F.cross_entropy(
            field.flatten(0, 1), values[..., index].flatten(), ignore_index=symbols.IGNORED
        )
        for index, field in enumerate(logits)
    )
    return torch.stack(list(losses)).sum()


def _error_rates(logits: list[torch.Tensor], values: torch.Tensor) -> dict[str, float]:
    """Return each field's share of wrong predictions, over patches that are not empty."""
    is_item = values[..., 0] > 0
    return {
        name: (field.argmax(-1) != values[..., index])[is_item & (values[..., index] >= 0)]
        .float()
        .mean()
        .item()
        for index, (name, field) in enumerate(zip(symbols.FIELDS, logits, strict=True))
    }
