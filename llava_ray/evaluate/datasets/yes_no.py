"""Reads yes-or-no questions: POPE and MME."""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from llava_ray.errors import ConfigError, SampleError
from llava_ray.evaluate.datasets.files import SHORT, find_file, get_text, read_jsonl
from llava_ray.evaluate.datasets.open_answer import read_llava
from llava_ray.evaluate.scoring.metrics import MME_COGNITION, MME_PERCEPTION
from llava_ray.types import Question

_POPE_OBJECT = re.compile(r"is there an? (.+?) in the im")
MME_QUESTIONS = {
    "existence": 60, "count": 60, "position": 60, "color": 60, "posters": 294, "celebrity": 340,
    "scene": 400, "landmark": 400, "artwork": 400, "OCR": 40, "commonsense_reasoning": 140,
    "numerical_calculation": 40, "text_translation": 40, "code_reasoning": 40,
}  # fmt: skip
"""How many questions MME's release has in each of its tasks."""
MME_HINT = "Please answer yes or no."


def read_pope(folder: Path) -> list[Question]:
    """LLaVA's file of all three splits, labels from POPE's own files."""
    questions = read_llava(find_file(folder, "llava_pope_test.jsonl"), folder / "val2014")
    by_split: dict[str, list[Question]] = {}
    for question in questions:
        if not question.groups:
            raise SampleError(f"POPE's question {question.question_id} has no category")
        question = replace(question, groups=(question.groups[0].lower(),))
        by_split.setdefault(question.groups[0], []).append(question)
    labelled = {
        question.question_id: question
        for split, members in by_split.items()
        for question in _label_pope(members, _find_pope(folder, split))
    }
    return [labelled[question.question_id] for question in questions]


def _find_pope(folder: Path, split: str) -> Path:
    name = f"coco_pope_{split}.json"
    return find_file(folder, f"coco/{name}", name)


def _label_pope(questions: list[Question], path: Path) -> Iterator[Question]:
    """Pair questions and labels by their order where image and words agree, else by these."""
    rows = [_read_label(row, f"{path.name}, row {i}") for i, row in enumerate(read_jsonl(path), 1)]
    by_words = dict(rows)
    for i, question in enumerate(questions):
        key = _make_pope_key(question.cluster, question.text.removesuffix(SHORT))
        label = rows[i][1] if i < len(rows) and rows[i][0] == key else by_words.get(key)
        if label is None:
            raise SampleError(
                f"{path.name} has no label for POPE's question {question.question_id} "
                f"({key[0]}: {key[1]!r}): use the file of the same release"
            )
        yield replace(question, answers=(label,))


def _read_label(row: dict[str, Any], where: str) -> tuple[tuple[str, str], str]:
    """Return what is asked about which image, and the label, which some releases write as Yes."""
    label = get_text(row, "label", where).strip().strip(".").lower()
    if label not in ("yes", "no"):
        raise SampleError(f"{where}: the label is {row['label']!r}, and POPE's are yes and no")
    return _make_pope_key(get_text(row, "image", where), get_text(row, "text", where)), label


def _make_pope_key(image: str, text: str) -> tuple[str, str]:
    """The image, and the object that is asked about; releases write the rest in several ways."""
    text = " ".join(text.lower().split())
    match = _POPE_OBJECT.match(text)
    return image, match[1] if match else text


def read_mme(folder: Path) -> list[Question]:
    """LLaVA's file, answers from the benchmark's questions_answers_YN."""
    release = folder / "MME_Benchmark_release_version"
    answers = _read_mme_answers(release)
    questions = []
    for question in read_llava(find_file(folder, "llava_mme.jsonl"), release):
        subtask, _, name = question.source_id.rpartition("/")
        subtask = subtask.split("/")[0]
        key = (subtask, Path(name).stem, clean_mme_question(question.text))
        if key not in answers:
            raise SampleError(
                f"{release} has no answer for MME's question {question.question_id}: {key[2]!r}"
            )
        image = release / question.cluster
        if not image.exists():
            image = release / subtask / "images" / name
        questions.append(
            replace(
                question,
                images=(str(image),),
                answers=(answers[key],),
                groups=(subtask,),
                cluster=f"{subtask}/{Path(name).stem}",
            )
        )
    return questions


def clean_mme_question(text: str) -> str:
    """Return a question without what is said about the form of its answer."""
    return text.replace(SHORT.strip(), "").replace(MME_HINT, "").strip()


def _read_mme_answers(release: Path) -> dict[tuple[str, str, str], str]:
    answers: dict[tuple[str, str, str], str] = {}
    if not release.is_dir():
        raise ConfigError(f"{release} is missing: put MME's release there")
    for subtask in sorted(path for path in release.iterdir() if path.is_dir()):
        inner = subtask / "questions_answers_YN"
        for path in sorted((inner if inner.is_dir() else subtask).glob("*.txt")):
            for line in path.read_text(encoding="utf-8").split("\n"):
                if line.strip():
                    question, _, answer = line.strip().rpartition("\t")
                    key = (subtask.name, path.stem, clean_mme_question(question))
                    answers[key] = answer.strip().lower()
    return answers


def read_mme_results(path: Path) -> Iterator[tuple[Question, str | None]]:
    """Yield MME's questions from its per-task files, each with its response.

    A line is `image, question, right answer, response`, separated by tabs; lines after each other
    about the same image are a pair. Questions that are missing come last, with None: those of
    the release in the half (perception or cognition) of which there is any file.

    Raises:
        ConfigError: there is no such file.
        SampleError: a line is not of that form.
    """
    files = sorted(path.glob("*.txt")) if path.is_dir() else [path]
    if not files or not path.exists():
        raise ConfigError(f"there are no files of MME's (color.txt, ...) at {path}")
    num_read: Counter[str] = Counter()
    for file in files:
        pair, before = 0, ""
        for number, cells in enumerate(_read_mme_lines(file)):
            image, text, answer, response = cells
            if before == image:
                before = ""
            else:
                pair, before = pair + 1, image
            num_read[file.stem] += 1
            question = Question(
                f"{file.stem}/{image}/{number}",
                text,
                answers=(answer.strip().lower(),),
                groups=(file.stem,),
                cluster=f"{file.stem}/{pair}",
                source_id=f"{file.stem}/{image}",
            )
            yield question, response
    for half in (MME_PERCEPTION, MME_COGNITION):
        for name in half if num_read.keys() & set(half) else ():
            for i in range(num_read[name], MME_QUESTIONS[name]):
                yield Question(f"{name}/missing/{i}", "", answers=("",), groups=(name,)), None


def _read_mme_lines(file: Path) -> Iterator[list[str]]:
    text = file.read_bytes().decode("utf-8-sig", errors="surrogateescape")
    for number, line in enumerate(text.split("\n"), start=1):
        cells = line.removesuffix("\r").split("\t", 3)  # a response may hold tabs
        if len(cells) == 4:
            yield cells
        elif line.strip():
            raise SampleError(
                f"{file}, line {number}, has {len(cells)} columns: image, question, "
                "right answer and response are needed"
            )
