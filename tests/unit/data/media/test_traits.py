"""Pictures that lose something: counted from the header, changed by policy; attacks are refused in no time."""

import io
import json
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from megatron_v2pe.config.schema import DataConfig
from megatron_v2pe.core.errors import DataError
from megatron_v2pe.data.index.annotation_index import index_dataset
from megatron_v2pe.data.media.cut import CutRule, plan_tiles
from megatron_v2pe.data.media.image import ImageFile, read_header, read_rgb
from megatron_v2pe.data.media.medium import MediaRules
from megatron_v2pe.data.media.tiling import TilingRule
from megatron_v2pe.data.samples.notes import notice_text
from tests.support.mixture import entry, record

RULES = MediaRules(max_pixels=10**6)
EXIF_6 = Image.Exif()
EXIF_6[0x0112] = 6


def saved(path, image, **options):
    image.save(path, **options)
    return str(path)


def grey16():
    return Image.fromarray(np.arange(600, dtype=np.uint16).reshape(20, 30) * 100)


def half_transparent():
    pixels = np.zeros((20, 30, 4), dtype=np.uint8)
    pixels[:, :15] = (10, 20, 30, 255)
    return Image.fromarray(pixels, "RGBA")


KINDS = {
    "deep.png": (lambda path: saved(path, grey16()), ("deep",)),
    "deep.tif": (lambda path: saved(path, Image.fromarray(np.ones((20, 30), dtype=np.float32))), ("deep",)),
    "alpha.png": (lambda path: saved(path, half_transparent()), ("alpha",)),
    "alpha.webp": (lambda path: saved(path, half_transparent(), lossless=True), ("alpha",)),
    "key.png": (lambda path: saved(path, Image.new("RGB", (30, 20)), transparency=(0, 0, 0)), ("alpha",)),
    "exif.jpg": (lambda path: saved(path, Image.new("RGB", (30, 20)), exif=EXIF_6), ("exif",)),
    "exif.png": (lambda path: saved(path, Image.new("RGB", (30, 20)), exif=EXIF_6), ("exif",)),
    "cmyk.jpg": (lambda path: saved(path, Image.new("CMYK", (30, 20))), ("cmyk",)),
    "moving.gif": (
        lambda path: saved(
            path, Image.new("L", (30, 20)), save_all=True, append_images=[Image.new("L", (30, 20), 255)]
        ),
        ("animated",),
    ),
    "plain.png": (lambda path: saved(path, Image.new("RGB", (30, 20))), ()),
    "plain.jpg": (lambda path: saved(path, Image.new("RGB", (30, 20))), ()),
}


@pytest.mark.parametrize("name", KINDS)
def test_traits(tmp_path, name):
    make, traits = KINDS[name]
    header = read_header(make(tmp_path / name), RULES)
    assert (header.size, header.traits) == ((30, 20), traits)


def test_an_index_counts_them(mixture):
    for name, (make, _) in KINDS.items():
        make(mixture.folder / "images" / name)
    images = list(KINDS)
    mixture.write([record("<image>" * len(images), "x", images), record("<image>", "x", "alpha.png")])
    config = mixture.config()
    (dataset,) = [entry(annotation=str(mixture.folder / "a.jsonl"), root=str(mixture.folder / "images"))]
    index = index_dataset(dataset, settings=mixture.settings(), cache_dir=config.data.cache_dir)
    assert {notice.note: notice.count for notice in index.notices} == {
        "image:deep": 2, "image:alpha": 4, "image:exif": 2, "image:cmyk": 1, "image:animated": 1,
    }  # fmt: skip
    texts = [notice_text(each, annotation="a.jsonl", exif="ignore", alpha="white") for each in index.notices]
    assert "4 images with transparency (laid on white), first a.jsonl:1" in texts
    again = index_dataset(dataset, settings=mixture.settings(), cache_dir=config.data.cache_dir)
    assert again.notices == index.notices


def test_notices_of_a_file_that_grows_are_exact(mixture):
    dataset = entry(annotation=str(mixture.folder / "a.jsonl"))
    cache = mixture.config().data.cache_dir
    odd = {**record("a", "b"), "uid": 1}
    mixture.write([odd, record("a", "b"), odd])
    before = index_dataset(dataset, settings=mixture.settings(), cache_dir=cache).notices
    assert [(each.note, each.count, each.line_number) for each in before] == [("unread:uid", 2, 1)]
    with open(mixture.folder / "a.jsonl", "a") as file:
        file.write(json.dumps({**odd, "source2": "x"}) + "\n")
    after = index_dataset(dataset, settings=mixture.settings(), cache_dir=cache).notices
    found = [(each.note, each.count, each.line_number) for each in after]
    assert found == [("unread:source2", 1, 4), ("unread:uid", 3, 1)]


def test_exif_is_applied_by_policy(tmp_path):
    pixels = np.zeros((20, 30, 3), dtype=np.uint8)
    pixels[:, :15] = 255
    path = saved(tmp_path / "a.png", Image.fromarray(pixels), exif=EXIF_6)
    turned = MediaRules(max_pixels=10**6, exif="apply")
    assert read_header(path, turned).size == (20, 30)
    upright = np.asarray(read_rgb(path, turned, size=(20, 30)))
    assert upright.shape == (30, 20, 3)
    assert upright[:15].min() == 255
    assert upright[15:].max() == 0
    assert np.array_equal(np.asarray(read_rgb(path, RULES, size=(30, 20))), pixels)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB"])
def test_white_is_the_same_in_strips_as_at_once(tmp_path, mode):
    pixels = np.random.default_rng(0).integers(0, 256, (600, 7, 4), dtype=np.uint8)
    whole = Image.fromarray(pixels, "RGBA").convert("RGB" if mode == "P" else "RGBA").convert(mode)
    options = {"P": {"transparency": 3}, "RGB": {"transparency": tuple(pixels[0, 0, :3].tolist())}}
    whole.save(tmp_path / "a.png", **options.get(mode, {}))
    whole = Image.open(tmp_path / "a.png").convert("RGBA")
    wanted = Image.alpha_composite(Image.new("RGBA", whole.size, "white"), whole).convert("RGB")
    found = read_rgb(str(tmp_path / "a.png"), MediaRules(max_pixels=10**6, alpha="white"))
    assert np.array_equal(np.asarray(found), np.asarray(wanted))


def test_transparency_is_laid_on_white_by_policy(tmp_path):
    path = saved(tmp_path / "a.png", half_transparent())
    assert np.asarray(read_rgb(path, RULES))[0, 29].tolist() == [0, 0, 0]
    white = np.asarray(read_rgb(path, MediaRules(max_pixels=10**6, alpha="white")))
    assert white[0, 29].tolist() == [255, 255, 255]
    assert white[0, 0].tolist() == [10, 20, 30]


@pytest.mark.parametrize(("image_format", "share"), [("WEBP", "75%"), ("JPEG2000", "40%")])
def test_formats_that_need_more_memory_have_less_of_the_limit(tmp_path, image_format, share):
    path = str(tmp_path / "a")
    Image.new("RGB", (100, 100)).save(path, image_format)
    with pytest.raises(DataError, match=f"its limit is {share} of data.max_image_pixels = 10000"):
        read_header(path, MediaRules(max_pixels=10_000))
    assert read_header(path, MediaRules(max_pixels=25_000)).size == (100, 100)


def test_large_metadata_are_no_reason_to_refuse(tmp_path):
    texts = PngImagePlugin.PngInfo()
    texts.add_text("prompt", "x" * 3_000_000, zip=True)
    path = saved(tmp_path / "a.png", Image.new("RGB", (30, 20)), pnginfo=texts)
    assert read_header(path, RULES).size == (30, 20)
    assert read_rgb(path, RULES).size == (30, 20)


def png(width, height):
    """A valid PNG of one color, a few KB however large; rows are packed once."""

    def part(kind, content):
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    rows = zlib.compress(b"\0" * ((width + 7) // 8 + 1) * min(height, 4))
    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + part(b"IHDR", head) + part(b"IDAT", rows) + part(b"IEND", b"")


ATTACKS = {
    "thin.png": (png(89_478_485, 1), "no side may exceed 65535"),
    "large.png": (png(20_000, 20_000), "400000000 pixels exceed data.max_image_pixels"),
    "bomb.ico": (
        struct.pack("<HHHBBBBHHII", 0, 1, 1, 0, 0, 0, 0, 1, 32, len(png(20_000, 20_000)), 22) + png(20_000, 20_000),
        "it is an ICO file",
    ),
    "bomb.icns": (
        b"icns" + struct.pack(">I", 16 + 99) + b"ic10" + struct.pack(">I", 99) + b"\0" * 91, "it is an ICNS file",
    ),
    "eps.jpg": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n", "it is a PostScript file"),
    "page.jpg": (b"<!DOCTYPE html><html>404</html>", "it is an HTML page"),
    "lfs.png": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "it is a Git LFS pointer"),
    "phone.jpg": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "it is a HEIC image"),
    "text.png": (b"iVBORw0KGgo" * 100, "it is base64 text"),
    "dds.png": (b"DDS " + b"\x7c\0\0\0" + b"\0" * 120, "it is a DDS texture"),
}  # fmt: skip


@pytest.mark.parametrize("name", ATTACKS)
def test_attacks_are_refused_from_the_header(tmp_path, name):
    content, message = ATTACKS[name]
    (tmp_path / name).write_bytes(content)
    for read in (read_header, read_rgb):
        with pytest.raises(DataError, match=message) as caught:
            read(str(tmp_path / name), MediaRules())
        assert len(str(caught.value)) < 500


def test_a_pipe_is_no_image(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(DataError, match="a pipe, socket or device"):
        read_header(str(tmp_path / "a.png"), RULES)


@pytest.mark.parametrize(
    "error", [RuntimeError, NotImplementedError, AttributeError, MemoryError, KeyError, AssertionError]
)
def test_whatever_a_decoder_raises_is_a_data_error(tmp_path, monkeypatch, error):
    path = saved(tmp_path / "a.webp", Image.new("RGB", (30, 20)))

    def load(self):
        raise error("of a decoder")

    monkeypatch.setattr("PIL.WebPImagePlugin.WebPImageFile.load", load)
    with pytest.raises(DataError, match=r"a\.webp: "):
        read_header(path, RULES)


def test_the_canvas_of_a_padded_image_is_bounded():
    rule = CutRule(tiling=TilingRule(image_size=16, dynamic=False), pad_color=(0, 0, 0), max_pixels=10**6)
    assert plan_tiles([(1000, 10)], rule)
    with pytest.raises(DataError, match=r"a\.png: padded to a square .* 1001 x 1001 pixels"):
        ImageFile(path="a.png").tiles([(1001, 10)], rule)


def test_pillows_limits_are_as_before(tmp_path):
    before = (Image.MAX_IMAGE_PIXELS, PngImagePlugin.MAX_TEXT_CHUNK)
    read_header(saved(tmp_path / "a.webp", Image.new("RGB", (3, 2))), RULES)
    with pytest.raises(DataError):
        read_rgb(str(tmp_path / "none.webp"), RULES)
    assert before == (Image.MAX_IMAGE_PIXELS, PngImagePlugin.MAX_TEXT_CHUNK)


def test_the_default_is_the_releases():
    assert (DataConfig().exif, DataConfig().alpha) == ("ignore", "black")
    buffer = io.BytesIO()
    half_transparent().save(buffer, "PNG")
    buffer.seek(0)
    assert np.asarray(Image.open(buffer).convert("RGB"))[0, 29].tolist() == [0, 0, 0]
