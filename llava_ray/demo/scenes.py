"""Scenes: what is in an image, and the image.

A scene holds up to nine items, one a cell of a 3x3 layout: a coloured shape, an everyday thing or
a printed number. `make_scene` makes one from a random generator and `draw` paints it, both exactly
repeatable. Some combinations of what is drawn are kept out of every training scene
(`is_held_out`), so that a test can ask for what was never seen.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import Literal

from PIL import Image, ImageDraw

from llava_ray.demo import sprites

Kind = Literal["shape", "thing", "number"]
Size = Literal["small", "medium", "large"]

SHAPES = ("circle", "square", "triangle", "diamond", "star", "heart")
COLOURS = {
    "red": (220, 38, 38),
    "orange": (249, 135, 20),
    "yellow": (244, 208, 30),
    "green": (34, 150, 62),
    "blue": (37, 88, 225),
    "purple": (128, 46, 170),
    "pink": (246, 130, 185),
    "black": (24, 24, 28),
}
SIZES: dict[Size, tuple[int, int]] = {"small": (22, 24), "medium": (31, 34), "large": (42, 44)}
CATEGORIES = tuple(sprites.EMOJI)
THINGS = tuple(sprites.THINGS)
ROWS = ("top", "middle", "bottom")
COLUMNS = ("left", "middle", "right")
OTHER_INKS: dict[str, tuple[tuple[int, int, int], ...]] = {
    "red": ((255, 0, 0), (220, 20, 60), (200, 0, 0)),
    "orange": ((255, 165, 0), (255, 140, 0)),
    "yellow": ((255, 255, 0), (255, 215, 0)),
    "green": ((0, 128, 0), (0, 255, 0), (0, 200, 0), (34, 139, 34)),
    "blue": ((0, 0, 255), (30, 64, 175), (65, 105, 225)),
    "purple": ((128, 0, 128), (148, 0, 211)),
    "pink": ((255, 192, 203), (255, 105, 180)),
    "black": ((0, 0, 0),),
}
"""What other hands mean by the same words: CSS's colours and their neighbours."""
MIN_CONTRAST = 110
"""Between a plain shape and its ground, as a distance of red, green and blue."""
SMALLEST, LARGEST = 7, 115
"""Plain shapes, in pixels: 5 and 80 % of the image's width."""
NUM_VARIANTS = 400
ODD_SHAPES = {
    "cross": [(0.35, 0), (0.65, 0), (0.65, 0.35), (1, 0.35), (1, 0.65), (0.65, 0.65), (0.65, 1),
              (0.35, 1), (0.35, 0.65), (0, 0.65), (0, 0.35), (0.35, 0.35)],
    "hexagon": [(0.25, 0.06), (0.75, 0.06), (1, 0.5), (0.75, 0.94), (0.25, 0.94), (0, 0.5)],
    "house": [(0.5, 0), (1, 0.5), (0.85, 0.5), (0.85, 1), (0.15, 1), (0.15, 0.5), (0, 0.5)],
    "arrow": [(0, 0.3), (0.5, 0.3), (0.5, 0), (1, 0.5), (0.5, 1), (0.5, 0.7), (0, 0.7)],
    "bolt": [(0.6, 0), (0.1, 0.6), (0.45, 0.6), (0.35, 1), (0.9, 0.38), (0.55, 0.38)],
}  # fmt: skip
"""Outlines without a name, which no question is about; coordinates are from 0 to 1."""
GRID = 3
CELL = 48  # pixels
PIXELS = CELL * GRID  # an image's side, as the model sees it
MAX_JITTER = 6
UNNAMED = "?"  # the colour or the shape that is none of those above
_SUPERSAMPLING = 4

_HELD_OUT_NUMBERS = frozenset((14, 23, 37, 46, 50, 68, 72, 85, 91))


@dataclass(frozen=True, slots=True)
class Item:
    """One object of a scene; `x`, `y` and `pixels` are measured in an image of PIXELS a side."""

    kind: Kind
    name: str  # a shape, a thing, or the digits of a number
    size: Size
    cell: int  # 0 top left ... 8 bottom right
    x: int  # of its centre
    y: int
    pixels: int  # its longer side; a number's height
    colour: str | None = None  # of a shape
    ink: tuple[int, int, int] = (0, 0, 0)  # what a shape or a number is painted with
    face: int = 0  # a number's typeface
    outline: str = ""  # of a shape whose name does not say it
    variant: int = 0  # of a shape's outline: 0 as in most scenes, others as other hands draw it

    @property
    def row(self) -> int:
        return self.cell // GRID

    @property
    def column(self) -> int:
        return self.cell % GRID

    @property
    def category(self) -> str:
        """Return 'shape', 'number', or the category of a thing."""
        return sprites.THINGS[self.name] if self.kind == "thing" else self.kind


@dataclass(frozen=True, slots=True)
class Scene:
    """What an image shows: its items in reading order, and the two colours of its background."""

    items: tuple[Item, ...]
    background: tuple[tuple[int, int, int], tuple[int, int, int]]
    slope: int  # degrees


def is_held_out(kind: Kind, name: str, colour: str | None, cell: int) -> bool:
    """Return whether a combination (colour and shape, number, thing and place) is held out."""
    match kind:
        case "shape":
            shape, shade = SHAPES.index(name), list(COLOURS).index(colour or "")
            return (3 * shape + 1) % len(COLOURS) == shade
        case "number":
            return int(name) in _HELD_OUT_NUMBERS
        case "thing":
            return THINGS.index(name) * 4 % GRID**2 == cell


def make_scene(
    rng: random.Random,
    *,
    num_items: int | None = None,
    kinds: Sequence[Kind] = ("shape", "thing", "number"),
    held_out: bool = False,
) -> Scene:
    """Return a random scene of `num_items` (None: one to five).

    Training scenes hold no held-out combination; with `held_out`, every scene holds at least one
    and the rest is free. Items resemble each other more often than chance would have it, so that
    counting and telling apart have something to do.
    """
    count = num_items or rng.choices((1, 2, 3, 4, 5), weights=(2, 3, 4, 4, 4))[0]
    cells = sorted(rng.sample(range(GRID**2), count))
    surprise = rng.randrange(count) if held_out else -1
    like: list[Item] = []
    for index, cell in enumerate(cells):
        allowed = {True} if index == surprise else {True, False} if held_out else {False}
        item = _make_item(rng, cell, kinds, like)
        while is_held_out(item.kind, item.name, item.colour, cell) not in allowed:
            item = _make_item(rng, cell, kinds, like if rng.random() < 0.5 else [])
        like.append(item)
    is_graded = rng.random() < 0.7
    first = _light(rng)
    light = (first, _light(rng) if is_graded else first)
    return Scene(tuple(like), light, rng.randrange(0, 360, 15))


def make_plain_scene(rng: random.Random) -> Scene:
    """A random scene of one to four shapes as anybody draws them, without held-out combinations.

    They are of 5 to 80 % of the image's width, anywhere, on a ground of any colour that differs
    from theirs.
    """
    first, second = _ground(rng)
    items: list[Item] = []
    for _ in range(rng.choices((1, 2, 3, 4), weights=(4, 3, 2, 1))[0]):
        for _ in range(20):
            item = _make_plain_item(rng, alone=not items)
            if _has_room(item, items) and all(
                math.dist(item.ink, ground) > MIN_CONTRAST for ground in (first, second)
            ):
                items.append(item)
                break
    if not items:
        return make_plain_scene(rng)
    items.sort(key=lambda item: item.cell)
    return Scene(tuple(items), (first, second), rng.randrange(0, 360, 15))


def _make_plain_item(rng: random.Random, *, alone: bool) -> Item:
    largest = LARGEST if alone else LARGEST * 3 // 5
    is_even = rng.random() < 0.5  # else each doubling of the size is as likely
    log_size = rng.uniform(math.log(SMALLEST), math.log(largest))
    pixels = rng.randint(12, largest) if is_even else round(math.exp(log_size))
    size: Size = "small" if pixels <= 27 else "medium" if pixels <= 37 else "large"
    half = (pixels + 1) // 2
    x, y = (rng.randint(half, PIXELS - half) for _ in range(2))
    while True:
        name, colour = rng.choice(SHAPES), rng.choice(tuple(COLOURS))
        if not is_held_out("shape", name, colour, 0):
            break
    ink = _varied(rng, rng.choice((COLOURS[colour], *OTHER_INKS[colour])), 10)
    cell = y // CELL * GRID + x // CELL
    variant = rng.randrange(1, NUM_VARIANTS) if rng.random() < 0.8 else 0
    return Item("shape", name, size, cell, x, y, pixels, colour, ink, variant=variant)


def _has_room(item: Item, others: Sequence[Item]) -> bool:
    """Whether an item has a cell of its own, clearly, and overlaps no other."""
    if any(abs(place % CELL - CELL / 2) > CELL / 2 - 3 for place in (item.x, item.y)):
        return False
    return all(
        item.cell != other.cell
        and max(abs(item.x - other.x), abs(item.y - other.y)) > (item.pixels + other.pixels) / 2 + 2
        for other in others
    )


def _ground(rng: random.Random) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """The two ends of a background: white, light, dark or of any colour; mostly plain."""
    share = rng.random()
    if share < 0.35:
        return (255, 255, 255), (255, 255, 255)
    if share < 0.5:
        first = _light(rng)
    elif share < 0.65:
        first = (rng.randrange(50), rng.randrange(50), rng.randrange(50))
    else:
        first = _any_colour(rng)
    return first, first if rng.random() < 0.8 else _varied(rng, first, 40)


def make_empty_scene(rng: random.Random) -> Scene:
    """Return a scene without items, light or dark."""
    paint = _light if rng.random() < 0.5 else _any_colour
    first = paint(rng)
    second = first if rng.random() < 0.5 else paint(rng)
    return Scene((), (first, second), rng.randrange(0, 360, 15))


def _make_item(rng: random.Random, cell: int, kinds: Sequence[Kind], like: list[Item]) -> Item:
    model = rng.choice(like) if like and rng.random() < 0.35 else None
    kind = (
        model.kind if model else rng.choices(kinds, [2 if k == "number" else 3 for k in kinds])[0]
    )
    size: Size = rng.choice(("small", "medium", "large"))
    pixels = rng.randint(*SIZES[size])
    name, colour, ink, face = "", None, (0, 0, 0), 0
    match kind:
        case "shape":
            share = rng.random()
            name = model.name if model and share < 0.6 else rng.choice(SHAPES)
            colour = model.colour if model and share > 0.4 else rng.choice(tuple(COLOURS))
            ink = _varied(rng, COLOURS[colour or ""], 12)
        case "thing":
            name = model.name if model and rng.random() < 0.6 else rng.choice(THINGS)
        case "number":
            name = str(rng.randrange(10) if rng.random() < 0.25 else rng.randrange(10, 100))
            size, pixels = "medium", rng.randint(20, 25)
            ink, face = _varied(rng, (45, 45, 60), 40), rng.randrange(len(sprites.FACES))
    reach = min(MAX_JITTER, (CELL - pixels) // 2 - 1)
    x = cell % GRID * CELL + CELL // 2 + rng.randint(-reach, reach)
    y = cell // GRID * CELL + CELL // 2 + rng.randint(-reach, reach)
    if kind == "number":
        x = cell % GRID * CELL + CELL // 2 + rng.randint(-2, 2)
    return Item(kind, name, size, cell, x, y, pixels, colour, ink, face)


def _varied(rng: random.Random, ink: tuple[int, int, int], by: int) -> tuple[int, int, int]:
    red, green, blue = (max(0, min(255, part + rng.randint(-by, by))) for part in ink)
    return red, green, blue


def _light(rng: random.Random) -> tuple[int, int, int]:
    return rng.randint(228, 255), rng.randint(228, 255), rng.randint(228, 255)


def disguise(rng: random.Random, scene: Scene, share: float) -> Scene:
    """Give some shapes a colour or an outline that has no name; it is then UNNAMED.

    A vision tower that is trained on these learns colours and outlines separately, and recognises
    combinations that it has never seen.
    """
    items = [
        _disguise(rng, item) if item.kind == "shape" and rng.random() < share else item
        for item in scene.items
    ]
    return replace(scene, items=tuple(items))


def _disguise(rng: random.Random, item: Item) -> Item:
    if rng.random() < 0.5:
        return replace(item, name=UNNAMED, outline=rng.choice(tuple(ODD_SHAPES)))
    return replace(item, colour=UNNAMED, ink=_odd_ink(rng))


def _odd_ink(rng: random.Random) -> tuple[int, int, int]:
    """Return a colour that differs clearly from all named ones and from the background."""
    while True:
        ink = _any_colour(rng)
        if min(ink) < 190 and min(math.dist(ink, named) for named in COLOURS.values()) > 105:
            return ink


def _any_colour(rng: random.Random) -> tuple[int, int, int]:
    return rng.randrange(256), rng.randrange(256), rng.randrange(256)


def draw(scene: Scene, *, scale: int = 1) -> Image.Image:
    """Paint a scene as a square RGB image of side `scale * PIXELS`."""
    image = _draw_background(scene, PIXELS * scale)
    for item in scene.items:
        pixels = item.pixels * scale
        match item.kind:
            case "shape":
                stamp: Image.Image = _shape_mask(item.outline or item.name, pixels, item.variant)
            case "thing":
                stamp = sprites.thing(item.name, pixels)
            case "number":
                stamp = sprites.number(item.name, item.face, pixels)
        corner = (item.x * scale - stamp.width // 2, item.y * scale - stamp.height // 2)
        image.paste(stamp if item.kind == "thing" else item.ink, corner, stamp)
    return image


def _draw_background(scene: Scene, pixels: int) -> Image.Image:
    """Return a background that fades from one colour into another."""
    first, second = scene.background
    if first == second:
        return Image.new("RGB", (pixels, pixels), first)
    start, end = (Image.new("RGB", (pixels, pixels), light) for light in (first, second))
    return Image.composite(start, end, _ramp(scene.slope, pixels))


@cache
def _ramp(slope: int, pixels: int) -> Image.Image:
    ramp = Image.linear_gradient("L").rotate(slope, Image.Resampling.BILINEAR, fillcolor=128)
    return ramp.resize((pixels, pixels), Image.Resampling.BILINEAR, box=(37, 37, 219, 219))


@lru_cache(4096)
def _shape_mask(name: str, pixels: int, variant: int = 0) -> Image.Image:
    """The mask (mode L) of a shape that fills a square of `pixels`, its edges smooth."""
    side = pixels * _SUPERSAMPLING
    if variant:
        return _draw_variant(name, side, variant).resize((pixels, pixels), Image.Resampling.BOX)
    mask = Image.new("L", (side, side))
    pen = ImageDraw.Draw(mask)
    if name == "circle":
        pen.ellipse((0, 0, side - 1, side - 1), fill=255)
    else:
        pen.polygon([(x * (side - 1), y * (side - 1)) for x, y in _outline(name)], fill=255)
    return mask.resize((pixels, pixels), Image.Resampling.BOX)


def _draw_variant(name: str, side: int, variant: int) -> Image.Image:
    """A shape as another hand draws it: other proportions, a little turned."""
    rng = random.Random(f"{name} {variant}")
    mask = Image.new("L", (side, side))
    pen = ImageDraw.Draw(mask)
    last = side - 1
    angle = rng.uniform(-12, 12) if rng.random() < 0.3 else 0.0
    match name:
        case "circle":
            inset = rng.choice((0, 0, 0, rng.uniform(0, 0.06))) * side
            pen.ellipse((0, inset, last, last - inset), fill=255)
            return mask
        case "square":
            corners = [(0.0, 0.0), (1.0, 0.0), (1.0, 1.0), (0.0, 1.0)]
        case "triangle":
            top, apex = rng.uniform(0, 0.15), rng.choice((0.5, 0.5, 0.5, rng.uniform(0.2, 0.8)))
            corners = [(apex, top), (1.0, 1.0), (0.0, 1.0)]
        case "diamond":
            half = rng.uniform(0.32, 0.5)
            corners = [(0.5, 0.0), (0.5 + half, 0.5), (0.5, 1.0), (0.5 - half, 0.5)]
        case "star":
            inner = rng.uniform(0.17, 0.26)
            corners = [
                (0.5 + r * math.cos(turn), 0.52 + r * math.sin(turn))
                for step in range(10)
                for r, turn in [((inner if step % 2 else 0.51), math.pi * (step / 5 - 0.5))]
            ]
        case "heart" if rng.random() < 0.5:
            joint = rng.uniform(0.25, 0.33)
            pen.ellipse((0, 0, 0.52 * last, 2 * joint * last), fill=255)
            pen.ellipse((0.48 * last, 0, last, 2 * joint * last), fill=255)
            low = joint * 1.25
            corners = [(0.03, low), (0.5, joint * 0.9), (0.97, low), (0.5, 1.0)]
        case _:
            corners = _outline(name)
    pen.polygon([(x * last, y * last) for x, y in corners], fill=255)
    if not angle:
        return mask
    turned = mask.rotate(angle, Image.Resampling.BILINEAR, expand=True)
    return turned.resize((side, side), Image.Resampling.BILINEAR)


def _outline(name: str) -> list[tuple[float, float]]:
    """Return the corners of a shape; coordinates are from 0 to 1."""
    match name:
        case name if name in ODD_SHAPES:
            return ODD_SHAPES[name]
        case "square":
            return [(0.06, 0.06), (0.94, 0.06), (0.94, 0.94), (0.06, 0.94)]
        case "triangle":
            return [(0.5, 0.04), (1, 0.94), (0, 0.94)]
        case "diamond":
            return [(0.5, 0), (0.92, 0.5), (0.5, 1), (0.08, 0.5)]
        case "star":
            spokes = [
                (radius, math.pi * (step / 5 - 0.5))
                for step in range(10)
                for radius in [0.53 if step % 2 == 0 else 0.22]
            ]
            return [(0.5 + r * math.cos(a), 0.53 + r * math.sin(a)) for r, a in spokes]
        case _:  # a heart
            turns = [math.tau * step / 60 for step in range(60)]
            across = [16 * math.sin(t) ** 3 for t in turns]
            up = [
                13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
                for t in turns
            ]
            return [(0.5 + x / 33, 0.45 - y / 33) for x, y in zip(across, up, strict=True)]
