"""Sources: from raw files in their true layout to exact samples."""

import json
from pathlib import Path

import pytest

from llava_ray.data.sources import SOURCES, find_source
from llava_ray.data.sources.building import write_box
from llava_ray.data.sources.conversations import CAPTION_REQUESTS
from llava_ray.data.sources.scienceqa import INPUTS, OUTPUTS
from llava_ray.errors import ConfigError
from llava_ray.types import IMAGE, Message, Sample, TextPart
from tests.support.raw_data import read, save, say, write_json, write_pickle, write_table, write_tar

SHORT = "Answer the question using a single word or phrase."
BOX_OF = "Please provide the bounding box coordinate of the region this sentence describes: "
WORDS_OF = "Please provide a short description for this region: "


def test_llava_json_becomes_messages_with_an_image_where_the_text_has_it(tmp_path: Path) -> None:
    rows = [
        {"id": "a", "image": "x/1.jpg", "conversations": say("<image>\nWhat?", "A cat.")},
        {"id": "b", "image": "1.jpg", "conversations": say("What?\n<image>", "A dog.")},
        {"id": "c", "image": ["1", "2"], "conversations": say("<image> or <image>?", "The one.")},
        {"id": "d", "conversations": say("Hello", "Hi") + say("More", "No")},
        {"id": "e", "conversations": [{"from": "gpt", "value": "Well?"}, *say("Hello", "Hi")]},
    ]
    write_json(tmp_path / "list.json", rows)
    expected = [
        ("a", ["<image>What?", "A cat."], ["x/1.jpg"]),
        ("b", ["What?<image>", "A dog."], ["1.jpg"]),
        ("c", ["<image> or <image>?", "The one."], ["1", "2"]),
        ("d", ["Hello", "Hi", "More", "No"], []),
        ("e", ["Hello", "Hi"], []),
    ]
    assert read("llava", tmp_path) == expected
    lines = tmp_path / "lines"
    lines.mkdir()
    (lines / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    assert read("llava", lines) == expected
    assert read("llava", tmp_path / "list.json") == expected


def test_one_function_makes_the_sample_of_a_row() -> None:
    row = {"id": 7, "image": "7.png", "conversations": say("<image>\nHow many?", "Two.")}
    assert SOURCES["llava"].convert(row) == Sample(
        sample_id="7",
        messages=(
            Message("user", (IMAGE, TextPart("How many?"))),
            Message("assistant", (TextPart("Two."),)),
        ),
        images=("7.png",),
        source="llava",
    )


def test_rows_that_are_no_conversation_are_rejected_with_the_reason(tmp_path: Path) -> None:
    rows = [
        {"id": "no turns"},
        {"id": "unknown speaker", "conversations": [{"from": "narrator", "value": "Once"}]},
        {"id": "twice", "conversations": [say("a", "b")[0], say("a", "b")[0]]},
        {"id": "no answer", "conversations": say("a", "b")[:1]},
        {"id": "no place", "image": "1.png", "conversations": say("What?", "That.")},
        {"id": "no image", "conversations": say("<image>\nWhat?", "That.")},
        {"id": "said by the answer", "conversations": say("What?", "<image>")},
        {"id": "silent", "conversations": say("What?", "")},
        {"id": "long", "conversations": say("What?", "a" * 1001)},
        {"id": "half a character", "conversations": say("What?", "\ud83d")},
        {"id": "same", "conversations": say("a", "b")},
        {"id": "same", "conversations": say("a", "b")},
        {"id": "same", "conversations": say("a", "c")},
    ]
    lines = [json.dumps(row) for row in rows]
    (tmp_path / "rows.jsonl").write_text("\n".join([*lines, "{broken", "[1]"]))
    found = read("llava", tmp_path, max_chars=1000)
    assert [row[1] for row in found] == [
        "bad_row",
        "roles",
        "roles",
        "empty",
        "placeholders",
        "placeholders",
        "placeholders",
        "empty",
        "too_long",
        "bad_row",
        ["a", "b"],
        "duplicate",
        "duplicate_id",
        "bad_row",
        "bad_row",
    ]
    assert [row[0] for row in found[:9]] == [row["id"] for row in rows[:9]]


def test_ids_that_were_there_before_can_be_made_new(tmp_path: Path) -> None:
    rows = [{"id": "same", "conversations": say("a", answer)} for answer in ("b", "c", "d", "b")]
    write_json(tmp_path / "rows.json", rows)
    found = read("llava", tmp_path, duplicate_ids="rename")
    assert found[0] == ("same", ["a", "b"], [])
    assert [row[0][:5] for row in found[1:3]] == ["same-", "same-"]
    assert len({row[0] for row in found[:3]}) == 3
    assert found[3] == ("same", "duplicate")
    assert found == read("llava", tmp_path, duplicate_ids="rename")


def test_a_broken_json_file_stops_the_conversion_and_is_named(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text('[{"id": "1"')
    with pytest.raises(ConfigError, match=r"'rows.json' in .* is not JSON"):
        read("llava", tmp_path)
    with pytest.raises(ConfigError, match="there is nothing at"):
        read("llava", tmp_path / "nowhere")


def test_sharegpt_and_openai_rows_become_the_same_samples(tmp_path: Path) -> None:
    shared = {
        "id": "s",
        "conversations": [{"from": "system", "value": "Be brief."}, *say("Hello", "Hi")],
    }
    write_json(tmp_path / "s" / "rows.json", [shared])
    assert read("sharegpt", tmp_path / "s") == [("s", ["Be brief.", "Hello", "Hi"], [])]
    url = "data:image/png;base64,AAAA"
    messages = [
        {
            "role": "user",
            "content": [
                {"type": "image_url", "image_url": {"url": url}},
                {"type": "text", "text": "And "},
                {"type": "image_url", "image_url": "dogs/2.jpg"},
                {"type": "text", "text": "?"},
            ],
        },
        {"role": "assistant", "content": "Both."},
    ]
    fetched = [{"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}]
    rows = [
        {"id": 1, "messages": messages},
        {"id": 2, "messages": [{"role": "user", "content": fetched}, messages[1]]},
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert read("openai", tmp_path / "rows.jsonl") == [
        ("1", ["<image>And <image>?", "Both."], [b"\0\0\0", "dogs/2.jpg"]),
        ("2", "image_missing"),
    ]


def test_a_folder_of_images_and_texts_becomes_captions(tmp_path: Path) -> None:
    save(tmp_path / "a" / "cat.PNG")
    (tmp_path / "a" / "cat.txt").write_text(" A cat. \n")
    save(tmp_path / "dog.png")
    first, second = read("pairs", tmp_path)
    assert first[0] == "a/cat.PNG"
    assert first[1][0].removeprefix("<image>") in CAPTION_REQUESTS
    assert (first[1][1], first[2]) == ("A cat.", ["a/cat.PNG"])
    assert second == ("dog.png", "bad_row")


PROBLEM = {
    "question": "Which  one?",
    "choices": ["red", "a  cat"],
    "answer": 1,
    "hint": "Look.",
    "image": "image.png",
    "lecture": "Things\nhave names.",
    "solution": "It purrs.",
    "split": "train",
}
Q, C, M = "Which one?", "Look.", "(A) red (B) a cat"
L, E = "Things\nhave names.", "It purrs."
ASKED = {
    "CQM": f"Context: {C}\nQuestion: {Q}\nOptions: {M}",
    "QCM": f"{Q}\nContext: {C}\nOptions: {M}",
    "QCML": f"{Q}\nContext: {C}\nOptions: {M}\nBECAUSE: {L}",
    "QCME": f"{Q}\nContext: {C}\nOptions: {M}\nBECAUSE: {E}",
    "QCMLE": f"{Q}\nContext: {C}\nOptions: {M}\nBECAUSE: {L} {E}",
    "QCLM": f"{Q}\nContext: {C}\nBECAUSE: {L}\nOptions: {M}",
    "QCEM": f"{Q}\nContext: {C}\nBECAUSE: {E}\nOptions: {M}",
    "QCLEM": f"{Q}\nContext: {C}\nBECAUSE: {L} {E}\nOptions: {M}",
}
ANSWERED = {
    "A": "The answer is B.",
    "AL": f"The answer is B. BECAUSE: {E}",
    "AE": f"The answer is B. BECAUSE: {L}",
    "ALE": f"The answer is B. BECAUSE: {L} {E}",
    "AEL": f"The answer is B. BECAUSE: {E} {L}",
    "LA": f"{L} The answer is B.",
    "EA": f"{E} The answer is B.",
    "LEA": f"{L} {E} The answer is B.",
    "ELA": f"{E} {L} The answer is B.",
    "LEPA": f"LECTURE: {L}\nSOLUTION: {E}\n###\nANSWER: B.",
}


def write_scienceqa(folder: Path, **problems: dict[str, object]) -> Path:
    write_json(folder / "problems.json", problems)
    splits = {name: [] for name in ("train", "val", "test", "minival", "minitest")}
    write_json(folder / "pid_splits.json", splits | {"train": list(problems)})
    return folder


@pytest.mark.parametrize("asked", INPUTS)
@pytest.mark.parametrize("answered", OUTPUTS)
def test_scienceqa_has_the_original_strings_in_every_format(
    asked: str, answered: str, tmp_path: Path
) -> None:
    folder = write_scienceqa(tmp_path, **{"7": PROBLEM})
    form = f"{asked}-{answered}"
    question = f"{ASKED[asked]}<image>"
    expected = ("7", [question, ANSWERED[answered]], ["train/7/image.png"])
    if form == "CQM-A":  # of LLaVA-1.5's evaluation
        question = "<image>Context: Look.\nWhich  one?\nA. red\nB. a  cat"
        expected = ("7", [question, "B"], ["train/7/image.png"])
    assert read("scienceqa", folder, prompt_format=form) == [expected]


def test_scienceqa_without_hint_lecture_or_image(tmp_path: Path) -> None:
    bare = {**PROBLEM, "hint": "", "lecture": "", "solution": "", "image": None}
    folder = write_scienceqa(tmp_path, **{"8": bare})

    def read_as(form: str) -> tuple[list[str], list[str]]:
        ((_, texts, images),) = read("scienceqa", folder, prompt_format=form)
        return texts, images

    asked = f"{Q}\nContext: N/A\nOptions: {M}"
    assert read_as("QCM-LEA") == ([asked, " The answer is B."], [])
    assert read_as("QCM-LEPA") == ([asked, "###\nANSWER: B."], [])
    assert read_as("QCML-ALE") == ([asked, "The answer is B."], [])
    assert read_as("CQM-A") == (["Which  one?\nA. red\nB. a  cat", "B"], [])


def test_scienceqa_splits_and_formats_that_do_not_exist_are_refused(tmp_path: Path) -> None:
    folder = write_scienceqa(tmp_path, **{"7": PROBLEM})
    assert read("scienceqa", folder, split="minival") == []
    with pytest.raises(ConfigError, match=r"split='dev': pid_splits\.json has train, val"):
        read("scienceqa", folder, split="dev")
    with pytest.raises(ConfigError, match="prompt_format='QCM': write INPUT-OUTPUT"):
        read("scienceqa", folder, prompt_format="QCM")


def test_coco_gives_captions_and_conversations_with_boxes(tmp_path: Path) -> None:
    images = [{"id": 5, "file_name": "000000000005.jpg", "width": 100, "height": 50}]
    captions = [
        {"id": 12, "image_id": 5, "caption": "A cat and two cups.\n"},
        {"id": 11, "image_id": 5, "caption": "A cat."},
    ]
    boxes = [
        {"image_id": 5, "category_id": 1, "bbox": [10, 0, 40, 50], "iscrowd": 0},
        {"image_id": 5, "category_id": 2, "bbox": [60, 0, 4, 5]},
        {"image_id": 5, "category_id": 2, "bbox": [70, 0, 4, 5]},
        {"image_id": 5, "category_id": 3, "bbox": [1, 1, 90, 40], "iscrowd": 1},
    ]
    kinds = [{"id": i, "name": name} for i, name in ((1, "cat"), (2, "cup"), (3, "grass"))]
    folder = tmp_path / "annotations"
    write_json(folder / "captions_train2017.json", {"images": images, "annotations": captions})
    write_json(
        folder / "instances_train2017.json",
        {"images": images, "annotations": boxes, "categories": kinds},
    )
    image = "train2017/000000000005.jpg"
    found = read("coco", tmp_path)
    assert [(row[0], row[1][1], row[2]) for row in found] == [
        ("12", "A cat and two cups.", [image]),
        ("11", "A cat.", [image]),
    ]
    assert all(row[1][0].removeprefix("<image>") in CAPTION_REQUESTS for row in found)
    assert read("coco", tmp_path, prompt_format="instruct") == [
        (
            "5",
            [
                "<image>Provide a one-sentence caption for the provided image.",
                "A cat.",
                f"{BOX_OF}the cat.",
                "[0.1, 0.25, 0.5, 0.75]",
            ],
            [image],
        )
    ]


def test_a_box_is_written_in_the_image_padded_to_a_square() -> None:
    assert write_box(0, 0, 100, 50, size=(100, 50)) == "[0.0, 0.25, 1.0, 0.75]"
    assert write_box(0, 0, 50, 100, size=(50, 100)) == "[0.25, 0.0, 0.75, 1.0]"
    assert write_box(-3, 7, 500, 3, size=(100, 100)) == "[0.0, 0.07, 1.0, 0.1]"


def test_vqa_merges_the_questions_about_an_image_and_takes_the_common_answer(
    tmp_path: Path,
) -> None:
    asked = [
        {"image_id": 9, "question_id": 90, "question": "Is it red?"},
        {"image_id": 9, "question_id": 91, "question": "How many?"},
        {"image_id": 8, "question_id": 80, "question": "Why?"},
    ]
    v2 = [
        {"question_id": key, "multiple_choice_answer": answer}
        for key, answer in ((90, "yes"), (91, "2"))
    ]
    ok = [
        {"question_id": asked[0]["question_id"], "answers": [{"answer": a} for a in "abb"]},
        {"question_id": asked[2]["question_id"], "answers": [{"answer": "c"}]},
    ]
    v2_folder, ok_folder = tmp_path / "v2", tmp_path / "ok"
    for folder, prefix, answers in ((v2_folder, "v2_", v2), (ok_folder, "", ok)):
        questions = folder / f"{prefix}OpenEnded_mscoco_train2014_questions.json"
        write_json(questions, {"questions": asked if prefix else [asked[0], asked[2]]})
        write_json(folder / f"{prefix}mscoco_train2014_annotations.json", {"annotations": answers})
    image = "train2014/COCO_train2014_{:012d}.jpg"
    assert read("vqa", v2_folder) == [
        ("9", [f"<image>Is it red?\n{SHORT}", "yes", "How many?", "2"], [image.format(9)]),
        ("8", "bad_row"),
    ]
    assert read("vqa", ok_folder) == [
        ("9", [f"<image>Is it red?\n{SHORT}", "b"], [image.format(9)]),
        ("8", [f"<image>Why?\n{SHORT}", "c"], [image.format(8)]),
    ]


def test_aokvqa_asks_each_question_with_every_rotation_of_its_choices(tmp_path: Path) -> None:
    row = {
        "question_id": "q",
        "image_id": 4,
        "question": "Which?",
        "choices": ["a", "b", "c"],
        "correct_choice_idx": 2,
    }
    write_json(tmp_path / "aokvqa_v1p0_train.json", [row])
    letter = "Answer with the option's letter from the given choices directly."
    image = ["train2017/000000000004.jpg"]
    assert read("vqa", tmp_path) == [
        ("q-0", [f"<image>Which?\nA. a\nB. b\nC. c\n{letter}", "C"], image),
        ("q-1", [f"<image>Which?\nA. b\nB. c\nC. a\n{letter}", "B"], image),
        ("q-2", [f"<image>Which?\nA. c\nB. a\nC. b\n{letter}", "A"], image),
    ]


def test_vizwiz_may_be_unanswerable(tmp_path: Path) -> None:
    answers = [{"answer": "unanswerable"}, {"answer": "soup"}, {"answer": "unanswerable"}]
    row = {"image": "VizWiz_train_1.jpg", "question": "What is it?", "answers": answers}
    write_json(tmp_path / "Annotations" / "train.json", [row])
    hint = "When the provided information is insufficient, respond with 'Unanswerable'."
    assert read("vqa", tmp_path) == [
        (
            "VizWiz_train_1.jpg",
            [f"<image>What is it?\n{hint}\n{SHORT}", "unanswerable"],
            ["train/VizWiz_train_1.jpg"],
        )
    ]


def test_gqa_merges_the_questions_about_an_image(tmp_path: Path) -> None:
    asked = {
        "1": {"imageId": "77", "question": "Is it day?", "answer": "yes"},
        "2": {"imageId": "78", "question": "Who?", "answer": "man"},
        "3": {"imageId": "77", "question": "Where?", "answer": "street"},
    }
    write_json(tmp_path / "train_balanced_questions.json", asked)
    assert read("gqa", tmp_path) == [
        ("77", [f"<image>Is it day?\n{SHORT}", "yes", "Where?", "street"], ["77.jpg"]),
        ("78", [f"<image>Who?\n{SHORT}", "man"], ["78.jpg"]),
    ]


def test_textvqa_and_textcaps_name_what_was_read_in_the_image(tmp_path: Path) -> None:
    asked = {"image_id": "p", "question_id": 3, "question": "What brand?", "answers": list("xyy")}
    write_json(tmp_path / "TextVQA_0.5.1_train.json", {"data": [asked]})
    captions = [{"image_id": "p", "caption_str": "A box."}, {"image_id": "p", "caption_str": "No."}]
    write_json(tmp_path / "TextCaps_0.1_train.json", {"data": captions})
    image = ["train_images/p.jpg"]
    assert read("textvqa", tmp_path) == [("3", [f"<image>What brand?\n{SHORT}", "y"], image)]
    words = {"data": [{"image_id": "p", "ocr_tokens": ["ACME", "12"]}]}
    write_json(tmp_path / "TextVQA_Rosetta_OCR_v0.2_train.json", words)
    read_in_it = "Reference OCR token: ACME, 12"
    assert read("textvqa", tmp_path) == [
        ("3", [f"<image>What brand?\n{read_in_it}\n{SHORT}", "y"], image)
    ]
    caption = "Provide a one-sentence caption for the provided image."
    assert read("textcaps", tmp_path) == [
        ("p", [f"<image>{caption}\n{read_in_it}", "A box."], image)
    ]


def test_ocrvqa_takes_the_split_asked_for(tmp_path: Path) -> None:
    book = {"questions": ["Who wrote it?", "What is it?"], "answers": ["Poe", "A book"]}
    write_json(tmp_path / "dataset.json", {"1": {**book, "split": 1}, "2": {**book, "split": 3}})
    texts = [f"<image>Who wrote it?\n{SHORT}", "Poe", "What is it?", "A book"]
    assert read("ocrvqa", tmp_path) == [("1", texts, ["1.jpg"])]
    assert read("ocrvqa", tmp_path, split="test") == [("2", texts, ["2.jpg"])]


def test_refcoco_and_visual_genome_go_from_boxes_to_words_and_back(tmp_path: Path) -> None:
    refs = [
        {"image_id": 6, "ann_id": key, "split": split, "sentences": [{"sent": f"thing {key}"}]}
        for key, split in [*((i, "train") for i in range(12)), (12, "val")]
    ]
    write_pickle(tmp_path / "refcoco" / "refs(unc).p", refs)
    entries = [{"id": 6, "file_name": "COCO_train2014_6.jpg", "width": 100, "height": 100}]
    boxes = [{"id": key, "bbox": [key, 0, 10, 100]} for key in range(13)]
    write_json(tmp_path / "refcoco" / "instances.json", {"images": entries, "annotations": boxes})
    found = read("refcoco", tmp_path)
    assert [(row[0], len(row[1]), row[2]) for row in found] == [
        ("6-0", 20, ["train2014/COCO_train2014_6.jpg"]),
        ("6-1", 4, ["train2014/COCO_train2014_6.jpg"]),
    ]
    check_regions(found[0][1], {f"thing {i}": box_of(i, 10) for i in range(10)})
    regions = [
        {"region_id": i, "phrase": f"part {i}", "x": i, "y": 0, "width": 20, "height": 100}
        for i in range(30)
    ]
    write_json(tmp_path / "vg" / "region_descriptions.json", [{"id": 3, "regions": regions}])
    image = {"image_id": 3, "url": "https://host/VG_100K_2/3.jpg", "width": 100, "height": 100}
    write_json(tmp_path / "vg" / "image_data.json", [image])
    ((sample_id, texts, images),) = read("vg", tmp_path / "vg")
    assert (sample_id, images, len(texts)) == ("3", ["VG_100K_2/3.jpg"], 20)
    check_regions(texts, {f"part {i}": box_of(i, 20) for i in range(30)})


def box_of(left: int, width: int) -> str:
    return f"[{left / 100}, 0.0, {round((left + width) / 100, 2)}, 1.0]"


def check_regions(texts: list[str], boxes: dict[str, str]) -> None:
    kinds = set()
    for question, answer in zip(texts[::2], texts[1::2], strict=True):
        asked = question.removeprefix("<image>")
        if asked.startswith(BOX_OF):
            assert boxes[asked.removeprefix(BOX_OF).removesuffix(".")] == answer
        else:
            assert asked == f"{WORDS_OF}{boxes[answer]}."
        kinds.add(asked[:25])
    assert len(kinds) == 2, "both ways are asked for"


def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path) -> None:
    write_pickle(tmp_path / "refs(unc).p", [print])
    write_json(tmp_path / "instances.json", {"images": [], "annotations": []})
    with pytest.raises(ConfigError, match=r"not a pickle of plain data .*print"):
        read("refcoco", tmp_path)


def test_hugging_face_tables_are_read_in_their_usual_columns(tmp_path: Path) -> None:
    data = save(tmp_path / "x.png")
    held = {"bytes": data, "path": None}
    turns = [{"user": "What?", "assistant": "A cat."}]
    write_table(tmp_path / "hub" / "train-0.parquet", [{"images": [held, held], "texts": turns}])
    asked = {"image": held, "question": "Why?", "answers": ["So.", "No."]}
    write_table(tmp_path / "hub" / "val-0.parquet", [asked])
    assert read("hf", tmp_path / "hub") == [
        ("train-0.parquet[0]", ["<image><image>What?", "A cat."], [data, data]),
        ("val-0.parquet[0]", ["<image>Why?", "So."], [data]),
    ]
    assert [row[0] for row in read("hf", tmp_path / "hub", split="val")] == ["val-0.parquet[0]"]
    messages = [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "B"}]
    write_table(tmp_path / "more" / "x.parquet", [{"id": "m", "image": held, "messages": messages}])
    write_table(tmp_path / "more" / "y.parquet", [{"id": "c", "image": held, "caption": " C "}])
    found = read("hf", tmp_path / "more")
    assert found[0] == ("m", ["<image>What?", "B"], [data])
    assert (found[1][0], found[1][1][1], found[1][2]) == ("c", "C", [data])


def test_a_tar_of_images_and_texts_is_read_in_groups(tmp_path: Path) -> None:
    data = save(tmp_path / "x.png")
    turns = json.dumps({"conversations": say("<image>\nWhat?", "A cat.")}).encode()
    files = {
        "a/0.png": data,
        "a/0.txt": b"A cat.",
        "a/1.json": turns,
        "a/1.jpg": data,
        "a/2.png": b"",
    }
    write_tar(tmp_path / "tars" / "000.tar", files)
    first, second, third = read("webdataset", tmp_path / "tars")
    assert (first[0], first[1][1], first[2]) == ("000.tar/a/0", "A cat.", [data])
    assert second == ("000.tar/a/1", ["<image>What?", "A cat."], [data])
    assert third == ("000.tar/a/2", "bad_row")


def test_a_setting_that_the_source_does_not_use_is_refused(tmp_path: Path) -> None:
    write_json(tmp_path / "rows.json", [{"conversations": say("a", "b")}])
    with pytest.raises(ConfigError, match="split='val' has no effect on the source llava"):
        read("llava", tmp_path, split="val")
    with pytest.raises(ConfigError, match="only on scienceqa, coco: leave it out"):
        read("vqa", tmp_path, prompt_format="CQM-A")


def test_a_misspelt_source_is_refused_with_the_one_that_was_meant() -> None:
    with pytest.raises(ConfigError, match="did you mean scienceqa"):
        find_source("sciencqa")
