"""Videos: the frames that are asked for, exactly, from every container; limits; damage."""

import random
import shutil
import sys
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
from PIL import Image

from megatron_v2pe.core.errors import ConfigError, DataError
from megatron_v2pe.data.media import video as video_module
from megatron_v2pe.data.media import video_stream
from megatron_v2pe.data.media.cut import ImageTiles
from megatron_v2pe.data.media.frames import VideoRule, draw_places, frame_index, wanted_frames
from megatron_v2pe.data.media.image import read_header
from megatron_v2pe.data.media.medium import DrawSeed, MediaRules, MediumTiles, load_tile_range
from megatron_v2pe.data.media.tiling import TileGrid
from megatron_v2pe.data.media.video import VideoFile
from tests.support.videos import frame_number, write_frames, write_video

pytest.importorskip("av")
ALL = VideoRule(min_frames=40, max_frames=40, sampling="rand", max_seconds=100)
ONE_TILE = TileGrid(columns=1, rows=1, has_thumbnail=False)
LIMIT = 10**6


def measure(path, *, rule=ALL, limit=LIMIT, **source):
    rules = MediaRules(max_pixels=limit, video=rule)
    headers = VideoFile(path=str(path), **source).probe(rules, sample_id="a:1", header_of=read_header)
    return tuple(header.size for header in headers)


def load(path, places, *, tile_range=None, size=(64, 48), max_seconds=100.0, **source):
    """Tiles of frames at given places of their intervals."""
    count = len(places)
    video = MediumTiles(
        medium=VideoFile(path=str(path), **source),
        images=(ImageTiles(size=size, grid=ONE_TILE),) * count,
        rules=MediaRules(max_pixels=LIMIT, video=replace(ALL, max_seconds=max_seconds)),
    )
    with mock.patch.object(video_module, "draw_places", return_value=tuple(places)):
        return load_tile_range([video], image_size=16, tile_range=tile_range or (0, count))


def shown(tiles):
    return [frame_number(tile) for tile in tiles]


def test_indices_of_intervals():
    """The whole interval can be drawn, the last frame too; the release never drew that one."""
    assert [frame_index(i, -1.0, count=4, available=10) for i in range(4)] == [0, 3, 5, 8]
    assert [frame_index(i, 0.999, count=4, available=10) for i in range(4)] == [1, 4, 6, 9]
    assert [frame_index(i, 0.5, count=5, available=5) for i in range(5)] == [0, 1, 2, 3, 4]
    generator = random.Random(1)
    for _ in range(200):
        available = generator.randint(1, 60)
        count = generator.randint(1, available)
        drawn = [frame_index(i, generator.random(), count=count, available=available) for i in range(count)]
        assert drawn == sorted(set(drawn))
        assert 0 <= drawn[0] <= drawn[-1] < available


def test_counts_and_places_are_functions_of_the_identity():
    rule = VideoRule(min_frames=2, max_frames=5, sampling="rand", max_seconds=9)
    counts = [wanted_frames(f"a:{line}", rule) for line in range(200)]
    assert set(counts) == {2, 3, 4, 5}
    assert counts == [wanted_frames(f"a:{line}", rule) for line in range(200)]

    def places(epoch, identity):
        seed = DrawSeed(seed=1, epoch=epoch, identity=identity)
        return draw_places(rule, 5, seed.generator("frames"))

    assert places(0, "a:1") == places(0, "a:1")
    assert places(0, "a:1") != places(1, "a:1")
    assert places(0, "a:1") != places(0, "a:2")


CONTAINERS = {
    "a.mp4": {},
    "a.mkv": {},
    "a.avi": {},
    "a.gif": {"codec": "gif", "gop": 0},
    "a.webm": {"codec": "libvpx", "gop": 8},
    "intra.mp4": {"gop": 1},
    "one_key.mp4": {"gop": 1000},
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_the_frames_that_were_asked_for(tmp_path, name):
    write_video(tmp_path / name, 36, **CONTAINERS[name])
    assert measure(tmp_path / name) == ((64, 48),) * 36
    assert shown(load(tmp_path / name, [0.0] * 36)) == list(range(36))
    places = [0.0, 0.99, 0.5, -1.0, 0.99]
    wanted = [frame_index(i, place, count=5, available=36) for i, place in enumerate(places)]
    assert shown(load(tmp_path / name, places)) == wanted
    assert shown(load(tmp_path / name, places, tile_range=(2, 4))) == wanted[2:4]


def test_times_of_a_varying_frame_rate(tmp_path):
    """Ten frames in the first second, then one each second: a clip is cut by time, not by mean rate."""
    write_video(tmp_path / "a.mp4", 15, durations=[1] * 10 + [10] * 5)
    assert len(measure(tmp_path / "a.mp4", clip=(0.0, 1.0))) == 10
    clip = (0.95, 4.0)
    assert len(measure(tmp_path / "a.mp4", clip=clip)) == 3
    assert shown(load(tmp_path / "a.mp4", [0.5] * 3, clip=clip)) == [10, 11, 12]
    assert shown(load(tmp_path / "a.mp4", [0.5], clip=(2.0, 2.5))) == [11]


@pytest.mark.parametrize("name", ["a.mp4", "a.avi"])
def test_clips(tmp_path, name):
    write_video(tmp_path / name, 30)
    assert shown(load(tmp_path / name, [0.0] * 10, clip=(1.0, 2.0))) == list(range(10, 20))
    with pytest.raises(DataError, match=r"no frame in the clip \[50\.0, 60\.0\]"):
        measure(tmp_path / name, clip=(50.0, 60.0))


def test_few_frames_are_not_repeated(tmp_path):
    write_video(tmp_path / "a.mp4", 3)
    assert len(measure(tmp_path / "a.mp4")) == 3


def test_folders_of_frames_in_natural_order(tmp_path):
    write_frames(tmp_path / "v", 12)
    assert measure(f"{tmp_path}/v/") == measure(f"{tmp_path}/v") == ((64, 48),) * 12
    assert shown(load(f"{tmp_path}/v/", [0.0] * 12)) == list(range(12))
    assert shown(load(f"{tmp_path}/v/", [0.0] * 4, clip=(1.0, 3.0), fps=2)) == [2, 3, 4, 5]
    with pytest.raises(DataError, match="needs its frames per second; set video_fps"):
        measure(f"{tmp_path}/v/", clip=(1.0, 3.0))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no frame"):
        measure(f"{tmp_path}/empty/")
    with pytest.raises(DataError, match="gone: cannot be listed"):
        measure(f"{tmp_path}/gone/")


def test_limits(tmp_path):
    write_video(tmp_path / "a.mp4", 30)
    short = VideoRule(min_frames=4, max_frames=4, sampling="rand", max_seconds=2)
    with pytest.raises(DataError, match=r"3 seconds exceed data\.max_video_seconds = 2"):
        measure(tmp_path / "a.mp4", rule=short)
    assert len(measure(tmp_path / "a.mp4", rule=short, clip=(0.0, 1.5))) == 4
    with pytest.raises(DataError, match=r"3 seconds exceed|2 seconds exceed"):
        load(tmp_path / "a.mp4", [0.5], max_seconds=1.0)
    with pytest.raises(DataError, match=r"64 x 48 = 3072 pixels exceed data\.max_image_pixels = 3000"):
        measure(tmp_path / "a.mp4", limit=3000)


@pytest.mark.parametrize("content", [b"", b"not a video", b"\0\0\0\x18ftypmp42"])
def test_files_that_are_no_videos(tmp_path, content):
    (tmp_path / "a.mp4").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.mp4: cannot be read as a video"):
        measure(tmp_path / "a.mp4")
    with pytest.raises(DataError, match=r"gone\.mp4: no such video"):
        measure(tmp_path / "gone.mp4")


def test_a_file_that_changed_since_it_was_measured(tmp_path):
    write_video(tmp_path / "a.mp4", 5)
    with pytest.raises(DataError, match="has 5 frames of 64 x 48, but had at least 6"):
        load(tmp_path / "a.mp4", [0.5] * 6)
    with pytest.raises(DataError, match=r"of 64 x 48, but had at least 2 of 32 x 48"):
        load(tmp_path / "a.mp4", [0.5] * 2, size=(32, 48))


def test_a_playlist_cannot_open_other_files(tmp_path):
    """FFmpeg would read what a playlist names; here it gets one open file and nothing else."""
    write_video(tmp_path / "secret.ts", 5, container="mpegts", codec="mpeg2video")
    playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile://{tmp_path}/secret.ts\n#EXT-X-ENDLIST\n"
    for name, text in {
        "a.m3u8": playlist,
        "a.ffconcat": f"ffconcat version 1.0\nfile {tmp_path}/secret.ts\n",
    }.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(DataError, match=r"cannot be read as a video|holds no video stream"):
            measure(tmp_path / name)


def test_damage_is_a_dataerror(tmp_path):
    write_video(tmp_path / "a.mp4", 30)
    content = (tmp_path / "a.mp4").read_bytes()
    generator = np.random.default_rng(0)
    outcomes = set()
    for _ in range(60):
        damaged = bytearray(content)
        for place in generator.integers(0, len(content), 20):
            damaged[place] = int(generator.integers(0, 256))
        (tmp_path / "b.mp4").write_bytes(bytes(damaged[: generator.integers(1, len(content) + 1)]))
        try:
            sizes = measure(tmp_path / "b.mp4")
            load(tmp_path / "b.mp4", [0.5] * len(sizes), size=sizes[0])
            outcomes.add("read")
        except DataError as error:
            outcomes.add(str(error).partition("b.mp4: ")[1])
    assert outcomes - {"read"} == {"b.mp4: "}


def test_without_pyav(tmp_path, monkeypatch):
    write_video(tmp_path / "a.mp4", 2)
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ConfigError, match=r"need the package av .* pip install 'megatron_v2pe\[video\]'"):
        measure(tmp_path / "a.mp4")


def test_videos_and_folders_behind_an_address(tmp_path):
    write_video(tmp_path / "a.mp4", 12)
    write_frames(tmp_path / "v", 3)
    assert shown(load(f"file://{tmp_path}/a.mp4", [0.0] * 12)) == list(range(12))
    assert shown(load(f"file://{tmp_path}/v/", [0.0] * 3)) == [0, 1, 2]
    shutil.rmtree(tmp_path / "v")
    with pytest.raises(DataError, match="v: cannot be listed"):
        measure(f"file://{tmp_path}/v/")


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("decoder"), IndexError("x"), NotImplementedError()]
)
def test_whatever_a_decoder_raises_names_the_file(tmp_path, monkeypatch, error):
    write_video(tmp_path / "a.mp4", 4)

    def fail(*args):
        raise error

    monkeypatch.setattr(video_stream, "_bound", fail)
    with pytest.raises(DataError, match=r"a\.mp4: (not enough memory|cannot be read as a video)"):
        measure(tmp_path / "a.mp4")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid", "a Git LFS pointer"),
        (b"<!DOCTYPE html><html>", "an HTML page"),
        (b"", "an empty file"),
        (b"hello, this is text\n" * 20, "cannot be read as a video"),
        (b"\0\0\0\x18ftypisom" + b"x" * 200, "cannot be read as a video"),
    ],
)
def test_what_a_file_is_that_is_no_video(tmp_path, content, said):
    (tmp_path / "a.mp4").write_bytes(content)
    with pytest.raises(DataError, match=said):
        measure(tmp_path / "a.mp4")


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_a_single_picture_is_no_video(tmp_path, suffix):
    """FFmpeg reads one as a video of one frame; the record has it under the wrong key."""
    Image.new("RGB", (32, 24), "red").save(tmp_path / f"a.{suffix}")
    with pytest.raises(
        DataError, match=r"is a single picture, not a video; name it as 'image'|it is a .* image"
    ):
        measure(tmp_path / f"a.{suffix}")


def test_sound_alone_and_a_cut_file(tmp_path):
    av = pytest.importorskip("av")
    with av.open(str(tmp_path / "sound.mp4"), "w") as file:
        stream = file.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(
            np.zeros((1, 1024), dtype=np.float32), format="fltp", layout="mono"
        )
        frame.rate = 8000
        for packet in [*stream.encode(frame), *stream.encode()]:
            file.mux(packet)
    with pytest.raises(DataError, match=r"sound\.mp4: holds no video stream"):
        measure(tmp_path / "sound.mp4")
    write_video(tmp_path / "whole.mkv", 20)
    content = (tmp_path / "whole.mkv").read_bytes()
    (tmp_path / "cut.mkv").write_bytes(content[:300])
    with pytest.raises(DataError, match=r"cut\.mkv: "):
        measure(tmp_path / "cut.mkv")
