"""Normalizes free answers before they are compared, as EvalAI's servers do.

The rules are those of the VQA challenge in the form of M4C, which LLaVA uses for VQAv2, VizWiz and
TextVQA; published numbers depend on every one of them, the odd ones included.
"""

import re

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_NUMBER_WORDS = "zero one two three four five six seven eight nine ten".split()
_NUMBERS = {word: str(i) for i, word in enumerate(_NUMBER_WORDS)} | {"none": "0"}
_ARTICLES = frozenset(("a", "an", "the"))
_PERIOD = re.compile(r"(?!<=\d)\.(?!\d)")  # the first bracket never matters: it is a slip of old
_COMMA_IN_NUMBER = re.compile(r"(?<=\d),+(?=\d)")
_MAX_PERIODS = 32  # further ones stay: the original passes a flag where the count belongs

_CONTRACTED = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've
might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've
shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll
someone's something'd something'd've something'll that's there'd there'd've there're there's
they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's
won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
""".split()


def _list_misspellings() -> dict[str, str]:
    """Map each contraction that lacks one apostrophe to the right form."""
    table = {"somebody'd": "somebodyd"}  # the wrong way round in the original
    for word in _CONTRACTED:
        for i in (i for i, letter in enumerate(word) if letter == "'"):
            table[word[:i] + word[i + 1 :]] = word
    return table


_MISSPELLINGS = _list_misspellings()


def normalize_answer(text: str) -> str:
    """Return an answer in the form in which VQA answers are compared."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    return normalize_words(strip_punctuation(text))


def strip_punctuation(text: str) -> str:
    """Remove punctuation: where it touches a space it goes, elsewhere it becomes a space.

    A comma in a number makes all of it go. Periods go unless a digit follows.
    """
    result = text
    goes = _COMMA_IN_NUMBER.search(text) is not None
    for mark in _PUNCTUATION:
        is_loose = goes or f"{mark} " in text or f" {mark}" in text
        result = result.replace(mark, "" if is_loose else " ")
    return _PERIOD.sub("", result, count=_MAX_PERIODS)


def normalize_words(text: str) -> str:
    """Write numbers up to ten as digits, leave articles out, put missing apostrophes in."""
    words = (_NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(_MISSPELLINGS.get(word, word) for word in words if word not in _ARTICLES)
