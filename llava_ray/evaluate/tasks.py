"""The tasks: one `Task` for each benchmark, under the name that lmms-eval has for it.

Prompts come from the benchmarks' files or are made by `datasets`. Decoding is greedy, as in
LLaVA-1.5.
"""

import csv
import difflib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from llava_ray.errors import ConfigError, SampleError
from llava_ray.evaluate import submission
from llava_ray.evaluate.datasets import choice, judged, open_answer, own, yes_no
from llava_ray.evaluate.scoring import judge as judges
from llava_ray.evaluate.scoring import metrics, scorers
from llava_ray.evaluate.scoring.captions import score_captions, summarize_captions
from llava_ray.evaluate.scoring.metrics import Summary
from llava_ray.types import Question, Sampling, Score

Scorer = Callable[[Question, str], Score]
_MISSHAPEN = (KeyError, IndexError, TypeError, ValueError, AttributeError, csv.Error)


@dataclass(frozen=True)
class Task:
    """A benchmark.

    Attributes:
        name: lmms-eval's name for it.
        folder: name of its folder within the folder of all benchmarks.
        other_folders: further names that this folder may have.
        needs_all: its numbers mean nothing unless every question is scored.
        read: reads the questions from the benchmark's files.
        keep: selects the questions that are asked; by default all.
        score: scores one response; None if only a server knows the answers, or a judge grades.
        score_together: scores all responses at once, where one's score depends on the others.
        summarize: computes the task's metrics; the first is the headline.
        max_tokens: longest response, in tokens.
        judge: how another model grades the responses.
        submit: writes the file that the benchmark's server takes: (questions, responses by id,
            folder of the task, path without suffix) -> the file.
    """

    name: str
    folder: str
    read: Callable[[Path], list[Question]]
    keep: Callable[[Question], bool] | None = None
    score: Scorer | None = None
    score_together: Callable[[Sequence[Question], Sequence[str]], list[Score]] | None = None
    summarize: Summary = metrics.summarize_accuracy
    max_tokens: int = 128
    judge: judges.Judge | None = None
    submit: submission.Submit | None = None
    other_folders: tuple[str, ...] = ()
    needs_all: bool = False

    @property
    def sampling(self) -> Sampling:
        return Sampling(max_tokens=self.max_tokens, temperature=0)

    def read_all(self, data: Path) -> list[Question]:
        """Return the questions of the benchmark's files, also those that this task leaves out.

        Raises:
            ConfigError: a file is missing or of another kind.
            SampleError: a row of it is.
        """
        folder = self.find_folder(data)
        try:
            questions = [_as_texts(question) for question in self.read(folder)]
        except _MISSHAPEN as error:
            raise SampleError(
                f"the files of {self.name} in {folder} are not of the form that this benchmark has "
                f"({type(error).__name__}: {error}): get them again"
            ) from error
        counts = Counter(question.question_id for question in questions)
        if repeated := [name for name, number in counts.items() if number > 1]:
            raise ConfigError(
                f"{self.name} has {len(questions)} questions but {len(counts)} ids: make them "
                f"unique ({repeated[0]!r} is there {counts[repeated[0]]} times)"
            )
        return questions

    def select(self, questions: Sequence[Question]) -> list[Question]:
        """Return the questions that this task asks."""
        return [each for each in questions if self.keep is None or self.keep(each)]

    def find_folder(self, data: Path) -> Path:
        """The task's folder in that of all benchmarks, or that folder if it is the task's own."""
        folders = (data / name for name in (self.folder, *self.other_folders))
        return next((folder for folder in folders if folder.is_dir()), data)


def _as_texts(question: Question) -> Question:
    """Return a question whose fields are texts; numbers in a benchmark's files are written out."""
    texts = {
        name: tuple(_as_text(value, name) for value in getattr(question, name))
        for name in ("images", "answers", "choices", "groups")
    }
    return replace(
        question,
        text=_as_text(question.text, "question"),
        cluster=_as_text(question.cluster, "image"),
        context=_as_text(question.context, "context"),
        **texts,
    )


def _as_text(value: object, name: str) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise TypeError(f"{name} is {str(value)[:80]!r}")
    return str(value)


_ALL = (
    Task("vqav2_val", "vqav2", open_answer.read_vqav2_val, score=scorers.score_vqa),
    Task("vqav2_test", "vqav2", open_answer.read_vqav2_test, submit=submission.write_vqav2),
    Task("gqa", "gqa", open_answer.read_gqa, score=scorers.score_gqa, submit=submission.write_gqa),
    Task("vizwiz_vqa_val", "vizwiz", open_answer.read_vizwiz_val, score=scorers.score_vqa),
    Task("vizwiz_vqa_test", "vizwiz", open_answer.read_vizwiz_test, submit=submission.write_vizwiz),
    Task(
        "scienceqa",
        "scienceqa",
        choice.read_scienceqa,
        score=scorers.score_scienceqa,
        max_tokens=1024,
    ),
    Task(
        "scienceqa_img",
        "scienceqa",
        choice.read_scienceqa,
        keep=lambda question: bool(question.images),
        score=scorers.score_scienceqa,
        max_tokens=1024,
    ),
    Task("textvqa_val", "textvqa", open_answer.read_textvqa, score=scorers.score_textvqa),
    Task(
        "pope",
        "pope",
        yes_no.read_pope,
        score=scorers.score_pope,
        summarize=metrics.summarize_pope,
    ),
    Task(
        "mme",
        "MME",
        yes_no.read_mme,
        score=scorers.score_mme,
        summarize=metrics.summarize_mme,
        needs_all=True,
    ),
    Task(
        "mmbench_en_dev",
        "mmbench",
        choice.read_mmbench_en,
        score=scorers.score_choice,
        summarize=metrics.summarize_circular,
        max_tokens=1024,
        submit=submission.write_mmbench,
    ),
    Task(
        "mmbench_cn_dev",
        "mmbench_cn",
        choice.read_mmbench_cn,
        other_folders=("mmbench",),
        score=scorers.score_choice,
        summarize=metrics.summarize_circular,
        max_tokens=1024,
        submit=submission.write_mmbench,
    ),
    Task(
        "seedbench",
        "seed_bench",
        choice.read_seedbench,
        score=scorers.score_letter,
        submit=submission.write_seed,
    ),
    Task(
        "llava_in_the_wild",
        "llava-bench-in-the-wild",
        judged.read_llava_bench,
        summarize=metrics.summarize_reviews,
        max_tokens=1024,
        judge=judges.REVIEW,
    ),
    Task(
        "mmvet",
        "mm-vet",
        judged.read_mmvet,
        other_folders=("mmvet",),
        max_tokens=1024,
        judge=judges.GRADING,
        submit=submission.write_mmvet,
    ),
    Task("qbench", "qbench", choice.read_qbench, score=scorers.score_choice, max_tokens=1024),
    Task(
        "coco2014_cap_val",
        "coco",
        judged.read_coco2014,
        score_together=score_captions,
        summarize=summarize_captions,
        max_tokens=64,
    ),
    Task(
        "coco2017_cap_val",
        "coco",
        judged.read_coco2017,
        score_together=score_captions,
        summarize=summarize_captions,
        max_tokens=64,
    ),
    Task("own_exact", "", own.read_own, score=scorers.score_exact),
    Task("own_contains", "", own.read_own, score=scorers.score_contains, max_tokens=512),
    Task("own_choice", "", own.read_own_choice, score=scorers.score_choice),
    Task("own_vqa", "", own.read_own_vqa, score=scorers.score_textvqa),
)
TASKS = {task.name: task for task in _ALL}


def find_tasks(names: Sequence[str]) -> list[Task]:
    """Return the tasks of these names.

    Raises:
        ConfigError: there is no such task.
    """
    for name in names:
        if name not in TASKS:
            close = difflib.get_close_matches(name, TASKS, n=1)
            hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(TASKS)}"
            raise ConfigError(f"no task is called {name!r}: {hint}")
    return [TASKS[name] for name in names]
