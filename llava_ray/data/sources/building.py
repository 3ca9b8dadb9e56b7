"""What converters share: raw rows, checks of their fields, and the texts of LLaVA's prompts.

A converter is a pure function from a row to a `Sample`. It raises a `SampleError` for a row that it
cannot use. Whatever Python raises when a field is missing or has the wrong type (`BROKEN_ROW`)
rejects the row as well.
"""

import hashlib
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from llava_ray.errors import SampleError
from llava_ray.template import IMAGE_TOKEN
from llava_ray.types import IMAGE, ImagePart, Message, Role, Sample, TextPart

Row = dict[str, Any]

BROKEN_ROW = (
    LookupError,
    TypeError,
    ValueError,
    AttributeError,
    ArithmeticError,
    RecursionError,
)
"""What plain Python raises when a field is missing, has the wrong type, or is nested too deeply."""

SHORT_ANSWER = "Answer the question using a single word or phrase."
LETTER_ANSWER = "Answer with the option's letter from the given choices directly."
ONE_SENTENCE = "Provide a one-sentence caption for the provided image."
REGION_TO_TEXT = "Please provide a short description for this region: {}."
TEXT_TO_REGION = (
    "Please provide the bounding box coordinate of the region this sentence describes: {}."
)
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


class RawRow(NamedTuple):
    """A row of raw data.

    Attributes:
        where: its file, and the line or place in it.
        row: its content, or why it cannot be read.
    """

    where: str
    row: Row | SampleError

    def get(self) -> Row:
        """Return the content.

        Raises:
            SampleError: it cannot be read.
        """
        if isinstance(self.row, SampleError):
            raise self.row
        return self.row


def make_raw_row(where: str, make: Callable[[], Row]) -> RawRow:
    """Return the row that `make` returns, or the reason why it cannot be made."""
    try:
        return RawRow(where, make())
    except SampleError as error:
        return RawRow(where, error)
    except BROKEN_ROW as error:
        return RawRow(where, explain_broken(error))


def index_rows(where: str, rows: list[Any], key: str) -> tuple[dict[Any, Row], list[RawRow]]:
    """Return objects by the value of a field, and the rejected ones, which lack it."""
    groups, rejects = group_rows(where, rows, key)
    return {value: found[-1] for value, found in groups.items()}, rejects


def group_rows(
    where: str, rows: list[Any], key: str
) -> tuple[defaultdict[Any, list[Row]], list[RawRow]]:
    """Return objects grouped by the value of a field, and the rejected ones, which lack it.

    Args:
        where: the file and the list, for messages.
        rows: the list.
        key: the field; its values are texts or whole numbers.
    """
    groups: defaultdict[Any, list[Row]] = defaultdict(list)
    rejects: list[RawRow] = []
    for i, row in enumerate(rows):
        place = f"{where}[{i}]"
        value = row.get(key) if isinstance(row, dict) else None
        if isinstance(value, str | int):
            groups[value].append(row)
            continue
        found = make_raw_row(place, lambda row=row: {key: read_dict(row, "the entry")[key]})
        problem = SampleError(f"{key} is neither a text nor a whole number", reason="bad_row")
        rejects.append(found if isinstance(found.row, SampleError) else RawRow(place, problem))
    return groups, rejects


def explain_broken(error: Exception) -> SampleError:
    """Return the reason to reject a row at which one of `BROKEN_ROW` was raised."""
    found = f"{type(error).__name__}: {error}"[:200]
    return SampleError(
        f"the row does not have the layout of its source ({found}): compare it with other rows",
        reason="bad_row",
    )


def read_text(value: object, name: str) -> str:
    """Return a field's text.

    Raises:
        SampleError: it is anything but a text.
    """
    if not isinstance(value, str):
        raise SampleError(f"{name} is {describe(value)}: write a text", reason="bad_row")
    return value


def read_dict(value: object, name: str) -> Row:
    """Return a field's object.

    Raises:
        SampleError: it is anything but a JSON object.
    """
    if not isinstance(value, dict):
        raise SampleError(f"{name} is {describe(value)}: write an object", reason="bad_row")
    return value


def describe(value: object) -> str:
    """Return a value in a few words, for a message."""
    if value is None:
        return "null"
    kinds = {bool: "a truth value", int: "a number", float: "a number", str: "a text"}
    kinds |= {list: "a list", dict: "an object", bytes: "bytes"}
    kind = kinds.get(type(value), type(value).__name__)
    if isinstance(value, list | dict | bytes):
        return f"{kind} of {len(value)}"
    return f"{kind} ({value!r:.60})"


def write_message(role: Role, text: str) -> Message:
    """Return a message; each `<image>` in the text becomes an image.

    One line break before and one after an image are dropped, because templates write their own.
    """
    return Message(role, tuple(parse_text(text)))


def parse_text(text: str) -> list[TextPart | ImagePart]:
    """Return the parts of a text in which each `<image>` stands for an image."""
    parts: list[TextPart | ImagePart] = []
    pieces = text.split(IMAGE_TOKEN)
    for i, piece in enumerate(pieces):
        if i:
            parts.append(IMAGE)
            piece = piece.removeprefix("\n")
        if i < len(pieces) - 1:
            piece = piece.removesuffix("\n")
        if piece:
            parts.append(TextPart(piece))
    return parts


def user(text: str) -> Message:
    """Return a user's message; each `<image>` in the text becomes an image."""
    return write_message("user", text)


def assistant(text: str) -> Message:
    """Return an assistant's message, which holds no images."""
    return Message("assistant", (TextPart(text),))


def make_turns(turns: Sequence[tuple[str, str]], *, num_images: int = 1) -> tuple[Message, ...]:
    """Return the messages of questions and answers, with the images before the first question.

    Raises:
        SampleError: a question or an answer is not a text.
    """
    messages: list[Message] = []
    images = f"{IMAGE_TOKEN}\n" * num_images
    for question, answer in turns:
        messages.append(user(images + read_text(question, "the question")))
        messages.append(assistant(read_text(answer, "the answer")))
        images = ""
    return tuple(messages)


def write_options(choices: Sequence[str]) -> str:
    """Return choices as lines, "A. first".

    Raises:
        SampleError: there are more choices than letters, or one is not a text.
    """
    check_choices(choices)
    return "\n".join(f"{LETTERS[i]}. {choice}" for i, choice in enumerate(choices))


def pick_letter(index: object, choices: Sequence[str]) -> str:
    """Return the letter of the choice with this index, counted from 0.

    Raises:
        SampleError: there is no such choice.
    """
    check_choices(choices)
    if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < len(choices):
        raise SampleError(
            f"the answer is {describe(index)}, not the index of one of {len(choices)} choices",
            reason="bad_row",
        )
    return LETTERS[index]


def check_choices(choices: object) -> None:
    """Raise a `SampleError` unless these are at most 26 texts."""
    if not isinstance(choices, list | tuple):
        raise SampleError(f"the choices are {describe(choices)}: write a list", reason="bad_row")
    for choice in choices:
        read_text(choice, "a choice")
    if len(choices) > len(LETTERS):
        raise SampleError(
            f"there are {len(choices)} choices and only {len(LETTERS)} letters: leave the row out",
            reason="bad_row",
        )


def most_frequent(answers: Sequence[str]) -> str:
    """Return the most frequent of several people's answers, the first of equally frequent ones.

    Raises:
        SampleError: there are none, or one is not a text.
    """
    if not isinstance(answers, list | tuple) or not answers:
        raise SampleError("the question has no answers: leave it out of training", reason="bad_row")
    texts = [read_text(answer, "an answer") for answer in answers]
    return max(texts, key=texts.count)


def write_box(x: float, y: float, width: float, height: float, *, size: tuple[int, int]) -> str:
    """Return a box as in LLaVA's 665k mixture: its corners in the image padded to a square.

    Args:
        x, y: the upper left corner of the box, in pixels.
        width, height: of the box, in pixels.
        size: width and height of the image.

    Returns:
        "[left, top, right, bottom]" as shares of the square's side, with two decimals.

    Raises:
        SampleError: the box or the image is infinite or not a number.
    """
    side = max(size)
    left, top = ((side - length) // 2 for length in size)
    edges = (x + left, y + top, x + width + left, y + height + top)
    if not all(map(math.isfinite, (*edges, side))):
        raise SampleError(f"the box {[x, y, width, height]} is infinite", reason="bad_row")
    return str([round(min(max(edge / side, 0.0), 1.0), 2) for edge in edges])


def choose(key: str, num: int) -> int:
    """Return a number below `num` that is always the same for a key, and as good as random."""
    data = key.encode(errors="surrogatepass")
    return int.from_bytes(hashlib.sha256(data).digest()[:8]) % num


def read_id(row: Row) -> str:
    """Return a row's id, or a digest of its content if it has none."""
    for name in ("id", "sample_id"):
        if row.get(name) is not None:
            return str(row[name])
    return digest_content(row)


def digest_content(content: object) -> str:
    """Return 16 hexadecimal digits that identify some content."""
    data = repr(content).encode(errors="surrogatepass")
    return hashlib.sha256(data).hexdigest()[:16]


def make_sample(
    source: str, sample_id: object, messages: Sequence[Message], *images: bytes | str
) -> Sample:
    """Return a sample."""
    return Sample(str(sample_id), tuple(messages), tuple(images), source)
