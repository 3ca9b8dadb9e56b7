"""ScienceQA (Lu et al. 2022): problems.json, pid_splits.json, images/{split}/{pid}/image.png.

A prompt format is `INPUT-OUTPUT`. Its letters give the order of the parts: Question, Context,
Multiple options, Lecture, Explanation, Answer; P writes lecture and explanation in sections of
their own. `CQM-A` is the format of LLaVA-1.5's evaluation; all others are exactly those of LLaVA's
converter.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from llava_ray.data.sources.building import (
    LETTERS,
    RawRow,
    Row,
    assistant,
    describe,
    make_raw_row,
    make_sample,
    pick_letter,
    read_text,
    user,
    write_options,
)
from llava_ray.data.sources.readers import find_one, read_json_object
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
# In AL, AE, ALE and AEL, LLaVA's converter swaps lecture and explanation.
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
    """Yield the problems of a split, in the order of the split."""
    wanted = config.prompt_format or DEFAULT_FORMAT
    _check_format(wanted)
    problems = read_json_object(folder, find_one(folder, names, "problems.json"))
    splits = read_json_object(folder, find_one(folder, names, "pid_splits.json"))
    split = config.split or "train"
    if split not in splits:
        raise ConfigError(f"split={split!r}: pid_splits.json has {', '.join(splits)}")
    if not isinstance(splits[split], list):
        raise ConfigError(f"{split!r} of pid_splits.json is {describe(splits[split])}, not a list")
    for i, pid in enumerate(splits[split]):
        yield make_raw_row(
            f"pid_splits.json {split}[{i}]",
            lambda pid=pid: {**problems[pid], "id": pid, "format": wanted},
        )


def convert_scienceqa(row: Row) -> Sample:
    """Return the sample of a problem; the reader added its `id` and the prompt `format`."""
    images = [f"{row['split']}/{row['id']}/{row['image']}"] if row["image"] else []
    write = _write_short if row["format"] == SHORT_FORMAT else _write_long
    read_text(row["question"], "the question")
    question, answer = write(row)
    return make_sample("scienceqa", row["id"], (user(question), assistant(answer)), *images)


def _write_short(row: Row) -> tuple[str, str]:
    lines = ["<image>"] if row["image"] else []
    if row["hint"]:
        lines.append(f"Context: {row['hint']}")
    lines += [row["question"], write_options(row["choices"])]
    return "\n".join(lines), pick_letter(row["answer"], row["choices"])


def _write_long(row: Row) -> tuple[str, str]:
    answer = pick_letter(row["answer"], row["choices"])
    lecture, solution = (row[name].replace("\\n", "\n") for name in ("lecture", "solution"))
    pieces = {
        "q": row["question"],
        "c": row["hint"].strip() or "N/A",
        "o": " ".join(f"({LETTERS[i]}) {choice}" for i, choice in enumerate(row["choices"])),
        "l": lecture,
        "e": solution,
        "a": answer,
        "lecture_line": f"LECTURE: {lecture}\n" if lecture.strip() else "",
        "solution_line": f"SOLUTION: {solution}\n" if solution.strip() else "",
    }
    asked, answered = row["format"].split("-")
    question = _tidy(INPUTS[asked].format(**pieces), "Question: ")
    answer = _tidy(OUTPUTS[answered].format(**pieces), "Answer: ")
    return question + ("\n<image>" if row["image"] else ""), answer


def _tidy(text: str, label: str) -> str:
    """Do what LLaVA's converter does to a finished text.

    If the text begins with `label`, each `label` in it is removed.
    """
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
