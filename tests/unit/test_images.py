"""`images`: every kind of image that clients send, and every way in which one can be invalid."""

import base64
import io
import random
import struct
import zlib

import pytest
from PIL import Image

from llava_ray import images
from llava_ray.config import LimitsConfig
from llava_ray.errors import ImageError
from llava_ray.types import ImagePart

LIMITS = LimitsConfig()
WHITE, BLACK, RED, BLUE = (255, 255, 255), (0, 0, 0), (255, 0, 0), (0, 0, 255)


def encode(image: Image.Image, file_format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def make_image(color: tuple[int, ...] = RED, mode: str = "RGB") -> Image.Image:
    return Image.new(mode, (8, 6), color)


def decode(data: bytes, **limits: int) -> Image.Image:
    return images.decode(data, limits=LimitsConfig(**limits), param="messages[0].content[1]")


def refusal(data: bytes, **limits: int) -> str:
    with pytest.raises(ImageError) as caught:
        decode(data, **limits)
    assert caught.value.status == 400
    assert caught.value.code == "invalid_image"
    assert caught.value.param == "messages[0].content[1]"
    return caught.value.message


def header_png(width: int, height: int) -> bytes:
    """Return a PNG with a header that declares a size, and no pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        body = name + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b""))


@pytest.mark.parametrize("file_format", images.FORMATS)
def test_every_format_that_is_named_is_read(file_format: str) -> None:
    decoded = decode(encode(make_image(BLUE), file_format))
    assert (decoded.mode, decoded.size) == ("RGB", (8, 6))
    assert max(abs(a - b) for a, b in zip(decoded.getpixel((3, 3)), BLUE, strict=True)) < 4


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.new("L", (8, 6), 255), WHITE),
        (Image.new("1", (8, 6), 1), WHITE),
        (Image.new("LA", (8, 6), (0, 0)), WHITE),
        (Image.new("RGBA", (8, 6), (0, 0, 0, 0)), WHITE),
        (Image.new("RGBA", (8, 6), (255, 0, 0, 255)), RED),
        (Image.new("I;16", (8, 6), 65535), WHITE),
        (Image.new("I;16", (8, 6), 0), BLACK),
        (Image.new("I;16", (8, 6), 32896), (128, 128, 128)),
        (make_image(RED).convert("P"), RED),
        (make_image(RED).quantize(4), RED),
    ],
    ids=lambda value: value.mode if isinstance(value, Image.Image) else "",
)
def test_every_mode_becomes_rgb_on_white(image: Image.Image, expected: tuple[int, ...]) -> None:
    assert decode(encode(image)).getpixel((3, 3)) == expected


def test_transparent_palettes_and_colours_become_white() -> None:
    palette = make_image(RED).quantize(4)
    assert decode(encode(palette, transparency=palette.getpixel((0, 0)))).getpixel((3, 3)) == WHITE
    assert decode(encode(make_image(RED), transparency=RED)).getpixel((3, 3)) == WHITE
    grey = Image.new("L", (8, 6), 7)
    assert decode(encode(grey, transparency=7)).getpixel((3, 3)) == WHITE


def test_cmyk_and_floating_point_images_are_converted() -> None:
    cmyk = decode(encode(Image.new("CMYK", (8, 6), (0, 255, 255, 0)), "JPEG"))
    assert cmyk.getpixel((3, 3))[0] > 200
    assert max(cmyk.getpixel((3, 3))[1:]) < 60
    ramp = Image.new("F", (2, 2))
    ramp.putdata([-1.0, 0.0, 0.5, 1.0])
    assert decode(encode(ramp, "TIFF")).getpixel((1, 1)) == WHITE
    assert decode(encode(ramp, "TIFF")).getpixel((0, 0)) == BLACK
    assert decode(encode(Image.new("F", (2, 2), 3.0), "TIFF")).size == (2, 2)
    assert "not a number" in refusal(encode(Image.new("F", (2, 2), float("nan")), "TIFF"))


@pytest.mark.parametrize("file_format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_several_frames_the_first_is_taken(file_format: str) -> None:
    data = encode(make_image(RED), file_format, save_all=True, append_images=[make_image(BLUE)])
    red, _, blue = decode(data).getpixel((3, 3))
    assert red > 200
    assert blue < 60


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_exif_orientation_is_applied(orientation: int) -> None:
    image = Image.new("RGB", (8, 6), BLUE)
    image.paste(RED, (0, 0, 8, 3))
    exif = Image.Exif()
    exif[0x0112] = orientation
    decoded = decode(encode(image, exif=exif))
    assert decoded.size == ((8, 6) if orientation < 5 else (6, 8))
    corners = {1: (0, 0), 2: (0, 0), 3: (0, -1), 4: (0, -1), 5: (0, 0), 6: (-1, 0), 7: (-1, 0)}
    x, y = corners.get(orientation, (0, 0))
    assert decoded.getpixel((x % decoded.width, y % decoded.height)) == RED


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_a_broken_exif_block_does_not_cost_the_image() -> None:
    data = encode(make_image(RED), "JPEG", exif=b"Exif\x00\x00II*\x00\xff\xff\xff\xff")
    assert decode(data).size == (8, 6)


def test_a_bomb_is_refused_from_its_header() -> None:
    assert "30000 x 30000 = 900,000,000 pixels" in refusal(
        header_png(30000, 30000), max_image_pixels=10**9 - 10**8 - 1
    ) or "too many pixels" in refusal(header_png(30000, 30000))
    message = refusal(header_png(8000, 8000))
    assert "8000 x 8000 = 64,000,000 pixels" in message
    assert "40,000,000 allowed: scale it down" in message
    assert "too many pixels" in refusal(header_png(2**31 - 1, 2**31 - 1))
    assert "crop it" in refusal(header_png(1, 30_000_000))


def test_limits_are_the_configured_ones() -> None:
    data = encode(make_image())
    assert "8 x 6 = 48 pixels, more than the 47" in refusal(data, max_image_pixels=47)
    assert decode(data, max_image_pixels=48).size == (8, 6)
    noise = encode(Image.effect_noise((64, 64), 90))
    assert "bytes, more than the 100 allowed" in refusal(noise, max_image_bytes=100)


@pytest.mark.parametrize("file_format", images.FORMATS)
def test_a_truncated_file_is_refused(file_format: str) -> None:
    data = encode(Image.effect_noise((64, 64), 90).convert("RGB"), file_format)
    assert "damaged" in refusal(data[: len(data) // 2])


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "empty"),
        (b"hello", "not an image"),
        (b"%PDF-1.7", "a PDF document"),
        (b"  <svg xmlns=", "an SVG drawing"),
        (b"<!doctype html>", "an HTML page"),
        (b"<?xml version='1.0'?><svg/>", "an SVG drawing"),
        (b"\0\0\0\x20ftypheic", "an HEIC image"),
        (b"\0\0\0\x20ftypmif1", "an HEIC image"),
        (b"\0\0\0\x20ftypavif", "an AVIF image that is damaged"),
        (b"\0\0\0\x0cJXL \r\n", "a JPEG XL image"),
        (b"\0\0\0\x20ftypisom", "a video"),
        (encode(make_image(), "ICO"), "an icon (ICO)"),
        (encode(make_image(), "PPM"), "not an image"),
        (encode(make_image(), "EPS"), "not an image"),
    ],
)
def test_what_is_no_image_is_named_with_the_remedy(data: bytes, words: str) -> None:
    message = refusal(data)
    assert words in message
    assert "send" in message or "convert" in message


def test_damaged_files_give_images_or_image_errors_and_nothing_else() -> None:
    dice = random.Random(0)
    files = [
        encode(Image.effect_noise((24, 18), 60).convert("RGB"), name) for name in images.FORMATS
    ]
    num_refused = 0
    for _ in range(1500):
        data = bytearray(dice.choice(files))
        for _ in range(dice.choice((1, 3, 10))):
            data[dice.randrange(len(data))] = dice.randrange(256)
        try:
            assert decode(bytes(data), max_image_pixels=10_000).mode == "RGB"
        except ImageError:
            num_refused += 1
    assert 300 < num_refused < 1500


def test_a_part_carries_its_own_place() -> None:
    part = ImagePart(b"hello", "messages[3].content[0]")
    with pytest.raises(ImageError) as caught:
        images.decode(part, limits=LIMITS)
    assert caught.value.param == "messages[3].content[0]"
    part = ImagePart(encode(make_image()), "here")
    assert images.decode(part, limits=LIMITS).size == (8, 6)


def test_a_data_url_makes_the_way_there_and_back() -> None:
    data = encode(make_image(), "WEBP")
    url = images.to_data_url(data)
    assert url.startswith("data:image/webp;base64,")
    assert images.decode_data_url(url, limits=LIMITS, param="url") == data
    for image in (make_image(), make_image(mode="CMYK", color=(0, 0, 0, 0)), make_image(mode="P")):
        url = images.to_data_url(image)
        assert url.startswith("data:image/png;base64,")
        assert decode(images.decode_data_url(url, limits=LIMITS, param="url")).size == (8, 6)
    with pytest.raises(ImageError, match="not an image"):
        images.to_data_url(b"hello")


def test_a_telephones_jpeg_with_a_second_image_is_a_jpeg() -> None:
    data = encode(make_image(RED), "MPO", save_all=True, append_images=[make_image(BLUE)])
    assert decode(data).getpixel((3, 3))[0] > 200
    assert images.to_data_url(data).startswith("data:image/jpeg;base64,")


def test_sloppy_data_urls_are_put_right() -> None:
    data = bytes(range(256)) * 3 + b"!"
    text = base64.b64encode(data).decode()
    lines = "\n".join(text[start : start + 76] for start in range(0, len(text), 76))
    for url in (
        f"data:image/png;base64,{text}",
        f"  DATA:IMAGE/PNG;BASE64,{text}\n",
        f"data:image/png;name=a.png;base64,{text.rstrip('=')}",
        f"data:;base64,{lines}",
        f"data:image/jpg;base64,{base64.urlsafe_b64encode(data).decode()}",
        f"data:image/png;base64,{text.replace('+', '%2B').replace('/', '%2f')}",
    ):
        assert images.decode_data_url(url, limits=LIMITS, param="url") == data


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("https://example.com/cat.png", "not fetched from the web"),
        ("HTTP://127.0.0.1/", "not fetched from the web"),
        ("file:///etc/passwd", "not a URL of an image"),
        ("", "not a URL of an image"),
        ("cat.png", "not a URL of an image"),
        ("data", "not a URL of an image"),
        ("data:image/png;base64", "not base64"),
        ("data:image/png,abc", "not base64"),
        ("data:image/png;base64,", "empty"),
        ("data:image/png;base64,  ", "empty"),
        ("data:image/png;base64,====", "empty"),
        ("data:image/png;base64,abcde", "broken"),
        ("data:image/png;base64,ab!c", "broken"),
        ("data:image/png;base64,\u00e4\u00f6", "broken"),
        ("data:image/png;base64,%ff%fe", "broken"),
        ("data:image/png;base64,b'iVBORw0KGgo='", "encode the bytes of the whole file once"),
    ],
)
def test_a_bad_url_is_refused_with_the_remedy(url: str, words: str) -> None:
    with pytest.raises(ImageError, match=words) as caught:
        images.decode_data_url(url, limits=LIMITS, param="messages[0].content[0].image_url.url")
    assert caught.value.param == "messages[0].content[0].image_url.url"
    assert len(caught.value.message) < 250


def test_a_data_url_that_is_too_long_is_refused_before_it_is_decoded() -> None:
    limits = LimitsConfig(max_image_bytes=100)
    with pytest.raises(ImageError, match="more than the 100 allowed"):
        images.decode_data_url("data:;base64," + "?" * 200, limits=limits, param="url")
    assert images.decode_data_url("data:;base64," + "A" * 132, limits=limits, param="url")


def test_a_colour_profile_is_neither_applied_nor_in_the_way() -> None:
    from PIL import ImageCms

    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    for icc in (profile, b"broken", b"x" * (1 << 20)):
        for file_format in ("PNG", "WEBP", "TIFF"):
            options = {"lossless": True} if file_format == "WEBP" else {}
            data = encode(make_image(RED), file_format, icc_profile=icc, **options)
            assert decode(data).getpixel((3, 3)) == RED


@pytest.mark.parametrize("name", [b"zTXt", b"iCCP", b"iTXt"])
def test_a_chunk_that_unpacks_to_very_much_is_refused(name: bytes) -> None:
    packed = zlib.compress(bytes(20 << 20))
    head = {b"zTXt": b"a\0\0", b"iCCP": b"a\0\0", b"iTXt": b"a\0\1\0\0\0"}[name]
    body = name + head + packed
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    data = encode(make_image(RED))
    data = data[:33] + chunk + data[33:]  # after the header
    assert "too large" in refusal(data)


MEDIA_TYPES = (
    *("image/mpo", "None", "binary/octet-stream", "image/heic", "text/plain", "image", "*/*"),
    *("image/jpeg;charset=utf-8", "application/pdf", "image/svg+xml", " image/PNG "),
)


@pytest.mark.parametrize("media_type", MEDIA_TYPES)
def test_the_declared_type_is_a_hint_and_the_bytes_decide(media_type: str) -> None:
    data = encode(make_image(RED))
    url = f"data:{media_type};base64,{base64.b64encode(data).decode()}"
    assert images.decode_data_url(url, limits=LIMITS, param="url") == data


def test_an_image_that_was_encoded_twice_gets_the_sentence_of_other_slips() -> None:
    data = encode(make_image(RED))
    for twice in (base64.b64encode(data), images.to_data_url(data).encode(), str(data).encode()):
        assert refusal(twice) == (
            "the base64 of the image is broken (it was encoded twice): encode the bytes of the "
            "whole file once, with the standard alphabet"
        )


def test_a_prefix_that_stands_there_twice_is_read_once() -> None:
    data = encode(make_image(RED))
    url = images.to_data_url(data)
    for doubled in (f"data:image/jpeg;base64,{url}", f"data:;base64, data:;base64,{url}"):
        assert images.decode_data_url(doubled, limits=LIMITS, param="url") == data


@pytest.mark.parametrize(("width", "height"), [(8000, 6000), (9248, 6936), (16320, 12240)])
@pytest.mark.parametrize("file_format", ["JPEG", "MPO"])
def test_a_large_photo_of_a_phone_is_read_at_a_reduced_size(
    width: int, height: int, file_format: str
) -> None:
    options = {"save_all": True, "append_images": [make_image()]} if file_format == "MPO" else {}
    photo = encode(Image.new("L", (width, height), 77), file_format, **options)
    decoded = decode(photo)
    factor = width // decoded.width
    assert factor in (2, 4)
    assert decoded.size == (width // factor, height // factor)
    assert decoded.width * decoded.height <= LIMITS.max_image_pixels
    assert decoded.getpixel((5, 5)) == (77, 77, 77)


def test_a_reduced_photo_keeps_what_is_on_it_and_its_orientation() -> None:
    image = Image.new("RGB", (640, 480), BLUE)
    image.paste(RED, (0, 0, 640, 240))
    exif = Image.Exif()
    exif[0x0112] = 6
    decoded = decode(encode(image, "JPEG", exif=exif), max_image_pixels=80_000)
    assert decoded.size == (240, 320)
    assert decoded.getpixel((230, 10))[0] > 200
    assert decoded.getpixel((10, 10))[2] > 200


def test_a_jpeg_of_too_many_pixels_even_for_that_is_refused() -> None:
    message = refusal(encode(make_image(), "JPEG"), max_image_pixels=5)
    assert "8 x 6 = 48 pixels, more than the 5 allowed" in message


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"quality": 97, "subsampling": 0}])
def test_a_jpeg_without_its_end_mark_is_read_and_one_without_data_is_not(
    options: dict[str, object],
) -> None:
    pixels = random.Random(5).randbytes(120 * 90 * 3)
    image = Image.frombytes("RGB", (120, 90), pixels)
    data = encode(image, "JPEG", **options)
    whole = decode(data)
    assert decode(data[:-1]).tobytes() == decode(data[:-2]).tobytes() == whole.tobytes()
    # Without the last few bytes a decoder may see a whole scan.
    for num_missing in (200, 500, len(data) // 2):
        assert "damaged" in refusal(data[:-num_missing])


def test_an_animation_costs_no_more_than_its_first_image() -> None:
    frames = [make_image((number, 0, 0)) for number in range(200)]
    for file_format in ("GIF", "WEBP", "PNG"):
        data = encode(frames[0], file_format, save_all=True, append_images=frames[1:])
        decoded = decode(data, max_image_pixels=48)
        assert decoded.size == (8, 6)
        assert getattr(decoded, "n_frames", 1) == 1
