"""Test images of plain shapes, drawn with Pillow's own calls as somebody else's code would.

Nothing here is shared with the painter of training scenes: other outlines, sizes, places, colours
by their CSS names, grounds, and canvases of other resolutions.
"""

import math
import random

from PIL import Image, ImageColor, ImageDraw

from llava_ray.demo.scenes import CELL, GRID, PIXELS, SHAPES, Item, Scene, Size

COLOURS = {
    "red": ("red", "crimson", "firebrick"),
    "orange": ("orange", "darkorange"),
    "yellow": ("yellow", "gold"),
    "green": ("green", "limegreen", "seagreen", "forestgreen"),
    "blue": ("blue", "royalblue", "mediumblue"),
    "purple": ("purple", "darkviolet", "rebeccapurple"),
    "pink": ("hotpink", "pink", "deeppink"),
    "black": ("black",),
}
GROUNDS = (
    *("white",) * 6, "whitesmoke", "lightgray", "beige", "lavender", "lightblue", "lightyellow",
    "palegreen", "navy", "darkslategray", "gray", "black", "tan", "teal", "maroon",
)  # fmt: skip
KINDS = ("existence", "colour", "shape", "things", "counting", "position")
"""The kinds of questions that are asked; sizes are the embedded model's own words."""

_MIN_CONTRAST = 130


def make_drawing(rng: random.Random) -> tuple[Scene, Image.Image]:
    """Return what is in a new square image, and the image in a resolution of its own.

    It has one to three shapes of 5 to 80 % of its width, each in a cell of the 3x3 layout of its
    own, that do not touch.
    """
    ground = rng.choice(GROUNDS)
    side = rng.choice((200, 224, 256, 336, 400, 512, 640, 800))
    count = rng.choices((1, 2, 3), weights=(3, 2, 1))[0]
    while True:
        items = [_make_item(rng, ground, largest=0.8 if count == 1 else 0.4) for _ in range(count)]
        if _are_apart(items):
            break
    items.sort(key=lambda item: item.cell)
    image = Image.new("RGB", (side, side), ground)
    for item in items:
        _draw(ImageDraw.Draw(image), item, side / PIXELS, rng)
    back = ImageColor.getrgb(ground)[:3]
    return Scene(tuple(items), (back, back), 0), image


def _make_item(rng: random.Random, ground: str, *, largest: float) -> Item:
    pixels = round(rng.uniform(0.05, largest) * PIXELS)
    size: Size = "small" if pixels <= 27 else "medium" if pixels <= 37 else "large"
    half = pixels // 2 + 2
    x, y = (rng.randint(half, PIXELS - half) for _ in range(2))
    back = ImageColor.getrgb(ground)[:3]
    while True:
        colour = rng.choice(tuple(COLOURS))
        ink = ImageColor.getrgb(rng.choice(COLOURS[colour]))[:3]
        if math.dist(ink, back) > _MIN_CONTRAST:
            break
    cell = y // CELL * GRID + x // CELL
    return Item("shape", rng.choice(SHAPES), size, cell, x, y, pixels, colour, ink)


def _are_apart(items: list[Item]) -> bool:
    """Whether all have cells of their own, each clearly in it, and none touches another."""
    if any(abs(at % CELL - CELL / 2) > CELL / 2 - 4 for item in items for at in (item.x, item.y)):
        return False
    return all(
        one.cell != other.cell
        and max(abs(one.x - other.x), abs(one.y - other.y)) > (one.pixels + other.pixels) / 2 + 4
        for index, one in enumerate(items)
        for other in items[:index]
    )


def _draw(pen: ImageDraw.ImageDraw, item: Item, scale: float, rng: random.Random) -> None:
    x, y, r = item.x * scale, item.y * scale, item.pixels * scale / 2
    match item.name:
        case "circle":
            pen.circle((x, y), r, fill=item.ink)
        case "square":
            pen.rectangle((x - r, y - r, x + r, y + r), fill=item.ink)
        case "triangle" if rng.random() < 0.5:
            pen.regular_polygon((x, y, r), 3, fill=item.ink)
        case "triangle":
            pen.polygon([(x, y - r), (x - r, y + r), (x + r, y + r)], fill=item.ink)
        case "diamond":
            wide = r * rng.choice((1.0, 0.7))
            pen.polygon([(x, y - r), (x + wide, y), (x, y + r), (x - wide, y)], fill=item.ink)
        case "star":
            corners = [(r, 0.45 * r)[step % 2] for step in range(10)]
            turns = [math.pi * (step / 5 - 0.5) for step in range(10)]
            pen.polygon(
                [
                    (x + far * math.cos(turn), y + far * math.sin(turn))
                    for far, turn in zip(corners, turns, strict=True)
                ],
                fill=item.ink,
            )
        case _:  # a heart: two circles and a triangle
            pen.circle((x - r / 2, y - r / 2), r / 2, fill=item.ink)
            pen.circle((x + r / 2, y - r / 2), r / 2, fill=item.ink)
            pen.polygon([(x - r, y - r / 3), (x + r, y - r / 3), (x, y + r)], fill=item.ink)
