"""The header reader and Pillow agree on any bytes: what the reader accepts, Pillow opens as the same format and size.

Strategy: images of many kinds as Pillow writes them, then bytes changed, cut off, repeated or put in, with checksums of
PNG chunks made right again in half of the cases, so that the chunks after the first one are reached too. Exact.
"""

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from megatron_v2pe.core.errors import DataError
from megatron_v2pe.data.media import image as image_module
from megatron_v2pe.data.media.image import check_image
from megatron_v2pe.data.media.image_header import HEADER_BYTES, LONG_HEADER_BYTES, plain_header
from megatron_v2pe.data.media.traits import orientation_of, traits_of

LIMIT = 10**6


def noise(width, height, mode="RGB"):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def written(image, **options):
    buffer = io.BytesIO()
    image.save(buffer, **options)
    return buffer.getvalue()


def png_text(**texts):
    info = PngImagePlugin.PngInfo()
    for key, text in texts.items():
        info.add_text(key, text)
    return info


def exif():
    tags = Image.Exif()
    tags[0x0112] = 6
    return tags


ORDINARY = {
    "jpeg": written(noise(30, 20), format="JPEG"),
    "jpeg, grey": written(noise(31, 21, "L"), format="JPEG"),
    "jpeg, four layers": written(noise(32, 22, "CMYK"), format="JPEG"),
    "jpeg, progressive": written(noise(33, 23), format="JPEG", progressive=True),
    "jpeg, a comment and a resolution": written(
        noise(34, 24), format="JPEG", comment=b"\xff\xda", dpi=(72, 72)
    ),
    "jpeg, a profile": written(noise(35, 25), format="JPEG", icc_profile=b"p" * 500),
    "jpeg, restarts": written(noise(36, 26), format="JPEG", restart_marker_rows=1),
    "png": written(noise(30, 20), format="PNG"),
    "png, grey": written(noise(31, 21, "L"), format="PNG"),
    "png, two colors": written(noise(32, 22, "1"), format="PNG"),
    "png, palette": written(noise(33, 23, "P"), format="PNG"),
    "png, transparent": written(noise(34, 24, "RGBA"), format="PNG"),
    "png, 16 bits": written(Image.fromarray(np.zeros((25, 35), dtype=np.uint16)), format="PNG"),
    "png, texts and a resolution": written(
        noise(36, 26), format="PNG", pnginfo=png_text(Software="x", Title="y"), dpi=(96, 96)
    ),
}
ODD = {
    "jpeg, exif": written(noise(30, 20), format="JPEG", exif=exif()),
    "jpeg, several pictures": written(
        noise(31, 21), format="MPO", save_all=True, append_images=[noise(31, 21)]
    ),
    "jpeg, a long profile": written(noise(32, 22), format="JPEG", icc_profile=b"p" * LONG_HEADER_BYTES),
    "png, animated": written(noise(33, 23), format="PNG", save_all=True, append_images=[noise(33, 23, "L")]),
    "png, a transparent color": written(noise(34, 24, "P"), format="PNG", transparency=3),
    "png, a profile": written(noise(35, 25), format="PNG", icc_profile=b"p" * 500),
    "gif": written(noise(36, 26), format="GIF"),
    "webp": written(noise(37, 27), format="WEBP"),
    "bmp": written(noise(38, 28), format="BMP"),
    "tiff": written(noise(39, 29), format="TIFF"),
}


def by_pillow(content):
    """What Pillow says: format, size and traits, or None. The bound on pixels is ours and another question."""
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Image, "MAX_IMAGE_PIXELS", None)
            with Image.open(io.BytesIO(content)) as image:
                return image.format, image.size, traits_of(image, orientation_of(image))
    except Exception:  # whatever it raises, it does not accept the file
        return None


@pytest.mark.parametrize("name", ORDINARY)
def test_ordinary_files_need_no_pillow(name):
    content = ORDINARY[name]
    assert by_pillow(content) is not None
    assert plain_header(content[:LONG_HEADER_BYTES]) == by_pillow(content)


@pytest.mark.parametrize("name", ODD)
def test_odd_files_are_left_to_pillow(name):
    assert plain_header(ODD[name][:LONG_HEADER_BYTES]) is None
    assert by_pillow(ODD[name]) is not None


def with_right_checksums(content):
    """The same bytes, with the checksum of every PNG chunk that is still whole made right."""
    content, place = bytearray(content), 8
    while place + 12 <= len(content):
        end = place + 8 + int.from_bytes(content[place : place + 4], "big")
        if end + 4 > len(content):
            break
        content[end : end + 4] = struct.pack(">I", zlib.crc32(content[place + 4 : end]))
        place = end + 4
    return bytes(content)


@st.composite
def damaged(draw):
    content = bytearray(draw(st.sampled_from([*ORDINARY.values(), *ODD.values()])))
    head = min(len(content), 700)  # most of what is read; the rest are pixels
    for _ in range(draw(st.integers(0, 3))):
        place = draw(st.integers(0, head - 1))
        match draw(st.sampled_from(["set", "insert", "delete", "repeat", "marker"])):
            case "set":
                content[place] = draw(st.integers(0, 255))
            case "insert":
                content[place:place] = draw(st.binary(min_size=1, max_size=4))
            case "delete":
                del content[place : place + draw(st.integers(1, 8))]
            case "repeat":
                content[place:place] = content[place : place + draw(st.integers(1, 80))]
            case "marker":
                size = draw(st.integers(0, 40))
                body = draw(st.binary(max_size=40))
                content[place:place] = (
                    bytes([0xFF, draw(st.integers(0xC0, 0xFE))]) + struct.pack(">H", size) + body
                )
        head = max(1, min(len(content), 700))
    if draw(st.booleans()):
        content = content[: draw(st.integers(0, len(content)))]
    content = bytes(content)
    return with_right_checksums(content) if draw(st.booleans()) else content


def jpeg(*segments):
    """Segments (marker, content) after the start of a JPEG."""
    return b"\xff\xd8" + b"".join(
        bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body for marker, body in segments
    )


FRAME = (0xC0, b"\x08\x00\x10\x00\x20\x01\x01\x11\x00")
SCAN = (0xDA, b"\x01\x01\x00\x00\x3f\x00")


@given(content=damaged())
@settings(max_examples=1500, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@example(content=jpeg(FRAME, SCAN))
@example(content=jpeg(SCAN))
@example(content=jpeg(FRAME, FRAME, SCAN))
@example(content=jpeg((0xE0, b"JFIF\0"), FRAME, SCAN))
@example(content=jpeg((0xEE, b"Adobe"), FRAME, SCAN))
@example(content=jpeg((0xED, b"Photoshop 3.0\x008BIM\x04\x04"), FRAME, SCAN))
@example(content=jpeg((0xE2, b"ICC_PROFILE\0"), FRAME, SCAN))
@example(content=jpeg((0xE2, b"MPF\0"), FRAME, SCAN))
@example(content=jpeg((0xE1, b"Exif\0\0MM"), FRAME, SCAN))
@example(content=jpeg((0xDB, b"\x00" * 64), FRAME, SCAN))
@example(content=jpeg((0xDB, b"\x10" * 65), FRAME, SCAN))
@example(content=jpeg((0xC0, b"\x08\x00\x00\x00\x20\x01\x01\x11\x00"), SCAN))
@example(content=jpeg((0xC0, b"\x08\x00\x10\x00\x20\x01\x01\x11"), SCAN))
@example(content=jpeg((0xC3, FRAME[1]), SCAN))
@example(content=jpeg((0xC8, FRAME[1]), FRAME, SCAN))
def test_pillow_agrees_with_what_is_read(content):
    for num_bytes in (HEADER_BYTES, LONG_HEADER_BYTES):
        found = plain_header(content[:num_bytes])
        assert found is None or found == by_pillow(content)


@given(content=damaged())
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_check_gives_what_pillow_alone_gives(tmp_path, content):
    """The whole check of a file: same size, or same message, with and without the reader."""
    path = tmp_path / "a.jpg"
    path.write_bytes(content)

    def outcome():
        try:
            return check_image(str(path), max_pixels=LIMIT)
        except DataError as error:
            return str(error)

    found = outcome()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(image_module, "plain_header", lambda head: None)
        assert found == outcome()


def test_a_header_with_a_color_profile_is_read_on(tmp_path, monkeypatch):
    content = written(noise(35, 25), format="JPEG", icc_profile=b"p" * 3144)
    assert plain_header(content[:HEADER_BYTES]) is None
    (tmp_path / "a").write_bytes(content)
    monkeypatch.setattr(Image, "open", lambda *_: pytest.fail("Pillow was asked"))
    assert check_image(str(tmp_path / "a"), max_pixels=LIMIT) == (35, 25)


def test_the_bound_on_pixels_comes_first(tmp_path):
    """A plain header of an absurd size is refused like any other."""
    path = tmp_path / "a.jpg"
    path.write_bytes(jpeg((0xC0, b"\x08\xff\xff\xff\xff\x01\x01\x11\x00"), SCAN) + b"\xff\xd9")
    with pytest.raises(
        DataError, match=r"65535 x 65535 = 4294836225 pixels exceed data\.max_image_pixels = 1000000"
    ):
        check_image(str(path), max_pixels=LIMIT)


@pytest.mark.parametrize("name", ["jpeg", "png"])
def test_pillow_is_not_asked_about_a_plain_file(tmp_path, monkeypatch, name):
    (tmp_path / "a").write_bytes(ORDINARY[name])
    monkeypatch.setattr(Image, "open", lambda *_: pytest.fail("Pillow was asked"))
    assert check_image(str(tmp_path / "a"), max_pixels=LIMIT) == (30, 20)
