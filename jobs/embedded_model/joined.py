"""Stages three and four: the projector alone, then projector and language model together.

In stage three the projector learns to map the tower's features of drawn images to the vectors of
their symbols; tower and language model are frozen. Stage four trains on answers.

Shapes: B conversations, T tokens, N images, P patches an image, D hidden.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn
from transformers import LlavaConfig, LlavaForConditionalGeneration, PreTrainedTokenizerFast

from jobs.embedded_model import language, symbols
from jobs.embedded_model.pace import Pace, Stage, autocast, resume
from jobs.embedded_model.reader import (
    PHRASE_SHARE,
    Losses,
    QuestionReader,
    build_language_model,
    make_batches,
)
from jobs.embedded_model.tower import DISGUISED, Labeller, build_tower, make_images, read_tower
from llava_ray.demo import questions

ALIGN_RATE = 2e-3
ALIGN_BATCH = 32
JOINT_RATE = 5e-4
JOINT_WEIGHTS = questions.WEIGHTS | {
    "number": 8.0, "counting": 5.0, "colour": 3.0, "description": 1.0, "talk": 1.0
}  # fmt: skip
"""Weights of the kinds of questions; those that are learned last are asked more often."""
SYMBOL_SHARE = 0.5  # weight of the symbols' loss relative to that of the answers
_TEACHERS = ("labeller.heads.", "reader.finder.", "reader.speller.extra.")


def build_llava(tokenizer: PreTrainedTokenizerFast) -> LlavaForConditionalGeneration:
    """Return the whole model, untrained."""
    text_config = build_language_model(tokenizer).config
    config = LlavaConfig(
        vision_config=build_tower().config,
        text_config=text_config,
        image_token_index=language.token_id(tokenizer, language.IMAGE),
        projector_hidden_act="gelu",
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=language.NUM_PATCHES,
        tie_word_embeddings=True,
    )
    return LlavaForConditionalGeneration(config)


class Joined(nn.Module):
    """The whole model during training: tower, projector, language model and auxiliary heads."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        super().__init__()
        self.labeller = Labeller()
        self.projector = build_llava(tokenizer).model.multi_modal_projector
        self.reader = QuestionReader(tokenizer)

    def losses(self, batch: language.ConversationBatch) -> Losses:
        """Return the losses of a batch."""
        return self.reader.losses(batch, self.see(symbols.pixels(batch.images)))

    def see(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return the projected features of images [N, 3, H, W], [N, P, D]; the tower is frozen."""
        with torch.no_grad():
            seen = read_tower(self.labeller.tower, pixels)
        return self.projector(seen)

    def symbol_loss(self, features: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Return the distance of features [N, P, D] from the symbols' vectors; 1: as the mean.

        Where a value has no name, the directions in which its field's values differ do not count.
        """
        with torch.no_grad():
            target = self.reader.speller(values.clamp(min=0)).float()
        missed = features.float() - target
        for field in range(values.shape[-1]):
            is_free = (values[..., field : field + 1] == symbols.IGNORED).float()
            if is_free.any():
                span = self.reader.speller.span(field).detach()
                missed = missed - is_free * (missed @ span @ span.T)
        return missed.square().mean() / target.var()

    def to_llava(self, tokenizer: PreTrainedTokenizerFast) -> LlavaForConditionalGeneration:
        """Return transformers' model with the same weights."""
        llava = build_llava(tokenizer)
        llava.model.vision_tower.load_state_dict(self.labeller.tower.state_dict())
        llava.model.multi_modal_projector.load_state_dict(self.projector.state_dict())
        llava.model.language_model.load_state_dict(self.reader.model.model.state_dict())
        llava.lm_head.load_state_dict(self.reader.model.lm_head.state_dict())
        return llava

    def teachers(self) -> dict[str, torch.Tensor]:
        """Return the weights of the auxiliary heads, which are not part of the LLaVA."""
        return {n: tensor for n, tensor in self.state_dict().items() if n.startswith(_TEACHERS)}

    def take_over(
        self, llava: LlavaForConditionalGeneration, teachers: Mapping[str, torch.Tensor]
    ) -> None:
        """Load weights that `to_llava` and `teachers` returned."""
        self.labeller.tower.load_state_dict(llava.model.vision_tower.state_dict())
        self.projector.load_state_dict(llava.model.multi_modal_projector.state_dict())
        self.reader.model.model.load_state_dict(llava.model.language_model.state_dict())
        self.reader.model.lm_head.load_state_dict(llava.lm_head.state_dict())
        self.load_state_dict({**self.state_dict(), **teachers})


def align_projector(
    checkpoint: Path,
    pace: Pace,
    tokenizer: PreTrainedTokenizerFast,
    *,
    tower: Path,
    reader: Path,
) -> None:
    """Train a projector between two checkpoints on crowded images and their symbols."""
    rng = pace.begin("align")
    model = Joined(tokenizer)
    resume(model.labeller, tower)
    resume(model.reader, reader)
    parts = {model.projector: 1.0}
    stage = Stage("align", model, checkpoint, pace, rate=ALIGN_RATE, shares=parts)
    while not stage.is_over:
        pixels, values = make_images(rng, ALIGN_BATCH, disguised=DISGUISED)
        with autocast():
            loss = model.symbol_loss(model.see(pixels), values)
        stage.step(loss)


def train_joined(checkpoint: Path, pace: Pace, tokenizer: PreTrainedTokenizerFast) -> None:
    """Continue training everything in `checkpoint` but its tower, and save it there."""
    rng = pace.begin("joint")
    model = Joined(tokenizer)
    resume(model, checkpoint)
    shares = {model.reader.model: 1.0, model.reader.finder: 1.0, model.projector: 1.0}
    stage = Stage("joint", model, checkpoint, pace, rate=JOINT_RATE, shares=shares)
    for batch in make_batches(tokenizer, rng, stage, weights=JOINT_WEIGHTS, is_easy_first=False):
        pixels, values = make_images(rng, ALIGN_BATCH, disguised=DISGUISED)
        with autocast():
            answer, phrase, exact = model.losses(batch)
            symbol = model.symbol_loss(model.see(pixels), values)
        loss = answer + PHRASE_SHARE * phrase + SYMBOL_SHARE * symbol
        parts = {"answer": answer, "phrase": phrase, "symbol": symbol}
        stage.step(loss, **{name: part.item() for name, part in parts.items()}, **exact)
