"""The files that the benchmarks' servers take, as LLaVA's scripts write them."""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llava_ray.errors import MissingPackageError, SampleError, UserError
from llava_ray.evaluate.datasets.choice import find_mmbench
from llava_ray.evaluate.datasets.files import get_field, read_jsonl
from llava_ray.evaluate.datasets.tsv import read_rows
from llava_ray.evaluate.output_files import write_json, write_json_lines
from llava_ray.evaluate.scoring.vqa_normalize import normalize_answer
from llava_ray.storage import open_folder
from llava_ray.types import Prediction, Question

Submit = Callable[[Sequence[Question], Mapping[str, str], Path, Path], Path]
_MMBENCH_LEFT_OUT = ("hint", "category", "source", "image", "comment", "l2-category")
_MMBENCH_COLUMN = 6
_MAX_CELL = 32_767
_NOT_IN_XML = re.compile("[\x00-\x08\x0b-\x1f\ud800-\udfff\ufffe\uffff]|_(?=x[0-9A-Fa-f]{4}_)")
"""What a cell holds as `_xHHHH_` only, and an underscore that would be read as the start of one."""


def write_submission(
    write: Submit,
    questions: Sequence[Question],
    predictions: Mapping[str, Prediction],
    folder: Path,
    path: Path,
) -> tuple[str, str]:
    """Write the file for a benchmark's server.

    Args:
        write: writes this benchmark's.
        questions: that were asked.
        predictions: by question id.
        folder: of the benchmark's files.
        path: of the file, without its suffix.

    Returns:
        the path of the file and ""; or "" and why there is none.
    """
    responses = {i: p.text for i, p in predictions.items() if p.status == "answered"}
    if not responses:
        return "", "there are no responses"
    try:
        return str(write(questions, responses, folder, path)), ""
    except UserError as error:
        return "", error.message


def write_vqav2(
    questions: Sequence[Question], responses: Mapping[str, str], folder: Path, path: Path
) -> Path:
    """EvalAI's VQAv2: every question of test2015, with "" where it was not asked."""
    whole = folder / "llava_vqav2_mscoco_test2015.jsonl"
    rows = read_jsonl(whole) if whole.is_file() else []
    ids = [get_field(row, "question_id", whole.name) for row in rows] or [
        _number(q.source_id) for q in questions
    ]
    answers = [
        {"question_id": i, "answer": normalize_answer(responses.get(str(i), ""))} for i in ids
    ]
    return _write_json(path, answers)


def write_gqa(
    questions: Sequence[Question], responses: Mapping[str, str], folder: Path, path: Path
) -> Path:
    """The predictions that GQA's own eval.py reads."""
    answers = [
        {"questionId": q.source_id, "prediction": responses[q.question_id].rstrip(".").lower()}
        for q in questions
        if q.question_id in responses
    ]
    return _write_json(path, answers)


def write_vizwiz(
    questions: Sequence[Question], responses: Mapping[str, str], folder: Path, path: Path
) -> Path:
    """EvalAI's VizWiz.

    Raises:
        SampleError: a question has no response; the server wants them all.
    """
    if missing := [q.question_id for q in questions if q.question_id not in responses]:
        raise SampleError(
            f"{len(missing)} questions of VizWiz have no response ({missing[0]}, ...), and its "
            "server wants all: run the same command again"
        )
    answers = [
        {"image": Path(str(q.images[0])).name, "answer": normalize_answer(responses[q.question_id])}
        for q in questions
    ]
    return _write_json(path, answers)


def write_mmbench(
    questions: Sequence[Question], responses: Mapping[str, str], folder: Path, path: Path
) -> Path:
    """MMBench's xlsx: the TSV without some columns and with one of predictions.

    Raises:
        MissingPackageError: openpyxl is not installed.
    """
    try:
        from openpyxl import Workbook
    except ImportError as error:
        raise MissingPackageError(
            "xlsx files need a package that is not installed: pip install 'llava-ray[eval]'"
        ) from error
    from openpyxl.cell import WriteOnlyCell

    rows: list[list[int | str]] = []
    for _, row in read_rows(find_mmbench(folder, "cn" if "mmbench_cn" in path.name else "en")):
        names = [name for name in row if name not in _MMBENCH_LEFT_OUT]
        names.insert(min(_MMBENCH_COLUMN, len(names)), "prediction")
        if not rows:
            rows.append([*names])
        row["prediction"] = responses.get(row["index"], "")
        texts = {name: _write_cell(row[name], row["index"]) for name in names}
        rows.append([_number(texts[name]) if name == "index" else texts[name] for name in names])
    book = Workbook(write_only=True)
    sheet = book.create_sheet("Sheet1")
    for row in rows:
        cells = [WriteOnlyCell(sheet, value=value or None) for value in row]
        for cell in cells:
            if isinstance(cell.value, str):
                cell.data_type = "s"  # a text that begins with = is no formula
        sheet.append(cells)
    with open_folder(str(path.parent)).write_beside(f"{path.name}.xlsx") as scratch:
        book.save(scratch)
    return path.with_name(f"{path.name}.xlsx")


def _write_cell(text: str, index: str) -> str:
    """Return a text as a cell holds it, its control characters escaped as in Excel's own files.

    Raises:
        SampleError: it is longer than a cell can be.
    """
    text = _NOT_IN_XML.sub(lambda match: f"_x{ord(match[0]):04X}_", text)
    if len(text) > _MAX_CELL:
        raise SampleError(
            f"a text of MMBench's question {index} has {len(text)} characters, and a cell of its "
            f"xlsx file holds {_MAX_CELL}: ask again with a lower limit of tokens"
        )
    return text


def write_mmvet(
    questions: Sequence[Question], responses: Mapping[str, str], folder: Path, path: Path
) -> Path:
    """MM-Vet's `v1_ID: response`."""
    found = {
        f"v1_{q.source_id}": responses[q.question_id]
        for q in questions
        if q.question_id in responses
    }
    return _write_json(path, found)


def write_seed(
    questions: Sequence[Question], responses: Mapping[str, str], folder: Path, path: Path
) -> Path:
    """SEED-Bench's lines of `question_id` and `prediction`."""
    lines = [
        {"question_id": q.source_id, "prediction": responses[q.question_id]}
        for q in questions
        if q.question_id in responses
    ]
    return write_json_lines(path.with_name(f"{path.name}.jsonl"), lines)


def _write_json(path: Path, content: Any) -> Path:
    return write_json(path.with_name(f"{path.name}.json"), content)


def _number(text: str) -> int | str:
    return int(text) if text.isdigit() else text
