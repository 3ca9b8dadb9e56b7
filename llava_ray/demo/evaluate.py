"""Measures a model of the scenes: exact match by kind of question, with and without its image.

One question of each possible kind is asked about every test scene. Half of the scenes hold a
combination that no training scene holds. "Blind" is the score on the same questions with a grey
image. "Prior" is the score of always giving the most frequent answer to each sort of question.
"""

import json
import random
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

from llava_ray.demo import hand_drawn, questions, scenes, talk
from llava_ray.model.precision import choose_dtype

KINDS = tuple(questions.QUESTIONS)
TARGETS = {
    "existence": 0.95, "colour": 0.95, "shape": 0.95, "things": 0.95,
    "counting": 0.90, "position": 0.90, "comparison": 0.90, "number": 0.90,
}  # fmt: skip
GREY = 128
LATER_TURNS = "later turns"  # any kind, at the end of a conversation
MAX_NEW_TOKENS = 96

Order = Literal["image first", "text first", "image between", "image alone", "later turn"]
"""Where the image of a question stands: before its text, behind it, in the middle of it, in a
message of its own before it, or in the second turn of a conversation."""


@dataclass(frozen=True)
class Case:
    """One question about a scene, with the turns before it."""

    kind: str
    sort: str
    scene: scenes.Scene
    question: str
    answer: str
    is_unseen: bool  # the scene holds a combination kept out of training
    history: tuple[tuple[str, str], ...] = ()
    image: Image.Image | None = None  # in place of the painted scene


@dataclass(frozen=True)
class KindScore:
    """Exact match on one kind of question; shares are from 0 to 1."""

    num_questions: int
    exact: float
    unseen: float  # on scenes that hold a combination never seen in training
    blind: float
    prior: float
    target: float | None = None


@dataclass(frozen=True)
class Scores:
    """Scores by kind of question, and a few wrong answers as examples."""

    num_scenes: int
    seed: int
    seconds: float
    kinds: dict[str, KindScore]
    mistakes: list[dict[str, str]] = field(default_factory=list)

    @property
    def reaches_targets(self) -> bool:
        return all(score.exact >= (score.target or 0) for score in self.kinds.values())

    def table(self) -> str:
        """Return the scores as a Markdown table."""
        lines = [
            "| kind of question | asked | exact | unseen combinations | blind | prior | target |",
            "|---|---:|---:|---:|---:|---:|---:|",
        ]
        for kind, score in self.kinds.items():
            shares = (score.exact, score.unseen, score.blind, score.prior)
            cells = " | ".join(f"{100 * share:.1f} %" for share in shares)
            target = f"{100 * score.target:.0f} %" if score.target else ""
            lines.append(f"| {kind} | {score.num_questions} | {cells} | {target} |")
        return "\n".join(lines)

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=2) + "\n")


def make_cases(num_scenes: int, *, seed: int = 0) -> list[Case]:
    """Return questions of all kinds about held-out scenes, and last turns of long conversations."""
    cases = []
    for index in range(num_scenes):
        rng = random.Random(f"test {seed} {index}")
        is_unseen = index % 2 == 0
        scene = scenes.make_scene(rng, held_out=is_unseen)
        asker = questions.Asker(scene, rng, spare_held_out=False)
        for kind in KINDS:
            if question := questions.ask(kind, asker, tries=30):
                text = talk.vary(rng, question.text)
                cases.append(Case(kind, question.sort, scene, text, question.answer, is_unseen))
        turns = questions.make_conversation(
            rng, [scene], num_turns=rng.randint(4, 10), spare_held_out=False
        )
        *before, last = turns
        history = tuple((turn.question, turn.answer) for turn in before)
        sort = f"{last.kind} {last.question.split(' ')[0]}"
        cases.append(Case(LATER_TURNS, sort, scene, last.question, last.answer, is_unseen, history))
    return cases


def make_drawn_cases(num_images: int, *, seed: int = 0) -> list[Case]:
    """Questions about images that share no code with those of training."""
    cases = []
    for index in range(num_images):
        rng = random.Random(f"drawn {seed} {index}")
        scene, image = hand_drawn.make_drawing(rng)
        is_unseen = any(
            scenes.is_held_out(item.kind, item.name, item.colour, item.cell) for item in scene.items
        )
        asker = questions.Asker(scene, rng, spare_held_out=False)
        for kind in hand_drawn.KINDS:
            if question := questions.ask(kind, asker, tries=30):
                text, answer = talk.vary(rng, question.text), question.answer
                cases.append(Case(kind, question.sort, scene, text, answer, is_unseen, image=image))
    return cases


class SceneModel:
    """A model that answers batches of cases, greedily."""

    def __init__(self, model_dir: Path | str) -> None:
        self._processor = AutoProcessor.from_pretrained(model_dir)
        self._model: Any = LlavaForConditionalGeneration.from_pretrained(
            model_dir, dtype=choose_dtype("cpu")
        ).eval()

    @torch.inference_mode()
    def answer(
        self,
        cases: Sequence[Case],
        *,
        is_blind: bool = False,
        order: Order = "image first",
    ) -> list[str]:
        images = [_grey() if is_blind else case.image or scenes.draw(case.scene) for case in cases]
        prompts = [
            self._processor.apply_chat_template(_messages(case, order), add_generation_prompt=True)
            for case in cases
        ]
        inputs = self._processor(
            images=images,
            text=prompts,
            padding=True,
            return_tensors="pt",
            add_special_tokens=False,
        ).to(self._model.dtype)
        output = self._model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        answers = output[:, inputs["input_ids"].shape[1] :]
        return [
            text.strip() for text in self._processor.batch_decode(answers, skip_special_tokens=True)
        ]

    def chat(self, texts: Sequence[str]) -> list[str]:
        """Return the answers to texts without an image, one by one."""
        return [self._generate([_message("user", text)]) for text in texts]

    @torch.inference_mode()
    def _generate(self, messages: list[dict]) -> str:
        inputs = self._processor.apply_chat_template(
            messages,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        output = self._model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        answer = output[0, inputs["input_ids"].shape[1] :]
        return self._processor.decode(answer, skip_special_tokens=True).strip()


def _message(role: str, text: str) -> dict:
    return {"role": role, "content": [{"type": "text", "text": text}]}


def _grey() -> Image.Image:
    return Image.new("RGB", (scenes.PIXELS, scenes.PIXELS), (GREY, GREY, GREY))


def _messages(case: Case, order: Order) -> list[dict]:
    """The conversation up to the question, the image with its first message."""
    texts = [text for turn in case.history for text in turn] + [case.question]
    messages = [
        _message(("user", "assistant")[index % 2], text) for index, text in enumerate(texts)
    ]
    image, content = {"type": "image"}, messages[0]["content"]
    match order:
        case "image first":
            content.insert(0, image)
        case "text first":
            content.append(image)
        case "image between":
            start, space, end = case.question.partition(" ")
            halves = ({"type": "text", "text": start + space}, {"type": "text", "text": end})
            content[:] = [halves[0], image, halves[1]]
        case "image alone":
            messages.insert(0, {"role": "user", "content": [image]})
        case "later turn":
            content.insert(0, image)
            messages[:0] = [_message("user", "Hello"), _message("assistant", talk.HELLO)]
    return messages


def evaluate(
    model_dir: Path | str,
    *,
    num_scenes: int = 1000,
    seed: int = 0,
    is_drawn: bool = False,
    threads: int | None = None,
    report: Callable[[str], None] = print,
) -> Scores:
    """Score a model folder on held-out scenes, with their images and blind, and print a table.

    Args:
        model_dir: the folder of the weights.
        num_scenes: how many images.
        seed: the same seed, the same images and questions.
        is_drawn: ask about hand-drawn images instead of scenes.
        threads: of torch; default: as it is.
        report: takes the table.
    """
    if threads:
        torch.set_num_threads(threads)
    start = time.monotonic()
    make = make_drawn_cases if is_drawn else make_cases
    cases = make(num_scenes, seed=seed)
    model = SceneModel(model_dir)
    seen, blind = [], []
    for batch in _make_batches(cases):
        seen += model.answer(batch)
        blind += model.answer(batch, is_blind=True)
    kinds = {
        kind: _score(kind, [triple for triple in zip(cases, seen, blind, strict=True)
                            if triple[0].kind == kind])
        for kind in (*KINDS, LATER_TURNS) if any(case.kind == kind for case in cases)
    }  # fmt: skip
    scores = Scores(
        num_scenes, seed, round(time.monotonic() - start, 1), kinds, _mistakes(cases, seen)
    )
    report(scores.table())
    return scores


def evaluate_orders(
    model_dir: Path | str,
    *,
    num_scenes: int = 1000,
    seed: int = 0,
    is_drawn: bool = False,
    report: Callable[[str], None] = print,
) -> dict[Order, float]:
    """Ask the same first questions with the image in each place, and print a table by kind.

    Returns:
        The share of exact answers for each place, over all kinds.
    """
    make = make_drawn_cases if is_drawn else make_cases
    cases = [case for case in make(num_scenes, seed=seed) if not case.history]
    model = SceneModel(model_dir)
    orders: tuple[Order, ...] = get_args(Order)
    right: dict[str, dict[Order, list[bool]]] = defaultdict(lambda: defaultdict(list))
    for batch in _make_batches(cases):
        for order in orders:
            for case, answer in zip(batch, model.answer(batch, order=order), strict=True):
                right[case.kind][order].append(answer == case.answer)
    lines = [f"| kind of question | {' | '.join(orders)} |", "|---" + "|---:" * len(orders) + "|"]
    for kind, marks in right.items():
        shares = [f"{100 * sum(marks[order]) / len(marks[order]):.1f} %" for order in orders]
        lines.append(f"| {kind} | {' | '.join(shares)} |")
    report("\n".join(lines))
    return {
        order: sum(sum(marks[order]) for marks in right.values()) / len(cases) for order in orders
    }


def _make_batches(cases: list[Case], size: int = 64) -> list[list[Case]]:
    """Batches of cases of one kind and about the same length; sorts `cases` in place."""
    cases.sort(key=lambda case: (case.kind == LATER_TURNS, KINDS.index(case.kind)
               if case.kind in KINDS else 0, len(case.history)))  # fmt: skip
    return [cases[start : start + size] for start in range(0, len(cases), size)]


def _score(kind: str, triples: Sequence[tuple[Case, str, str]]) -> KindScore:
    def share(right: list[bool]) -> float:
        return round(sum(right) / len(right), 4) if right else 0.0

    return KindScore(
        len(triples),
        share([answer == case.answer for case, answer, _ in triples]),
        share([answer == case.answer for case, answer, _ in triples if case.is_unseen]),
        share([answer == case.answer for case, _, answer in triples]),
        round(prior([case for case, _, _ in triples]), 4),
        TARGETS.get(kind),
    )


def prior(cases: Sequence[Case]) -> float:
    """Return the share of questions that the most frequent answer of their sort gets right.

    Answers are compared in a form without the objects that the question names: "The dog." is "the
    first" or "the second" of two, and "There is no dog." is "there is no first".
    """
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for case in cases:
        answers[case.sort][_blind_form(case)] += 1
    return sum(max(counts.values()) for counts in answers.values()) / max(1, len(cases))


def _blind_form(case: Case) -> str:
    """Return an answer in which an object that the question names is replaced by its position."""
    named = case.answer.rstrip(".").lower()
    for opening in ("the ", "there is no "):
        phrase = named.removeprefix(opening)
        before, found, _ = case.question.lower().partition(f"the {phrase}")
        if phrase != named and found:
            return f"{opening}{'second' if ' or ' in before else 'first'}"
    return case.answer


def _mistakes(
    cases: Sequence[Case], answers: Sequence[str], limit: int = 3
) -> list[dict[str, str]]:
    """Return the first few wrong answers of each kind."""
    found: dict[str, list[dict[str, str]]] = defaultdict(list)
    for case, answer in zip(cases, answers, strict=True):
        if answer != case.answer and len(found[case.kind]) < limit:
            scene = questions.describe(case.scene)
            found[case.kind].append(
                {"kind": case.kind, "scene": scene, "question": case.question,
                 "right": case.answer, "said": answer}
            )  # fmt: skip
    return [mistake for mistakes in found.values() for mistake in mistakes]
