"""One's own questions: lines and shards alike, each answer read as it is meant or refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from llava_ray.data.shards import ShardWriter
from llava_ray.data.sources.building import assistant, make_sample, user
from llava_ray.errors import ConfigError, SampleError, UserError
from llava_ray.evaluate.results.results import score_predictions, summarize_task
from llava_ray.evaluate.tasks import TASKS
from llava_ray.types import Prediction, Question
from tests.support.benchmark_files import LETTER, write_lines


def read(name: str, folder: Path, *rows: dict[str, Any]) -> list[Question]:
    write_lines(folder / "questions.jsonl", list(rows))
    return TASKS[name].read_all(folder)


def read_one(name: str, folder: Path, **row: Any) -> Question:
    (question,) = read(name, folder, {"question_id": 1, "text": "Which?", "answer": "x", **row})
    return question


def score(name: str, question: Question, text: str) -> float:
    scorer = TASKS[name].score
    assert scorer is not None
    value = scorer(question, text).value
    assert value is not None
    return value


@pytest.mark.parametrize(
    "answer", ["B", "b", "(B)", "(b)", "B.", "B)", "dog", "Dog.", 1, "1", "B. dog", "(B) dog",
               "The answer is B.", ["B"], ["dog", 1]]
)  # fmt: skip
def test_right_options_may_be_letters_texts_or_indices(tmp_path: Path, answer: Any) -> None:
    question = read_one("own_choice", tmp_path, answer=answer, choices=["cat", "dog", "bird"])
    assert question.answers == ("B",)
    assert question.text == f"Which?\nA. cat\nB. dog\nC. bird{LETTER}"
    assert [score("own_choice", question, text) for text in ("B", "**(b)**", "a dog", "A man")] == [
        1, 1, 1, 0,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("answer", "choices"),
    [
        ("D", ["cat", "dog"]),
        ("zebra", ["cat", "dog"]),
        (2, ["cat", "dog"]),
        (-1, ["cat", "dog"]),
        (True, ["cat", "dog"]),
        ("", ["cat", "dog"]),
        ("A or B", ["cat", "dog"]),
        (None, ["cat", "dog"]),
        ([], ["cat", "dog"]),
        (0.5, ["cat", "dog"]),
        ("A", ["B", "A"]),  # the first option, or the one called A?
        (1, ["0", "2", "1"]),
        ("dog", ["dog", "dog"]),
        ("A", []),
        ("A", ["cat"]),
        ("A", "cat"),
        ("A", [["cat"], "dog"]),
        ("A", [None, "dog"]),
        ("A", ["x"] * 27),
        ("A", {"1": "cat", "2": "dog"}),
    ],
)
def test_an_answer_that_fits_no_option_is_refused(
    tmp_path: Path, answer: Any, choices: Any
) -> None:
    with pytest.raises(SampleError, match=r"questions\.jsonl, row 1"):
        read_one("own_choice", tmp_path, answer=answer, choices=choices)


def test_a_marked_letter_is_a_letter_whatever_the_options_are_called(tmp_path: Path) -> None:
    question = read_one("own_choice", tmp_path, answer="(A)", choices=["B", "A"])
    assert question.answers == ("A",)
    question = read_one("own_choice", tmp_path, answer="2", choices=["0", "2", "1"])
    assert question.answers == ("B",)
    question = read_one("own_choice", tmp_path, answer=True, choices=["true", "false"])
    assert question.answers == ("A",)


@pytest.mark.parametrize("mark", ["{}. ", "({}) ", "{}) ", "{}: "])
def test_options_may_stand_in_the_question(tmp_path: Path, mark: str) -> None:
    lines = ["Context: A. Lincoln", "Which?", mark.format("A") + "cat", mark.format("B") + "dog"]
    question = read_one("own_choice", tmp_path, text="\n".join(lines), answer="dog")
    assert (question.choices, question.answers) == (("cat", "dog"), ("B",))
    assert question.text == "\n".join(lines) + LETTER


def test_options_that_are_there_are_not_written_twice(tmp_path: Path) -> None:
    text = "Which?\nA. cat\nB. dog"
    question = read_one("own_choice", tmp_path, text=text, answer="B", choices=["cat", "dog"])
    assert question.text == text + LETTER
    again = read_one("own_choice", tmp_path, text=question.text, answer="B")
    assert again.text == question.text


def test_annotators_and_responses_are_brought_into_one_form(tmp_path: Path) -> None:
    for answers in (["Blue"] * 10, ["blue."] * 5 + ["the blue"] * 5):
        question = read_one("own_vqa", tmp_path, answer=answers)
        for text in ("Blue", "blue", "BLUE.", "the blue"):
            assert score("own_vqa", question, text) == 1
        assert score("own_vqa", question, "red") == 0


def test_images_are_relative_to_the_file_and_may_be_several(tmp_path: Path) -> None:
    question = read_one("own_exact", tmp_path, image="a/b.png", text="<image>\nWhat?")
    assert question.images == (str(tmp_path / "a/b.png"),)
    assert question.text == "What?"
    several = read_one("own_exact", tmp_path, image=["a.png", "/b.png"])
    assert several.images == (str(tmp_path / "a.png"), "/b.png")
    assert read_one("own_exact", tmp_path, image=None).images == ()


ODD = [
    ({"image": "https://host/a.png"}, "is an address"),
    ({"image": 5.5}, None),
    ({"image": {"path": "a"}}, "'image' is"),
    ({"text": None}, "'text' is"),
    ({"text": ["Which?"]}, "'text' is"),
    ({"answer": None}, "'answer' is"),
    ({"answer": {"text": "a"}}, "'answer' is"),
    ({"answer": " "}, "the answer is empty"),
    ({"answer": []}, "the answer is empty"),
    ({"question_id": None}, "'question_id' is"),
    ({"category": ["a"]}, "'category' is"),
]


@pytest.mark.parametrize(("changes", "said"), ODD)
def test_a_field_of_an_odd_type_is_named(
    tmp_path: Path, changes: dict[str, Any], said: str | None
) -> None:
    if said is None:
        read_one("own_exact", tmp_path, **changes)
        return
    with pytest.raises(SampleError, match=rf"row 1.*{said}"):
        read_one("own_exact", tmp_path, **changes)


@pytest.mark.parametrize("answer", [5, "5", 5.0, "5."])
def test_numbers_are_answers(tmp_path: Path, answer: Any) -> None:
    question = read_one("own_contains", tmp_path, answer=answer)
    assert score("own_contains", question, "There are 5 dogs.") == 1
    assert score("own_contains", question, "There are -5 dogs, 2.5 cats, 50 birds") == 0


def write_shard(path: Path, rows: list[tuple[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = ShardWriter(path)
    for i, (question, answer) in enumerate(rows):
        turns = (user(question), assistant(answer))
        writer.add(make_sample("mine", f"s{i}", turns), [], num_tokens=None)
    writer.close()


def test_ids_that_repeat_are_refused(tmp_path: Path) -> None:
    row = {"question_id": 1, "text": "Which?", "answer": "x"}
    with pytest.raises(ConfigError, match=r"2 questions but 1 ids: .*'1' is there 2 times"):
        read("own_exact", tmp_path, row, {**row, "question_id": "1"})


def test_a_json_list_will_do(tmp_path: Path) -> None:
    path = tmp_path / "questions.json"
    path.write_text(json.dumps([{"question_id": 1, "text": "Which?", "answer": "x"}]))
    assert len(TASKS["own_exact"].read_all(path)) == 1
    for content in ('{"a": 1}', "[5]", "5"):
        path.write_text(content)
        with pytest.raises(UserError):
            TASKS["own_exact"].read_all(path)


def test_lines_and_shards_make_the_same_questions(tmp_path: Path) -> None:
    text = "Which?\nA. cat\nB. dog"
    write_shard(tmp_path / "shards" / "part-00000.parquet", [(text, "dog")])
    (shard,) = TASKS["own_choice"].read_all(tmp_path / "shards")
    line = read_one("own_choice", tmp_path / "lines", text=text, answer="dog")
    assert (shard.text, shard.answers, shard.choices) == (line.text, line.answers, line.choices)
    write_shard(tmp_path / "shards" / "part-00000.parquet", [(text, "zebra")])
    with pytest.raises(SampleError, match=r"sample s0 .*'zebra' is none of the options"):
        TASKS["own_choice"].read_all(tmp_path / "shards")


def test_a_folder_below_one_called_rejects_is_read(tmp_path: Path) -> None:
    write_shard(tmp_path / "rejects" / "shards" / "part-00000.parquet", [("Hi?", "yes")])
    assert len(TASKS["own_exact"].read_all(tmp_path / "rejects" / "shards")) == 1
    with pytest.raises(ConfigError, match="neither shards"):
        TASKS["own_exact"].read_all(tmp_path)


def test_a_folder_of_both_kinds_and_an_empty_one_are_refused(tmp_path: Path) -> None:
    write_lines(tmp_path / "questions.jsonl", [])
    with pytest.raises(ConfigError, match="has no questions"):
        TASKS["own_exact"].read_all(tmp_path)
    write_shard(tmp_path / "part-00000.parquet", [("Hi?", "yes")])
    with pytest.raises(ConfigError, match=r"both shards .* and questions"):
        TASKS["own_exact"].read_all(tmp_path)
    assert len(TASKS["own_exact"].read_all(tmp_path / "part-00000.parquet")) == 1


@pytest.mark.parametrize("name", ["own_exact", "own_contains", "own_choice", "own_vqa"])
@pytest.mark.parametrize("odd", [5, None, [], {}, "x", True, [[]], [None], {"A": 1}])
def test_no_row_whatever_ends_in_a_traceback(tmp_path: Path, name: str, odd: Any) -> None:
    whole = {"question_id": "1", "text": "Which?", "answer": ["a"] * 4, "image": "a.png",
             "choices": ["a", "b"], "category": "c"}  # fmt: skip
    for field in whole:
        write_lines(tmp_path / "questions.jsonl", [{**whole, field: odd}])
        try:
            questions = TASKS[name].read_all(tmp_path)
        except UserError:
            continue
        said = {q.question_id: Prediction(q.question_id, "answered", "a") for q in questions}
        scores = score_predictions(TASKS[name], questions, said)
        summarize_task(TASKS[name], questions, said, scores, min_coverage=0)
    (tmp_path / "questions.jsonl").write_text(json.dumps(odd))
    with pytest.raises(UserError):
        TASKS[name].read_all(tmp_path)
