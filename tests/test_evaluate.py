"""Evaluation: scorers to the letter, files from elsewhere, and runs that resume."""

import json
from pathlib import Path

import pytest

from llava_ray.config import EvaluateConfig
from llava_ray.errors import ConfigError, SampleError
from llava_ray.evaluate import judge, scorers
from llava_ray.evaluate.answers import normalize_answer
from llava_ray.evaluate.rescore import score_file
from llava_ray.evaluate.tasks import TASKS, find_tasks
from llava_ray.types import Question


def write_lines(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("Two dogs.", "2 dogs"),
        ("The U.S.A.", "usa"),
        ("1,000", "1000"),
        ("3.5 feet", "3.5 feet"),
        ("dont know", "don't know"),
        ("somebody'd", "somebodyd"),
        ("black-white", "black white"),
        ("black - white", "black white"),
        ("it's", "it 's"),
        ("none", "0"),
    ],
)
def test_an_answer_is_normalized_as_evalai_does(text: str, form: str) -> None:
    assert normalize_answer(text) == form


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("B", "B"),
        ("B. dog", "B"),
        ("So. The answer is B.", "B"),
        ("b", "FAILED"),
        ("Bdog", "FAILED"),
    ],
)
def test_scienceqa_reads_a_letter_as_the_original_does(text: str, parsed: str) -> None:
    question = Question("1", "?", answers=("B",), choices=("cat", "dog"))
    assert scorers.score_scienceqa(question, text).answer == parsed
    assert scorers.score_scienceqa(question, "D").value == 0


def test_a_period_at_the_end_of_either_side_is_no_difference() -> None:
    for right in ("Yes.", "yes"):
        assert scorers.score_exact(Question("1", "?", answers=(right,)), "Yes.").value == 1


def test_vqa_accuracy_leaves_each_annotator_out_once() -> None:
    question = Question("1", "?", answers=("red",) * 3 + ("blue",) * 7)
    assert scorers.score_textvqa(question, "Red").value == pytest.approx((3 * 2 / 3 + 7) / 10)
    assert scorers.score_vqa(question, "blue.").value == 1


def test_a_verdict_that_cannot_be_read_is_no_score() -> None:
    question = Question("1", "?", answers=("x",))
    assert judge.score_review(question, "8 7\nbecause").figures == (8, 7)
    assert judge.score_review(question, "both are fine").value is None
    assert judge.score_grading(question, "0.5 ").value == 0.5
    assert judge.score_grading(question, "7").value is None


def make_pope(folder: Path) -> Path:
    """POPE in LLaVA's layout, two splits of four questions."""
    questions, labels = [], ["yes", "no", "yes", "no"]
    for split in ("random", "popular"):
        rows = [
            {"question_id": i, "image": f"{i}.jpg", "text": f"Is there a dog {i}?", "label": label}
            for i, label in enumerate(labels)
        ]
        write_lines(folder / "pope" / "coco" / f"coco_pope_{split}.json", rows)
        for row in rows:
            suffix = "\nAnswer the question using a single word or phrase."
            number = len(questions)
            text = row["text"] + suffix
            questions.append(
                {"question_id": number, "image": row["image"], "text": text, "category": split}
            )
    write_lines(folder / "pope" / "llava_pope_test.jsonl", questions)
    return folder


def test_popes_answer_file_gives_its_numbers(tmp_path: Path) -> None:
    replies = ["Yes", "No", "No, there is not.", "Yes", "yes", "no", "yes", "no"]
    rows = [{"question_id": i, "text": text} for i, text in enumerate(replies)]
    path = write_lines(tmp_path / "answers.jsonl", rows)
    result = score_file(TASKS["pope"], path, make_pope(tmp_path), min_coverage=0.99)
    assert result.metrics["random/f1"].value == pytest.approx(50)
    assert result.metrics["popular/accuracy"].value == 100
    assert result.headline is not None
    assert result.headline[0] == "f1"
    assert result.headline[1].value == pytest.approx(75)


def test_too_few_answers_give_no_headline_and_are_not_wrong(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "answers.jsonl", [{"question_id": 0, "text": "yes"}])
    result = score_file(TASKS["pope"], path, make_pope(tmp_path), min_coverage=0.99)
    assert result.headline is None
    assert result.metrics["accuracy"].value == 100
    assert result.statuses == {"answered": 1, "missing": 7}


def test_a_reply_to_no_question_is_named(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "answers.jsonl", [{"question_id": 77, "text": "yes"}])
    with pytest.raises(SampleError, match="a reply for 77"):
        score_file(TASKS["pope"], path, make_pope(tmp_path), min_coverage=0.99)


def test_mmes_files_need_nothing_else(tmp_path: Path) -> None:
    lines = ["a.jpg\tq1\tYes\tYes", "a.jpg\tq2\tNo\tNo", "b.jpg\tq1\tYes\tno", "b.jpg\tq2\tNo\tNo"]
    (tmp_path / "color.txt").write_text("\n".join(lines) + "\n")
    result = score_file(TASKS["mme"], tmp_path, tmp_path, min_coverage=0.99)
    assert result.metrics["perception"].value == pytest.approx(75 + 50)
    assert result.metrics["cognition"].value == 0


def test_mmbench_counts_a_question_once_and_only_if_all_turns_are_right(tmp_path: Path) -> None:
    lines = ["index\tquestion\thint\tA\tB\tcategory\timage\tanswer"]
    for index, answer in ((1, "A"), (1_000_001, "B"), (2, "A")):
        lines.append(f"{index}\twhat?\tnan\tx\ty\tocr\taGk=\t{answer}")
    (tmp_path / "mmbench_dev_20230712.tsv").write_text("\n".join(lines) + "\n")
    rows = [{"question_id": i, "text": "A"} for i in (1, 1_000_001, 2)]
    path = write_lines(tmp_path / "answers.jsonl", rows)
    result = score_file(TASKS["mmbench_en_dev"], path, tmp_path, min_coverage=0.99)
    assert result.metrics["accuracy"].value == 50
    assert result.metrics["one_pass/accuracy"].value == pytest.approx(200 / 3)


def test_missing_files_and_unknown_tasks_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"llava_pope_test\.jsonl is missing"):
        TASKS["pope"].read(tmp_path)
    with pytest.raises(ConfigError, match="did you mean scienceqa"):
        find_tasks(["sciencqa"])


def make_own(folder: Path) -> Path:
    rows = [{"question_id": str(i), "text": f"say {i}", "answer": f"say {i}"} for i in range(20)]
    rows[3]["image"] = "absent.png"
    write_lines(folder / "data" / "questions.jsonl", rows)
    return folder / "data"


@pytest.mark.usefixtures("served")
def test_a_run_types_what_it_cannot_ask_and_asks_nothing_twice(tmp_path: Path) -> None:
    from llava_ray.evaluate import run

    def evaluate(**changes: object) -> list[tuple[int, int]]:
        steps: list[tuple[int, int]] = []
        settings = {"tasks": ["own_contains"], "data": str(make_own(tmp_path)), "engine": "echo"}
        settings |= {"output": str(tmp_path / "out"), "num_cpus": 0.1, "concurrency": 4}
        config = EvaluateConfig(**{**settings, **changes})
        (result,) = run.evaluate(config, on_progress=lambda p: steps.append(p[1:]))
        assert result.statuses == {"answered": 19, "refused": 1}
        assert result.headline is None
        assert result.metrics["accuracy"].value == 100
        assert any("absent.png" in reason for reason in result.reasons)
        return steps

    assert evaluate()[0] == (0, 20)
    log = tmp_path / "out" / "predictions_own_contains.jsonl"
    first = log.read_text()
    with log.open("a") as file:
        file.write('{"question_id": "7", "sta')  # a writer that was killed
    assert evaluate()[0] == (19, 20)
    assert log.read_text().startswith(first)
    samples = (tmp_path / "out" / "samples_own_contains.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in samples] == [str(i) for i in range(20)]


def test_the_three_paths_give_the_same_replies(served: str, tmp_path: Path) -> None:
    from llava_ray.evaluate import run

    replies = []
    for path in ({"engine": "echo"}, {"endpoint": served}, {"app": "app"}):
        output = tmp_path / next(iter(path))
        settings = {"tasks": ["own_contains"], "data": str(make_own(tmp_path)), "num_cpus": 0.1}
        config = EvaluateConfig(**settings, output=str(output), model_name="echo", **path)
        run.evaluate(config)
        lines = (output / "samples_own_contains.jsonl").read_text().splitlines()
        replies.append([(row["id"], row["reply"]) for row in map(json.loads, lines)])
    assert replies[0] == replies[1] == replies[2]
