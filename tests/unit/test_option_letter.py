"""Which option a response chooses, in the ways in which models say it."""

import math

import pytest

from llava_ray.evaluate.scoring.metrics import Scored
from llava_ray.evaluate.scoring.option_letter import read_option
from llava_ray.evaluate.scoring.text_match import contains_phrase, normalize_text
from llava_ray.evaluate.tasks import TASKS
from llava_ray.types import Question
from tests.support.random_responses import make_responses

CHOICES = ("cat", "dog", "a red bird", "none of these")

SAY_B = r"""
B|b|(b)|(B)|B.|B)|B:|B。|B、|【B】|「B」|Ｂ|（B）|[B]|{B}|**B**|*B*|`B`|__B__|"B"|'B'|“B”
B. dog|**B.** dog|B, dog|B dog|(B) dog|B - dog|B because the dog barks
Answer: B|answer: b|Answer - B|Answer B|**Answer:** B|**Answer: B**|Ans: B|<answer>B</answer>
{"answer": "B"}|Correct answer: **B**|The answer is B.|The answer is (B).|My answer is B
The best answer is B|The correct answer is: B|The most likely answer is B
The correct option is B. dog
Therefore, the answer is option B.|So the answer should be B|Final answer: B
Final answer: A? No. Final answer: B|Option B|option (b)|Choice B|Option B is correct|B is correct.
B is the correct answer|I choose B|I would choose option B.|I'd go with B.|It's B|I think it's B.
I think the answer is B|Option A is incorrect. Answer: B|Option A is wrong, option B is right
The answer is not A, it's B|\boxed{B}|$\boxed{B}$|\boxed{\text{B}}|\boxed{(B)}
\boxed{B. dog}|\boxed{dog}
The answer is $\boxed{\mathrm{B}}$.|答案是B|答案：B|答案为B。|答案是（B）|正确答案是 B|选B
我选择B|应选B。
选项B|故选：B|B选项正确|正确选项是B|答えはB|정답은 B|Antwort: B|Réponse : B|Respuesta: B
It may be A.</think>B|答案是B不是A|我认为是B
正确的是B|B;|<<B>>|Answer => B|Most likely B|\boxed B|\fbox{B}|B, not A|#### B|B</s>
<think>maybe A or C</think>B|<think>A</think> The answer is B|dog|Dog.|The dog|It is a dog.
A dog is running in the park
"""
LINES = [
    "Answer:\nB",
    "### Answer\nB",
    "The answer is\n\n(B)",
    "B\nExplanation: A cat has whiskers",
    "Let me see. The animal barks.\n\nB",
    "A. cat\nB. dog\nC. a red bird\nAnswer: B",
]


@pytest.mark.parametrize(
    "text", [*(each for line in SAY_B.strip().splitlines() for each in line.split("|")), *LINES]
)
def test_an_option_is_read_however_it_is_stated(text: str) -> None:
    assert read_option(text, CHOICES) == "B"


@pytest.mark.parametrize(
    "text",
    [
        "", "?", "E", "A man riding a horse", "A man is walking", "The answer is A man", "a man",
        "I don't know", "B or C", "A and B", "A, B", "A/B", "both A and B", "A cat or B dog",
        "cat and dog", "All of the above", "Because", "Bdog", "B-side", "C++", "Dé", "D'accord",
        "Vitamin C is nice", "A/an", "A;B", "A\nB", "B is wrong", "<think>B",
        "选项B错误", "The answer is not B", "N/A",
        "The answer is neither A nor B", "\\boxed{}", "The answer is B or C",
    ],
)  # fmt: skip
def test_what_names_no_option_or_two_is_not_read(text: str) -> None:
    assert read_option(text, CHOICES) is None


@pytest.mark.parametrize("letter", "ABCD")
@pytest.mark.parametrize(
    "form", ["{0}", "{0}.", "{0}. {1}", "({0})", "({0}) {1}", "{0}) {1}", "{0}: {1}", "{0}, {1}",
             "{0}\n", "The answer is {0}.", "The answer is {0}. {1}", "the correct answer is {0}",
             "The correct option is: ({0})", "{1}", "{1}."]
)  # fmt: skip
def test_llavas_own_responses_are_read_as_before(form: str, letter: str) -> None:
    text = CHOICES["ABCD".index(letter)]
    assert read_option(form.format(letter, text), CHOICES) == letter


def test_letters_that_are_words_are_options_only_where_they_can_be() -> None:
    twelve = [f"x{i}" for i in range(12)]
    assert read_option("I think so", twelve) is None
    assert read_option("I", twelve) == "I"
    for text in ("A is correct", "A\nBecause", "A because it is", "A."):
        assert read_option(text, CHOICES) == "A"
    assert read_option("anything", ()) is None


def test_an_options_text_is_found_as_whole_words_and_the_longer_one_counts() -> None:
    assert read_option("a.", ("b", "a")) == "B"  # as it is written; the letter would be A
    assert read_option("a black cat", ("cat", "black cat")) == "B"
    assert read_option("这是一只狗", ("猫", "狗")) == "B"
    assert read_option("It is 3.5 m", ("5", "3.5")) == "B"
    assert read_option("It is 5", ("5", "3.5")) == "A"


def test_a_response_that_cannot_be_read_is_wrong_and_unread() -> None:
    question = Question("1", "?", answers=("B",), choices=CHOICES)
    for name, text in (
        ("own_choice", "A man"), ("seedbench", "b"), ("scienceqa", "b"), ("mme", "maybe"),
    ):  # fmt: skip
        score = TASKS[name].score
        assert score is not None
        found = score(question, text)
        assert (found.value, found.is_unread) == (0, True)
        assert not score(question, "B" if name != "mme" else "yes").is_unread


@pytest.mark.parametrize(
    ("text", "phrase", "holds"),
    [
        ("There are 5 dogs.", "5", True),
        ("It is -5 degrees", "5", False),
        ("It is −5 degrees", "-5", True),
        ("pages 3-5", "5", True),
        ("2.5 m", "5", False),
        ("2.5 m", "2", False),
        ("2.50 m", "2.5", True),
        ("It costs 1,000 dollars", "1000", True),
        ("It costs 1,000 dollars", "000", False),
        ("2,5 m", "5", False),
        ("2,5 m", "2.5", True),
        ("1,2,3", "2", True),
        ("yes 😀!", "😀", True),
        ("yes!", "😀", False),
        ("It costs $5", "$5", True),
        ("It costs 5", "$5", False),
        ("What?", "?", True),
        ("about 50%", "50", True),
        ("about 50", "50%", False),
        ("C++ is fast", "C++", True),
        ("C is fast", "C++", False),
        ("catalogue", "cat", False),
        ("The cat's tail", "cat", True),
        ("New York USA", "New York, USA", True),
        ("一只黑猫在睡觉", "黑猫", True),
        ("東京タワーです", "東京タワー", True),
        ("고양이가 있습니다", "고양이", True),
        ("แมวดำ", "แมว", True),
        ("हिन्दी भाषा", "हिन्द", False),
        ("naïve café", "caf", False),
        ("anything", "", False),
        ("anything", "...", False),
    ],
)
def test_a_phrase_is_found_as_words_and_numbers_of_its_own(
    text: str, phrase: str, holds: bool
) -> None:
    assert contains_phrase(text, phrase) == holds


def test_texts_are_equal_whatever_their_form() -> None:
    assert normalize_text(' "Red  Car." ') == normalize_text("red car")
    assert normalize_text("ＲＥＤ。") == "red"
    assert normalize_text("3.5") != normalize_text("35")


def test_no_response_whatever_makes_a_scorer_fail() -> None:
    question = Question("1", "?", answers=("B",) * 4, choices=CHOICES)
    scorers = [task.score for task in TASKS.values() if task.score]
    judges = [task.judge for task in TASKS.values() if task.judge]
    assert judges
    for text in make_responses(1500):
        scores = [score(question, text) for score in scorers]
        assert all(each.value is not None and 0 <= each.value <= 1 for each in scores)
        for judge in judges:
            value = judge.score(text).value
            assert value is None or 0 <= value <= 1


def test_no_caption_whatever_makes_its_scorer_fail() -> None:
    task = TASKS["coco2017_cap_val"]
    assert task.score_together is not None
    texts = [*make_responses(150), "", " ", "\ud800"]
    questions = [Question(str(i), "?", answers=("a cat", "a dog")) for i in range(len(texts))]
    scores = task.score_together(questions, texts)
    rows = [Scored(*row) for row in zip(questions, texts, scores, strict=True)]
    for some in (rows, rows[:1], rows[-2:]):
        assert all(math.isfinite(value) for value in task.summarize(some).values())


def test_a_verdicts_numbers_are_read_only_within_their_scale() -> None:
    review, grading = (TASKS[name].judge for name in ("llava_in_the_wild", "mmvet"))
    assert review
    assert grading
    for verdict in ("nan 5", "5 nan", "inf 5", "5 1e999", "5 11", "-1 5", "1_0 5", "٥ 5", "5 5 5"):
        assert review.score(verdict).value is None, verdict
    for verdict in ("nan", "inf", "-inf", "1.1", "-0.1", "1e-999x", "0_0", "Infinity"):
        assert grading.score(verdict).value is None, verdict
    assert review.score("10 0").figures == (10, 0)
    assert grading.score("1.0\nbecause").value == 1


@pytest.mark.parametrize("text", ["answer:" * 5000, "_" * 20_000, " " * 20_000, "(" * 20_000,
                                  "\\boxed{" * 3000, "<think>" * 3000, "A or " * 5000])  # fmt: skip
def test_a_long_response_takes_no_time_to_speak_of(text: str) -> None:
    read_option(text, CHOICES)
