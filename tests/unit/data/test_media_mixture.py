"""Mixtures with videos and mixtures at remote addresses, from annotation to packs."""

import json

import fsspec
import numpy as np
import pytest

from megatron_v2pe.config.schema import PositionConfig
from megatron_v2pe.core.errors import DataError
from megatron_v2pe.data.samples.draw import Draw, read_sample
from megatron_v2pe.data.sources.meta import read_meta
from tests.support.mixture import measure, record, write_image
from tests.support.videos import frame_number, write_frames, write_video

pytest.importorskip("av")
LIMITS = {"min_num_frame": 3, "max_num_frame": 5}


def video_record(name, question="what happens?", **keys):
    return {**record(question, "it gets brighter"), "video": name, **keys}


@pytest.fixture
def films(mixture):
    """Three videos, a folder of frames, and samples with images and text between them."""
    for number in range(3):
        write_video(mixture.folder / "images" / f"{number}.mp4", 20 + number)
    write_frames(mixture.folder / "images" / "frames", 9)
    write_image(mixture.folder / "images" / "a.png", 60, 60)
    mixture.write(
        [
            video_record("0.mp4"),
            video_record("1.mp4", "<video>\nwhat happens?", clip=[0.5, 1.5]),
            video_record("2.mp4", "look: <video> what happens?"),
            video_record("frames/"),
            record("<image> what is it?", "noise", "a.png"),
            record("hello", "hi"),
        ]
    )
    return mixture


def brightness(batch):
    """For each document the numbers of its frames."""
    tiles = iter(batch.tiles)
    return {
        name: [frame_number(next(tiles)) for _ in range(int(document.num_tiles.sum()))]
        for name, document in zip(batch.sample_ids, batch.layout.documents, strict=True)
    }


def test_videos_through_the_loader(films):
    """One tile per frame; rising frames of the clip; anew in each epoch; the same at any share of the tiles."""
    config = films.config(steps=12, batch=1, position=PositionConfig(mode="v2pe_random"), **LIMITS)
    steps = [batch for (batch,) in films.loader(config)]
    draws = {}
    for batch in steps:
        for name, frames in brightness(batch).items():
            draws.setdefault(name, []).append(frames)
    for name in ("a:1", "a:2", "a:3", "a:4"):
        lengths = {len(frames) for frames in draws[name]}
        assert len(lengths) == 1
        assert lengths <= {3, 4, 5}
        assert all(frames == sorted(set(frames)) for frames in draws[name])
        assert len({tuple(frames) for frames in draws[name]}) > 1
    assert all(5 <= frame < 15 for frames in draws["a:2"] for frame in frames)
    shares = [[batch for (batch,) in films.loader(config, tile=(rank, 3))] for rank in range(3)]
    for step, batch in enumerate(steps):
        parts = [share[step].tiles for share in shares]
        assert np.array_equal(np.concatenate(parts), batch.tiles)


def test_the_middle_frames_are_the_same_in_every_epoch(films):
    config = films.config(steps=6, batch=1, video_sampling="middle", **LIMITS)
    drawn = {
        json.dumps(brightness(batch)) for (batch,) in films.loader(config) if batch.sample_ids[0] == "a:1"
    }
    first = [brightness(batch)["a:1"] for (batch,) in films.loader(config) if "a:1" in batch.sample_ids]
    assert len(drawn) <= 1
    assert all(frames == first[0] for frames in first)


def read(films, line_number, **data):
    (entry,) = read_meta(films.folder / "meta.json")
    line = (films.folder / "a.jsonl").read_bytes().splitlines()[line_number - 1]
    settings = films.settings(**data)
    sizes = measure(line, line_number, entry=entry, settings=settings).sizes
    return read_sample(line, line_number, sizes, entry=entry, settings=settings, draw=Draw(epoch=0))


def test_limits_of_a_data_set_come_first(films):
    meta = json.loads((films.folder / "meta.json").read_text())
    meta["a"] |= {"min_num_frame": 7, "max_num_frame": 7}
    (films.folder / "meta.json").write_text(json.dumps(meta))
    assert read(films, 1).layout.num_images == 7
    del meta["a"]["max_num_frame"]
    meta["a"]["min_num_frame"] = 30
    (films.folder / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(DataError, match="min_num_frame is 30, but max_num_frame is 20"):
        read(films, 1)


@pytest.mark.parametrize("policy", ["split", "bad"])
def test_videos_under_the_policies_for_long_samples(films, policy, caplog):
    """A video that fits is read whole; one that does not is named, and not split."""
    frames = {"min_num_frame": 5, "max_num_frame": 5, "long_samples": policy}
    assert films.loader(films.config(**frames)).num_bad == 0
    caplog.set_level("WARNING", logger="megatron_v2pe")
    loader = films.loader(films.config(max_sample_tokens=130, max_bad_samples=0.9, **frames))
    assert loader.num_bad >= 4
    assert "exceed data.max_sample_tokens = 130" in caplog.text
    assert "or lower data.max_num_frame (a video is not split)" in caplog.text


def test_a_broken_video_is_a_bad_sample(films, caplog):
    (films.folder / "images" / "1.mp4").write_bytes(b"no video")
    (films.folder / "images" / "2.mp4").unlink()
    caplog.set_level("WARNING", logger="megatron_v2pe")
    loader = films.loader(films.config(max_bad_samples=0.5))
    assert (loader.num_bad, loader.num_samples) == (2, 4)
    assert "1.mp4: cannot be read as a video" in caplog.text
    assert "2.mp4: no such video" in caplog.text


@pytest.mark.parametrize("kind", ["file", "memory"])
def test_a_mixture_at_remote_addresses_gives_the_same_packs(filled, tmp_path, kind):
    """The meta json is local; annotation and images are read through fsspec."""
    local = [batch for step in filled.loader(filled.config(steps=6)) for batch in step]
    root = f"file://{tmp_path}" if kind == "file" else "memory://mixture"
    if kind == "memory":
        store = fsspec.filesystem("memory")
        store.put(str(tmp_path / "images"), "/mixture/images", recursive=True)
        for name in ("a.jsonl", "b.jsonl"):
            store.put(str(tmp_path / name), f"/mixture/{name}")
    meta = json.loads((tmp_path / "meta.json").read_text())
    for name, entry in meta.items():
        entry |= {"annotation": f"{root}/{name}.jsonl", "root": f"{root}/images"}
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    # Workers of the file store only: what is in memory is in this process.
    config = filled.config(steps=6, num_workers=1 if kind == "file" else 0, cache_dir=str(tmp_path / "other"))
    remote = [batch for step in filled.loader(config) for batch in step]
    assert [batch.sample_ids for batch in remote] == [batch.sample_ids for batch in local]
    for left, right in zip(remote, local, strict=True):
        assert np.array_equal(left.tokens, right.tokens)
        assert np.array_equal(left.tiles, right.tiles)


def test_remote_images_that_are_missing_or_damaged(filled, tmp_path):
    meta = json.loads((tmp_path / "meta.json").read_text())
    for entry in meta.values():
        entry["root"] = f"file://{tmp_path}/images"
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    (tmp_path / "images" / "1_0.png").unlink()
    content = (tmp_path / "images" / "2_0.png").read_bytes()
    (tmp_path / "images" / "2_0.png").write_bytes(content[: len(content) // 2])
    with pytest.raises(
        DataError, match=r"(?s)2 of 24 samples are bad.*1_0\.png: no such image.*2_0\.png: cannot be"
    ):
        filled.loader(filled.config())
