"""Stored predictions in every form and with every character: matched by id, or refused."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from openpyxl import load_workbook
from openpyxl.utils.escape import unescape
from typer.testing import CliRunner

from llava_ray.cli import app
from llava_ray.config import TasksConfig
from llava_ray.errors import ConfigError, SampleError, UserError
from llava_ray.evaluate.predict import ask
from llava_ray.evaluate.rescore import score_file
from llava_ray.evaluate.results.results import TaskResult, score_predictions, summarize_task
from llava_ray.evaluate.tasks import TASKS
from llava_ray.types import Prediction, Question
from tests.support.benchmark_files import MME_SUBTASKS, WRITERS, write_lines
from tests.support.random_responses import make_responses
from tests.support.raw_data import write_json
from tests.support.scripted_openai import ScriptedOpenAI

REST = "Reference OCR token: A, B\nAnswer the question using a single word or phrase."


def find(name: str, data: Path) -> list[Question]:
    WRITERS[TASKS[name].folder](data)
    return TASKS[name].read_all(data)


def score(name: str, path: Path, data: Path | None = None, **options: Any) -> TaskResult:
    if data is not None:
        WRITERS[TASKS[name].folder](data)
    return score_file(TASKS[name], path, data, min_coverage=0.99, **options)


def headline(result: TaskResult) -> float | None:
    return round(result.headline[1].value, 6) if result.headline else None


# Layouts of LLaVA's guide


def test_mmbench_in_chinese_lies_beside_the_english_one(tmp_path: Path) -> None:
    expected = find("mmbench_cn_dev", tmp_path)
    name = "mmbench_dev_cn_20231003.tsv"
    (tmp_path / "mmbench_cn" / name).rename(tmp_path / "mmbench" / name)
    task = TASKS["mmbench_cn_dev"]
    texts = [question.text for question in expected]
    assert [q.text for q in task.read_all(tmp_path)] == texts  # an empty mmbench_cn is left
    (tmp_path / "mmbench_cn").rmdir()
    assert [q.text for q in task.read_all(tmp_path)] == texts
    assert task.submit is not None
    folder = task.find_folder(tmp_path)
    path = task.submit(expected, {"1": "A"}, folder, tmp_path / "submit_mmbench_cn_dev")
    assert path.is_file()


@pytest.mark.parametrize("layout", ["mmvet", "mmvet/mm-vet", "mm-vet/mm-vet"])
def test_mm_vet_is_found_where_the_guide_unpacks_it(tmp_path: Path, layout: str) -> None:
    expected = find("mmvet", tmp_path)
    (tmp_path / layout).mkdir(parents=True)
    for name in ("mm-vet.json", "images"):  # LLaVA's questions stay in mm-vet
        (tmp_path / "mm-vet" / name).rename(tmp_path / layout / name)
    found = TASKS["mmvet"].read_all(tmp_path)
    assert [q.text for q in found] == [q.text for q in expected]
    assert all(Path(q.images[0]).is_file() for q in found)


@pytest.mark.parametrize("label", [str.upper, str.capitalize, "{}.".format, " {} ".format])
def test_popes_labels_may_be_capital(tmp_path: Path, label: Any) -> None:
    expected = [q.answers for q in find("pope", tmp_path)]
    for path in (tmp_path / "pope").rglob("coco_pope_*.json"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        write_lines(path, [{**row, "label": label(row["label"])} for row in rows])
    assert [q.answers for q in TASKS["pope"].read_all(tmp_path)] == expected


@pytest.mark.parametrize("value", [None, "maybe", 1.5, ["yes"], True])
def test_popes_rows_without_a_label_are_named(tmp_path: Path, value: Any) -> None:
    find("pope", tmp_path)
    path = next((tmp_path / "pope").rglob("coco_pope_random.json"))
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[1] = {k: v for k, v in {**rows[1], "label": value}.items() if v is not None}
    write_lines(path, rows)
    with pytest.raises(SampleError, match=r"coco_pope_random\.json, row 2"):
        TASKS["pope"].read_all(tmp_path)


def test_popes_categories_may_be_capital(tmp_path: Path) -> None:
    expected = [(q.answers, q.groups) for q in find("pope", tmp_path)]
    path = tmp_path / "pope" / "llava_pope_test.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    write_lines(path, [{**row, "category": row["category"].capitalize()} for row in rows])
    assert [(q.answers, q.groups) for q in TASKS["pope"].read_all(tmp_path)] == expected


def test_popes_labels_in_another_order_are_found_by_image_and_object(tmp_path: Path) -> None:
    expected = [q.answers for q in find("pope", tmp_path)]
    for path in (tmp_path / "pope").rglob("coco_pope_*.json"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        write_lines(path, rows[::-1])
    assert [q.answers for q in TASKS["pope"].read_all(tmp_path)] == expected


@pytest.mark.parametrize("name", [name for name in TASKS if not name.startswith("own_")])
def test_odd_types_in_a_benchmarks_files_are_told_and_never_a_traceback(
    tmp_path: Path, name: str
) -> None:
    find(name, tmp_path)
    folder = tmp_path / TASKS[name].folder
    files = [path for path in folder.rglob("*.json*") if path.is_file()]
    for path in files:
        before = path.read_text()
        for odd in (5, None, [], {}, "x", True):
            path.write_text(_replace_values(before, odd))
            try:
                questions = TASKS[name].read_all(tmp_path)
            except UserError:
                continue  # any field may turn out not to matter
            said = {q.question_id: Prediction(q.question_id, "answered", "yes") for q in questions}
            scores = score_predictions(TASKS[name], questions, said)
            summarize_task(TASKS[name], questions, said, scores, min_coverage=0)
        path.write_text(before)


def _replace_values(text: str, odd: Any) -> str:
    """Return JSON, or lines of it, with `odd` for every text and number."""

    def change(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: change(each) for name, each in value.items()}
        return [change(each) for each in value] if isinstance(value, list) else odd

    try:
        return json.dumps(change(json.loads(text)))
    except ValueError:
        return "\n".join(json.dumps(change(json.loads(line))) for line in text.splitlines())


# Forms of stored predictions


def test_scienceqas_output_file_is_one_object_whatever_its_name(tmp_path: Path) -> None:
    rows = [{"question_id": i, "pred": text, "question": "?"} for i, text in (("4", "A"),)]
    path = tmp_path / "llava-v1.5_output.jsonl"
    path.write_text(json.dumps({"correct": rows, "incorrect": []}, indent=2))
    assert headline(score("scienceqa_img", path, tmp_path)) == 100


def test_vizwizs_submission_names_the_image(tmp_path: Path) -> None:
    (question,) = find("vizwiz_vqa_val", tmp_path)
    rows = [{"image": question.source_id, "answer": question.answers[0]}]
    (tmp_path / "answers.json").write_text(json.dumps(rows))
    assert score("vizwiz_vqa_val", tmp_path / "answers.json", tmp_path).num_scored == 1


@pytest.mark.parametrize("ending", ["json", "jsonl"])
def test_lines_may_be_a_list_and_name_the_response_in_other_ways(
    tmp_path: Path, ending: str
) -> None:
    path = tmp_path / f"answers.{ending}"
    rows = [{"questionId": "201", "prediction": "yes"}, {"questionId": "202", "answer": "chair"}]
    path.write_text(json.dumps(rows))
    assert headline(score("gqa", path, tmp_path)) == 100


def test_textvqas_responses_are_matched_by_id_and_question_never_by_their_place(
    tmp_path: Path,
) -> None:
    find("textvqa_val", tmp_path)
    asked = [("What does it say?", "word 0"), ("Who wrote it?", "word 1")]
    for pairs in (asked, asked[::-1]):
        rows = [
            {"question_id": "0a1", "text": text, "prompt": f"{question}\n{REST}"}
            for question, text in pairs
        ]
        path = write_lines(tmp_path / "answers.jsonl", rows)
        assert headline(score("textvqa_val", path, tmp_path)) == 100
        rows = [{**row, "prompt": row["prompt"].split("\n")[0].upper()} for row in rows]
        path = write_lines(tmp_path / "answers.jsonl", rows)
        assert headline(score("textvqa_val", path, tmp_path)) == 100
    for prompt in ("", "Where is it?"):
        rows = [{"question_id": "0a1", "text": "word 0", "prompt": prompt}] * 2
        path = write_lines(tmp_path / "answers.jsonl", rows)
        with pytest.raises(SampleError, match=r"asks 2 questions, .*give lines with"):
            score("textvqa_val", path, tmp_path)


def test_textvqas_own_ids_name_one_question_each(tmp_path: Path) -> None:
    find("textvqa_val", tmp_path)
    notes = tmp_path / "textvqa" / "TextVQA_0.5.1_val.json"
    content = json.loads(notes.read_text())
    for i, row in enumerate(content["data"]):
        row["question_id"] = 34602 + i
    write_json(notes, content)
    questions = TASKS["textvqa_val"].read_all(tmp_path)
    rows = [
        {"question_id": int(q.other_ids[0]), "answer": q.answers[0]} for q in reversed(questions)
    ]
    path = write_lines(tmp_path / "answers.jsonl", rows)
    result = score_file(TASKS["textvqa_val"], path, tmp_path, min_coverage=0.99)
    assert headline(result) == 100


def test_a_runs_own_files_can_be_scored_again(tmp_path: Path) -> None:
    questions = find("textvqa_val", tmp_path)
    rows = [{"id": q.source_id, "prompt": q.text, "response": q.answers[0]} for q in questions]
    rows[0] |= {"status": "failed", "reason": "it broke"}
    result = score("textvqa_val", write_lines(tmp_path / "s.jsonl", rows), tmp_path)
    assert result.statuses == {"failed": 1, "answered": 1}
    assert result.reasons == {"it broke": 1}
    rows = [{"question_id": q.question_id, "text": "x", "cache_key": "k"} for q in questions]
    result = score("textvqa_val", write_lines(tmp_path / "p.jsonl", rows), tmp_path)
    assert result.statuses == {"answered": 2}


ODD_ROWS = [
    ('{"question_id": 0, "text": ["yes"]}', "'response' is .*a text is needed"),
    ('{"question_id": 0, "text": true}', "a text is needed"),
    ('{"question_id": [0], "text": "yes"}', "a text is needed"),
    ('{"question_id": null, "text": "yes"}', "a text is needed"),
    ("[5]", "5' is no JSON object"),
    ("5", "holds no responses"),
    ("[]", "holds no responses"),
    ("PK\x03\x04", "is an Excel or zip file"),
    ("question_id,text\n0,yes\n", "line 1 of .*"),
    ("[" * 100_000, "line 1 of .*"),
    ('{"outputs": 5}', "holds no responses"),
    ('{"correct": [5], "incorrect": []}', "is it a file of this task"),
]


@pytest.mark.parametrize(("content", "said"), ODD_ROWS)
def test_odd_types_in_stored_predictions_are_named(tmp_path: Path, content: str, said: str) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match=said):
        score("pope", path, tmp_path)


def test_numbers_are_responses_and_null_is_none(tmp_path: Path) -> None:
    rows = [{"question_id": i, "text": None if i == 3 else 5} for i in range(8)]
    result = score("pope", write_lines(tmp_path / "answers.jsonl", rows), tmp_path)
    assert result.statuses == {"answered": 7, "failed": 1}
    assert "null in place of a response" in next(iter(result.reasons))


# MME's files per task


def write_mme(folder: Path, names: Sequence[str], rows: list[tuple[str, str, str]]) -> Path:
    folder.mkdir()
    for name in names:
        lines = [f"{image}.jpg\tIs it?\t{right}\t{text}\r\n" for image, right, text in rows]
        (folder / f"{name}.txt").write_text("".join(lines))
    return folder


def test_mmes_incomplete_files_have_no_headline_and_their_coverage_is_told(
    tmp_path: Path,
) -> None:
    rows = [("a", "Yes", "Yes"), ("a", "No", "no"), ("b", "Yes", "yes\tindeed")]
    result = score("mme", write_mme(tmp_path / "results", MME_SUBTASKS, rows))
    assert result.headline is None
    assert (result.num_questions, result.num_scored) == (2374, 42)
    assert "only 42 of 2374" in result.problem
    assert result.metrics["color/acc"].value == 100
    assert result.metrics["color/acc_plus"].value == 100  # of the one whole pair


def test_mmes_pairs_are_of_one_image_also_where_a_line_is_missing(tmp_path: Path) -> None:
    rows = [("a", "Yes", "Yes"), ("b", "Yes", "yes"), ("b", "No", "no"), ("c", "Yes", "yes"),
            ("c", "No", "yes")]  # fmt: skip
    result = score("mme", write_mme(tmp_path / "results", ["color"], rows))
    assert result.metrics["color/acc_plus"].value == 50


def test_mmes_whole_files_have_their_headline(tmp_path: Path) -> None:
    from llava_ray.evaluate.datasets.yes_no import MME_QUESTIONS

    assert sum(MME_QUESTIONS.values()) == 2374
    (tmp_path / "results").mkdir()
    for name, number in MME_QUESTIONS.items():
        lines = [f"{i // 2}.jpg\t?\t{('Yes', 'No')[i % 2]}\tyes\n" for i in range(number)]
        (tmp_path / "results" / f"{name}.txt").write_text("".join(lines))
    result = score("mme", tmp_path / "results")
    assert headline(result) == 500
    assert result.problem == ""
    results = tmp_path / "results"
    (results / "code_reasoning.txt").unlink()
    assert headline(score("mme", results)) is None  # of cognition, which has other files
    for name in ("commonsense_reasoning", "numerical_calculation", "text_translation"):
        (results / f"{name}.txt").unlink()
    whole = score("mme", results)
    assert whole.headline is not None
    assert (whole.headline[0], whole.num_questions) == ("perception", 2114)
    posters = results / "posters.txt"
    posters.write_text("".join(posters.read_text().splitlines(keepends=True)[:-1]))
    lacking = score("mme", results)
    assert lacking.headline is None
    assert "only 2113 of 2114 questions were scored" in lacking.problem


# What --score-only leaves behind


def test_files_for_servers_are_written_from_stored_predictions(tmp_path: Path) -> None:
    rows = [{"question_id": i, "text": f"A dog {i}."} for i in (7, 8)]
    path = write_lines(tmp_path / "answers.jsonl", rows)
    result = score("vqav2_test", path, tmp_path, output=tmp_path / "out")
    assert result.submission == str(tmp_path / "out" / "submit_vqav2_test.json")
    assert json.loads(Path(result.submission).read_text())[0]["answer"] == "dog 7"
    assert result.problem == ""
    assert "nothing was scored" in score("vqav2_test", path, tmp_path).problem


def test_stored_predictions_are_sent_to_a_judge(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ask, "FIRST_PAUSE_S", 0.001)
    rows = [{"question_id": i, "text": f"a dog \ud800 {i}"} for i in range(2)]
    path = write_lines(tmp_path / "answers.jsonl", rows)
    with ScriptedOpenAI(lambda text: "nan" if "What is 1?" in text else "0.5") as server:
        judging = TasksConfig(tasks=["mmvet"], data=".", judge_endpoint=server.url)
        options = {"output": tmp_path / "out", "judging": judging}
        result = score("mmvet", path, tmp_path, **options)
        with pytest.raises(ConfigError, match="name a folder for the judge's verdicts"):
            score("mmvet", path, tmp_path, judging=judging)
    assert result.statuses == {"answered": 1, "unjudged": 1}
    assert result.metrics["accuracy"].value == 50
    assert (tmp_path / "out" / "verdicts_mmvet.jsonl").is_file()
    assert (tmp_path / "out" / "submit_mmvet.json").is_file()
    # without a judge, the file for the server is what can be had
    alone = score("mmvet", path, tmp_path, output=tmp_path / "alone")
    assert (alone.num_scored, alone.problem) == (0, "")


@pytest.mark.parametrize(("num", "code"), [(8, 0), (4, 2), (0, 2)])
def test_the_command_fails_where_nothing_or_too_little_was_scored(
    tmp_path: Path, num: int, code: int
) -> None:
    find("pope", tmp_path)
    rows = [{"question_id": i, "text": "Yes" if i < num else None} for i in range(8)]
    path = write_lines(tmp_path / "answers.jsonl", rows)
    words = ["evaluate", "--score-only", "--task", "pope", "--data", str(tmp_path)]
    run = CliRunner().invoke(app, [*words, "--predictions", str(path)])
    assert isinstance(run.exception, UserError) == bool(code), run.output
    if num == 4:
        assert "only 4 of 8 questions were scored" in str(run.exception)
    if num == 0:
        assert "none of its 8 questions was answered: the file holds null" in str(run.exception)


def test_unread_responses_and_the_rows_of_each_number_are_counted(tmp_path: Path) -> None:
    find("mmbench_en_dev", tmp_path)
    texts = {1: "A man", 2: "**B**", 1_000_002: "C"}
    rows = [{"question_id": i, "text": text} for i, text in texts.items()]
    path = write_lines(tmp_path / "answers.jsonl", rows)
    words = ["evaluate", "--score-only", "--task", "mmbench_en_dev", "--data", str(tmp_path)]
    words += ["--predictions", str(path), "--output", str(tmp_path / "out")]
    run = CliRunner().invoke(app, words)
    assert run.exit_code == 0, run.output
    assert "no answer could be read out of 1 responses" in run.output
    assert re.search(r"accuracy +│ 50.00 +│ 50.00 +│ 3 +│ 3 of 3", run.output)
    results = json.loads((tmp_path / "out" / "results.json").read_text())["tasks"]
    assert results["mmbench_en_dev"]["num_unread"] == 1
    assert "<th>not readable</th>" in (tmp_path / "out" / "report.html").read_text()


def test_a_limit_holds_for_stored_predictions_and_they_need_score_only(tmp_path: Path) -> None:
    find("pope", tmp_path)
    rows = [{"question_id": i, "text": "Yes"} for i in range(8)]
    path = write_lines(tmp_path / "answers.jsonl", rows)
    words = ["--task", "pope", "--data", str(tmp_path), "--predictions", str(path), "--limit", "2"]
    run = CliRunner().invoke(app, ["evaluate", "--score-only", *words])
    assert run.exit_code == 0, run.output
    assert "2 of 2" in run.output
    run = CliRunner().invoke(app, ["evaluate", *words])
    assert "--score-only" in str(run.exception)


# Any character

ODD_TEXTS = [
    "lone \ud800 surrogate \udfff", "nul \0 bell \x07 escape \x1b[31m", "=1+1", "+1", "-1", "@x",
    "=HYPERLINK(\"http://x\")", "line\u2028sep\u2029\x85\x0b\x0c\x1e", "<script>alert(1)</script>",
    "\u202egnp.exe", "#N/A", "#DIV/0!", "[/red]", "_x0041_", "tab\tnew\r\nline", "'", "\ufffe", "",
]  # fmt: skip


def test_every_character_reaches_every_file_whole_and_harmless(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    for text in ODD_TEXTS:
        rows = [{"question_id": i, "text": text} for i in (1, 2, 1_000_002)]
        path = tmp_path / "answers.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        output = tmp_path / "out"
        result = score("mmbench_en_dev", path, tmp_path, output=output)
        assert result.statuses == {"answered": 3}
        lines = (output / "samples_mmbench_en_dev.jsonl").read_text(encoding="utf-8")
        assert len(lines.splitlines()) == 3
        assert [json.loads(line)["response"] for line in lines.splitlines()] == [text] * 3
        table = pq.read_table(output / "samples_mmbench_en_dev.parquet")
        assert table["response"][0].as_py() == text.encode("utf-8", "backslashreplace").decode()
        page = (output / "report.html").read_text(encoding="utf-8")
        assert "<script>" not in page
        assert not set(page) & set("\0\x07\x1b\x85\u202e")
        assert result.note == ""
        cell = load_workbook(result.submission)["Sheet1"]["G2"]
        if text:
            assert cell.data_type in ("s", "inlineStr")
            assert unescape(cell.value) == text
        assert CliRunner().invoke(app, ["evaluate", "compare", str(output), str(output)]).output


SCORED = [name for name in TASKS if not name.startswith("own_") and not TASKS[name].judge]


@pytest.mark.parametrize("name", SCORED)
def test_no_response_whatever_ends_the_scoring_of_a_file(tmp_path: Path, name: str) -> None:
    questions = find(name, tmp_path)
    output = tmp_path / "out"
    for start in range(0, 150, 15):
        texts = make_responses(150)[start:]
        rows = [
            {"question_id": q.source_id, "prompt": q.text, "text": text}
            for q, text in zip(questions, texts, strict=False)
        ]
        path = write_lines(tmp_path / "answers.jsonl", rows)
        result = score_file(TASKS[name], path, tmp_path, min_coverage=0.99, output=output)
        assert result.statuses["answered"] == min(len(rows), result.num_questions)
        assert result.note == ""


@pytest.mark.parametrize("name", ["vqav2_test", "gqa", "mmvet", "seedbench", "vizwiz_vqa_test"])
def test_servers_files_hold_every_character(tmp_path: Path, name: str) -> None:
    questions = find(name, tmp_path)
    task = TASKS[name]
    assert task.submit is not None
    folder = task.find_folder(tmp_path)
    for text in ODD_TEXTS:
        responses = {question.question_id: text for question in questions}
        path = task.submit(questions, responses, folder, tmp_path / f"submit_{name}")
        content = path.read_text(encoding="utf-8")
        for line in content.splitlines() if path.suffix == ".jsonl" else [content]:
            json.loads(line)


def test_a_text_too_long_for_a_cell_is_told(tmp_path: Path) -> None:
    rows = [{"question_id": i, "text": "B " * 20_000} for i in (1, 2, 1_000_002)]
    path = write_lines(tmp_path / "answers.jsonl", rows)
    result = score("mmbench_en_dev", path, tmp_path, output=tmp_path / "out")
    assert "32767" in result.note
    assert "no file for its server" in result.problem
