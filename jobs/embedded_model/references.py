"""What the phrases of a question refer to: "the red circle", "dogs", "in the top left".

During training, auxiliary heads predict at the end of every such phrase how many items it refers to
and, for a single item, its position and properties; some layers later also how it compares with the
item of the previous phrase. The model thus learns early to look up and compare, from which most
answers follow. Only training uses this.
"""

import re
from typing import NamedTuple

from jobs.embedded_model import symbols
from llava_ray.demo import questions, scenes

IGNORED = -100
MAX_COUNT = 5
ASPECTS = {
    "count": MAX_COUNT + 1,
    "row": scenes.GRID,
    "column": scenes.GRID,
    **{field: len(values) for field, values in symbols.FIELDS.items()},
}
ORDERS = {"columns": 3, "rows": 3, "sizes": 3}  # less, the same, more
_NOUNS = {
    form: noun
    for noun in (*scenes.SHAPES, *scenes.THINGS, *scenes.CATEGORIES, "shape", "number", "object")
    for form in (noun, questions.plural(noun))
}
_PHRASE = re.compile(
    rf"\b(?:({'|'.join(scenes.SIZES)}) )?(?:({'|'.join(scenes.COLOURS)}) )?"
    rf"({'|'.join(sorted(_NOUNS, key=len, reverse=True))})\b(?: (\d+))?",
    re.IGNORECASE,
)


_PLACE = re.compile(
    r"\b(?:in the )(?:(top|upper|middle|bottom|lower) )?(left|middle|right|center|centre)\b",
    re.IGNORECASE,
)
_ROWS = {"upper": "top", "lower": "bottom", None: "middle"}
_COLUMNS = {"center": "middle", "centre": "middle"}


class Reference(NamedTuple):
    """The end of a phrase in a text, and its meaning; unknown values are IGNORED."""

    end: int  # index of a character
    aspects: tuple[int, ...]
    orders: tuple[int, ...]  # how the previous phrase's item compares with this one


def find_references(text: str, scene: scenes.Scene) -> list[Reference]:
    """Return every phrase of a text with its meaning in a scene."""
    found, before = [], []
    for match in _PHRASE.finditer(text):
        items = _meant(match, scene)
        found.append(Reference(match.end(), _aspects(items, scene), _orders(before, items)))
        before = items
    for match in _PLACE.finditer(text):
        aspects = _aspects(_placed(match, scene), scene)
        found.append(Reference(match.end(), aspects, _orders([], [])))
    return found


def _orders(before: list[scenes.Item], items: list[scenes.Item]) -> tuple[int, ...]:
    if len(before) != 1 or len(items) != 1:
        return (IGNORED,) * len(ORDERS)
    (first,), (second,) = before, items
    sizes = list(scenes.SIZES)
    has_sizes = first.kind != "number" and second.kind != "number"
    return (
        _order(first.column, second.column),
        _order(first.row, second.row),
        _order(sizes.index(first.size), sizes.index(second.size)) if has_sizes else IGNORED,
    )


def _order(first: int, second: int) -> int:
    return (first > second) - (first < second) + 1


def _meant(match: re.Match[str], scene: scenes.Scene) -> list[scenes.Item]:
    size, colour, noun, digits = (group and group.lower() for group in match.groups())
    name = _NOUNS[noun or ""]
    return [
        item
        for item in scene.items
        if name in (item.name, item.kind, item.category, "object")
        and (size is None or (item.size == size and item.kind != "number"))
        and (colour is None or item.colour == colour)
        and (digits is None or item.name == digits)
    ]


def _placed(match: re.Match[str], scene: scenes.Scene) -> list[scenes.Item]:
    row, column = (group and group.lower() for group in match.groups())
    row, column = _ROWS.get(row, row), _COLUMNS.get(column or "", column)
    return [
        item
        for item in scene.items
        if (scenes.ROWS[item.row], scenes.COLUMNS[item.column]) == (row, column)
    ]


def _aspects(items: list[scenes.Item], scene: scenes.Scene) -> tuple[int, ...]:
    count = min(len(items), MAX_COUNT)
    if count != 1:
        return (count, *[IGNORED] * (len(ASPECTS) - 1))
    (item,) = items
    return (count, item.row, item.column, *symbols.spell(scene)[item.cell].tolist())
