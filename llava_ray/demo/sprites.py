"""The sprites of the scenes, in two PNG sheets: sixty things, and digits in eight typefaces.

Scenes are drawn from these sheets, so drawing a scene needs no font. `cut_sheets` made them
once, with an emoji font and DejaVu at hand:

    python -m llava_ray.demo.sprites NotoColorEmoji.ttf DIRECTORY_OF_DEJAVU
"""

import argparse
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

SHEETS = Path(__file__).parent / "assets"
THING_PIXELS = 80  # a sprite's longer side: about twice what the model sees, for larger drawings
DIGIT_PIXELS = 64  # a line of type
COLUMNS = 10

EMOJI = {
    "animal": {
        "dog": "🐶", "cat": "🐱", "mouse": "🐭", "rabbit": "🐰", "fox": "🦊",
        "bear": "🐻", "panda": "🐼", "pig": "🐷", "frog": "🐸", "monkey": "🐵",
        "cow": "🐮", "lion": "🦁", "elephant": "🐘", "fish": "🐟", "butterfly": "🦋",
        "turtle": "🐢", "owl": "🦉", "octopus": "🐙", "bee": "🐝", "penguin": "🐧",
    },
    "food": {
        "apple": "🍎", "banana": "🍌", "lemon": "🍋", "strawberry": "🍓", "pear": "🍐",
        "pineapple": "🍍", "carrot": "🥕", "mushroom": "🍄", "tomato": "🍅", "pizza": "🍕",
        "burger": "🍔", "donut": "🍩", "cake": "🎂", "cookie": "🍪", "egg": "🥚",
        "ice cream": "🍦",
    },
    "vehicle": {
        "car": "🚗", "bus": "🚌", "train": "🚂", "plane": "✈", "helicopter": "🚁",
        "bicycle": "🚲", "boat": "⛵", "rocket": "🚀", "tractor": "🚜", "fire truck": "🚒",
        "scooter": "🛵", "ambulance": "🚑",
    },
    "tool": {
        "hammer": "🔨", "wrench": "🔧", "screwdriver": "🪛", "axe": "🪓", "saw": "🪚",
        "ladder": "🪜", "magnet": "🧲", "key": "🔑", "bucket": "🪣", "pencil": "✏",
        "paintbrush": "🖌", "flashlight": "🔦",
    },
}  # fmt: skip
THINGS = {name: category for category, names in EMOJI.items() for name in names}

FACES = (
    "DejaVuSans",
    "DejaVuSans-Bold",
    "DejaVuSans-Oblique",
    "DejaVuSansCondensed",
    "DejaVuSerif",
    "DejaVuSerif-Bold",
    "DejaVuSansMono",
    "DejaVuSansMono-Bold",
)


@cache
def _cells(name: str, pixels: int) -> tuple[Image.Image, ...]:
    """Return the cells of a sheet in reading order, each cropped to its content."""
    with Image.open(SHEETS / f"{name}.png") as stored:
        sheet = stored if stored.mode == "L" else stored.convert("RGBA")
        sheet.load()
    boxes = (
        (x, y, x + pixels, y + pixels)
        for y in range(0, sheet.height, pixels)
        for x in range(0, sheet.width, pixels)
    )
    cells = (sheet.crop(box) for box in boxes)
    return tuple(cell.crop(cell.getbbox()) for cell in cells)


@cache
def thing(name: str, pixels: int) -> Image.Image:
    """Return the RGBA image of a thing, whose longer side is `pixels`."""
    cell = _cells("things", THING_PIXELS)[list(THINGS).index(name)]
    return _resized(cell, pixels / max(cell.size))


@cache
def number(text: str, face: int, pixels: int) -> Image.Image:
    """Return the mask (mode L) of a number in typeface `face`, with digits `pixels` high."""
    glyphs = [_cells("digits", DIGIT_PIXELS)[face * COLUMNS + int(digit)] for digit in text]
    gap = DIGIT_PIXELS // 12
    width = sum(glyph.width for glyph in glyphs) + gap * (len(glyphs) - 1)
    line = Image.new("L", (width, max(glyph.height for glyph in glyphs)))
    x = 0
    for glyph in glyphs:
        line.paste(glyph, (x, line.height - glyph.height))
        x += glyph.width + gap
    return _resized(line, pixels / line.height)


def _resized(image: Image.Image, scale: float) -> Image.Image:
    width, height = (max(1, round(side * scale)) for side in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS)


def cut_sheets(emoji_font: Path, dejavu: Path) -> None:
    """Draw both sheets anew from an emoji font (Noto Color Emoji) and the DejaVu typefaces."""
    SHEETS.mkdir(exist_ok=True)
    emoji = ImageFont.truetype(emoji_font, 109)  # the one size that its bitmaps have
    emojis = [text for names in EMOJI.values() for text in names.values()]
    things = _sheet("RGBA", THING_PIXELS, (_drawn(text, emoji) for text in emojis))
    things.quantize(256, method=Image.Quantize.FASTOCTREE).save(
        SHEETS / "things.png", optimize=True
    )
    faces = (ImageFont.truetype(dejavu / f"{face}.ttf", 80) for face in FACES)
    digits = (_drawn(digit, face).getchannel("A") for face in faces for digit in "0123456789")
    _sheet("L", DIGIT_PIXELS, digits).save(SHEETS / "digits.png", optimize=True)


def _drawn(text: str, font: ImageFont.FreeTypeFont) -> Image.Image:
    canvas = Image.new("RGBA", (200, 200))
    ImageDraw.Draw(canvas).text((20, 20), text, font=font, embedded_color=True)
    return canvas.crop(canvas.getbbox())


def _sheet(mode: str, pixels: int, images: Iterator[Image.Image]) -> Image.Image:
    fitted = [_resized(image, pixels / max(image.size)) for image in images]
    sheet = Image.new(mode, (COLUMNS * pixels, -(-len(fitted) // COLUMNS) * pixels))
    for index, image in enumerate(fitted):
        sheet.paste(image, (index % COLUMNS * pixels, index // COLUMNS * pixels))
    return sheet


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Draw the sprite sheets again.")
    parser.add_argument("emoji_font", type=Path)
    parser.add_argument("dejavu", type=Path)
    arguments = parser.parse_args()
    cut_sheets(arguments.emoji_font, arguments.dejavu)
