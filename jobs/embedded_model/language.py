"""The language of the scenes as tokens: the tokenizer, the chat template, conversations as ids.

Shapes: B conversations, T tokens, P image tokens an image, F fields.
"""

import random
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from jobs.embedded_model import references, symbols
from llava_ray.demo import questions, scenes, talk

BOS, EOS, UNK, PAD, IMAGE = SPECIAL = ("<s>", "</s>", "<unk>", "<pad>", "<image>")
NUM_PATCHES = (scenes.GRID * symbols.PATCHES_PER_CELL) ** 2
VOCABULARY = 1024
CONTEXT = 2048
IGNORED = -100
TALK_BEFORE_IMAGE = 0.2  # fraction of conversations
LENGTH_STEP = 64  # batches are padded to multiples of it: each new length prepares new kernels

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% set role, content = message['role'], message['content'] %}"
    "{% set is_whole = loop.last or role != 'user' or loop.nextitem['role'] != 'user' %}"
    "{% if role == 'assistant' %}{{ 'ASSISTANT: ' }}"
    "{% elif role == 'user' and (loop.first or loop.previtem['role'] != 'user') %}{{ 'USER: ' }}"
    "{% endif %}"
    "{% if content is string %}{{ content }}{% set texts = [content] %}{% else %}"
    "{% for part in content if part['type'] in ('image', 'image_url') %}{{ '<image>\n' }}"
    "{% endfor %}"
    "{% set texts = content | selectattr('type', 'equalto', 'text') | list %}"
    "{% for part in texts %}{{ part['text'] }}{% endfor %}{% endif %}"
    "{% if role == 'assistant' %}{{ eos_token }}{% elif texts or is_whole %}{{ ' ' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
"""Images come first in their message, as in LLaVA, wherever they stand in it: the model reads them
before it reads a question. Messages of one user that follow one another are one turn."""


class EncodedTurns(NamedTuple):
    """A conversation of several turns as token ids and labels, and its images."""

    ids: list[int]
    labels: list[int]
    positions: list[int]
    turns: list[int]  # index of the turn whose answer the token belongs to, or -1
    blocks: list[int]  # 0: every turn sees the token; n: only turn n does
    kinds: list[str]  # of the turns
    references: list[tuple[int, tuple[int, ...]]]  # last token of a phrase, and its meaning
    images: list[scenes.Scene]


class ConversationBatch(NamedTuple):
    """A batch; `images[n]` belongs to the n-th run of P image tokens, in row-major order."""

    ids: torch.Tensor  # [B, T]
    labels: torch.Tensor  # [B, T], IGNORED except for answers
    positions: torch.Tensor  # [B, T]
    turns: torch.Tensor  # [B, T], numbered through the whole batch
    blocks: torch.Tensor  # [B, T]; a token sees block 0 and its own
    kinds: list[str]
    references: torch.Tensor  # [R, 2], row and last token of every phrase
    aspects: torch.Tensor  # [R, A], its meaning: ASPECTS, then ORDERS
    images: list[scenes.Scene]


def train_tokenizer(seed: int = 0, *, num_conversations: int = 6000) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on the scenes' language; each digit is a token of its own."""
    rng = random.Random(seed)
    tokenizer = Tokenizer(models.BPE(unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(rng, num_conversations), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNK,
        pad_token=PAD,
        extra_special_tokens={"image_token": IMAGE},
        chat_template=CHAT_TEMPLATE,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )


def token_id(tokenizer: PreTrainedTokenizerFast, token: str) -> int:
    index = tokenizer.convert_tokens_to_ids(token)
    assert isinstance(index, int)
    return index


def _corpus(rng: random.Random, num_conversations: int) -> Iterator[str]:
    """Yield conversations, and many repetitions of every word that symbols are made of."""
    for _ in range(num_conversations):
        turns = questions.make_conversation(rng, [scenes.make_scene(rng)], num_turns=8)
        yield from (f"USER: {turn.question} ASSISTANT: {turn.answer}" for turn in turns)
        yield turns[0].question  # on a line of its own, as after an image
    for word in (word for phrase in symbol_phrases() for word in phrase.split()):
        yield f" {word}" * 500


def symbol_phrases() -> list[str]:
    """Return every word or pair of words that symbols are made of, except digits."""
    fields = [
        value for name in ("category", "name", "colour", "size") for value in symbols.FIELDS[name]
    ]
    return [value for value in dict.fromkeys((*fields, *scenes.ROWS, *scenes.COLUMNS)) if value]


class ConversationEncoder:
    """Turns conversations into exactly the token ids that the chat template gives."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, rng: random.Random) -> None:
        self._tokenizer, self._rng = tokenizer, rng
        self._skipped = 0
        self._image = token_id(tokenizer, IMAGE)

    def encode(
        self,
        turns: Sequence[questions.SceneTurn],
        *,
        is_strict: bool = False,
        has_gaps: bool = False,
    ) -> EncodedTurns:
        """Return the ids and labels of a conversation.

        Unless `is_strict`, some conversations get a system message or no <s>. With `has_gaps`, some
        have gaps in their positions, as if turns were left out.
        """
        rng = random.Random(0) if is_strict else self._rng
        start = BOS if is_strict or rng.random() < 0.85 else ""
        system = f"{talk.system_prompt(rng)} " if not is_strict and rng.random() < 0.04 else ""
        has_gaps = has_gaps and rng.random() < 0.3
        encoded = EncodedTurns([], [], [], [], [], [turn.kind for turn in turns], [], [])
        self._add(encoded, f"{start}{system}")
        scene = None
        for index, turn in enumerate(turns):
            if has_gaps and rng.random() < 0.3:
                self._skipped = min(self._skipped + rng.randrange(150), CONTEXT // 2)
            image = f"{IMAGE}\n" if turn.image else ""
            is_image_first = is_strict or rng.random() < 0.95
            content = f"{image}{turn.question}" if is_image_first else f"{turn.question}{image}"
            scene = turn.image or scene
            self._add(encoded, f"USER: {content} ASSISTANT:", scene=scene)
            self._add(encoded, f" {turn.answer}{EOS}", turn=index)
            if turn.image:
                encoded.images.append(turn.image)
        self._skipped = 0
        return encoded

    def encode_apart(self, turns: Sequence[questions.SceneTurn]) -> EncodedTurns:
        """Encode questions about one image whose turns cannot attend to one another.

        Earlier turns say much about an image, and a model that can read it there is slow to learn
        to look at the image itself.
        """
        scene = turns[0].image
        assert scene, "turns apart are about one image"
        encoded = EncodedTurns([], [], [], [], [], [turn.kind for turn in turns], [], [scene])
        start = BOS if self._rng.random() < 0.85 else ""
        before = ""
        if self._rng.random() < TALK_BEFORE_IMAGE:
            question, answer = talk.small_talk(self._rng)
            before = f"USER: {question} ASSISTANT: {answer}{EOS}"
        self._add(encoded, f"{start}{before}USER: {IMAGE}\n")
        shared = len(encoded.ids)
        for index, turn in enumerate(turns):
            self._skipped = shared - len(encoded.ids)
            text = f"{turn.question} ASSISTANT:"
            self._add(encoded, text, scene=scene, block=index + 1)
            self._add(encoded, f" {turn.answer}{EOS}", turn=index, block=index + 1)
        self._skipped = 0
        return encoded

    def _add(
        self,
        encoded: EncodedTurns,
        text: str,
        *,
        turn: int = -1,
        scene: scenes.Scene | None = None,
        block: int = 0,
    ) -> None:
        """Add text: a turn's answer, or what precedes an answer."""
        tokens = self._tokenizer(text, add_special_tokens=False)
        ends = []
        for token in tokens["input_ids"]:
            copies = NUM_PATCHES if token == self._image else 1
            start = len(encoded.ids) + self._skipped
            encoded.positions.extend(range(start, start + copies))
            encoded.ids.extend([token] * copies)
            encoded.labels.extend([token if turn >= 0 else IGNORED] * copies)
            encoded.turns.extend([turn] * copies)
            encoded.blocks.extend([block] * copies)
            ends.append(len(encoded.ids) - 1)
        for reference in references.find_references(text, scene) if scene else ():
            token = tokens.char_to_token(reference.end - 1)
            encoded.references.append((ends[token], (*reference.aspects, *reference.orders)))


def collate(batch: Sequence[EncodedTurns], pad: int) -> ConversationBatch:
    """Pad conversations on the right, to the next multiple of `LENGTH_STEP` tokens."""
    longest = max(len(one.ids) for one in batch)
    length = -(-longest // LENGTH_STEP) * LENGTH_STEP

    def padded(rows: list[list[int]], fill: int) -> torch.Tensor:
        return torch.tensor([row + [fill] * (length - len(row)) for row in rows])

    starts = [0, *accumulate(len(one.kinds) for one in batch)]
    turns = [
        [turn + start if turn >= 0 else -1 for turn in one.turns]
        for one, start in zip(batch, starts, strict=False)
    ]
    found = [(row, *pair) for row, one in enumerate(batch) for pair in one.references]
    return ConversationBatch(
        padded([one.ids for one in batch], pad),
        padded([one.labels for one in batch], IGNORED),
        padded([one.positions for one in batch], 0),
        padded(turns, -1),
        padded([one.blocks for one in batch], 0),
        [kind for one in batch for kind in one.kinds],
        torch.tensor([(row, token) for row, token, _ in found]).reshape(-1, 2),
        torch.tensor([aspects for *_, aspects in found]).reshape(
            -1, len(references.ASPECTS) + len(references.ORDERS)
        ),
        [image for one in batch for image in one.images],
    )
