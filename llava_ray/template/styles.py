"""How each style of LLaVA's templates writes a conversation, segment by segment.

Called by `ListedTemplate.walk`. Each style is one generator over the turns; a segment says whether
the model is trained to write it.

    single   system###Human: …###Assistant: …###
    two      system USER: … ASSISTANT: …</s>USER: …
    chatml   <|im_start|>system⏎…<|im_end|><|im_start|>user⏎…<|im_end|><|im_start|>assistant⏎…
    llama_2  [INST] <<SYS>>⏎system⏎<</SYS>>⏎⏎… [/INST] … </s><s>[INST] … [/INST] … </s>
    plain    <image>caption⏎
"""

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

from llava_ray.template.tokens import Segment

Style = Literal["single", "two", "chatml", "llama_2", "plain"]

_CHATML_ROLES = ("<|im_start|>user\n", "<|im_start|>assistant\n")


class RenderedTurn(NamedTuple):
    """A message as text, with image tokens written out."""

    is_answer: bool
    text: str


def walk_named(
    system: str,
    turns: Sequence[RenderedTurn],
    *,
    roles: tuple[str, str],
    gap: str,
    end: str,
    ask: bool,
) -> Iterator[Segment]:
    """Write "single" and "two": the role before each turn, `gap` or `end` after it.

    The learned segment of an answer begins with the space after the colon: prompts end with the
    colon, and tokenizers join the space to the first word.
    """
    yield Segment(system + gap)
    for turn in turns:
        yield Segment(f"{roles[turn.is_answer]}:")
        yield Segment(f" {turn.text}{end if turn.is_answer else gap}", turn.is_answer)
    if ask:
        yield Segment(f"{roles[1]}:")


def walk_chatml(
    system: str, turns: Sequence[RenderedTurn], *, gap: str, end: str, ask: bool
) -> Iterator[Segment]:
    """Write "chatml"; `gap` is the text between `end` and the next turn."""
    yield Segment(f"<|im_start|>system\n{system}{end}{gap}")
    for turn in turns:
        yield Segment(_CHATML_ROLES[turn.is_answer])
        yield Segment(turn.text + end, turn.is_answer)
        yield Segment(gap)
    if ask:
        yield Segment(_CHATML_ROLES[1])


def walk_llama_2(
    system: str, turns: Sequence[RenderedTurn], *, begin: str, end: str
) -> Iterator[Segment]:
    """Write "llama_2": the system text inside the first question, `begin` before every later one.

    The end of a question is what prompts for an answer.
    """
    asked = f"<<SYS>>\n{system}\n<</SYS>>\n\n" if system else ""
    for i, turn in enumerate(turns):
        if turn.is_answer:
            yield Segment(f" {turn.text} {end}", True)
        else:
            yield Segment(f"{begin if i else ''}[INST] {asked}{turn.text} [/INST]")
            asked = ""


def walk_plain(turns: Sequence[RenderedTurn], *, end: str) -> Iterator[Segment]:
    """Write "plain" as a prompt: each turn on its own line."""
    for turn in turns:
        yield Segment(turn.text + end, turn.is_answer)


def walk_caption(images: str, caption: str, *, end: str) -> Iterator[Segment]:
    """Write "plain" as LLaVA's trainer does: only the caption, which is learned."""
    yield Segment(images)
    yield Segment(caption + end, True)


def walk_headed(
    system: str, turns: Sequence[RenderedTurn], *, roles: tuple[str, str]
) -> Iterator[Segment]:
    """Write "single" as LLaVA's trainer does: first the header, then a line for each turn."""
    yield Segment(f"{system}\n\n")
    for turn in turns:
        yield Segment(f"### {roles[turn.is_answer]}: {turn.text}\n", turn.is_answer)
    yield Segment("### ", True)
