"""One's own questions: shards of samples (see `llava_ray.data`) or files of JSON lines.

In a shard the first user's turn is the question, with its images, and the turn after it the answer.

A line is an object of
    question_id  text or number, unique within the folder
    text         the question; `<image>` in it is left out
    answer       what is right: text, number, true or false, or a list of these
    image        path of the image, or a list of paths, relative to the folder of the file
    choices      the options' texts; `own_choice` writes them below the question as A, B, ...
    category     a group by which the score is broken down
of which `image`, `choices` and `category` may be absent.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from llava_ray.data.shards import ShardReader
from llava_ray.data.sources.building import LETTERS, write_options
from llava_ray.errors import ConfigError, SampleError
from llava_ray.evaluate.datasets.files import LETTER, get_field, get_text, read_json, read_jsonl
from llava_ray.evaluate.scoring.option_letter import read_option
from llava_ray.evaluate.scoring.text_match import normalize_text
from llava_ray.storage import open_folder
from llava_ray.template import IMAGE_TOKEN
from llava_ray.template.tokens import count_images, join_text
from llava_ray.types import Question, Sample

MIN_ANNOTATORS = 4
_OPTION_LINE = re.compile(r"\(?([A-Z])[.):]\s+(.*\S)")
_LETTER = re.compile(r"(\()?([A-Za-z])(?(1)\)|[.):]?)")
_URL = re.compile(r"[a-z][a-z0-9+]*://", re.IGNORECASE)


def read_own(folder: Path) -> list[Question]:
    """Questions as they stand."""
    return list(_read(folder, _keep))


def read_own_choice(folder: Path) -> list[Question]:
    """Questions with options, which are written below the question if they are not there.

    Right answers may be given as a letter, as `(B)`, as an option's text, or as its index from 0;
    they become letters.

    Raises:
        SampleError: a question has no options, or its answer is none of them.
    """
    return list(_read(folder, _ask_for_letter))


def read_own_vqa(folder: Path) -> list[Question]:
    """Questions with the answers of several annotators.

    Raises:
        SampleError: a question has fewer than four answers, with which no response could be right.
    """
    questions = list(_read(folder, _keep))
    for question in questions:
        if len(question.answers) < MIN_ANNOTATORS:
            raise SampleError(
                f"question {question.question_id} has {len(question.answers)} answers: VQA "
                "accuracy compares with those of several people, mostly ten; use own_exact"
            )
    return questions


Finish = Callable[[Question, tuple[Any, ...], str], Question]
"""Makes a task's question of a row: (question, answers as the row has them, where it stands)."""


def _read(folder: Path, finish: Finish) -> Iterator[Question]:
    shards = [path for path in sorted(folder.rglob("*.parquet")) if _is_shard(path, folder)]
    files = [folder] if folder.is_file() else sorted(folder.glob("*.jsonl"))
    if folder.suffix == ".parquet" and folder.is_file():
        shards, files = [folder], []
    if not shards and not files:
        raise ConfigError(
            f"{folder} has neither shards (.parquet) nor questions (.jsonl): give the folder that "
            "holds them with --data"
        )
    if shards and files:
        raise ConfigError(
            f"{folder} has both shards ({shards[0].name}) and questions ({files[0].name}): give "
            "the file of questions, or a folder of one kind, with --data"
        )
    num_questions = 0
    for path in shards:
        for question in _read_shard(path, finish):
            num_questions += 1
            yield question
    for path in files:
        for number, row in enumerate(_read_objects(path), start=1):
            num_questions += 1
            yield _read_row(row, path, f"{path.name}, row {number}", finish)
    if not num_questions:
        raise ConfigError(f"{folder} has no questions: its files are empty")


def _read_objects(path: Path) -> list[Any]:
    """Return the objects of a file of JSON lines, or of a JSON list."""
    if path.suffix != ".json":
        return read_jsonl(path)
    content = read_json(path)
    if not isinstance(content, list):
        raise ConfigError(f"{path} is no list of questions: write one, or an object on each line")
    return content


def _is_shard(path: Path, folder: Path) -> bool:
    """Whether a file of a converted folder holds samples, not what is known about them."""
    return "rejects" not in path.relative_to(folder).parts and not path.name.startswith("_")


def _read_shard(path: Path, finish: Finish) -> Iterator[Question]:
    reader = ShardReader(open_folder(str(path.parent)), path.name)
    try:
        for row, shard_row in enumerate(reader.rows()):
            yield _ask_sample(shard_row.sample, f"{path}#{row}", finish)
    finally:
        reader.close()


def _ask_sample(sample: Sample, place: str, finish: Finish) -> Question:
    turns = [message for message in sample.messages if message.role != "system"]
    if len(turns) < 2:
        raise SampleError(f"sample {sample.sample_id} ({place}) has no answer: leave it out")
    text, answer = join_text(turns[0]).strip(), join_text(turns[1])
    question = Question(
        sample.sample_id,
        text,
        tuple(f"{place}/{i}" for i in range(count_images(turns[:1]))),
        (answer,),
        find_options(text),
        source_id=sample.sample_id,
    )
    return _finish(question, (answer,), f"sample {sample.sample_id} ({place})", finish)


def _read_row(row: dict[str, Any], path: Path, where: str, finish: Finish) -> Question:
    question_id = get_text(row, "question_id", where)
    answers = get_field(row, "answer", where)
    given = tuple(answers) if isinstance(answers, list) else (answers,)
    text = get_text(row, "text", where).replace(IMAGE_TOKEN, "").strip()
    category = get_text(row, "category", where, default="")
    question = Question(
        question_id,
        text,
        tuple(_find_images(row, path.parent, where)),
        tuple(_write_answer(each, where) for each in given),
        _read_choices(row, where) or find_options(text),
        (category,) if category else (),
        source_id=question_id,
    )
    return _finish(question, given, where, finish)


def _finish(question: Question, given: tuple[Any, ...], where: str, finish: Finish) -> Question:
    if not any(answer.strip() for answer in question.answers):
        raise SampleError(f"{where}: the answer is empty, so no response could be right")
    return finish(question, given, where)


def _find_images(row: dict[str, Any], folder: Path, where: str) -> Iterator[str]:
    value = row.get("image")
    for each in value if isinstance(value, list) else [value]:
        image = get_text({"image": each}, "image", where, default="")
        if _URL.match(image):
            raise SampleError(
                f"{where}: the image {image[:80]!r} is an address: put the file beside the "
                "questions, and write its path"
            )
        if image:
            yield str(folder / image)


def _read_choices(row: dict[str, Any], where: str) -> tuple[str, ...]:
    choices = row.get("choices") or ()
    if isinstance(choices, dict):  # {"A": "cat", "B": "dog"}
        if list(choices) != list(LETTERS[: len(choices)]):
            raise SampleError(f"{where}: the keys of 'choices' are {list(choices)}, and not A, B")
        choices = list(choices.values())
    if not isinstance(choices, list | tuple) or len(choices) > len(LETTERS):
        raise SampleError(
            f"{where}: 'choices' is {str(choices)[:80]!r}: give a list of at most {len(LETTERS)}"
        )
    return tuple(_write_answer(each, where, "choices") for each in choices)


def _write_answer(value: Any, where: str, name: str = "answer") -> str:
    """Return an answer or option as text; true and false as yes and no would be a guess."""
    if isinstance(value, bool):
        return str(value).lower()
    return get_text({name: value}, name, where)


def find_options(text: str) -> tuple[str, ...]:
    """Return the options that a question lists, a line each: "A. cat", "(A) cat" or "A: cat"."""
    options: list[str] = []
    for line in text.split("\n"):
        match = _OPTION_LINE.fullmatch(line.strip())
        if match and match[1] == "A":
            options = [match[2]]
        elif match and options and match[1] == LETTERS[len(options) : len(options) + 1]:
            options.append(match[2])
    return tuple(options) if len(options) > 1 else ()


def _keep(question: Question, given: tuple[Any, ...], where: str) -> Question:
    return question


def _ask_for_letter(question: Question, given: tuple[Any, ...], where: str) -> Question:
    if len(question.choices) < 2:
        raise SampleError(
            f"{where} has no options: give `choices`, or write them below the question, a line "
            'each ("A. cat"); a question without options is for own_exact'
        )
    text = question.text
    if find_options(text) != question.choices:
        text = f"{text}\n{write_options(question.choices)}"
    if not text.endswith(LETTER.strip()):
        text += LETTER
    letters = dict.fromkeys(find_letter(each, question.choices, where) for each in given)
    return replace(question, text=text, answers=tuple(letters))


def find_letter(answer: Any, choices: tuple[str, ...], where: str) -> str:
    """Return the letter of the option that an answer names: as letter, text, or index from 0.

    Raises:
        SampleError: it names none, or two in different readings.
    """
    letters = LETTERS[: len(choices)]
    text = _write_answer(answer, where)
    equal = [i for i, each in enumerate(choices) if normalize_text(each) == normalize_text(text)]
    found = {letters[i] for i in equal}
    match = _LETTER.fullmatch(text.strip())
    if match and match[2].upper() in letters:
        is_marked = len(text.strip()) > 1  # "(B)" is a letter, whatever the options are called
        found = {match[2].upper()} if is_marked else found | {match[2].upper()}
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(choices):
        found.add(letters[answer])
    if not found and text.strip().isascii() and text.strip().isdigit():
        found = set(letters[int(text) : int(text) + 1])
    if not found and not isinstance(answer, int) and (letter := read_option(text, choices)):
        found = {letter}
    if len(found) == 1:
        return found.pop()
    problem = f"may be {' or '.join(sorted(found))}" if found else "is none of the options"
    raise SampleError(
        f"{where}: the answer {answer!r} {problem} {list(choices)}: give a letter as '(A)', an "
        "option's text, or its index, which counts from 0"
    )
