"""Random responses, such as no model should give."""

import random


def make_responses(number: int) -> list[str]:
    """Random strings of letters, cues, markup, foreign scripts, controls and lone surrogates."""
    rng = random.Random(25)
    pieces = [
        *"ABCDabcdI()[]{}*_`#$\\<>:.,;!?'\"-+=/|&%0123456789 ",
        *"\n\t\r\0\x08\x1b\x85\u2028\ud800\udfff",
        "answer", "The answer is ", "Option ", "\\boxed{", "}", "<think>", "</think>", "答案", "选",
        "猫", "แมว", "고양이", "é", "２", "²", "½", "yes", "no", "nan", "inf", "1e999", "-1",
        "a man",
        "final answer ", "is", " not ", "\u202e", "😀", "\u0301", "cat", "dog", "1,000", "..", "__",
    ]  # fmt: skip
    return ["".join(rng.choices(pieces, k=rng.randint(0, 40))) for _ in range(number)]
