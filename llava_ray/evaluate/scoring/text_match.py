"""Compares free texts: equality without regard to form, and a phrase inside a longer text.

Used for `own_exact` and `own_contains`, and to find an option's text in a response. Benchmarks with
a published scorer of their own compare texts as that one does.
"""

import re
import unicodedata

_UNSPACED = (
    (0x0E00, 0x0EFF),  # Thai, Lao
    (0x1000, 0x109F),  # Myanmar
    (0x1100, 0x11FF),  # Hangul; Korean has spaces, but glues particles to its words
    (0x1780, 0x17FF),  # Khmer
    (0x3040, 0x30FF),  # Hiragana, Katakana
    (0x3100, 0x318F),
    (0x31F0, 0x31FF),
    (0x3400, 0x9FFF),  # Han
    (0xA960, 0xA97F),
    (0xAC00, 0xD7FF),
    (0xF900, 0xFAFF),
    (0x20000, 0x3FFFF),
)
"""Code points of the scripts whose words are not set apart by spaces: each sign is a token."""
_SYMBOLS = frozenset("+#%=<>&@")
"""Signs that are tokens, as currencies and emoji are: `C++` is not `C`."""
_QUOTES = "".join(("\"'`*", "\u201c\u201d\u2018\u2019 "))
_END = "".join((".!", "\u3002 "))
_NUMBER = re.compile(r"\d+(?:\.\d+)*|\.\d+")
_DECIMAL_COMMA = re.compile(r"(?<![\d.,])(\d+),(\d{1,2})(?![\d,]|\.\d)")
_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])")


def normalize_text(text: str) -> str:
    """Return a text in lower case, on one line, without quotation marks or a period at its end."""
    text = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return text.strip(_QUOTES).rstrip(_END).strip(_QUOTES)


def contains_phrase(text: str, phrase: str) -> bool:
    """Return whether a phrase stands in a text as words of its own.

    A phrase of punctuation alone is looked for as it is written; an empty one is nowhere.
    """
    tokens, wanted = split_tokens(text), split_tokens(phrase)
    if not wanted:
        return bool(phrase.strip()) and phrase.strip() in text
    length = len(wanted)
    return any(tokens[i : i + length] == wanted for i in range(len(tokens) - length + 1))


def split_tokens(text: str) -> list[str]:
    """Return a text's words, numbers and symbols, in one form; punctuation is left out.

    A number keeps its sign and its decimals, so that 5 is neither in "-5" nor in "2.5". Commas may
    separate thousands, or a decimal ("2,5"). In scripts without spaces each sign is a token.
    """
    text = unicodedata.normalize("NFKC", text).casefold().replace("\u2212", "-")
    text = _THOUSANDS.sub(lambda match: match[0].replace(",", ""), text)
    text = _DECIMAL_COMMA.sub(r"\1.\2", text)
    tokens: list[str] = []
    i = 0
    while i < len(text):
        end = _find_end(text, i)
        if end > i:
            tokens.append(_write_token(text[i:end], is_negative=_is_negative(text, i)))
        elif text[i] in _SYMBOLS or unicodedata.category(text[i]) in ("So", "Sc"):
            tokens.append(text[i])
        i = max(end, i + 1)
    return tokens


def _find_end(text: str, start: int) -> int:
    """Return where the token that begins here ends; `start` if none does."""
    if _is_unspaced(text[start]):
        return start + 1
    number = _NUMBER.match(text, start)
    if number and not (number.end() < len(text) and _is_word(text[number.end()])):
        return number.end()
    end = start
    while end < len(text) and _is_word(text[end]):
        end += 1
    return end


def _is_word(sign: str) -> bool:
    return unicodedata.category(sign)[0] in "LNM" and not _is_unspaced(sign)


def _is_unspaced(sign: str) -> bool:
    code = ord(sign)
    return code >= 0x0E00 and any(first <= code <= last for first, last in _UNSPACED)


def _is_negative(text: str, start: int) -> bool:
    """Return whether a minus stands right before this place, and not between two words."""
    if start == 0 or text[start - 1] != "-":
        return False
    return start == 1 or not (_is_word(text[start - 2]) or text[start - 2] in "-)")


def _write_token(token: str, *, is_negative: bool) -> str:
    if not _NUMBER.fullmatch(token) or not token.isascii():
        return token
    if token.count(".") == 1:
        whole, decimals = token.split(".")
        decimals = decimals.rstrip("0")
        token = f"{whole or '0'}.{decimals}" if decimals else whole or "0"
    return f"-{token}" if is_negative else token
