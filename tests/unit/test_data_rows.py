"""Rows: every form of other tools is read or refused by name, and no odd row ends a conversion."""

import base64
import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import pytest

from llava_ray.config import ConvertConfig
from llava_ray.data.convert.partition import make_shard_jobs
from llava_ray.data.convert.records import PendingSample, RejectedRow
from llava_ray.data.sources import SOURCES, Source
from llava_ray.data.sources.building import assistant, user
from llava_ray.data.sources.conversations import read_conversations
from llava_ray.errors import ConfigError, SampleError
from llava_ray.types import Message, Sample, TextPart
from tests.support.raw_data import (
    read,
    save,
    say,
    write_json,
    write_pickle,
    write_table,
    write_tar,
)

DEEP = json.loads("[" * 200 + "]" * 200)


def list_rejects(source: str, folder: Path, **settings: Any) -> list[RejectedRow]:
    config = ConvertConfig(source=source, input=str(folder), output="unused", **settings)
    rows = [row for job in make_shard_jobs(config) for row in job.rows]
    return [row for row in rows if isinstance(row, RejectedRow)]


def convert(row: dict[str, Any], source: str = "openai") -> Any:
    """Return (texts, images) of a row's sample, or the reason for which it is rejected."""
    from llava_ray.data.shards import write_text

    try:
        sample = SOURCES[source].convert({"id": "1", **row})
    except SampleError as error:
        return error.reason
    return [f"{m.role}: {write_text(m)}" for m in sample.messages], list(sample.images)


BAD_IMAGES = {
    "a number": 5,
    "a truth value": True,
    "a list of null": [None],
    "a list of lists": [["a"]],
    "an empty object": {"bytes": None, "path": None},
    "an object": {"width": 3},
    "a list with an empty name": [""],
    "a fraction": 1.5,
}


@pytest.mark.parametrize("kind", BAD_IMAGES)
def test_an_image_that_is_no_image_rejects_its_row_and_no_other(kind: str, tmp_path: Path) -> None:
    rows = [
        {"id": "odd", "image": BAD_IMAGES[kind], "conversations": say("<image>\nWhat?", "This.")},
        {"id": "good", "conversations": say("What?", "That.")},
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (reject,) = list_rejects("llava", tmp_path)
    assert (reject.id, reject.reason, reject.where) == ("odd", "bad_row", "rows.jsonl:1")
    assert read("llava", tmp_path)[1] == ("good", ["What?", "That."], [])


ODD_FIELDS: dict[str, dict[str, Any]] = {
    "an answer that is a number": {
        "conversations": [say("a", "b")[0], {"from": "gpt", "value": 5}]
    },
    "a message that is a list": {"conversations": [["human", "hi"]]},
    "conversations that are a text": {"conversations": "hi"},
    "conversations that are an object": {"conversations": {"from": "human"}},
    "a speaker that is a list": {"conversations": [{"from": ["human"], "value": "hi"}]},
    "a message without a text": {"conversations": [{"from": "human"}]},
    "content that is a number": {"messages": [{"role": "user", "content": 7}]},
    "a part that is a number": {"messages": [{"role": "user", "content": [7]}]},
    "a part without a type": {"messages": [{"role": "user", "content": [{"text": "hi"}]}]},
    "a part of a deep type": {"messages": [{"role": "user", "content": [{"type": DEEP}]}]},
    "a deep answer": {"question": "hi", "answer": DEEP},
    "an answer of objects": {"question": "hi", "answer": [{"text": "a"}]},
    "a caption that is a list": {"caption": ["a", "b"]},
    "a history that is no list of pairs": {"query": "a", "response": "b", "history": [["x"]]},
    "texts that are texts": {"texts": ["a"]},
    "no known field": {"a": 1},
}


@pytest.mark.parametrize("kind", ODD_FIELDS)
def test_an_odd_field_rejects_its_row_and_no_other(kind: str, tmp_path: Path) -> None:
    write_json(tmp_path / "rows.json", [ODD_FIELDS[kind], {"conversations": say("a", "b")}])
    (reject,) = list_rejects("sharegpt", tmp_path)
    assert (reject.reason, reject.where) in {
        ("bad_row", "rows.json[0]"),
        ("roles", "rows.json[0]"),
        ("unsupported", "rows.json[0]"),
    }


@pytest.mark.parametrize("ending", ["json", "jsonl"])
def test_a_row_that_is_nested_too_deeply_is_rejected_and_no_other(
    ending: str, tmp_path: Path
) -> None:
    deep = '{"id": ' + "[" * 100_000 + "]" * 100_000 + "}"
    good = json.dumps({"id": "good", "conversations": say("a", "b")})
    text = f"{good}\n{deep}\n{good}" if ending == "jsonl" else f"[{good}, {deep}, {good}]"
    (tmp_path / f"rows.{ending}").write_text(text)
    first, second, third = read("llava", tmp_path)
    assert first == ("good", ["a", "b"], [])
    assert (second[1], third[1]) == ("bad_row", "duplicate")


def test_a_broken_entry_of_a_list_is_rejected_and_no_other(tmp_path: Path) -> None:
    good = json.dumps({"id": "good", "conversations": say("a", "b")})
    long = '{"id": 1' + "0" * 5000 + "}"  # Python refuses to read so long a number
    (tmp_path / "rows.json").write_text(f'[{{"id": 1, what}}, {long}, 5, {good}]')
    assert [row[1] for row in read("llava", tmp_path)] == ["bad_row"] * 3 + [["a", "b"]]


@pytest.mark.parametrize("num_choices", [26, 27])
def test_more_options_than_letters_reject_the_row(num_choices: int, tmp_path: Path) -> None:
    choices = [f"c{i}" for i in range(num_choices)]
    problem = {
        "question": "Which?",
        "choices": choices,
        "answer": 25,
        "hint": "",
        "image": None,
        "lecture": "",
        "solution": "",
        "split": "train",
    }
    write_json(tmp_path / "problems.json", {"1": problem, "2": {**problem, "answer": -1}})
    write_json(tmp_path / "pid_splits.json", {"train": ["1", "2", "3", ["4"]]})
    turn = {"question": "Which?", "choices": choices, "correct_choice_idx": 25, "image_id": 1}
    write_json(tmp_path / "aokvqa_v1p0_train.json", [{**turn, "question_id": "q"}])
    is_good = num_choices == 26
    found = read("scienceqa", tmp_path)
    assert [len(row) for row in found] == [3 if is_good else 2, 2, 2, 2]
    assert len(read("vqa", tmp_path)) == (26 if is_good else 1)


def test_fields_that_a_sample_cannot_express_reject_the_row() -> None:
    turns = {"conversations": say("a", "b")}
    for field, value in {
        "tools": '[{"name": "search"}]',
        "videos": ["a.mp4"],
        "video": "a.mp4",
        "audios": ["a.wav"],
    }.items():
        assert convert({**turns, field: value}) == "unsupported", field
    for field in ("tools", "videos", "video", "audios"):
        for empty in (None, "", [], "[]"):
            assert convert({**turns, field: empty}) == (["user: a", "assistant: b"], [])
    call = {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}
    assert convert({"messages": [{"role": "user", "content": "a"}, call]}) == "unsupported"
    unlearned = {"role": "assistant", "content": "b", "weight": 0}
    assert convert({"messages": [{"role": "user", "content": "a"}, unlearned]}) == "unsupported"
    heard = {"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}
    assert convert({"messages": [heard]}) == "unsupported"
    assert convert({"prompt": "a", "chosen": "b", "rejected": "c"}) == "unsupported"


def test_a_system_field_is_the_system_message() -> None:
    turns = {"conversations": say("a", "b")}
    expected = (["system: Be brief.", "user: a", "assistant: b"], [])
    assert convert({**turns, "system": "Be brief."}) == expected
    first = {"from": "system", "value": "Be brief."}
    both = {"conversations": [first, *say("a", "b")], "system": "Be brief."}
    assert convert(both) == expected
    assert convert({**both, "system": "Be long."}) == "roles"
    assert convert({**turns, "system": 5}) == "bad_row"


FORMS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "Alpaca": (
        {"instruction": "Add.", "input": "1 1", "output": "2", "history": [["a", "b"]]},
        ["user: a", "assistant: b", "user: Add.\n1 1", "assistant: 2"],
    ),
    "prompt and response": ({"prompt": "a", "response": "b"}, ["user: a", "assistant: b"]),
    "prompt and completion": ({"prompt": "a", "completion": "b"}, ["user: a", "assistant: b"]),
    "TRL's messages": (
        {
            "prompt": [{"role": "user", "content": "a"}],
            "completion": [{"role": "assistant", "content": "b"}],
        },
        ["user: a", "assistant: b"],
    ),
    "ms-swift": ({"query": "a", "response": "b"}, ["user: a", "assistant: b"]),
    "question and answer": ({"question": "a", "answer": "b"}, ["user: a", "assistant: b"]),
    "several people's answers": (
        {"question": "a", "answers": [{"answer": "x"}, {"answer": "b"}, {"answer": "b"}]},
        ["user: a", "assistant: b"],
    ),
    "developer": (
        {"messages": [{"role": "developer", "content": "s"}, {"role": "user", "content": "a"}]},
        ["system: s", "user: a"],
    ),
    "conversation": ({"conversation": say("a", "b")}, ["user: a", "assistant: b"]),
    "null beside the right field": (
        {"conversations": None, "messages": [{"role": "user", "content": "a"}]},
        ["user: a"],
    ),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("source", ["llava", "sharegpt", "openai", "hf"])
def test_the_forms_of_other_tools_are_read(form: str, source: str) -> None:
    row, texts = FORMS[form]
    assert convert(row, source) == (texts, [])


@pytest.mark.parametrize(
    "field", ["image", "images", "image_path", "img", "img_path", "image_file", "file_name"]
)
def test_images_are_found_under_the_names_of_other_tools(field: str) -> None:
    row = {"prompt": "What?", "response": "This.", field: "a.png"}
    assert convert(row) == (["user: <image>What?", "assistant: This."], ["a.png"])
    value = "a.png" if field == "file_name" else ["a.png"]
    row = {"prompt": "What is <image>?", "response": "This.", field: value, "other": None}
    assert convert(row) == (["user: What is <image>?", "assistant: This."], ["a.png"])


def test_null_beside_images_is_no_image() -> None:
    row = {"image": None, "images": ["a.png"], "conversations": say("<image>\na", "b")}
    assert convert(row) == (["user: <image>a", "assistant: b"], ["a.png"])
    part = {"type": "image", "image": None, "text": None}
    said = {"type": "text", "image": None, "text": "a"}
    row = {"images": ["a.png"], "messages": [{"role": "user", "content": [part, said]}]}
    assert convert(row) == (["user: <image>a"], ["a.png"])
    row = {"image": "b.png", "images": ["a.png"], "conversations": say("<image>\na", "b")}
    assert convert(row) == "bad_row"


def test_images_of_the_row_and_of_its_parts_keep_the_order_of_the_text() -> None:
    own = {"type": "image_url", "image_url": {"url": "own.png"}}
    row = {
        "images": ["first.png", "last.png"],
        "messages": [{"role": "user", "content": [{"type": "image"}, own, {"type": "image"}]}],
    }
    assert convert(row) == (["user: <image><image><image>"], ["first.png", "own.png", "last.png"])


def test_text_is_not_learned_without_the_image_that_the_row_has_under_another_name() -> None:
    row = {"prompt": "What?", "response": "This."}
    for field, value in {
        "picture": "a/b.JPG",
        "image_1": {"bytes": b"x", "path": None},
        "views": [{"bytes": b"x", "path": None}],
        "photo": b"x",
        "url": "https://example.com/a.png",
    }.items():
        assert convert({**row, field: value}) == "unsupported", field
        assert convert({**row, field: value, "image": "a.png"})[1] == ["a.png"], field
    assert convert({**row, "file_name": "main.py"})[1] == []
    assert convert({**row, "source": "web", "image_id": 5, "url": "https://example.com"})[1] == []


def test_a_caption_without_an_image_is_not_learned() -> None:
    for field in ("text", "caption"):
        assert convert({field: "A cat."}) == "bad_row"
        assert convert({field: "A cat.", "image": "a.png"})[1] == ["a.png"]


def test_a_message_with_other_fields_is_rejected_by_their_names() -> None:
    row = {"id": "1", "messages": [{"speaker": "user", "text": "hi"}]}
    with pytest.raises(SampleError, match="fields speaker, text: name them from and value"):
        SOURCES["openai"].convert(row)


def test_an_image_may_be_base64_and_may_not_be_a_link() -> None:
    data = base64.b64encode(b"\x89PNG\r\n\x1a\n" + bytes(90)).decode()
    row = {"prompt": "a", "response": "b", "image": data}
    assert convert(row)[1] == [base64.b64decode(data)]
    assert convert({**row, "image": f"data:image/png;base64,{data}"})[1] == [base64.b64decode(data)]
    assert convert({**row, "image": "https://example.com/a.png"}) == "image_missing"


def test_a_source_of_one_s_own_that_returns_odd_samples_rejects_their_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd: list[Any] = [
        {"images": (5,)},
        {"images": 5},
        {"messages": (user("<image>a"), Message("assistant", (TextPart(5),)))},  # type: ignore[arg-type]
        {"messages": None},
        {"sample_id": 5},
        {"messages": (user("<image>a"), Message("assistant", ("b",)))},  # type: ignore[arg-type]
    ]
    good = Sample("1", (user("<image>a"), assistant("b")), ("a.png",), "mine")
    samples = iter([*(dataclasses.replace(good, **fields) for fields in odd), good])
    mine = Source(read_conversations, lambda row: next(samples))
    monkeypatch.setitem(SOURCES, "mine", mine)
    write_json(tmp_path / "rows.json", [{"n": i} for i in range(len(odd) + 1)])
    rejects = list_rejects("mine", tmp_path)
    expected = ["bad_row", "bad_row", "bad_row", "roles", "bad_row", "empty"]
    assert [reject.reason for reject in rejects] == expected


def write_every_source(folder: Path) -> dict[str, Path]:
    """Write one good row for each source, in files that `spoil` can change; return the folders."""
    image = save(folder / "x.png")
    coco = {
        "images": [{"id": 5, "file_name": "5.jpg", "width": 100, "height": 50}],
        "annotations": [{"id": 12, "image_id": 5, "caption": "A cat."}],
    }
    boxes = [{"image_id": 5, "category_id": 1, "bbox": [10, 0, 40, 50], "iscrowd": 0}]
    answers = {"annotations": [{"question_id": 9, "multiple_choice_answer": "yes"}]}
    asked = {"questions": [{"image_id": 5, "question_id": 9, "question": "Is it?"}]}
    choice = {
        "question_id": "q",
        "image_id": 4,
        "question": "Which?",
        "choices": ["a", "b"],
        "correct_choice_idx": 1,
    }
    problem = {
        "question": "Which?",
        "choices": ["a", "b"],
        "answer": 1,
        "hint": "",
        "image": None,
        "lecture": "",
        "solution": "",
        "split": "train",
    }
    refs = [{"image_id": 6, "ann_id": 1, "split": "train", "sentences": [{"sent": "a"}]}]
    region = {"region_id": 1, "phrase": "a", "x": 1, "y": 0, "width": 20, "height": 10}
    vg = {"image_id": 3, "url": "https://h/VG_100K/3.jpg", "width": 100, "height": 100}
    book = {"questions": ["Who?"], "answers": ["Poe"], "split": 1}
    seen = {"image_id": "p", "question_id": 3, "question": "What?", "answers": ["a", "b"]}
    message = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    files: dict[str, dict[str, Any]] = {
        "llava": {
            "rows.json": [{"id": "1", "image": "x.png", "conversations": say("<image>\na", "b")}]
        },
        "sharegpt": {"rows.json": [{"id": "1", "conversations": say("a", "b"), "system": "s"}]},
        "openai": {"rows.json": [{"id": "1", "messages": message}]},
        "scienceqa": {"problems.json": {"1": problem}, "pid_splits.json": {"train": ["1"]}},
        "coco": {
            "captions_train2017.json": coco,
            "instances_train2017.json": {
                "annotations": boxes,
                "categories": [{"id": 1, "name": "cat"}],
            },
        },
        "vqa": {
            "v2_OpenEnded_mscoco_train2014_questions.json": asked,
            "v2_mscoco_train2014_annotations.json": answers,
            "aokvqa_v1p0_train.json": [choice],
            "train.json": [{"image": "i.jpg", "question": "q", "answers": [{"answer": "a"}]}],
        },
        "gqa": {
            "train_balanced_questions.json": {"1": {"imageId": "7", "question": "q", "answer": "a"}}
        },
        "textvqa": {"TextVQA_0.5.1_train.json": {"data": [seen]}},
        "textcaps": {"TextCaps_0.1_train.json": {"data": [{"image_id": "p", "caption_str": "c"}]}},
        "ocrvqa": {"dataset.json": {"1": book}},
        "refcoco": {
            "instances.json": {
                "images": [{"id": 6, "file_name": "6.jpg", "width": 9, "height": 9}],
                "annotations": [{"id": 1, "bbox": [1, 0, 5, 5]}],
            }
        },
        "vg": {
            "region_descriptions.json": [{"id": 3, "regions": [region]}],
            "image_data.json": [vg],
        },
        "hf": {},
        "webdataset": {},
        "pairs": {},
    }
    for source, contents in files.items():
        for name, content in contents.items():
            write_json(folder / source / name, content)
    write_pickle(folder / "refcoco" / "refs(unc).p", refs)
    write_table(folder / "hf" / "x.parquet", [{"image": {"bytes": image}, "text": "a"}])
    write_tar(folder / "webdataset" / "x.tar", {"a.png": image, "a.json": b'{"text": "a"}'})
    save(folder / "pairs" / "a.png")
    (folder / "pairs" / "a.txt").write_text("a")
    assert sorted(files) == sorted(SOURCES)
    return {source: folder / source for source in files}


ODD_VALUES: tuple[Any, ...] = (
    None,
    True,
    -1,
    5,
    10**30,
    0.5,
    float("nan"),
    "",
    "\ud800",
    "<image>",
    "../x.png",
    [],
    [None],
    [["a"]],
    {},
    {"bytes": None, "path": None},
    {"a": {"b": ["c"]}},
    DEEP,
    "a" * 3000,
    list(range(30)),
)


def spoil(value: Any, chance: random.Random) -> Any:
    """Return a value of JSON in which something is replaced, removed or added."""
    if isinstance(value, dict) and value and chance.random() < 0.85:
        key = chance.choice(sorted(value))
        if chance.random() < 0.2:
            return {k: v for k, v in value.items() if k != key}
        return {**value, key: spoil(value[key], chance)}
    if isinstance(value, list) and value and chance.random() < 0.85:
        i = chance.randrange(len(value))
        return [*value[:i], spoil(value[i], chance), *value[i + 1 :], *value[:1]]
    return chance.choice(ODD_VALUES)


@pytest.mark.parametrize("source", SOURCES)
def test_random_rows_of_every_source_are_samples_or_rejects(source: str, tmp_path: Path) -> None:
    folder = write_every_source(tmp_path)[source]
    formats = ("pretrain", "instruct") if source == "coco" else ("",)
    for prompt_format in formats:
        settings = {"prompt_format": prompt_format, "max_chars": 2000}
        assert any(len(row) == 3 for row in read(source, folder, **settings)), "a good row"
        check_spoilt_files(source, folder, settings)


def check_spoilt_files(source: str, folder: Path, settings: dict[str, Any]) -> None:
    chance = random.Random(f"{source} {settings}")
    originals = {path: path.read_bytes() for path in sorted(folder.iterdir())}
    num_rejects = num_refused = 0
    for _ in range(60):
        path = chance.choice(sorted(originals))
        path.write_bytes(spoil_file(path, originals[path], chance))
        config = ConvertConfig(source=source, input=str(folder), output="unused", **settings)
        try:
            rows = [row for job in make_shard_jobs(config) for row in job.rows]
        except ConfigError:
            num_refused += 1  # the file as a whole is not what the source has
        else:
            assert all(isinstance(row, PendingSample | RejectedRow) for row in rows)
            num_rejects += sum(isinstance(row, RejectedRow) and bool(row.reason) for row in rows)
        path.write_bytes(originals[path])
    assert num_rejects > 5
    assert num_refused < 50


def spoil_file(path: Path, data: bytes, chance: random.Random) -> bytes:
    if path.suffix == ".json":
        return json.dumps(spoil(json.loads(data), chance)).encode()
    if path.suffix == ".p":
        import pickle

        return pickle.dumps(spoil(pickle.loads(data), chance), protocol=0)
    if path.suffix == ".parquet":
        write_table(path, [{**_odd_row(chance)}])
    elif path.suffix == ".tar":
        row = json.dumps(spoil({"text": "a", "image": "a.png"}, chance)).encode()
        write_tar(path, {"a.png": b"x", "a.json": chance.choice((row, b"\xff", b"[", b""))})
    elif path.suffix == ".txt":
        return chance.choice((b"\xe9", b"", b"caf\xc3", b"\xff\xfea\0\xd8", b"x" * (1 << 21)))
    else:
        return data
    return path.read_bytes()


def _odd_row(chance: random.Random) -> dict[str, Any]:
    """Return a row that a table can hold, with odd values in the usual columns."""
    values = (
        None,
        True,
        5,
        0.5,
        "",
        "a",
        "<image>",
        b"x",
        [],
        ["a"],
        [5],
        {"bytes": None},
        {"a": 1},
    )
    names = ("id", "image", "images", "text", "question", "answer", "messages", "conversations")
    return {name: chance.choice(values) for name in chance.sample(names, 4)} | {"x": 1}
