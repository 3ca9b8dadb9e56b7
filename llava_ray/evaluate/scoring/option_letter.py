r"""Reads which option a response chooses: its letter, stated in any of many ways, or its text.

Stages, of which the first that finds a letter decides; one that finds two different letters cannot
be read:

    what stands in \boxed{}, or after "final answer"; the last one counts
    a letter at the beginning: `B`, `(b)`, `B. dog`, `**B**`, `[B]`
    a letter after a word for answer, in several languages: `The best answer is B`, `答案是B`
    a letter after a weaker cue: `Option B`, `I would choose B`, `B is correct`
    the text of an option: the whole response, or words within it
    a letter in brackets, or a last line that is a letter
"""

import re
import unicodedata
from collections.abc import Callable, Sequence

from llava_ray.data.sources.building import LETTERS
from llava_ray.evaluate.scoring.text_match import contains_phrase, normalize_text, split_tokens

_THOUGHT = re.compile(r"(?is)\A.*</think(?:ing)?>|<think(?:ing)?>.*")
"""Up to the last end of thoughts, whose beginning some templates hold; thoughts that do not end."""
_TAG = re.compile(r"</?(?:[a-z]|[A-Za-z][A-Za-z_]{1,30})>")
_TEX_STYLE = re.compile(r"\\(?:text|textbf|mathrm|mathbf|mathit|mbox)\s*\{([^{}]*)\}")
_TEX_BRACKETS = re.compile(r"\\[()\[\]]|\$")
_BOXED = re.compile(r"\\(?:boxed|fbox)\s*(?:\{([^{}]*)\}|(?=([A-Z])\b)[A-Z])")
_MARKDOWN = re.compile(r"[*`#]+|(?<![^\W_])_{1,3}(?=[^\W_])|(?<=[^\W_])_{1,3}(?![^\W_])|^[>\s]+")

_LATIN = r"[^\W\u3040-\u30ff\u3400-\u9fff\uac00-\ud7ff]"
"""A letter or digit, except of Chinese, Japanese and Korean, which set no space around `B`."""
_BEFORE = rf"(?<!{_LATIN})"
_AFTER = rf"(?!{_LATIN}|['’]\w|[+#]|-\w|/[a-z])"
_OPEN = r"[\s\"'“‘(\[{<【「『:-]{0,12}"
_CLOSE = ")]}】」』"

_NOUN_FOLLOWS = re.compile(
    r"[ \t]+(?!(?:is|was|because|since|as|for|due|based|given|which|in|on|from|with|by|at|so|but|"
    r"if|while|where|the|this|that|it|they|would|seems|and|or|option|choice)\b)\w"
)
"""Follows "A" where it is an article ("A man") and "I" where it is a pronoun."""
_DENIED = re.compile(
    r"(?i)[^\w\n]{0,3}(?:\s(?:is|was|does|can|could|would)\s?(?:not\b|n['’]t\b|incorrect|wrong|"
    r"false)|\s?(?:isn|wasn|doesn|couldn|wouldn)['’]t\b|\s?can(?:not|['’]t)\b|(?:选项)?(?:是|为)?(?:不对|不正确|不符|错))"
)
_DENIES = re.compile(r"(?i)(?:\bnot|n['’]t|\bnever|\bcannot|不|eliminate|rule out)\s*\Z")
_ALSO = r"[)\]】]?\s*(?:,|;|/|&|\n|、|\band\b|\bor\b|和|或)\s*[(\[]?"
_ALSO_ENDS = re.compile(r"[)\]】]?\s*(?:\Z|[.。,;、/&\n]|and\b|or\b|are\b|都)")

_FINAL = r"final (?:answer|choice|option)"
_ANSWER = (
    r"\b(?:answer|ans|response|antwort|lösung|réponse|reponse|respuesta|risposta|resposta|ответ)\b|"
    r"答案|答え|正解|正确的是|正确选项|正確選項|答|정답|답"
)
_CHOICE = (
    r"\b(?:option|choice|letter|choose|chose|pick|select|selected|go with|going with|opt for|"
    r"would say|guess|think|believe|it is|it['’]s|must be|should be|would be|"
    r"probably|likely)\b|认为是|认为|选项|選項|选择|選擇|选|選"
)
_LINK = (
    r"(?:\s{0,4}(?:\b(?:is|would be|should be|must be|could be|to (?:the|this) question is|option|"
    r"choice|letter|ist|est|es|likely|probably|definitely|clearly|therefore|thus|also)\b|"
    r"[:=>\"'”,-]|–|—|→|è|é|应该是|应为|應為|是|为|為|选项|は|은|는)){0,8}"
)
_CORRECT = r"(?:the\s+)?(?:most\s+)?(?:correct|right|best|true|appropriate|suitable|answer)\b"


def read_option(text: str, choices: Sequence[str]) -> str | None:
    """Return the letter of the option that a response chooses; None if it cannot be read.

    Args:
        text: the response.
        choices: the options' texts, the first of which is A; at most 26.
    """
    letters = LETTERS[: len(choices)]
    if not letters:
        return None
    text, boxed = _clean(text)
    stages: tuple[Callable[[], list[str]], ...] = (
        lambda: _read_boxed(boxed, letters, choices),
        lambda: _find_after(rf"\b{_FINAL}\b", text, letters)[-1:],
        lambda: _find_equal(text, choices) if text[:1].islower() else [],
        lambda: _read_start(text, letters),
        lambda: _find_after(_ANSWER, text, letters),
        lambda: _find_after(_CHOICE, text, letters) + _find_correct(text, letters),
        lambda: _find_texts(text, choices),
        lambda: _find_marked(text, letters),
    )
    for stage in stages:
        if found := set(stage()):
            return found.pop() if len(found) == 1 else None
    return None


def _clean(text: str) -> tuple[str, list[str]]:
    """Return a response without markup, and the contents of its boxes."""
    text = _THOUGHT.sub("", unicodedata.normalize("NFKC", text))
    text = _TEX_STYLE.sub(r"\1", _TAG.sub(" ", text))
    boxed = ["".join(contents).strip() for contents in _BOXED.findall(text)]
    text = _TEX_BRACKETS.sub("", _BOXED.sub(r" \1\2 ", text))
    lines = (_MARKDOWN.sub("", line).strip() for line in text.split("\n"))
    return "\n".join(lines).strip(), boxed


def _read_boxed(boxed: Sequence[str], letters: str, choices: Sequence[str]) -> list[str]:
    if not boxed:
        return []
    return _read_start(boxed[-1], letters) or _find_texts(boxed[-1], choices)


def _read_start(text: str, letters: str) -> list[str]:
    """Return the letter at the beginning; a lower-case one only if punctuation marks it."""
    repeated = set(re.findall(rf"(?m)^\(?([{letters}])[.):]", text))
    match = re.match(rf"({_OPEN})([{letters}{letters.lower()}]){_AFTER}", text)
    if not match or len(repeated) > 1:  # the options are listed once more
        return []
    letter, rest = match[2], text[match.end() :]
    if letter.islower() and not re.match(rf"[{re.escape(_CLOSE)}.:、。]|\W*\Z", rest):
        return []
    if _DENIED.match(rest) or (letter in "AI" and _NOUN_FOLLOWS.match(rest)):
        return []
    return [letter.upper(), *_find_second(rest, letters)]


def _find_after(cue: str, text: str, letters: str) -> list[str]:
    """Return the letters after a cue; lower-case ones only in brackets or at the end of a line."""
    small = letters.lower()
    letter = rf"([{letters}]){_AFTER}|[(\[]([{small}])[)\]]|([{small}])[.。]?\s*(?:\n|\Z)"
    found = []
    for match in re.finditer(rf"(?i:(?:{cue}){_LINK}){_OPEN}(?:{letter})", text):
        name = match[match.lastindex or 0]
        before = text[max(0, match.start() - 20) : match.start()]
        rest = text[match.end(match.lastindex or 0) :]
        is_noun = name in "AI" and _NOUN_FOLLOWS.match(rest)
        if not (is_noun or _DENIED.match(rest) or _DENIES.search(before)):
            found += [name.upper(), *_find_second(rest, letters)]
    return found


def _find_second(rest: str, letters: str) -> list[str]:
    """Return the second letter of "A or B", given the text after the first."""
    also = re.match(rf"{_ALSO}([{letters}]){_AFTER}", rest)
    return [also[1]] if also and _ALSO_ENDS.match(rest, also.end()) else []


def _find_correct(text: str, letters: str) -> list[str]:
    """Return the letters that the response calls correct."""
    english = rf"[)\]]?\s+(?i:is|seems|would be)\s+(?i:{_CORRECT})"
    pattern = rf"{_BEFORE}([{letters}])(?:{english}|[)\]]?\s*(?:选项)?(?:是|为)?(?:正确|对))"
    return [match[1] for match in re.finditer(pattern, text)]


def _find_equal(text: str, choices: Sequence[str]) -> list[str]:
    """Return the letter of the option whose text equals the response, if there is exactly one."""
    response = normalize_text(text)
    equal = [i for i, choice in enumerate(choices) if normalize_text(choice) == response]
    return [LETTERS[equal[0]]] if response and len(equal) == 1 else []


def _find_texts(text: str, choices: Sequence[str]) -> list[str]:
    """The option whose text the response is, else those whose text it holds.

    An option that is a part of another one which is there ("cat" of "black cat") does not count.
    """
    if equal := _find_equal(text, choices):
        return equal
    named = [i for i, choice in enumerate(choices) if contains_phrase(text, choice)]
    return [LETTERS[i] for i in named if not any(_is_part(choices[i], choices[j]) for j in named)]


def _is_part(phrase: str, longer: str) -> bool:
    return split_tokens(phrase) != split_tokens(longer) and contains_phrase(longer, phrase)


def _find_marked(text: str, letters: str) -> list[str]:
    """Return a letter that is the whole last line, else all letters in brackets."""
    last = text.rpartition("\n")[2]
    if alone := re.fullmatch(rf"[^\w+#]*([{letters}])[^\w+#]*", last):
        return [alone[1]]
    return re.findall(rf"[(\[【「]\s*([{letters}])\s*[)\]】」]", text)
