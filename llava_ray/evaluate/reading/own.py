"""One's own questions: shards of samples (Parquet, see `llava_ray.data`) or a JSONL file.

In a shard the first user's turn is the question and the turn after it the answer. A JSONL line has
`question_id`, `text`, `answer` (a text or a list), and if need be `image`, `choices`, `category`.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llava_ray.errors import ConfigError, SampleError
from llava_ray.evaluate.reading.files import LETTER, field, list_options, read_jsonl
from llava_ray.types import Question


def read_own(folder: Path) -> list[Question]:
    """Questions as they stand."""
    return list(_read(folder, suffix=""))


def read_own_choice(folder: Path) -> list[Question]:
    """Questions with options: those of `choices` are written below the question."""
    return list(_read(folder, suffix=LETTER))


def read_own_vqa(folder: Path) -> list[Question]:
    """Questions with the answers of several annotators.

    Raises:
        SampleError: a question has fewer than four answers, with which no reply could be right.
    """
    questions = list(_read(folder, suffix=""))
    for question in questions:
        if len(question.answers) < 4:
            raise SampleError(
                f"question {question.question_id} has {len(question.answers)} answers: VQA "
                "accuracy compares with those of several people, mostly ten; use own_exact"
            )
    return questions


def _read(folder: Path, *, suffix: str) -> Iterator[Question]:
    shards = sorted(folder.rglob("*.parquet")) if folder.is_dir() else []
    shards = [path for path in shards if "rejects" not in path.parts]
    files = [folder] if folder.is_file() else sorted(folder.glob("*.jsonl"))
    if not shards and not files:
        raise ConfigError(f"{folder} has neither shards (.parquet) nor questions (.jsonl)")
    for path in shards:
        yield from _read_shard(path)
    for path in [] if shards else files:
        for number, row in enumerate(read_jsonl(path), start=1):
            yield _read_row(row, path, f"{path.name}, line {number}", suffix)


def _read_shard(path: Path) -> Iterator[Question]:
    import pyarrow.parquet as pq

    row = 0
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(columns=["id", "messages", "num_images"]):
            for each in batch.to_pylist():
                turns = [m for m in each["messages"] if m["role"] != "system"]
                if len(turns) < 2:
                    raise SampleError(f"{path.name}, sample {each['id']}, has no answer")
                text = turns[0]["text"].replace("<image>", "").strip()
                pictures = tuple(f"{path}#{row}/{i}" for i in range(each["num_images"] or 0))
                yield Question(
                    each["id"],
                    text,
                    pictures,
                    (turns[1]["text"],),
                    _find_options(text),
                    source_id=each["id"],
                )
                row += 1


def _find_options(text: str) -> tuple[str, ...]:
    """The options in lines "A. ..." of a question."""
    lines = [line for line in text.split("\n") if line[1:3] == ". " and line[:1].isupper()]
    is_list = [line[0] for line in lines] == [chr(65 + i) for i in range(len(lines))]
    return tuple(line[3:] for line in lines) if is_list else ()


def _read_row(row: dict[str, Any], path: Path, where: str, suffix: str) -> Question:
    answer = field(row, "answer", where)
    choices = tuple(row.get("choices", ()))
    text = field(row, "text", where)
    if suffix and choices:
        text = f"{text}\n{list_options(choices)}{suffix}"
    question_id = str(field(row, "question_id", where))
    return Question(
        question_id,
        text,
        (str(path.parent / row["image"]),) if row.get("image") else (),
        tuple(answer) if isinstance(answer, list) else (str(answer),),
        choices or _find_options(text),
        (row["category"],) if row.get("category") else (),
        source_id=question_id,
    )
