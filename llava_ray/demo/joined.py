"""Stages three and four: a projector from the tower to the language model, then all together.

First the projector alone learns to say of real pictures what the symbols said, both of its
neighbours at rest. Then everything learns from answers, the tower slowly.

Shapes: B conversations, T tokens, N pictures, P patches a picture, D hidden.
"""

import random
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from transformers import LlavaConfig, LlavaForConditionalGeneration, PreTrainedTokenizerFast

from llava_ray.demo import language, partners, symbols
from llava_ray.demo.pace import Clock, Log, rate_at, save_atomically
from llava_ray.demo.reader import (
    PHRASE_SHARE,
    Finder,
    Losses,
    Speller,
    build_language_model,
    compute_losses,
    make_batches,
    step,
)
from llava_ray.demo.tower import Labeller, build_tower, read_tower
from llava_ray.demo.tower import make_batch as make_pictures

ALIGN_RATE = 2e-3
ALIGN_BATCH = 32
JOINT_RATE = 3e-4
TOWER_SHARE = 0.2  # of the joint rate
SYMBOL_SHARE = 0.3  # of the symbols' loss beside the answers'


def build_llava(tokenizer: PreTrainedTokenizerFast) -> LlavaForConditionalGeneration:
    """The whole model, untrained."""
    text_config = build_language_model(tokenizer).config
    config = LlavaConfig(
        vision_config=build_tower().config,
        text_config=text_config,
        image_token_id=tokenizer.convert_tokens_to_ids(language.IMAGE),
        projector_hidden_act="gelu",
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=language.NUM_PATCHES,
        tie_word_embeddings=True,
    )
    return LlavaForConditionalGeneration(config)


class Joined(nn.Module):
    """The whole model on its way: tower, projector and language model, and the symbols' targets."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        super().__init__()
        self.language = build_language_model(tokenizer)
        self.labeller = Labeller()
        self.projector = build_llava(tokenizer).model.multi_modal_projector
        self.speller = Speller(tokenizer, self.language.get_input_embeddings())
        self.finder = Finder(self.language.config.hidden_size)
        self._image_token = tokenizer.convert_tokens_to_ids(language.IMAGE)

    def load_stages(self, tower: Path, reader: Path) -> None:
        self.labeller.load_state_dict(torch.load(tower)["model"])
        parts = {"model": self.language, "speller": self.speller, "finder": self.finder}
        nn.ModuleDict(parts).load_state_dict(torch.load(reader)["modules"])

    def losses(self, batch: language.Batch) -> tuple[Losses, torch.Tensor]:
        """The losses of a batch, and beside them the symbols' loss."""
        features = self.projector(read_tower(self.labeller.tower, symbols.pixels(batch.pictures)))
        symbol = self.symbol_loss(features, symbols.spell_patches(batch.pictures))
        found = compute_losses(self.language, self.finder, batch, features, self._image_token)
        return found, symbol

    def symbol_loss(self, features: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """How far features [N, P, D] are from the symbols' vectors: 1 is no better than a guess."""
        with torch.no_grad():
            target = self.speller(values).float()
        return F.mse_loss(features.float(), target) / target.var()

    def to_llava(self, tokenizer: PreTrainedTokenizerFast) -> LlavaForConditionalGeneration:
        """The same weights as transformers' model."""
        llava = build_llava(tokenizer)
        llava.model.vision_tower.load_state_dict(self.labeller.tower.state_dict())
        llava.model.multi_modal_projector.load_state_dict(self.projector.state_dict())
        llava.model.language_model.load_state_dict(self.language.model.state_dict())
        llava.lm_head.load_state_dict(self.language.lm_head.state_dict())
        return llava


def load_joined(checkpoint: Path, tokenizer: PreTrainedTokenizerFast) -> Joined:
    model = Joined(tokenizer)
    model.load_state_dict(torch.load(checkpoint)["model"])
    return model


def align_projector(
    checkpoint: Path,
    tokenizer: PreTrainedTokenizerFast,
    *,
    tower: Path,
    reader: Path,
    minutes: float,
    seed: int = 0,
    threads: int = 2,
    log_every_s: float = 30,
) -> None:
    """Train a projector between two checkpoints to say of crowded pictures what symbols said."""
    torch.set_num_threads(threads)
    model = Joined(tokenizer)
    model.load_stages(tower, reader)
    rng = random.Random(f"align {seed}")
    parameters = list(model.projector.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=ALIGN_RATE, betas=(0.9, 0.98), fused=True)
    clock, log = Clock(minutes, threads), Log("align", every_s=log_every_s)
    while clock.progress < 1:
        pixels, values = make_pictures(rng, ALIGN_BATCH)
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                seen = read_tower(model.labeller.tower, pixels)
            loss = model.symbol_loss(model.projector(seen), values)
        loss.backward()
        step(optimizer, parameters, rate_at(clock.progress, ALIGN_RATE))
        log(clock, symbol=loss.item())
    save_atomically(checkpoint, model=model.state_dict())


def train_joined(
    checkpoint: Path,
    tokenizer: PreTrainedTokenizerFast,
    *,
    minutes: float,
    seed: int = 0,
    threads: int = 2,
    rate: float = JOINT_RATE,
    log_every_s: float = 30,
) -> None:
    """Train all of `checkpoint` for some minutes, the tower at its share of the rate."""
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    model = load_joined(checkpoint, tokenizer)
    rng = random.Random(f"joint {seed} {partners.rank()}")
    shares = {
        model.language: 1.0,
        model.finder: 1.0,
        model.projector: 1.0,
        model.labeller.tower: TOWER_SHARE,
    }
    groups = [
        {"params": list(module.parameters()), "share": share} for module, share in shares.items()
    ]
    parameters = [parameter for group in groups for parameter in group["params"]]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.02, fused=True)
    clock, log = Clock(minutes, threads), Log("joint", every_s=log_every_s)
    saved = 0.0
    for batch in make_batches(tokenizer, rng, clock, is_easy_first=False):
        with torch.autocast("cpu", torch.bfloat16):
            (answer, phrase, exact), symbol = model.losses(batch)
        (answer + PHRASE_SHARE * phrase + SYMBOL_SHARE * symbol).backward()
        progress = partners.average_gradients(parameters, clock.progress)
        step(optimizer, parameters, rate_at(progress, rate))
        log(clock, answer=answer.item(), phrase=phrase.item(), symbol=symbol.item(), **exact)
        is_over = progress >= 1
        if partners.rank() == 0 and (is_over or clock.minutes_spent > saved + 2):
            saved = clock.minutes_spent
            save_atomically(checkpoint, model=model.state_dict())
        if is_over:
            return
