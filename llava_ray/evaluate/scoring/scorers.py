"""Scores single responses exactly as each benchmark's own scorer does.

A scorer is a pure function of a question and a response. `metrics` combines the scores of all rows
(accuracy, F1, ...); `judge` scores responses that a model grades, `captions` scores captions.
"""

import re
from collections import Counter
from collections.abc import Sequence

from llava_ray.data.sources.building import LETTERS
from llava_ray.evaluate.scoring.option_letter import read_option
from llava_ray.evaluate.scoring.text_match import contains_phrase, normalize_text
from llava_ray.evaluate.scoring.vqa_normalize import (
    normalize_answer,
    normalize_words,
    strip_punctuation,
)
from llava_ray.types import Question, Score

UNPARSED = "FAILED"


def score_gqa(question: Question, text: str) -> Score:
    """Equal to the answer, in lower case and without periods at the end (GQA)."""
    answer = text.rstrip(".").lower()
    return _compare(answer in question.answers, answer, question)


def score_exact(question: Question, text: str) -> Score:
    """Equal to one of the answers, whatever the case, the spaces and a period at the end."""
    answer = normalize_text(text)
    rights = {normalize_text(right) for right in question.answers}
    return _compare(answer in rights, answer, question)


def score_contains(question: Question, text: str) -> Score:
    """One of the answers stands in the response, as words of its own; see `text_match`."""
    found = [right for right in question.answers if contains_phrase(text, right)]
    return _compare(bool(found), found[0] if found else text, question)


def score_letter(question: Question, text: str) -> Score:
    """The response is the right letter and nothing else (SEED-Bench)."""
    if text not in LETTERS[: len(question.choices) or None] or len(text) != 1:
        return _unread("not the letter of an option alone")
    return _compare(text in question.answers, text, question)


def score_scienceqa(question: Question, text: str) -> Score:
    """A letter from A to E, `A. ...`, or one `The answer is A.` in the response (ScienceQA)."""
    letter = _parse_scienceqa(text)
    if letter not in LETTERS[: len(question.choices)]:
        return _unread(f"none of the {len(question.choices)} options: {letter}")
    return _compare(letter in question.answers, letter, question)


def score_choice(question: Question, text: str) -> Score:
    """The right option, stated in any way that `option_letter` reads (MMBench, Q-Bench, own)."""
    letter = read_option(text, question.choices)
    if letter is None:
        return _unread("no option, or more than one, can be read out of the response")
    return _compare(letter in question.answers, letter, question)


def score_vqa(question: Question, text: str) -> Score:
    """VQA accuracy, as the VQA challenge computes it (VQAv2, VizWiz).

    The mean over all sets of answers but one of min(1, matches / 3). Unless all annotators agree,
    their answers lose punctuation, articles and number words.
    """
    answer = normalize_answer(text)
    rights = [_put_in_one_line(right) for right in question.answers]
    if len(set(rights)) > 1:
        rights = [normalize_words(strip_punctuation(right)) for right in rights]
        answer = normalize_words(strip_punctuation(answer))
    return _compare_with_annotators(answer, rights)


def score_textvqa(question: Question, text: str) -> Score:
    """VQA accuracy, as M4C computes it: all ten answers and the response in one form (TextVQA)."""
    rights = [normalize_answer(right) for right in question.answers]
    return _compare_with_annotators(normalize_answer(text), rights)


def score_pope(question: Question, text: str) -> Score:
    """No if the first sentence contains the word No, no or not, else yes (POPE)."""
    words = text.split(".")[0].replace(",", "").split(" ")
    answer = "no" if {"No", "not", "no"} & set(words) else "yes"
    return _compare(answer in question.answers, answer, question)


def score_mme(question: Question, text: str) -> Score:
    """Yes or no within the first four characters; anything else is wrong (MME)."""
    start = text.lower()[:4]
    answer = "yes" if "yes" in start else "no" if "no" in start else "other"
    if answer == "other":
        return _unread("neither yes nor no in the first four characters", answer)
    return _compare(answer in question.answers, answer, question)


def _compare(is_right: bool, answer: str, question: Question) -> Score:
    shown = question.answers[0] if len(question.answers) == 1 else list(question.answers)
    return Score(float(is_right), answer, "right" if is_right else f"right is {shown!r}")


def _unread(why: str, parsed: str = UNPARSED) -> Score:
    """A response out of which no answer can be read counts as wrong, and is counted by itself."""
    return Score(0.0, parsed, why, is_unread=True)


def _parse_scienceqa(text: str) -> str:
    options = LETTERS[:5]
    if len(text) == 1 and text in options:
        return text
    if len(text) >= 3 and text[0] in options and text[1:3] == ". ":
        return text[0]
    found = re.findall(r"The answer is ([A-Z]).", text)
    return found[0] if len(found) == 1 else UNPARSED


def _put_in_one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def _compare_with_annotators(answer: str, rights: Sequence[str]) -> Score:
    matches = Counter(rights)[answer]
    others = [matches - (right == answer) for right in rights]
    value = sum(min(1, number / 3) for number in others) / len(rights)
    usual, votes = Counter(rights).most_common(1)[0]
    why = f"{matches} of {len(rights)} said so"
    return Score(value, answer, why if matches else f"{why}; {votes} said {usual!r}")
