"""Responses from elsewhere are scored, and the files that benchmarks' servers take are written."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from llava_ray.cli import app
from llava_ray.errors import ConfigError, SampleError, UserError
from llava_ray.evaluate.rescore import score_file
from llava_ray.evaluate.results.results import TaskResult
from llava_ray.evaluate.tasks import TASKS
from tests.support.benchmark_files import MME_SUBTASKS, WRITERS, write_lines
from tests.support.raw_data import write_json


def score(name: str, path: Path, data: Path | None = None, **options: Any) -> TaskResult:
    """Score a file of responses against the small benchmark, which is written first."""
    if data is not None:
        WRITERS[TASKS[name].folder](data)
    return score_file(TASKS[name], path, data, min_coverage=0.99, **options)


def value(result: TaskResult, name: str) -> float:
    return round(result.metrics[name].value, 6)


def answers(path: Path, texts: dict[Any, str] | list[tuple[Any, str]]) -> Path:
    """Write an answer file as LLaVA's scripts do."""
    pairs = texts.items() if isinstance(texts, dict) else texts
    extra = {"answer_id": "x", "model_id": "llava", "metadata": {}}
    return write_lines(path, [{"question_id": i, "text": t, **extra} for i, t in pairs])


def test_popes_answer_file_gives_its_numbers(tmp_path: Path) -> None:
    responses = ["Yes", "No", "No, there is not.", "Yes", "yes", "no", "yes", "no"]
    path = answers(tmp_path / "answers.jsonl", dict(enumerate(responses)))
    result = score("pope", path, tmp_path)
    assert value(result, "random/f1") == value(result, "random/precision") == 50
    assert value(result, "popular/accuracy") == value(result, "popular/recall") == 100
    assert value(result, "random/yes_ratio") == 50
    assert result.headline is not None
    assert (result.headline[0], value(result, "f1")) == ("f1", 75)


def test_popes_no_is_looked_for_in_the_first_sentence_only(tmp_path: Path) -> None:
    texts = ["Yes. No dog.", "not", "no dog", "Nothing", "Well, No", "nope", "No.", "Yes"]
    path = answers(tmp_path / "answers.jsonl", dict(enumerate(texts)))
    score("pope", path, tmp_path, output=tmp_path / "out")
    lines = (tmp_path / "out" / "samples_pope.jsonl").read_text().splitlines()
    parsed = [json.loads(line)["parsed"] for line in lines]
    assert parsed == ["yes", "no", "no", "yes", "no", "yes", "no", "yes"]


def test_scienceqas_files_give_its_two_numbers(tmp_path: Path) -> None:
    outputs = {"4": "A. cat", "5": "The answer is C."}
    analysis = [
        {"question_id": i, "pred": text, "question": "?", "is_multimodal": i == "4"}
        for i, text in outputs.items()
    ]
    write_json(tmp_path / "result.json", {"acc": 0, "results": {"4": 0}, "outputs": outputs})
    write_json(tmp_path / "output.json", {"correct": analysis[:1], "incorrect": analysis[1:]})
    lines = answers(tmp_path / "answers.jsonl", outputs)
    for path in (lines, tmp_path / "result.json", tmp_path / "output.json"):
        whole = score("scienceqa", path, tmp_path)
        assert (value(whole, "accuracy"), value(whole, "subject/LAN/accuracy")) == (50, 0)
        with_images = score("scienceqa_img", path, tmp_path)
        assert (value(with_images, "accuracy"), with_images.num_questions) == (100, 1)


def test_textvqas_responses_find_their_question_by_its_prompt(tmp_path: Path) -> None:
    rows = [
        {"question_id": "0a1", "text": "word 1", "prompt": f"Who wrote it?\n{REST}"},
        {"question_id": "0a1", "text": "word 0", "prompt": f"What does it say?\n{REST}"},
    ]
    path = write_lines(tmp_path / "answers.jsonl", rows)
    assert value(score("textvqa_val", path, tmp_path), "accuracy") == 100


REST = "Reference OCR token: A, B\nAnswer the question using a single word or phrase."


def write_mme_results(folder: Path, subtasks: list[str]) -> Path:
    folder.mkdir()
    for name in subtasks:
        rows = [("a", "Yes", "Yes, it is"), ("a", "No", "no")]
        rows += [("b", "Yes", "well"), ("b", "No", "No.")]
        lines = [f"{p}.jpg\tIs it?\t{right}\t{response}\n" for p, right, response in rows]
        (folder / f"{name}.txt").write_text("".join(lines))
    return folder


def test_mmes_files_need_nothing_else(tmp_path: Path) -> None:
    result = score("mme", write_mme_results(tmp_path / "results", MME_SUBTASKS))
    assert value(result, "color/acc") == 75
    assert value(result, "color/acc_plus") == 50
    assert (value(result, "perception"), value(result, "cognition")) == (1250, 500)
    assert result.metrics["perception"].standard_error is not None


def test_mmes_sum_is_not_given_without_all_its_subtasks(tmp_path: Path) -> None:
    result = score("mme", write_mme_results(tmp_path / "results", MME_SUBTASKS[:-1]))
    assert "perception" in result.metrics
    assert "cognition" not in result.metrics


def test_mmes_answer_file_gives_the_same(tmp_path: Path) -> None:
    rows = [
        {"question_id": f"{name}/0001.png", "prompt": f"Is it {word}{name}?{SHORT}", "text": text}
        for name in MME_SUBTASKS
        for word, text in (("not ", "No"), ("", "Yes" if name != "OCR" else "no"))
    ]
    result = score("mme", write_lines(tmp_path / "answers.jsonl", rows), tmp_path)
    assert value(result, "perception") == 2000 - 50 - 100
    assert value(result, "cognition") == 800


SHORT = "\nAnswer the question using a single word or phrase."
REVIEWS = [(8, 6.5), (9, 9), (7, 8), (-1, -1)]


def write_reviews(path: Path, reviews: list[tuple[float, float]]) -> Path:
    kinds = ["conv", "detail", "complex", "conv"]
    return write_lines(
        path,
        [
            {"id": i + 1, "question_id": i, "category": f"llava_bench_{kinds[i]}", "content": "..."}
            | {"tuple": list(pair)}
            for i, pair in enumerate(reviews)
        ],
    )


def test_reviews_give_the_ratio_and_failed_ones_are_left_out(tmp_path: Path) -> None:
    path = write_reviews(tmp_path / "reviews.jsonl", REVIEWS)
    result = score("llava_in_the_wild", path)
    assert value(result, "ratio") == round(100 * 7.833 / 8.0, 6)
    assert value(result, "conv/ratio") == 81.25
    assert value(result, "detail/reference") == 90
    assert result.statuses == {"answered": 3, "unjudged": 1}
    assert result.headline is None
    checked = score("llava_in_the_wild", write_reviews(path, REVIEWS[:3]), tmp_path)
    assert checked.headline is not None
    assert checked.headline[1].value == pytest.approx(100 * 7.833 / 8.0)


def test_mm_vets_grades_give_the_mean_in_percent(tmp_path: Path) -> None:
    grades = {f"v1_{i}": {"model": ["m"], "content": [""], "score": s} for i, s in GRADES.items()}
    write_json(tmp_path / "grades.json", grades)
    alone = score("mmvet", tmp_path / "grades.json")
    assert value(alone, "accuracy") == 70
    result = score("mmvet", tmp_path / "grades.json", tmp_path)
    assert value(result, "accuracy") == 70
    assert value(result, "ocr/accuracy") == 100
    assert value(result, "together/know+rec/accuracy") == 40


GRADES = {0: [0.5, 0.3], 1: [1.0]}


def test_mmbench_counts_a_question_once_and_only_if_all_turns_are_right(tmp_path: Path) -> None:
    path = answers(tmp_path / "answers.jsonl", {1: "A. x", 2: "The answer is (B).", 1_000_002: "x"})
    result = score("mmbench_en_dev", path, tmp_path)
    assert value(result, "accuracy") == 50
    assert value(result, "one_pass/accuracy") == pytest.approx(200 / 3, abs=1e-4)


def test_seedbench_takes_answers_and_submissions(tmp_path: Path) -> None:
    path = answers(tmp_path / "answers.jsonl", {101: "B", "v2": "B"})
    rows = [{"question_id": i, "prediction": "B"} for i in ("101", "v2")]
    for each in (path, write_lines(tmp_path / "submission.jsonl", rows)):
        result = score("seedbench", each, tmp_path)
        assert value(result, "accuracy") == 50
        assert value(result, "data/image/accuracy") == 100


def test_too_few_answers_give_no_headline_and_are_not_wrong(tmp_path: Path) -> None:
    result = score("pope", answers(tmp_path / "answers.jsonl", {0: "yes"}), tmp_path)
    assert result.headline is None
    assert value(result, "accuracy") == 100
    assert result.statuses == {"answered": 1, "missing": 7}


BAD = [
    (
        "pope",
        '{"question_id": 77, "text": "yes"}',
        "a response for '77', which the benchm",
    ),
    (
        "pope",
        '{"question_id": 0, "text": "a"}\n{"question_id": 0, "text": "b"}',
        "a response for '0'",
    ),
    ("pope", '{"question_id": 0}', "row 1 has no 'text'"),
    ("pope", "yes", "line 1 of 'answers.jsonl' is not a JSON object"),
    ("mmvet", '{"question_id": 0, "text": "yes"}', "holds responses without grades"),
]


@pytest.mark.parametrize(("name", "content", "said"), BAD)
def test_responses_that_cannot_be_scored_are_named(
    tmp_path: Path, name: str, content: str, said: str
) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match=said):
        score(name, path, tmp_path)


def test_files_that_are_not_there_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no file of responses"):
        score("gqa", tmp_path / "absent.jsonl", tmp_path)
    with pytest.raises(ConfigError, match="no files of MME's"):
        score("mme", tmp_path / "absent.txt")
    with pytest.raises(ConfigError, match="name their folder with --data"):
        score("gqa", answers(tmp_path / "answers.jsonl", {1: "a"}))
    (tmp_path / "color.txt").write_text("a.jpg\tIs it?\tYes\n")
    with pytest.raises(SampleError, match=r"color\.txt, line 1, has 3 columns"):
        score("mme", tmp_path / "color.txt")


def test_the_command_prints_the_score(tmp_path: Path) -> None:
    WRITERS["pope"](tmp_path)
    path = answers(tmp_path / "answers.jsonl", dict.fromkeys(range(8), "Yes"))
    options = ["--score-only", "--task", "pope", "--data", str(tmp_path), "--predictions"]
    run = CliRunner().invoke(app, ["evaluate", *options, str(path)], env={"COLUMNS": "120"})
    assert run.exit_code == 0, run.output
    assert "66.67" in run.output
    assert "100.00%" in run.output


SUBMISSIONS: dict[str, tuple[dict[str, str], str, Any]] = {
    "vqav2_test": (
        {"7": "A dog.", "8": "two"},
        "json",
        [
            {"question_id": 7, "answer": "dog"},
            {"question_id": 8, "answer": "2"},
            {"question_id": 9, "answer": ""},
        ],
    ),
    "gqa": (
        {"201": "Yes.", "202": "Chair"},
        "json",
        [
            {"questionId": "201", "prediction": "yes"},
            {"questionId": "202", "prediction": "chair"},
        ],
    ),
    "vizwiz_vqa_test": (
        {"0": "The soda.", "1": "unanswerable"},
        "json",
        [
            {"image": "VizWiz_test_00000000.jpg", "answer": "soda"},
            {"image": "VizWiz_test_00000001.jpg", "answer": "unanswerable"},
        ],
    ),
    "mmvet": ({"0": "a dog", "1": "3"}, "json", {"v1_0": "a dog", "v1_1": "3"}),
    "seedbench": (
        {"101": "B", "v2": "D"},
        "jsonl",
        [{"question_id": "101", "prediction": "B"}, {"question_id": "v2", "prediction": "D"}],
    ),
}


def submit(name: str, responses: dict[str, str], data: Path) -> Path:
    task = TASKS[name]
    WRITERS[task.folder](data)
    assert task.submit is not None
    folder = task.find_folder(data)
    return task.submit(task.read_all(data), responses, folder, data / f"submit_{name}")


@pytest.mark.parametrize("name", SUBMISSIONS)
def test_a_submission_is_what_llavas_script_writes(tmp_path: Path, name: str) -> None:
    responses, ending, content = SUBMISSIONS[name]
    path = submit(name, responses, tmp_path)
    assert path.name == f"submit_{name}.{ending}"
    text = path.read_text()
    found = json.loads(text) if ending == "json" else [*map(json.loads, text.splitlines())]
    assert found == content


@pytest.mark.parametrize("name", ["mmbench_en_dev", "mmbench_cn_dev"])
def test_mmbenchs_submission_is_its_table_with_a_column_of_predictions(
    tmp_path: Path, name: str
) -> None:
    from openpyxl import load_workbook

    path = submit(name, {"1": "A", "2": "B", "1000002": "C"}, tmp_path)
    rows = [*load_workbook(path).active.iter_rows(values_only=True)]
    columns = ["index", "question", "A", "B", "C", "D", "prediction", "split", "answer"]
    assert list(rows[0]) == columns
    assert [row[0] for row in rows[1:]] == [1, 2, 1_000_002]
    assert [row[6] for row in rows[1:]] == ["A", "B", "C"]


def test_vizwiz_wants_every_response(tmp_path: Path) -> None:
    with pytest.raises(SampleError, match="1 questions of VizWiz have no response"):
        submit("vizwiz_vqa_test", {"0": "soda"}, tmp_path)
