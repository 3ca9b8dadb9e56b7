"""ScienceQA (Lu et al. 2022): problems.json, pid_splits.json, images/{split}/{pid}/image.png.

A prompt format is `INPUT-OUTPUT`, letters for what stands where: Question, Context, Multiple
options, Lecture, Explanation, Answer; P is LLaVA's way to write lecture and explanation apart.
`CQM-A` is the form of LLaVA-1.5's evaluation; all others are those of LLaVA's converter, to the
letter.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from llava_ray.data.sources.building import (
    LETTERS,
    RawRow,
    Row,
    assistant,
    make_sample,
    user,
    write_options,
)
from llava_ray.data.sources.readers import find_one, read_json
from llava_ray.errors import ConfigError
from llava_ray.storage import Folder
from llava_ray.types import Sample

if TYPE_CHECKING:
    from llava_ray.config import ConvertConfig

DEFAULT_FORMAT = "QCM-LEA"
SHORT_FORMAT = "CQM-A"

INPUTS = {
    "CQM": "Context: {c}\nQuestion: {q}\nOptions: {o}\n",
    "QCM": "Question: {q}\nContext: {c}\nOptions: {o}\n",
    "QCML": "Question: {q}\nContext: {c}\nOptions: {o}\nBECAUSE: {l}\n",
    "QCME": "Question: {q}\nContext: {c}\nOptions: {o}\nBECAUSE: {e}\n",
    "QCMLE": "Question: {q}\nContext: {c}\nOptions: {o}\nBECAUSE: {l} {e}\n",
    "QCLM": "Question: {q}\nContext: {c}\nBECAUSE: {l}\nOptions: {o}\n",
    "QCEM": "Question: {q}\nContext: {c}\nBECAUSE: {e}\nOptions: {o}\n",
    "QCLEM": "Question: {q}\nContext: {c}\nBECAUSE: {l} {e}\nOptions: {o}\n",
}
# In AL, AE, ALE and AEL LLaVA's converter has lecture and explanation the other way round.
OUTPUTS = {
    "A": "Answer: The answer is {a}.",
    "AL": "Answer: The answer is {a}. BECAUSE: {e}",
    "AE": "Answer: The answer is {a}. BECAUSE: {l}",
    "ALE": "Answer: The answer is {a}. BECAUSE: {l} {e}",
    "AEL": "Answer: The answer is {a}. BECAUSE: {e} {l}",
    "LA": "Answer: {l} The answer is {a}.",
    "EA": "Answer: {e} The answer is {a}.",
    "LEA": "Answer: {l} {e} The answer is {a}.",
    "ELA": "Answer: {e} {l} The answer is {a}.",
    "LEPA": "{lecture_line}{solution_line}###\nANSWER: {a}.",
}


def read_scienceqa(folder: Folder, names: list[str], config: "ConvertConfig") -> Iterator[RawRow]:
    """Yield the problems of a split, in its order."""
    wanted = config.prompt_format or DEFAULT_FORMAT
    _check_format(wanted)
    problems = read_json(folder, find_one(folder, names, "problems.json"))
    splits = read_json(folder, find_one(folder, names, "pid_splits.json"))
    split = config.split or "train"
    if split not in splits:
        raise ConfigError(f"split={split!r}: pid_splits.json has {', '.join(splits)}")
    for i, pid in enumerate(splits[split]):
        row = {**problems.get(pid, {}), "id": pid, "format": wanted}
        yield RawRow(f"pid_splits.json {split}[{i}]", row)


def convert_scienceqa(row: Row) -> Sample:
    """Return the sample of a problem, with its `id` and the prompt `format` put to it."""
    images = [f"{row['split']}/{row['id']}/{row['image']}"] if row["image"] else []
    write = _write_short if row["format"] == SHORT_FORMAT else _write_long
    question, answer = write(row)
    return make_sample("scienceqa", row["id"], (user(question), assistant(answer)), *images)


def _write_short(row: Row) -> tuple[str, str]:
    lines = ["<image>"] if row["image"] else []
    if row["hint"]:
        lines.append(f"Context: {row['hint']}")
    lines += [row["question"], write_options(row["choices"])]
    return "\n".join(lines), LETTERS[row["answer"]]


def _write_long(row: Row) -> tuple[str, str]:
    lecture, solution = (row[name].replace("\\n", "\n") for name in ("lecture", "solution"))
    pieces = {
        "q": row["question"],
        "c": row["hint"].strip() or "N/A",
        "o": " ".join(f"({LETTERS[i]}) {choice}" for i, choice in enumerate(row["choices"])),
        "l": lecture,
        "e": solution,
        "a": LETTERS[row["answer"]],
        "lecture_line": f"LECTURE: {lecture}\n" if lecture.strip() else "",
        "solution_line": f"SOLUTION: {solution}\n" if solution.strip() else "",
    }
    asked, answered = row["format"].split("-")
    question = _tidy(INPUTS[asked].format(**pieces), "Question: ")
    answer = _tidy(OUTPUTS[answered].format(**pieces), "Answer: ")
    return question + ("\n<image>" if row["image"] else ""), answer


def _tidy(text: str, label: str) -> str:
    """Do what LLaVA's converter does to a finished text; every `label` goes if it begins so."""
    text = text.replace("  ", " ").strip()
    if text.endswith("BECAUSE:"):
        text = text.replace("BECAUSE:", "").strip()
    return text.replace(label, "") if text.startswith(label) else text


def _check_format(wanted: str) -> None:
    asked, _, answered = wanted.partition("-")
    if asked not in INPUTS or answered not in OUTPUTS:
        raise ConfigError(
            f"prompt_format={wanted!r}: write INPUT-OUTPUT, such as {DEFAULT_FORMAT}, with one of "
            f"{', '.join(INPUTS)} and one of {', '.join(OUTPUTS)}"
        )
