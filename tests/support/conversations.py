"""Conversations and tokenizers for tests of templates, and labels made as LLaVA's trainer does.

The tokenizers are small and of all relevant kinds: Llama's with a space after every special token
(legacy) and without, byte-level with and without a beginning of sequence. `relabel` tokenises each
round again and counts, as LLaVA's trainer does, and uses nothing of the package.
"""

import functools
import string
from typing import Any

from llava_ray.model.build.random_model import build_byte_tokenizer
from llava_ray.types import ImagePart, Message, TextPart

CHATML = ("<|im_start|>", "<|im_end|>")


def say(role: Any, text: str) -> Message:
    """Return a message; `<image>` in the text becomes an image."""
    parts: list[TextPart | ImagePart] = []
    for i, piece in enumerate(text.split("<image>")):
        parts += [ImagePart(b"")] * bool(i) + [TextPart(piece)] * bool(piece)
    return Message(role, tuple(parts))


def talk(*texts: str) -> list[Message]:
    """Return a conversation that the user begins."""
    return [say("assistant" if i % 2 else "user", text) for i, text in enumerate(texts)]


@functools.cache
def llama_tokenizer(*, legacy: bool, chatml: bool = False) -> Any:
    from transformers import LlamaTokenizer

    letters = string.ascii_letters
    vocabulary = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocabulary += ["▁", *letters, *string.digits, *"#.,:?!()[]<>/|_'-"]
    merges = [("▁", letter) for letter in letters + "[<"]
    merges += [(a, b) for a in string.ascii_lowercase for b in "aeinrst"]
    merges += [("#", "#"), ("▁", "##"), ("▁##", "#"), ("▁h", "e"), ("▁t", "h"), ("▁th", "e")]
    vocabulary += [a + b for a, b in merges]
    tokenizer = LlamaTokenizer(
        vocab={token: i for i, token in enumerate(dict.fromkeys(vocabulary))},
        merges=merges,
        legacy=legacy,
        add_bos_token=True,
        model_max_length=100_000,
    )
    if chatml:
        tokenizer.add_tokens(list(CHATML), special_tokens=True)
    return tokenizer


@functools.cache
def byte_tokenizer(*, begins: bool, chatml: bool = False) -> Any:
    from tokenizers import processors

    tokenizer = build_byte_tokenizer(context_length=100_000)
    if not begins:
        tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    if chatml:
        tokenizer.add_tokens(list(CHATML), special_tokens=True)
    return tokenizer


def ids_of(tokenizer: Any, text: str) -> list[int]:
    """Ids as LLaVA makes them: each piece between images alone, one beginning of sequence."""
    pieces = [tokenizer(piece).input_ids for piece in text.split("<image>")]
    num_begin = int(pieces[0][:1] == [tokenizer.bos_token_id])
    ids = pieces[0]
    for piece in pieces[1:]:
        ids = [*ids, -200, *piece[num_begin:]]
    return ids


def relabel(tokenizer: Any, rounds: list[tuple[str, str]], end: str) -> tuple[list[int], list[int]]:
    """Ids and labels of rounds (up to the space before the answer, answer) that `end` closes.

    Of each round the beginning of sequence stands in for the end of the one before, and the last
    token of what is masked is the space, which in the conversation belongs to the answer.
    """
    ids = ids_of(tokenizer, "".join(asked + answer + end for asked, answer in rounds))
    labels, place = [-100] * len(ids), 1
    for asked, answer in rounds:
        length = len(ids_of(tokenizer, asked + answer))
        start = place + len(ids_of(tokenizer, asked)) - 2
        labels[start : place + length] = ids[start : place + length]
        place += length
    assert place == len(ids), "LLaVA's trainer would warn of a mismatch and mask everything"
    return ids, labels


def relabel_lines(
    tokenizer: Any, header: str, lines: list[tuple[str, str]]
) -> tuple[list[int], list[int]]:
    """Ids and labels of the oldest templates: a header, and lines of (role, text)."""
    texts = [f"### {role}: {text}\n" for role, text in lines]
    ids = ids_of(tokenizer, header + "".join(texts) + "### ")
    place = len(ids_of(tokenizer, header))
    masked = set(range(place))
    for (role, _), text in zip(lines, texts, strict=True):
        length = len(ids_of(tokenizer, text))
        if role == "Human":
            masked |= set(range(place + 2, place + length))
        place += length
    return ids, [-100 if i in masked else id_ for i, id_ in enumerate(ids)]


def learned(tokenizer: Any, ids: list[int], labels: list[int]) -> list[str]:
    """Return the texts that have labels, one for each run of them."""
    runs: list[list[int]] = []
    for i, (id_, label) in enumerate(zip(ids, labels, strict=True)):
        assert label in (-100, id_)
        if label == -100:
            continue
        if i and labels[i - 1] != -100 and runs:
            runs[-1].append(id_)
        else:
            runs.append([id_])
    return [tokenizer.decode(run) for run in runs]
