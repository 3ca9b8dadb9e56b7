"""One's own questions: shards of samples (see `llava_ray.data`) or files of JSON lines.

In a shard the first user's turn is the question and the turn after it the answer. A line has
`question_id`, `text`, `answer` (a text or a list), and if need be `image`, `choices`, `category`.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llava_ray.data.shards import ShardReader
from llava_ray.data.sources.building import LETTERS, write_options
from llava_ray.errors import ConfigError, SampleError
from llava_ray.evaluate.datasets.files import LETTER, get_field, read_jsonl
from llava_ray.storage import open_folder
from llava_ray.template.tokens import count_images, join_text
from llava_ray.types import Question, Sample

MIN_ANNOTATORS = 4


def read_own(folder: Path) -> list[Question]:
    """Questions as they stand."""
    return list(_read(folder, suffix=""))


def read_own_choice(folder: Path) -> list[Question]:
    """Questions with options: those of `choices` are written below the question."""
    return list(_read(folder, suffix=LETTER))


def read_own_vqa(folder: Path) -> list[Question]:
    """Questions with the answers of several annotators.

    Raises:
        SampleError: a question has fewer than four answers, with which no response could be right.
    """
    questions = list(_read(folder, suffix=""))
    for question in questions:
        if len(question.answers) < MIN_ANNOTATORS:
            raise SampleError(
                f"question {question.question_id} has {len(question.answers)} answers: VQA "
                "accuracy compares with those of several people, mostly ten; use own_exact"
            )
    return questions


def _read(folder: Path, *, suffix: str) -> Iterator[Question]:
    shards = [path for path in sorted(folder.rglob("*.parquet")) if _is_shard(path)]
    files = [folder] if folder.is_file() else sorted(folder.glob("*.jsonl"))
    if not shards and not files:
        raise ConfigError(
            f"{folder} has neither shards (.parquet) nor questions (.jsonl): give the folder that "
            "holds them with --data"
        )
    for path in shards:
        yield from _read_shard(path, suffix)
    for path in [] if shards else files:
        for number, row in enumerate(read_jsonl(path), start=1):
            yield _read_row(row, path, f"{path.name}, row {number}", suffix)


def _is_shard(path: Path) -> bool:
    """Whether a file of a converted folder holds samples, not what is told of them."""
    return "rejects" not in path.parts and not path.name.startswith("_")


def _read_shard(path: Path, suffix: str) -> Iterator[Question]:
    reader = ShardReader(open_folder(str(path.parent)), path.name)
    for row, shard_row in enumerate(reader.rows()):
        yield _ask_sample(shard_row.sample, f"{path}#{row}", suffix)
    reader.close()


def _ask_sample(sample: Sample, place: str, suffix: str) -> Question:
    turns = [message for message in sample.messages if message.role != "system"]
    if len(turns) < 2:
        raise SampleError(f"sample {sample.sample_id} ({place}) has no answer: leave it out")
    text = join_text(turns[0]).strip()
    options = _find_options(text)
    is_told = not suffix or not options or text.endswith(suffix.strip())
    return Question(
        sample.sample_id,
        text if is_told else text + suffix,
        tuple(f"{place}/{i}" for i in range(count_images(turns[:1]))),
        (join_text(turns[1]),),
        options,
        source_id=sample.sample_id,
    )


def _find_options(text: str) -> tuple[str, ...]:
    """The options in lines "A. ..." of a question."""
    lines = [line for line in text.split("\n") if line[1:3] == ". " and line[:1].isupper()]
    is_list = [line[0] for line in lines] == list(LETTERS[: len(lines)])
    return tuple(line[3:] for line in lines) if is_list else ()


def _read_row(row: dict[str, Any], path: Path, where: str, suffix: str) -> Question:
    answer = get_field(row, "answer", where)
    choices = tuple(map(str, row.get("choices", ())))
    text = get_field(row, "text", where)
    if suffix and choices:
        text = f"{text}\n{write_options(choices)}{suffix}"
    question_id = str(get_field(row, "question_id", where))
    return Question(
        question_id,
        text,
        (str(path.parent / row["image"]),) if row.get("image") else (),
        tuple(map(str, answer)) if isinstance(answer, list) else (str(answer),),
        choices or _find_options(text),
        (row["category"],) if row.get("category") else (),
        source_id=question_id,
    )
