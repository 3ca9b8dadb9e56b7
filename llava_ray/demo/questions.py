"""Generates questions about a scene with their exact answers, and conversations of several turns.

Each `_ask_*` function takes an `Asker` (a scene and a random generator) and returns a question with
its answer, or None if the scene gives no occasion for it. `QUESTIONS` sorts them by kind;
`make_conversation` combines them.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from llava_ray.demo import scenes, talk
from llava_ray.demo.scenes import COLOURS, COLUMNS, GRID, ROWS, SHAPES, THINGS, Item, Scene
from llava_ray.demo.sprites import EMOJI

COUNTS = ("None", "One", "Two", "Three", "Four", "Five", "Six", "Seven", "Eight", "Nine")
CELLS = tuple(
    "middle" if row == column == "middle" else f"{row} {column}"
    for row in ROWS
    for column in COLUMNS
)
_PLURALS = {
    "mouse": "mice", "fish": "fish", "butterfly": "butterflies", "octopus": "octopuses",
    "fox": "foxes", "strawberry": "strawberries", "tomato": "tomatoes", "bus": "buses",
    "wrench": "wrenches", "paintbrush": "paintbrushes", "food": "food items",
}  # fmt: skip
_RELATIONS = {
    "left of": ("left of", "to the left of", "on the left of"),
    "right of": ("right of", "to the right of", "on the right of"),
    "above": ("above", "over", "higher than"),
    "below": ("below", "under", "lower than"),
}


class SceneQuestion(NamedTuple):
    """A question and its exact answer.

    Attributes:
        text: the question.
        answer: the exact answer.
        about: the one item that it is about, which the next question may call "it".
        sort: a finer division of its kind, for which `evaluate.prior` is computed.
    """

    text: str
    answer: str
    about: Item | None = None
    sort: str = ""


class SceneTurn(NamedTuple):
    """One turn of a conversation; `image` is the scene that comes with the question, if any."""

    kind: str
    question: str
    answer: str
    image: Scene | None


@dataclass(frozen=True)
class Asker:
    """A scene, and the random generator that chooses what is asked about it.

    Attributes:
        scene: the scene.
        rng: the random generator.
        spare_held_out: never ask about an absent object that is a held-out combination. A model
            that is trained to say that there is no red star has learned something about red stars.
    """

    scene: Scene
    rng: random.Random
    spare_held_out: bool = True

    @property
    def items(self) -> tuple[Item, ...]:
        return self.scene.items

    def pick(self, *phrases: str) -> str:
        return self.rng.choice(phrases)

    def of_kind(self, kind: scenes.Kind) -> list[Item]:
        return [item for item in self.items if item.kind == kind]

    def item_at(self, cell: int) -> Item | None:
        return next((item for item in self.items if item.cell == cell), None)

    def is_fair(self, shape: str, colour: str) -> bool:
        """Return whether this combination may be asked about although it is absent."""
        return not (self.spare_held_out and scenes.is_held_out("shape", shape, colour, 0))

    def names(self, item: Item) -> list[str]:
        """Return the phrases that, after "the", name this item and no other."""
        phrases = _phrases(item)
        others = [_phrases(other) for other in self.items if other is not item]
        return [phrase for phrase in phrases if not any(phrase in other for other in others)]

    def named(self, candidates: Sequence[Item]) -> list[tuple[Item, str]]:
        """Return the items that a phrase can name, in random order, each with such a phrase."""
        chosen = []
        for item in self.rng.sample(candidates, len(candidates)):
            names = self.names(item)
            if names:
                chosen.append((item, names[0] if self.rng.random() < 0.6 else self.pick(*names)))
        return chosen

    def place(self, cell: int) -> str:
        """Return where a cell is, such as "in the top left", in one of several wordings."""
        name = CELLS[cell]
        if self.rng.random() < 0.15:
            name = name.replace("top", "upper").replace("bottom", "lower")
        if cell == 4:
            name = self.pick("middle", "middle", "center", "centre")
        corner = " corner" if cell in (0, 2, 6, 8) and self.rng.random() < 0.2 else ""
        return f"in the {name}{corner}"


def _phrases(item: Item) -> list[str]:
    match item.kind:
        case "shape":
            name, colour, size = item.name, item.colour, item.size
            sized = [] if size == "medium" else [f"{size} {name}", f"{size} {colour} {name}"]
            return [f"{colour} {name}", name, f"{colour} shape", *sized]
        case "thing":
            sized = [] if item.size == "medium" else [f"{item.size} {item.name}"]
            return [item.name, *sized, item.category]
        case "number":
            return ["number", f"number {item.name}"]


def article(phrase: str) -> str:
    """Return a phrase with its article: "an apple", "a dog"."""
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def plural(name: str) -> str:
    return _PLURALS.get(name, f"{name}s")


def where(cell: int) -> str:
    return f"in the {CELLS[cell]}"


def what(item: Item) -> str:
    """Return what an item is: "a red circle", "a dog", "the number 42"."""
    match item.kind:
        case "shape":
            return article(f"{item.colour} {item.name}")
        case "thing":
            return article(item.name)
        case "number":
            return f"the number {item.name}"


def describe(scene: Scene) -> str:
    """Return a description of a scene: one sentence, or two for more than three items."""
    if not scene.items:
        return "There is nothing in the picture."
    parts = [f"{_sized(item)} {where(item.cell)}" for item in scene.items]
    text = f"There is {listed(parts[:3])}."
    return f"{text} There is also {listed(parts[3:])}." if len(parts) > 3 else text


def _sized(item: Item) -> str:
    if item.kind == "number" or item.size == "medium":
        return what(item)
    return article(f"{item.size} {what(item).split(' ', 1)[1]}")


def listed(parts: Sequence[str]) -> str:
    """Return a list in words: "a", "a and b", "a, b and c"."""
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def _yes(answer: bool) -> str:
    return "Yes." if answer else "No."


# ---- existence -----------------------------------------------------------------------------------


def _is_there(asker: Asker, phrase: str) -> str:
    return asker.pick(
        f"Is there {phrase}?", f"Is there {phrase}?", f"Is there {phrase} in the picture?",
        f"Do you see {phrase}?", f"Can you see {phrase}?", f"Is {phrase} in the picture?",
        f"Is there {phrase} in this image?", f"Does the picture show {phrase}?",
    )  # fmt: skip


def _ask_exists_shape(asker: Asker) -> SceneQuestion | None:
    """By colour and shape, by shape, or by colour; absent objects resemble present ones."""
    rng, shapes = asker.rng, asker.of_kind("shape")
    has = rng.random() < 0.5
    if has and not shapes:
        return None
    model = rng.choice(shapes) if shapes else None
    kind = rng.choice(("both", "both", "shape", "colour"))
    if has and model:
        phrase = {"both": f"{model.colour} {model.name}", "shape": model.name}.get(kind)
        phrase = phrase or f"{model.colour} shape"
        return SceneQuestion(
            _is_there(asker, article(phrase)), "Yes.", _alone(asker, model, phrase)
        )
    shape, colour = rng.choice(SHAPES), rng.choice(tuple(COLOURS))
    if kind == "both":
        if model and rng.random() < 0.7:
            shape, colour = rng.choice(((model.name, colour), (shape, model.colour or colour)))
        phrase = f"{colour} {shape}"
        if not asker.is_fair(shape, colour):
            return None
    else:
        phrase = shape if kind == "shape" else f"{colour} shape"
    if any(phrase in _phrases(item) for item in asker.items):
        return None
    return SceneQuestion(_is_there(asker, article(phrase)), "No.")


def _alone(asker: Asker, item: Item, phrase: str) -> Item | None:
    return item if phrase in asker.names(item) else None


def _ask_exists_thing(asker: Asker) -> SceneQuestion | None:
    rng, things = asker.rng, asker.of_kind("thing")
    if rng.random() < 0.5:
        if not things:
            return None
        item = rng.choice(things)
        return SceneQuestion(
            _is_there(asker, article(item.name)), "Yes.", _alone(asker, item, item.name)
        )
    alike = tuple(EMOJI[rng.choice(things).category]) if things and rng.random() < 0.6 else THINGS
    name = rng.choice(alike)
    if rng.random() < 0.04:
        name = rng.choice(talk.STRANGE_THINGS)
    return (
        None
        if name in {i.name for i in things}
        else SceneQuestion(_is_there(asker, article(name)), "No.")
    )


def _ask_exists_category(asker: Asker) -> SceneQuestion | None:
    rng = asker.rng
    category = rng.choice(("shape", "animal", "food", "vehicle", "tool", "number"))
    is_there = any(item.category == category for item in asker.items)
    if is_there != (rng.random() < 0.5):
        return None
    some = plural(category) if category != "food" else "food"
    one = article(category) if category != "food" else "food"
    text = asker.pick(
        f"Is there {one}?", f"Do you see any {some}?", f"Is there any {category}?",
        f"Can you see {one}?", f"{'Is' if category == 'food' else 'Are'} there any {some}?",
    )  # fmt: skip
    return SceneQuestion(text, _yes(is_there))


def _ask_exists_number(asker: Asker) -> SceneQuestion | None:
    rng, numbers = asker.rng, [item.name for item in asker.of_kind("number")]
    has = rng.random() < 0.5
    if not numbers:
        return None
    name = rng.choice(numbers)
    if not has:
        digits = list(name)
        digits[rng.randrange(len(digits))] = rng.choice("123456789")
        name = "".join(digits) if rng.random() < 0.7 else str(rng.randrange(100))
        if name in numbers or (
            asker.spare_held_out and scenes.is_held_out("number", name, None, 0)
        ):
            return None
    return SceneQuestion(_is_there(asker, f"the number {name}"), _yes(has))


def _ask_exists_at(asker: Asker) -> SceneQuestion | None:
    """At a place: any object, or a certain one."""
    rng = asker.rng
    cell, has = rng.randrange(GRID**2), rng.random() < 0.5
    item = asker.item_at(cell)
    if rng.random() < 0.5:
        if has != bool(item):
            return None
        text = asker.pick("Is there anything", "Is there something", "Do you see anything")
        return SceneQuestion(f"{text} {asker.place(cell)}?", _yes(has))
    if not asker.items:
        return None
    if has:
        item = rng.choice(asker.items)
        return SceneQuestion(f"Is there {what(item)} {asker.place(item.cell)}?", "Yes.", item)
    other = rng.choice(asker.items)
    if item and what(item) == what(other):
        return None
    held_out = scenes.is_held_out(other.kind, other.name, other.colour, cell)
    if asker.spare_held_out and held_out:
        return None
    return SceneQuestion(f"Is there {what(other)} {asker.place(cell)}?", "No.")


# ---- colour and shape ----------------------------------------------------------------------------


def _ask_colour(asker: Asker) -> SceneQuestion | None:
    for item, phrase in asker.named(asker.of_kind("shape")):
        if (item.colour or "") in phrase:
            continue
        text = asker.pick(
            f"What colour is the {phrase}?", f"What is the colour of the {phrase}?",
            f"Which colour is the {phrase}?", f"What colour is the {phrase}?",
            f"Tell me the colour of the {phrase}.", f"The {phrase} has what colour?",
        )  # fmt: skip
        return SceneQuestion(text, _sentence(item.colour or ""), item)
    return None


def _ask_colour_at(asker: Asker) -> SceneQuestion | None:
    if not (shapes := asker.of_kind("shape")):
        return None
    item = asker.rng.choice(shapes)
    it = asker.pick("shape", item.name, "object")
    place = asker.place(item.cell)
    text = asker.pick(
        f"What colour is the {it} {place}?", f"What is the colour of the {it} {place}?"
    )
    return SceneQuestion(text, _sentence(item.colour or ""), item)


def _ask_is_colour(asker: Asker) -> SceneQuestion | None:
    for item, phrase in asker.named(asker.of_kind("shape")):
        if (item.colour or "") in phrase:
            continue
        colour = item.colour or ""
        if asker.rng.random() < 0.5:
            others = [s.colour for s in asker.of_kind("shape")] + list(COLOURS)
            colour = asker.rng.choice(others) or ""
            if not asker.is_fair(item.name, colour):
                return None
        return SceneQuestion(f"Is the {phrase} {colour}?", _yes(colour == item.colour), item)
    return None


def _ask_shape(asker: Asker) -> SceneQuestion | None:
    for item in asker.rng.sample(shapes := asker.of_kind("shape"), len(shapes)):
        colour = item.colour
        if sum(shape.colour == colour for shape in shapes) == 1 and asker.rng.random() < 0.6:
            text = asker.pick(
                f"What shape is the {colour} object?", f"What shape is {colour}?",
                f"Which shape is {colour}?", f"What is the {colour} shape?",
                f"What is the shape of the {colour} object?", f"What {colour} shape is there?",
            )  # fmt: skip
        else:
            place = asker.place(item.cell)
            text = asker.pick(
                f"What shape is {place}?", f"What shape is the object {place}?",
                f"Which shape is {place}?", f"Which shape do you see {place}?",
            )  # fmt: skip
        return SceneQuestion(text, _sentence(article(item.name)), item)
    return None


# ---- things --------------------------------------------------------------------------------------


def _ask_what_at(asker: Asker) -> SceneQuestion | None:
    cell = asker.rng.randrange(GRID**2)
    item = asker.item_at(cell)
    if item is None and asker.rng.random() < 0.75:
        return None
    place = asker.place(cell)
    text = asker.pick(
        f"What is {place}?", f"What is {place}?", f"What is {place} of the picture?",
        f"What do you see {place}?", f"What can you see {place}?", f"What object is {place}?",
        f"What's {place}?", f"Which object is {place}?",
    )  # fmt: skip
    return SceneQuestion(text, _sentence(what(item)) if item else "Nothing.", item)


def _ask_which_things(asker: Asker) -> SceneQuestion | None:
    """Ask which things of a category there are; the answer lists them in reading order."""
    categories = sorted({item.category for item in asker.of_kind("thing")})
    if not categories:
        return None
    category = asker.rng.choice(categories)
    items = [item for item in asker.items if item.category == category]
    many = plural(category) if len(items) > 1 and category != "food" else category
    be = "are" if len(items) > 1 and category != "food" else "is"
    text = asker.pick(
        f"What {many} {be} there?", f"Which {many} {be} there?", f"What {many} do you see?",
        f"What {many} {be} in the picture?", f"Which {many} do you see?",
        f"What {many} can you see?", f"Name the {many}.",
    )  # fmt: skip
    return SceneQuestion(
        text, _sentence(listed([what(i) for i in items])), items[0] if be == "is" else None
    )


def _ask_which_is_it(asker: Asker) -> SceneQuestion | None:
    """Ask which thing is in a cell, such as "What animal is in the middle?"."""
    if not (things := asker.of_kind("thing")):
        return None
    item = asker.rng.choice(things)
    place = asker.place(item.cell)
    text = asker.pick(
        f"What {item.category} is {place}?", f"Which {item.category} is {place}?",
        f"What is the thing {place}?", f"What thing is {place}?", f"Name the thing {place}.",
    )  # fmt: skip
    return SceneQuestion(text, _sentence(what(item)), item)


# ---- counting ------------------------------------------------------------------------------------


def _how_many(asker: Asker, plural_phrase: str) -> str:
    return asker.pick(
        f"How many {plural_phrase} are there?", f"How many {plural_phrase} are there?",
        f"How many {plural_phrase} do you see?", f"How many {plural_phrase} can you see?",
        f"How many {plural_phrase} are in the picture?", f"Count the {plural_phrase}.",
        f"What is the number of {plural_phrase}?",
    )  # fmt: skip


def _ask_count_all(asker: Asker) -> SceneQuestion:
    text = _how_many(asker, asker.pick("objects", "objects", "things", "items"))
    return SceneQuestion(text.replace("things", "objects"), f"{COUNTS[len(asker.items)]}.")


def _ask_count(asker: Asker) -> SceneQuestion | None:
    """Ask for a number, more often of objects of which there are several."""
    rng = asker.rng
    groups = [group for item in asker.items for group in _groups(item)]
    if not groups or rng.random() < 0.12:
        shape, colour = rng.choice(SHAPES), rng.choice(tuple(COLOURS))
        strange = [shape, f"{colour} shape", rng.choice(THINGS), rng.choice(scenes.CATEGORIES)]
        groups = [*strange, f"{colour} {shape}"] if asker.is_fair(shape, colour) else strange
    counts = {group: sum(group in _groups(item) for item in asker.items) for group in groups}
    several = [group for group, count in counts.items() if count > 1]
    group = rng.choice(several if several and rng.random() < 0.7 else list(counts))
    *modifiers, noun = [group] if group in THINGS else group.split(" ")
    return SceneQuestion(
        _how_many(asker, " ".join([*modifiers, plural(noun)])), f"{COUNTS[counts[group]]}."
    )


def _groups(item: Item) -> list[str]:
    """Return the names of all groups in which an item is counted."""
    if item.kind == "shape":
        return ["shape", item.name, f"{item.colour} shape", f"{item.colour} {item.name}"]
    return [item.category, *([item.name] if item.kind == "thing" else [])]


# ---- position ------------------------------------------------------------------------------------


def _ask_where(asker: Asker) -> SceneQuestion | None:
    for item, phrase in asker.named(asker.items):
        text = asker.pick(
            f"Where is the {phrase}?", f"Where is the {phrase}?", f"Where's the {phrase}?",
            f"Where is the {phrase} in the picture?", f"Where do you see the {phrase}?",
            f"Where can I find the {phrase}?", f"In which part of the picture is the {phrase}?",
        )  # fmt: skip
        return SceneQuestion(text, _sentence(where(item.cell)), item)
    return None


def _ask_relation(asker: Asker) -> SceneQuestion | None:
    pair = asker.named(asker.items)[:2]
    if len(pair) < 2:
        return None
    (first, phrase), (second, other) = pair
    true, false = [], []
    if first.column != second.column:
        sides = ["left of", "right of"]
        (true if first.column < second.column else false).append(sides[0])
        (true if first.column > second.column else false).append(sides[1])
    if first.row != second.row:
        (true if first.row < second.row else false).append("above")
        (true if first.row > second.row else false).append("below")
    answer = asker.rng.random() < 0.5
    relation = asker.pick(*_RELATIONS[asker.rng.choice(true if answer else false)])
    return SceneQuestion(f"Is the {phrase} {relation} the {other}?", _yes(answer))


# ---- comparison ----------------------------------------------------------------------------------


def _sizeable(asker: Asker) -> list[Item]:
    return [item for item in asker.items if item.kind != "number"]


def _unsized(pairs: list[tuple[Item, str]]) -> list[tuple[Item, str]]:
    return [(item, phrase) for item, phrase in pairs if phrase.split(" ")[0] not in scenes.SIZES]


def _compared(asker: Asker) -> tuple[str, str, bool] | None:
    """Return the phrases of two things of clearly different size; is the first larger?"""
    sizes = list(scenes.SIZES)
    pair = _unsized(asker.named(_sizeable(asker)))[:2]
    if len(pair) < 2 or pair[0][0].size == pair[1][0].size:
        return None
    (first, phrase), (second, other) = pair
    return phrase, other, sizes.index(first.size) > sizes.index(second.size)


def _ask_which_larger(asker: Asker) -> SceneQuestion | None:
    if not (compared := _compared(asker)):
        return None
    phrase, other, is_larger = compared
    wants_larger = asker.rng.random() < 0.6
    word = asker.pick("larger", "bigger", "larger") if wants_larger else "smaller"
    text = asker.pick(
        f"Which is {word}, the {phrase} or the {other}?",
        f"What is {word}, the {phrase} or the {other}?",
        f"Which one is {word}: the {phrase} or the {other}?",
    )
    return SceneQuestion(text, f"The {phrase if is_larger == wants_larger else other}.")


def _ask_is_larger(asker: Asker) -> SceneQuestion | None:
    if not (compared := _compared(asker)):
        return None
    phrase, other, is_larger = compared
    wants_larger = asker.rng.random() < 0.6
    word = asker.pick("larger", "bigger", "larger") if wants_larger else "smaller"
    return SceneQuestion(
        f"Is the {phrase} {word} than the {other}?", _yes(is_larger == wants_larger)
    )


def _ask_largest(asker: Asker) -> SceneQuestion | None:
    items = _sizeable(asker)
    word, size = asker.rng.choice(
        (("largest", "large"), ("biggest", "large"), ("smallest", "small"))
    )
    extreme = [item for item in items if item.size == size]
    if len(items) < 2 or len(extreme) != 1:
        return None
    name = what(extreme[0]).split(" ", 1)[1]
    text = asker.pick(f"What is the {word} object?", f"Which object is the {word}?")
    return SceneQuestion(text, f"The {name}.", extreme[0])


def _ask_size(asker: Asker) -> SceneQuestion | None:
    for item, phrase in _unsized(asker.named(_sizeable(asker))):
        text = asker.pick(
            f"What size is the {phrase}?", f"How large is the {phrase}?",
            f"How big is the {phrase}?", f"Is the {phrase} small, medium or large?",
        )  # fmt: skip
        return SceneQuestion(text, _sentence(item.size), item)
    return None


# ---- numbers and descriptions --------------------------------------------------------------------


def _ask_number(asker: Asker) -> SceneQuestion | None:
    numbers = asker.of_kind("number")
    if not numbers:
        return None
    if len(numbers) > 1 and asker.rng.random() < 0.5:
        text = asker.pick("What numbers are written?", "Which numbers do you see?",
                          "What numbers are there?", "Read the numbers.")  # fmt: skip
        return SceneQuestion(text, f"{listed([item.name for item in numbers])}.")
    item = asker.rng.choice(numbers)
    place = f" {asker.place(item.cell)}" if len(numbers) > 1 or asker.rng.random() < 0.2 else ""
    text = asker.pick(
        f"What number is written{place}?", f"What number is{place or ' there'}?",
        f"Which number do you see{place}?", f"What is the number{place}?",
        f"Read the number{place}.", f"What number can you see{place}?",
        f"Which number is printed{place}?", f"What number is shown{place}?",
    )  # fmt: skip
    return SceneQuestion(text, f"{item.name}.", item)


def _ask_description(asker: Asker) -> SceneQuestion:
    text = asker.pick(
        "Describe the picture.", "Describe the image.", "Describe this picture.",
        "What do you see?", "What is in the picture?", "What is in this image?",
        "What can you see?", "Tell me about the picture.", "What does the picture show?",
        "Please describe what you see.", "Describe the scene.", "What is there?",
        "What objects are there?", "What things do you see?", "What is this?",
        "Describe the image in a sentence or two.", "What's in the image?",
    )  # fmt: skip
    return SceneQuestion(text, describe(asker.scene))


# ---- what cannot be answered straight ------------------------------------------------------------


def _ask_absent(asker: Asker) -> SceneQuestion | None:
    """Ask a question that presupposes an object that is absent."""
    rng = asker.rng
    shape, colour = rng.choice(SHAPES), rng.choice(tuple(COLOURS))
    phrase = rng.choice((shape, f"{colour} {shape}", *rng.sample(THINGS, 3)))
    if rng.random() < 0.06:
        phrase = rng.choice(talk.STRANGE_THINGS)
    if " " in phrase and phrase.startswith(colour) and not asker.is_fair(shape, colour):
        return None
    forms = [f"Where is the {phrase}?", f"Where's the {phrase}?", f"What size is the {phrase}?",
             f"How big is the {phrase}?"]  # fmt: skip
    if phrase == shape:
        forms += [f"What colour is the {shape}?", f"What is the colour of the {shape}?"]
    if known := asker.named(asker.items):
        other = known[0][1]
        relation = rng.choice(_RELATIONS[rng.choice(tuple(_RELATIONS))])
        forms += [
            f"Is the {phrase} {relation} the {other}?",
            f"Is the {phrase} larger than the {other}?",
        ]
    if rng.random() < 0.3:
        phrase = rng.choice((*scenes.CATEGORIES, "number", "shape"))
        forms = [
            f"Which {phrase} do you see?",
            f"What {phrase} is there?",
            f"Where is the {phrase}?",
        ]
        forms += ["What number is written?", "Read the number."] * (phrase == "number")
    if any(phrase in [*_phrases(item), *_groups(item)] for item in asker.items):
        return None
    return SceneQuestion(rng.choice(forms), f"There is no {phrase}.")


def _ask_unclear(asker: Asker) -> SceneQuestion | None:
    """Ask about one of several objects of the same kind."""
    groups = {group for item in asker.items if item.kind != "number" for group in _groups(item)}
    groups -= {"shape", *scenes.CATEGORIES} | {f"{colour} shape" for colour in COLOURS}
    counts = {g: sum(g in _groups(item) for item in asker.items) for g in sorted(groups)}
    several = [group for group, count in counts.items() if count > 1]
    if not several:
        return None
    group = asker.rng.choice(several)
    forms = [f"Where is the {group}?", f"What size is the {group}?"]
    forms += [f"What colour is the {group}?"] * (group in SHAPES) * 2
    *modifiers, noun = [group] if group in THINGS else group.split(" ")
    many = " ".join([*modifiers, plural(noun)])
    return SceneQuestion(asker.pick(*forms), f"There are {COUNTS[counts[group]].lower()} {many}.")


def _ask_thing_colour(asker: Asker) -> SceneQuestion | None:
    if not (things := asker.named(asker.of_kind("thing"))):
        return None
    return SceneQuestion(f"What colour is the {things[0][1]}?", talk.COLOURS_ONLY, things[0][0])


def _ask_anything(asker: Asker) -> SceneQuestion:
    return SceneQuestion(*talk.small_talk(asker.rng))


Ask = Callable[[Asker], SceneQuestion | None]
QUESTIONS: dict[str, tuple[tuple[Ask, float], ...]] = {
    "existence": ((_ask_exists_shape, 3), (_ask_exists_thing, 3), (_ask_exists_category, 1),
                  (_ask_exists_number, 1), (_ask_exists_at, 3)),
    "colour": ((_ask_colour, 3), (_ask_colour_at, 1), (_ask_is_colour, 1)),
    "shape": ((_ask_shape, 1),),
    "things": ((_ask_what_at, 3), (_ask_which_things, 1), (_ask_which_is_it, 1)),
    "counting": ((_ask_count_all, 1), (_ask_count, 3)),
    "position": ((_ask_where, 1), (_ask_relation, 4)),
    "comparison": ((_ask_which_larger, 3), (_ask_is_larger, 3), (_ask_largest, 1),
                   (_ask_size, 0.6)),
    "number": ((_ask_number, 1),),
    "description": ((_ask_description, 1),),
    "absent": ((_ask_absent, 3), (_ask_unclear, 2), (_ask_thing_colour, 1)),
    "talk": ((_ask_anything, 1),),
}  # fmt: skip
WEIGHTS = {
    "existence": 4.0, "colour": 2.0, "shape": 1.5, "things": 4.5, "counting": 3.5,
    "position": 8.0, "comparison": 8.0, "number": 5.0, "description": 0.4, "absent": 1.5,
    "talk": 0.4,
}  # fmt: skip

TALK_WITHOUT_IMAGE = 0.4  # of what is said while there is none


def ask(kind: str, asker: Asker, *, tries: int = 8) -> SceneQuestion | None:
    """Return a question of this kind, or None if the scene gives no occasion for it."""
    functions, weights = zip(*QUESTIONS[kind], strict=True)
    for _ in range(tries):
        function = asker.rng.choices(functions, weights)[0]
        if question := function(asker):
            return question._replace(sort=function.__name__.removeprefix("_ask_"))
    return None


def _ask_about(item: Item, rng: random.Random) -> tuple[str, SceneQuestion] | None:
    """Return a question that calls the item of the previous turn "it"."""
    forms = [("position", SceneQuestion("Where is it?", _sentence(where(item.cell)), item))]
    if item.kind != "number":
        forms.append(("comparison", SceneQuestion("What size is it?", _sentence(item.size), item)))
    if item.kind == "shape":
        colour = SceneQuestion("What colour is it?", _sentence(item.colour or ""), item)
        forms += [("colour", colour), ("colour", colour._replace(text="And what colour is it?"))]
    return rng.choice(forms)


def make_conversation(
    rng: random.Random,
    images: Sequence[Scene],
    *,
    num_turns: int,
    weights: dict[str, float] | None = None,
    spare_held_out: bool = True,
    follow_ups: bool = True,
) -> list[SceneTurn]:
    """Return the turns of a conversation with several images; each question is about the latest.

    With `follow_ups`, some questions call the subject of the previous one "it". If there is no
    image yet, every question about one is answered with `talk.NO_IMAGE`.
    """
    weights = weights or WEIGHTS
    arrivals = {0: 0} | {
        turn: index for index, turn in
        zip(range(1, len(images)), sorted(rng.sample(range(1, num_turns), len(images) - 1)),
            strict=True)
    } if images else {}  # fmt: skip
    turns: list[SceneTurn] = []
    asker = Asker(scenes.make_scene(rng), rng, spare_held_out)
    about: Item | None = None
    while len(turns) < num_turns:
        image = images[arrivals[len(turns)]] if len(turns) in arrivals else None
        if image:
            asker, about = Asker(image, rng, spare_held_out), None
        kind = rng.choices(tuple(weights), tuple(weights.values()))[0]
        if not images and rng.random() < TALK_WITHOUT_IMAGE:
            kind = "talk"
        question = ask(kind, asker)
        if follow_ups and about and not image and rng.random() < 0.12:
            kind, question = _ask_about(about, rng) or (kind, question)
        if question is None:
            continue
        answer = question.answer if images or kind == "talk" else talk.NO_IMAGE
        turns.append(SceneTurn(kind, talk.vary(rng, question.text), answer, image))
        about = question.about if images else None
    return turns
