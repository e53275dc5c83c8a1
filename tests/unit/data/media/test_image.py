"""Image files: what is refused and how, and that any share of the tiles equals the cut of all of them."""

import io

import numpy as np
import pytest
from PIL import Image

from megatron_v2pe.core.errors import DataError
from megatron_v2pe.data.media.cut import ImageTiles
from megatron_v2pe.data.media.image import ImageFile, check_image, open_image
from megatron_v2pe.data.media.medium import MediaRules, MediumTiles, load_tile_range
from megatron_v2pe.data.media.normalization import mean_color
from megatron_v2pe.data.media.tiling import TileGrid
from megatron_v2pe.data.sources.storage import resolve_path
from tests.support.mixture import write_image

LIMIT = 10**6
GRID = TileGrid(columns=2, rows=1, has_thumbnail=True)


def picture(path, size, **changes):
    image = ImageTiles(**{"size": size, "grid": GRID, **changes})
    return MediumTiles(medium=ImageFile(path=str(path)), images=(image,), rules=MediaRules(max_pixels=LIMIT))


def load_tiles(medium, *, first=0, last=None):
    last = medium.num_tiles if last is None else last
    return load_tile_range([medium], image_size=16, tile_range=(first, last))


def header_size(path, *, max_pixels):
    with open_image(str(path), max_pixels=max_pixels, header_only=True) as image:
        return image.size


def test_header_gives_the_size(tmp_path):
    write_image(tmp_path / "a.png", 30, 20)
    assert header_size(tmp_path / "a.png", max_pixels=LIMIT) == (30, 20)


@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "bmp", "webp"])
def test_truncated_files_are_found_by_the_check(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    write_image(path, 64, 64)
    assert check_image(str(path), max_pixels=LIMIT) == (64, 64)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 2 // 3])
    with pytest.raises(DataError, match=rf"a\.{suffix}: cannot be read as an image"):
        check_image(str(path), max_pixels=LIMIT)


def test_a_jpeg_with_bytes_after_its_end_is_fine(tmp_path):
    path = tmp_path / "a.jpg"
    write_image(path, 64, 64)
    path.write_bytes(path.read_bytes() + b"trailer of a camera")
    assert check_image(str(path), max_pixels=LIMIT) == (64, 64)


@pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0"])
def test_files_that_are_no_images(tmp_path, content):
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.png: cannot be read as an image"):
        check_image(str(tmp_path / "a.png"), max_pixels=LIMIT)


def test_missing_file_names_the_way_out(tmp_path):
    with pytest.raises(DataError, match=r"gone\.png: no such image; check the data set's root"):
        header_size(tmp_path / "gone.png", max_pixels=LIMIT)


def test_absurd_size_is_refused_from_the_header(tmp_path):
    """A header of 60000 x 60000 with no data after it: refused before anything is decoded."""
    buffer = io.BytesIO()
    Image.new("L", (1, 1)).save(buffer, "BMP")
    header = bytearray(buffer.getvalue())
    header[18:26] = (60000).to_bytes(4, "little") * 2
    (tmp_path / "huge.bmp").write_bytes(bytes(header))
    with pytest.raises(DataError, match=r"3600000000 pixels exceed data\.max_image_pixels = 178956970"):
        header_size(tmp_path / "huge.bmp", max_pixels=178_956_970)


def test_our_limit_replaces_pillows(tmp_path, monkeypatch):
    write_image(tmp_path / "a.png", 40, 40)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert header_size(tmp_path / "a.png", max_pixels=1600) == (40, 40)
    assert Image.MAX_IMAGE_PIXELS == 100


@pytest.mark.parametrize("name", ["../a.png", "/etc/passwd", "x/../../a.png", "s3://bucket/a.png"])
def test_paths_stay_inside_the_root(name):
    with pytest.raises(DataError, match=r"^here:3: "):
        resolve_path("/data/images", name, where="here:3")


def test_paths_inside_the_root_and_without_a_root():
    assert resolve_path("/data", "x/../a.png", where="") == "/data/a.png"
    assert resolve_path("", "/elsewhere/a.png", where="") == "/elsewhere/a.png"


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "CMYK", "1"])
def test_every_mode_becomes_three_channels(tmp_path, mode):
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    write_image(path, 50, 30, mode=mode)
    tiles = load_tiles(picture(path, (50, 30)))
    assert (tiles.shape, tiles.dtype) == ((3, 3, 16, 16), np.uint8)


ODD_MODES = [
    "LA",
    "PA",
    "RGBA",
    "I;16",
    "I",
    "F",
    "YCbCr",
    "LAB",
    "HSV",
    "CMYK",
    "P with a transparent color",
    "1",
]


def odd_image(name):
    """A 50 x 30 image of a mode that RGB has to be made of."""
    generator = np.random.default_rng(1)
    colors = Image.fromarray(generator.integers(0, 256, (30, 50, 3), dtype=np.uint8))
    if name in ("I;16", "I", "F"):
        depth = generator.integers(0, 65536, (30, 50))
        return Image.fromarray(depth.astype({"I;16": np.uint16, "I": np.int32, "F": np.float32}[name]))
    if name == "LA":
        return Image.merge("LA", [colors.getchannel("R"), colors.getchannel("G")])
    if name.startswith("P"):
        image = colors.convert("P", palette=Image.Palette.ADAPTIVE)
        image.info["transparency"] = bytes(range(256)) if name == "PA" else 3
        return image
    if name == "RGBA":
        return Image.merge("RGBA", [*colors.split(), colors.getchannel("R")])
    return colors.convert(name)


@pytest.mark.parametrize("name", ODD_MODES)
def test_odd_modes_are_converted_as_the_release_does(tmp_path, name):
    """`convert("RGB")` and nothing else: transparency is dropped, 16 bits are clipped."""
    path = tmp_path / ("a.tif" if name in ("F", "YCbCr", "LAB", "CMYK") else "a.png")
    image = odd_image(name)
    try:
        image.save(path)
    except OSError:  # Pillow has no format for it
        image.convert("RGB").save(path)
    wanted = np.asarray(Image.open(path).convert("RGB").resize((32, 16), Image.Resampling.BICUBIC))
    tiles = load_tiles(picture(path, check_image(str(path), max_pixels=LIMIT)))
    assert np.array_equal(np.concatenate([tiles[0], tiles[1]], axis=2), wanted.transpose(2, 0, 1))


def test_a_rotation_in_the_metadata_is_not_applied(tmp_path):
    """As in the release: width and height are those of the stored pixels."""
    exif = Image.Exif()
    exif[0x0112] = 6
    write_image(tmp_path / "a.png", 50, 30)
    Image.open(tmp_path / "a.png").save(tmp_path / "a.jpg", exif=exif, quality=95)
    assert check_image(str(tmp_path / "a.jpg"), max_pixels=LIMIT) == (50, 30)
    tiles = load_tiles(picture(tmp_path / "a.jpg", (50, 30)))
    wanted = Image.open(tmp_path / "a.jpg").convert("RGB").resize((32, 16), Image.Resampling.BICUBIC)
    assert np.array_equal(tiles[0], np.asarray(wanted)[:, :16].transpose(2, 0, 1))


@pytest.mark.parametrize("suffix", ["gif", "png", "webp", "tif"])
def test_of_an_animated_file_the_first_frame_is_taken(tmp_path, suffix):
    frames = [Image.new("RGB", (50, 30), (40 * number, 90, 10)) for number in range(3)]
    path = tmp_path / f"a.{suffix}"
    options = {"lossless": True} if suffix == "webp" else {}
    frames[0].save(path, save_all=True, append_images=frames[1:], **options)
    assert check_image(str(path), max_pixels=LIMIT) == (50, 30)
    tiles = load_tiles(picture(path, (50, 30)))
    assert abs(int(tiles[0, 0].mean()) - 0) <= 2
    assert abs(int(tiles[0, 1].mean()) - 90) <= 2


@pytest.mark.parametrize("jpeg_qualities", [(), (80, 90, 75)])
def test_any_share_equals_the_cut_of_all_tiles(tmp_path, jpeg_qualities):
    write_image(tmp_path / "a.png", 50, 30)
    image = picture(tmp_path / "a.png", (50, 30), jpeg_qualities=jpeg_qualities)
    whole = load_tiles(image)
    for first in range(3):
        for last in range(first + 1, 4):
            part = load_tiles(image, first=first, last=last)
            assert np.array_equal(part, whole[first:last])


def test_tiles_are_the_crops_of_the_resized_image(tmp_path):
    write_image(tmp_path / "a.png", 50, 30)
    tiles = load_tiles(picture(tmp_path / "a.png", (50, 30)))
    resized = np.asarray(Image.open(tmp_path / "a.png").resize((32, 16), Image.Resampling.BICUBIC))
    assert np.array_equal(tiles[1], resized[:, 16:].transpose(2, 0, 1))


def test_jpeg_augmentation_changes_pixels(tmp_path):
    write_image(tmp_path / "a.png", 50, 30)
    plain = load_tiles(picture(tmp_path / "a.png", (50, 30)))
    augmented = load_tiles(picture(tmp_path / "a.png", (50, 30), jpeg_qualities=(75, 75, 75)))
    assert not np.array_equal(plain, augmented)


def test_padding_to_a_square_uses_the_mean_color(tmp_path):
    write_image(tmp_path / "a.png", 16, 8)
    single = TileGrid(columns=1, rows=1, has_thumbnail=False)
    color = mean_color("imagenet")
    tiles = load_tiles(picture(tmp_path / "a.png", (16, 8), grid=single, pad_color=color))
    assert tuple(tiles[0, :, 0, 0]) == color == (123, 116, 103)
    assert np.array_equal(tiles[0, :, 4:12], np.asarray(Image.open(tmp_path / "a.png")).transpose(2, 0, 1))


def test_a_file_that_changed_since_it_was_measured(tmp_path):
    write_image(tmp_path / "a.png", 50, 30)
    with pytest.raises(DataError, match="is 50 x 30, but was 30 x 50 when lengths were measured"):
        load_tiles(picture(tmp_path / "a.png", (30, 50)))


def test_only_images_of_the_range_are_opened(tmp_path):
    write_image(tmp_path / "b.png", 50, 30)
    media = [picture(tmp_path / "missing.png", (50, 30)), picture(tmp_path / "b.png", (50, 30))]
    whole = load_tiles(media[1])
    assert np.array_equal(load_tile_range(media, image_size=16, tile_range=(4, 6)), whole[1:])
    assert load_tile_range(media, image_size=16, tile_range=(3, 3)).shape == (0, 3, 16, 16)
    with pytest.raises(DataError, match=r"missing\.png: no such image"):
        load_tile_range(media, image_size=16, tile_range=(2, 4))


def test_webp_has_a_lower_limit_of_pixels(tmp_path):
    """Its decoder holds 16 bytes for each pixel, so that an image at its limit stays as small as others at theirs."""
    for suffix in ("webp", "png"):
        Image.new("RGB", (100, 80)).save(tmp_path / f"a.{suffix}")
    assert check_image(str(tmp_path / "a.png"), 8000) == (100, 80)
    assert check_image(str(tmp_path / "a.webp"), 10_667) == (100, 80)
    with pytest.raises(DataError, match=r"limit is 75% of data\.max_image_pixels = 8000"):
        check_image(str(tmp_path / "a.webp"), 8000)
    with pytest.raises(DataError, match=r"exceed data\.max_image_pixels = 7000"):
        check_image(str(tmp_path / "a.webp"), 7000)
