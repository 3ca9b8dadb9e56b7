"""Stage two: the language model by itself, trained on images made of symbols.

In place of image features, every patch gets the sum of the word embeddings of its properties
("animal", "dog", "large", "top", "left"), as from a perfect tower and projector. No image is drawn
and no tower runs, so the model sees enough examples to learn to look up, count and compare, which
it does not learn from an untrained projector's features.

Shapes: B conversations, T tokens, P patches an image, F fields, D hidden, V vocabulary.
"""

import random
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from jobs.embedded_model import language, references, symbols
from jobs.embedded_model.pace import Pace, Stage, autocast, resume
from llava_ray.demo import questions, scenes, talk

BATCH = 8
RATE = 1e-3
FOUND_AFTER = 3  # layers, of six
COMPARED_AFTER = 5
PHRASE_SHARE = 0.5  # of the phrases' loss beside the answers'
EMPTY_SHARE = 0.03  # of images
PLAIN_SHARE = 0.35
WORD_SPREAD = 0.12  # of the embeddings at first: words start out far apart and stay so


def build_language_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=6,
        num_attention_heads=8,
        max_position_embeddings=language.CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": 1e5},
        tie_word_embeddings=True,
        bos_token_id=language.token_id(tokenizer, language.BOS),
        eos_token_id=language.token_id(tokenizer, language.EOS),
        pad_token_id=language.token_id(tokenizer, language.PAD),
    )
    model = LlamaForCausalLM(config)
    nn.init.normal_(model.model.embed_tokens.weight, std=WORD_SPREAD)
    for layer in model.model.layers:
        _start_alike(layer.self_attn, layer.mlp)
    return model


def _start_alike(attention: Any, mlp: Any) -> None:
    """Initialise half of a layer's heads to attend to tokens that are like their own.

    With equal queries and keys a word attends to patches of the same word (mimetic initialization,
    Trockman and Kolter, 2023). A small model is slow to learn this by itself.
    """
    width, inner = mlp.gate_proj.in_features, mlp.gate_proj.out_features
    for linear in (
        attention.q_proj,
        attention.k_proj,
        attention.v_proj,
        mlp.gate_proj,
        mlp.up_proj,
    ):
        nn.init.normal_(linear.weight, std=width**-0.5)
    nn.init.normal_(attention.o_proj.weight, std=width**-0.5 / 3)
    nn.init.normal_(mlp.down_proj.weight, std=inner**-0.5 / 3)
    with torch.no_grad():
        attention.k_proj.weight[: width // 2] = attention.q_proj.weight[: width // 2]


class Speller(nn.Module):
    """Embeds symbols: the sum of their words' embeddings and learned vectors."""

    _words_of: torch.Tensor
    _tens_of: torch.Tensor
    _starts: torch.Tensor

    def __init__(self, tokenizer: PreTrainedTokenizerFast, words: nn.Embedding) -> None:
        super().__init__()
        self._words = [words]  # in a list, since the language model registers it already
        fields = symbols.FIELDS | {"row": scenes.ROWS, "column": scenes.COLUMNS}
        phrases = [(name, value) for name, values in fields.items() for value in values]
        words_of = torch.zeros(len(phrases), len(tokenizer))
        tens_of = torch.zeros_like(words_of)
        for index, (name, value) in enumerate(phrases):
            text = value if value.isdigit() or not value else f" {value}"
            for token in tokenizer(text, add_special_tokens=False)["input_ids"]:
                (tens_of if name == "tens" else words_of)[index, token] += 1
        self.register_buffer("_words_of", words_of / words_of.sum(1, keepdim=True).clamp(min=1))
        self.register_buffer("_tens_of", tens_of)
        self.extra = nn.Embedding(len(phrases), words.embedding_dim)
        nn.init.normal_(self.extra.weight, std=WORD_SPREAD / 2)
        widths = [*symbols.WIDTHS, len(scenes.ROWS), len(scenes.COLUMNS)]
        self.register_buffer("_starts", torch.tensor([0, *widths[:-1]]).cumsum(0))

    def forward(self, values_BPF: torch.Tensor) -> torch.Tensor:
        """Return the vectors of patches, [B, P, D]."""
        places = _places().expand(len(values_BPF), -1, -1)
        indices = torch.cat([values_BPF, places], -1) + self._starts
        return F.embedding(indices, self._vectors()).sum(-2)

    def span(self, field: int) -> torch.Tensor:
        """Return an orthonormal basis of the directions in which a field's values differ."""
        start = int(self._starts[field])
        vectors = self._vectors()[start : start + symbols.WIDTHS[field]]
        return torch.linalg.qr((vectors - vectors.mean(0)).T).Q

    def _vectors(self) -> torch.Tensor:
        words = self._words[0].weight
        tens = words.roll(1, dims=-1)  # a digit's vector differs by its position in the number
        return self._words_of @ words + self._tens_of @ tens + self.extra.weight


def _places() -> torch.Tensor:
    """Return the row and the column, in cells, of every patch, [P, 2]."""
    side = scenes.GRID * symbols.PATCHES_PER_CELL
    patch = torch.arange(side**2)
    return torch.stack([patch // side, patch % side], -1) // symbols.PATCHES_PER_CELL


class Course(NamedTuple):
    """The composition of conversations at some point of training."""

    max_items: int
    images: tuple[float, float, float]  # odds of zero, one and two images in a conversation
    apart: float  # probability that an image's turns do not attend to one another
    has_gaps: bool  # gaps in positions between turns, as in long conversations


def course(progress: float) -> Course:
    """Return the composition: few items and one image at first."""
    if progress < 0.1:
        return Course(2, (0.03, 0.97, 0), apart=0.9, has_gaps=False)
    if progress < 0.2:
        return Course(3, (0.03, 0.97, 0), apart=0.9, has_gaps=False)
    if progress < 0.7:
        return Course(5, (0.03, 0.97, 0), apart=0.9, has_gaps=False)
    return Course(5, (0.06, 0.82, 0.12), apart=0.6, has_gaps=True)


def make_batches(
    tokenizer: PreTrainedTokenizerFast,
    rng: random.Random,
    stage: Stage,
    *,
    weights: dict[str, float] | None = None,
    is_easy_first: bool = True,
) -> Iterator[language.ConversationBatch]:
    """Yield batches of conversations of similar length during the stage, harder ones later."""
    encoder = language.ConversationEncoder(tokenizer, rng)
    pad = language.token_id(tokenizer, language.PAD)
    while not stage.is_over:
        now = course(max(stage.progress, 0.0 if is_easy_first else 0.2))
        batch = []
        for _ in range(BATCH):
            count = rng.choices((0, 1, 2), now.images)[0]
            limit = 5 if rng.random() < 0.5 else rng.randint(1, 5)
            shown = [_make_scene(rng, min(limit, now.max_items)) for _ in range(count)]
            is_apart = count == 1 and rng.random() < now.apart
            turns = questions.make_conversation(
                rng,
                shown,
                num_turns=rng.randint(9, 12) - 2 * count,
                weights=weights,
                follow_ups=not is_apart,
            )
            if shown and not is_apart and rng.random() < language.TALK_BEFORE_IMAGE:
                said, answer = talk.small_talk(rng)
                turns.insert(0, questions.SceneTurn("talk", said, answer, None))
            batch.append(
                encoder.encode_apart(turns)
                if is_apart
                else encoder.encode(turns, has_gaps=now.has_gaps)
            )
        yield language.collate(batch, pad)


def _make_scene(rng: random.Random, max_items: int) -> scenes.Scene:
    if rng.random() < EMPTY_SHARE:
        return scenes.make_empty_scene(rng)
    if rng.random() < PLAIN_SHARE:
        return scenes.make_plain_scene(rng)
    return scenes.make_scene(rng, num_items=rng.randint(1, max_items))


def _mask(blocks_BT: torch.Tensor) -> torch.Tensor:
    """Return the attention mask: [B, 1, T, T], or ones [B, T] for plain causal attention.

    It is never None: transformers would then take gaps in the positions for packed sequences.
    """
    if not blocks_BT.any():
        return torch.ones_like(blocks_BT)
    seen, seer = blocks_BT.unsqueeze(1), blocks_BT.unsqueeze(2)
    return torch.logical_or(seen == 0, seen == seer).tril().unsqueeze(1)


class Finder(nn.Module):
    """Auxiliary heads that predict what phrases refer to and, some layers later, how two compare.

    They are not part of the trained model.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = nn.Linear(width, sum(references.ASPECTS.values()))
        self.orders = nn.Linear(width, sum(references.ORDERS.values()))

    def loss(
        self, hidden: tuple[torch.Tensor, ...], batch: language.ConversationBatch
    ) -> torch.Tensor:
        """Return the sum of the losses of all aspects; `hidden`: [B, T, D] for every layer."""
        rows, tokens = batch.references.unbind(-1)
        aspects = self.heads(hidden[FOUND_AFTER][rows, tokens]).float()
        orders = self.orders(hidden[COMPARED_AFTER][rows, tokens]).float()
        logits = (
            *aspects.split(tuple(references.ASPECTS.values()), -1),
            *orders.split(tuple(references.ORDERS.values()), -1),
        )
        losses = [
            F.cross_entropy(aspect, batch.aspects[:, index], ignore_index=references.IGNORED)
            for index, aspect in enumerate(logits)
            if (batch.aspects[:, index] != references.IGNORED).any()
        ]
        return torch.stack(losses).sum() if losses else aspects.new_zeros(())


class Losses(NamedTuple):
    """A batch's loss of answers, loss of phrases, and share of exact answers by kind."""

    answer: torch.Tensor
    phrase: torch.Tensor
    exact: dict[str, float]


class QuestionReader(nn.Module):
    """A language model with the modules of its training: a speller and a finder."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        super().__init__()
        self.model = build_language_model(tokenizer)
        self.speller = Speller(tokenizer, self.model.model.embed_tokens)
        self.finder = Finder(self.model.config.hidden_size)
        self._image_token = language.token_id(tokenizer, language.IMAGE)

    def losses(self, batch: language.ConversationBatch, features: torch.Tensor) -> Losses:
        """Return the losses of a batch, with `features` [N, P, D] in place of its image tokens.

        A token of a long answer has a smaller weight, so that descriptions do not outweigh the
        single words that answer most questions.
        """
        embeddings = self.model.get_input_embeddings()(batch.ids)
        is_image = (batch.ids == self._image_token).unsqueeze(-1)
        embeddings = embeddings.masked_scatter(is_image, features.to(embeddings.dtype))
        output = self.model.model(
            inputs_embeds=embeddings,
            position_ids=batch.positions,
            attention_mask=_mask(batch.blocks),
            use_cache=False,
            output_hidden_states=True,
        )
        hidden = output.last_hidden_state
        phrase = self.finder.loss(output.hidden_states, batch)
        is_answer = batch.labels[:, 1:] != language.IGNORED
        labels, turns = batch.labels[:, 1:][is_answer], batch.turns[:, 1:][is_answer]
        logits = self.model.lm_head(hidden[:, :-1][is_answer]).float()
        num_wrong = torch.zeros(len(batch.kinds)).index_add_(
            0, turns, (logits.argmax(-1) != labels).float()
        )
        exact = defaultdict(list)
        for kind, wrong in zip(batch.kinds, num_wrong.tolist(), strict=True):
            exact[kind].append(float(wrong == 0))
        weights = turns.bincount()[turns].rsqrt()
        losses = F.cross_entropy(logits, labels, reduction="none")
        means = {kind: sum(marks) / len(marks) for kind, marks in exact.items()}
        return Losses((losses * weights).sum() / weights.sum(), phrase, means)


def train_reader(checkpoint: Path, pace: Pace, tokenizer: PreTrainedTokenizerFast) -> None:
    """Train, continuing from `checkpoint` if it exists, and save there."""
    rng = pace.begin("reader")
    reader = QuestionReader(tokenizer)
    resume(reader, checkpoint)
    stage = Stage("reader", reader, checkpoint, pace, rate=RATE)
    for batch in make_batches(tokenizer, rng, stage):
        with autocast():
            features = reader.speller(symbols.spell_patches(batch.images))
            answer, phrase, exact = reader.losses(batch, features)
        loss = answer + PHRASE_SHARE * phrase
        stage.step(loss, answer=answer.item(), phrase=phrase.item(), **exact)
