"""Every benchmark is read in the layout that LLaVA's documentation asks for, and asked as there."""

import hashlib
from pathlib import Path

import pytest

from llava_ray.data.shards import ShardWriter
from llava_ray.data.sources.building import assistant, make_sample, user
from llava_ray.data.validate import CheckedImage
from llava_ray.errors import ConfigError, ImageError, SampleError
from llava_ray.evaluate.datasets.images import hash_image, load_image
from llava_ray.evaluate.results.results import score_predictions, summarize_task
from llava_ray.evaluate.tasks import TASKS
from llava_ray.types import Prediction, Question
from tests.support.benchmark_files import (
    LETTER,
    MME_SUBTASKS,
    SHORT,
    UNANSWERABLE,
    write_all,
    write_lines,
)
from tests.support.raw_data import save
from tests.support.tiny_checkpoint import make_image


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_all(tmp_path_factory.mktemp("eval"))


ASKED = {
    "vqav2_val": (2, f"What is it?{SHORT}", "net"),
    "vqav2_test": (2, f"What is 7?{SHORT}", None),
    "gqa": (2, f"Is it red?{SHORT}", "yes"),
    "vizwiz_vqa_val": (1, f"What is this?{UNANSWERABLE}{SHORT}", "soda"),
    "vizwiz_vqa_test": (2, f"What is this?{UNANSWERABLE}{SHORT}", None),
    "scienceqa": (2, f"Context: Look at it.\nWhich is a cat?\nA. cat\nB. dog{LETTER}", "A"),
    "scienceqa_img": (1, f"Context: Look at it.\nWhich is a cat?\nA. cat\nB. dog{LETTER}", "A"),
    "textvqa_val": (2, f"What does it say?\nReference OCR token: A, B{SHORT}", "word 0."),
    "pope": (8, f"Is there a dog 0?{SHORT}", "yes"),
    "mme": (28, f"Is it existence?{SHORT}", "yes"),
    "mmbench_en_dev": (3, f"what?\nA. x{LETTER}", "A"),
    "mmbench_cn_dev": (3, "what?\nA. x\n请直接回答选项字母。", "A"),
    "seedbench": (2, f"Which?\nA. a\nB. b\nC. c\nD. d{LETTER}", "B"),
    "llava_in_the_wild": (3, "Why 0?", "Because 0."),
    "mmvet": (2, "What is 0?", "dog<AND>cat"),
    "qbench": (
        1,
        "Is it sharp?\nChoose between one of the options as follows:\nA. No\nB. Yes\n",
        "B",
    ),
    "coco2014_cap_val": (
        2,
        "Provide a one-sentence caption for the provided image.",
        "A dog runs on the grass.",
    ),
}
ASKED["coco2017_cap_val"] = ASKED["coco2014_cap_val"]


@pytest.mark.parametrize("name", ASKED)
def test_a_benchmark_is_asked_as_llava_asks_it(data: Path, name: str) -> None:
    task = TASKS[name]
    questions = task.select(task.read_all(data))
    number, text, answer = ASKED[name]
    assert (len(questions), questions[0].text) == (number, text)
    assert questions[0].answers[:1] == ((answer,) if answer else ())
    assert len({question.question_id for question in questions}) == number
    for question in questions:
        for each in question.images:
            assert load_image(each)[:4] in (b"\x89PNG", b"\xff\xd8\xff\xe0")
    assert sum(bool(question.images) for question in questions) >= number - 1
    assert task.sampling.is_greedy
    # the folder of one benchmark alone will do as well
    assert task.select(task.read_all(data / task.folder)) == questions


def test_every_task_is_tested_here() -> None:
    assert ASKED.keys() == {name for name in TASKS if not name.startswith("own_")}


def find(data: Path, name: str) -> list[Question]:
    return TASKS[name].select(TASKS[name].read_all(data))


def test_scores_are_broken_down(data: Path) -> None:
    groups = {name: [question.groups for question in find(data, name)] for name in ASKED}
    assert groups["scienceqa"] == [
        ("subject/NAT", "context/TXT", "context/IMG", "grade/G1-6"),
        ("subject/LAN", "context/NO", "grade/G7-12"),
    ]
    assert groups["gqa"] == [("binary",), ("open",)]
    assert groups["seedbench"][1] == ("data/video", "type/Action Recognition")
    assert groups["llava_in_the_wild"] == [("conv",), ("detail",), ("complex",)]
    assert groups["mmvet"] == [("know", "rec", "together/know+rec"), ("ocr", "together/ocr")]
    assert groups["vqav2_val"][0] == ("answer_type/other",)
    assert [g for (g,) in groups["mme"]] == [name for name in MME_SUBTASKS for _ in "ab"]


def test_popes_labels_are_found_where_the_order_differs(data: Path) -> None:
    assert [q.answers for q in find(data, "pope")] == [("yes",), ("no",), ("yes",), ("no",)] * 2


def test_scienceqas_questions_are_made_where_llavas_file_is_missing(data: Path) -> None:
    before = find(data, "scienceqa")
    asked = data / "scienceqa" / "llava_test_CQM-A.json"
    asked.rename(asked.with_suffix(".away"))
    try:
        assert find(data, "scienceqa") == before
    finally:
        asked.with_suffix(".away").rename(asked)


def test_mmbenchs_options_end_where_pandas_sees_nothing_and_quoted_cells_are_whole(
    data: Path,
) -> None:
    first, second, turned = find(data, "mmbench_en_dev")
    assert first.choices == ("x",)
    assert second.text == f'two\nlines\na "quoted"\tone?\nA. x\nB. y\nC. z{LETTER}'
    assert second.cluster == turned.cluster != first.cluster
    assert len({hash_image(q.images[0]) for q in (first, second, turned)}) == 1


@pytest.mark.parametrize("name", [name for name in ASKED if TASKS[name].score])
def test_right_answers_give_full_marks_and_nonsense_gives_none(data: Path, name: str) -> None:
    task, questions = TASKS[name], find(data, name)
    for is_right in (True, False):
        said = {
            q.question_id: Prediction(
                q.question_id, "answered", q.answers[-1] if is_right else "qwertyuiop"
            )
            for q in questions
        }
        scores = score_predictions(task, questions, said)
        result = summarize_task(task, questions, said, scores, min_coverage=1)
        assert result.headline is not None
        full = 2000 if name == "mme" else 100
        if is_right:
            assert result.headline[1].value == pytest.approx(full)
        elif name != "pope":  # there yes is all that does not say no
            assert result.headline[1].value == 0


def test_captions_are_measured_together(data: Path) -> None:
    task, questions = TASKS["coco2017_cap_val"], find(data, "coco2017_cap_val")
    texts = {"9": "A dog runs on the grass.", "11": "two red cars parked"}
    said = {i: Prediction(i, "answered", text) for i, text in texts.items()}
    scores = score_predictions(task, questions, said)
    result = summarize_task(task, questions, said, scores, min_coverage=1)
    assert result.metrics["Bleu_4"].value == pytest.approx(100)
    assert result.metrics["ROUGE_L"].value == pytest.approx(100)
    assert result.metrics["CIDEr"].value > 500
    assert result.headline is not None
    assert result.headline[0] == "CIDEr"


def test_captions_numbers_are_pycocoevalcaps(data: Path) -> None:
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    from llava_ray.evaluate.scoring.captions import split_words

    task, questions = TASKS["coco2017_cap_val"], find(data, "coco2017_cap_val")
    texts = {"9": "A black dog runs over grass", "11": "Two cars."}
    said = {i: Prediction(i, "answered", text) for i, text in texts.items()}
    ours = summarize_task(
        task, questions, said, score_predictions(task, questions, said), min_coverage=1
    ).metrics
    right = {q.question_id: [split_words(a) for a in q.answers] for q in questions}
    told = {i: [split_words(text)] for i, text in texts.items()}
    assert ours["CIDEr"].value == pytest.approx(100 * Cider().compute_score(right, told)[0])
    assert ours["ROUGE_L"].value == pytest.approx(100 * Rouge().compute_score(right, told)[0])
    bleus = Bleu(4).compute_score(right, told, verbose=0)[0]
    for n, bleu in enumerate(bleus, start=1):
        assert ours[f"Bleu_{n}"].value == pytest.approx(100 * bleu, abs=1e-3)


def write_shard(folder: Path) -> Path:
    folder.mkdir(parents=True)
    writer = ShardWriter(folder / "part-00000.parquet")
    for i in range(3):
        data = save(folder / "raw" / f"{i}.png", i)
        sha = CheckedImage(data, *make_image(i).size)
        turns = (user(f"<image>\nWhich is {i}?\nA. cat\nB. dog"), assistant("B"))
        writer.add(make_sample("mine", f"s{i}", turns, data), [sha], num_tokens=None)
    writer.close()
    return folder


def test_ones_own_shards_are_asked_with_their_images(tmp_path: Path) -> None:
    folder = write_shard(tmp_path / "shards")
    questions = find(folder, "own_choice")
    assert questions[1].text == f"Which is 1?\nA. cat\nB. dog{LETTER}"
    assert (questions[1].choices, questions[1].answers) == (("cat", "dog"), ("B",))
    for i, question in enumerate(questions):
        raw = (folder / "raw" / f"{i}.png").read_bytes()
        assert hash_image(question.images[0]) == hashlib.sha256(raw).hexdigest()
    score = TASKS["own_choice"].score
    assert score is not None
    assert [score(questions[0], text).value for text in ("B", "(B) dog", "dog", "A")] == [
        1,
        1,
        1,
        0,
    ]


def test_ones_own_lines_may_have_options_and_several_answers(tmp_path: Path) -> None:
    rows = [
        {"question_id": 1, "text": "Which?", "answer": "A", "choices": ["x", "y"], "category": "k"},
        {"question_id": 2, "text": "How many?", "answer": ["2", "2", "two", "3", "2"]},
    ]
    path = write_lines(tmp_path / "questions.jsonl", rows)
    with pytest.raises(SampleError, match="row 2 has no options"):
        find(path, "own_choice")
    second = find(path, "own_exact")[1]
    (first,) = find(write_lines(tmp_path / "one.jsonl", rows[:1]), "own_choice")
    assert (first.text, first.groups) == (f"Which?\nA. x\nB. y{LETTER}", ("k",))
    assert second.answers == ("2", "2", "two", "3", "2")
    with pytest.raises(SampleError, match="question 1 has 1 answers"):
        find(path, "own_vqa")


BAD_FILES = [
    ("gqa", "gqa/data/testdev_balanced_questions.json", None, "balanced_questions.json is missing"),
    ("gqa", "gqa/data/testdev_balanced_questions.json", "{}", "json has no '201'"),
    ("gqa", "gqa/data/testdev_balanced_questions.json", "{", "testdev_.*is not JSON"),
    ("gqa", "gqa/llava_gqa_testdev_balanced.jsonl", '{"text": "?"}', "row 1 has no 'question_id'"),
    ("gqa", "gqa/llava_gqa_testdev_balanced.jsonl", "nonsense", "line 1 of .*is not a JSON object"),
    ("vqav2_val", "vqav2/v2_mscoco_val2014_annotations.json", "{}", "has no 'annotations'"),
    ("pope", "pope/coco/coco_pope_random.json", '{"image": "9.jpg", "text": "", "label": "no"}',
     "no label for POPE's question 0"),
    ("mme", "MME/MME_Benchmark_release_version/color/0001.txt", "", "no answer for MME's"),
    ("textvqa_val", "textvqa/TextVQA_0.5.1_val.json", '{"data": []}', "has no .*what does it say"),
    ("mmbench_en_dev", "mmbench/mmbench_dev_20230712.tsv", "index\tA\n1\n", "1 columns"),
    ("mmvet", "mm-vet/mm-vet.json", "{}", "has no 'v1_0'"),
    ("scienceqa", "scienceqa/problems.json", "{}", "problems.json has no '4'"),
    ("coco2017_cap_val", "coco/annotations/captions_val2017.json", "[]", "has no 'annotations'"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "file", "content", "said"), BAD_FILES)
def test_a_file_that_is_missing_or_of_another_task_is_named(
    data: Path, name: str, file: str, content: str | None, said: str
) -> None:
    path = data / file
    before = path.read_text()
    path.unlink()
    if content is not None:
        path.write_text(content)
    try:
        with pytest.raises((ConfigError, SampleError), match=said):
            find(data, name)
    finally:
        path.write_text(before)


@pytest.mark.parametrize(
    "name", ["a\0b.png", "\ud800.png", "", "x.parquet#0/0", "x.parquet#a", "x.tsv#y", "#", "/",
             "y" * 5000]
)  # fmt: skip
def test_an_image_of_any_name_that_is_not_there_is_an_image_error(
    tmp_path: Path, name: str
) -> None:
    for path in (name, str(tmp_path / name) if "\0" not in name else name):
        with pytest.raises(ImageError):
            load_image(path)
        with pytest.raises(ImageError):
            hash_image(path)


def test_a_place_in_a_file_that_it_does_not_have_is_an_image_error(tmp_path: Path) -> None:
    write_shard(tmp_path / "shards")
    shard = tmp_path / "shards" / "part-00000.parquet"
    for place in ("9/0", "0/9", "-9/0", "0"):
        with pytest.raises(ImageError):
            load_image(f"{shard}#{place}")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    with pytest.raises(ImageError, match="cannot be read"):
        load_image(f"{tmp_path / 'broken.parquet'}#0/0")


def test_an_image_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"absent\.png cannot be read \(No such file"):
        load_image(str(tmp_path / "absent.png"))
    table = tmp_path / "table.tsv"
    table.write_text("index\timage\n1\tnot base64!\n")
    with pytest.raises(ImageError, match="index 1: there is no image in base64"):
        load_image(f"{table}#12")
