"""The walks: how each style writes a conversation, piece by piece.

Between a template's row, which has the texts, and the tokens. Every style is one generator over
turns; it says of each piece whether a model learns to say it.

    single   system###Human: …###Assistant: …###
    two      system USER: … ASSISTANT: …</s>USER: …
    chatml   <|im_start|>system⏎…<|im_end|><|im_start|>user⏎…<|im_end|><|im_start|>assistant⏎…
    llama_2  [INST] <<SYS>>⏎system⏎<</SYS>>⏎⏎… [/INST] … </s><s>[INST] … [/INST] … </s>
    plain    <image>caption⏎
"""

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

from llava_ray.template.tokens import Piece

Style = Literal["single", "two", "chatml", "llama_2", "plain"]

_CHATML_ROLES = ("<|im_start|>user\n", "<|im_start|>assistant\n")


class Turn(NamedTuple):
    """A message as text, its images written out."""

    is_answer: bool
    text: str


def walk_named(
    system: str, turns: Sequence[Turn], *, roles: tuple[str, str], gap: str, end: str, ask: bool
) -> Iterator[Piece]:
    """Write "single" and "two": a name before each turn, `gap` or `end` after it.

    What is learned of an answer begins with the space after the colon, because prompts end in the
    colon: tokenizers join that space to the first word.
    """
    yield Piece(system + gap)
    for turn in turns:
        yield Piece(f"{roles[turn.is_answer]}:")
        yield Piece(f" {turn.text}{end if turn.is_answer else gap}", turn.is_answer)
    if ask:
        yield Piece(f"{roles[1]}:")


def walk_chatml(
    system: str, turns: Sequence[Turn], *, gap: str, end: str, ask: bool
) -> Iterator[Piece]:
    """Write "chatml"; `gap` is what stands between `end` and the next turn."""
    yield Piece(f"<|im_start|>system\n{system}{end}{gap}")
    for turn in turns:
        yield Piece(_CHATML_ROLES[turn.is_answer])
        yield Piece(turn.text + end, turn.is_answer)
        yield Piece(gap)
    if ask:
        yield Piece(_CHATML_ROLES[1])


def walk_llama_2(system: str, turns: Sequence[Turn], *, begin: str, end: str) -> Iterator[Piece]:
    """Write "llama_2": the system text within the first question, `begin` before all later ones.

    Nothing asks for an answer but the end of the question.
    """
    asked = f"<<SYS>>\n{system}\n<</SYS>>\n\n" if system else ""
    for i, turn in enumerate(turns):
        if turn.is_answer:
            yield Piece(f" {turn.text} {end}", True)
        else:
            yield Piece(f"{begin if i else ''}[INST] {asked}{turn.text} [/INST]")
            asked = ""


def walk_plain(turns: Sequence[Turn], *, end: str) -> Iterator[Piece]:
    """Write "plain" as a prompt: every turn on a line of its own."""
    for turn in turns:
        yield Piece(turn.text + end, turn.is_answer)


def walk_caption(images: str, caption: str, *, end: str) -> Iterator[Piece]:
    """Write "plain" as LLaVA's trainer does: the question is left out, the caption learned."""
    yield Piece(images)
    yield Piece(caption + end, True)


def walk_headed(system: str, turns: Sequence[Turn], *, roles: tuple[str, str]) -> Iterator[Piece]:
    """Write "single" as LLaVA's trainer does: a line for each turn, the first piece the header."""
    yield Piece(f"{system}\n\n")
    for turn in turns:
        yield Piece(f"### {roles[turn.is_answer]}: {turn.text}\n", turn.is_answer)
    yield Piece("### ", True)
