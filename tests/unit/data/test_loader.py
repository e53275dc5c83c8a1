"""The loader: the same stream at any number of ranks, workers and starts; pixels only where they are due."""

import dataclasses
import json
import multiprocessing
import os
import re
import signal
import time

import numpy as np
import psutil
import pytest

from megatron_v2pe.config.schema import ModelConfig, PositionConfig, RuntimeConfig
from megatron_v2pe.config.sections.lora import LoRAConfig
from megatron_v2pe.core.errors import ConfigError, DataError
from megatron_v2pe.data.loader import explained_worker_deaths, packs_under_way
from megatron_v2pe.data.media.image import ImageFile
from tests.support.mixture import record, write_image

RANDOM = PositionConfig(mode="v2pe_random")


def facts(batch):
    """Everything of a pack but its pixels."""
    strides = [document.strides.tolist() for document in batch.layout.documents]
    arrays = (batch.tokens, batch.labels, batch.loss_weights, batch.layout.cu_seqlens)
    return batch.sample_ids, strides, batch.num_tiles, tuple(array.tobytes() for array in arrays)


def stream(mixture, config, **where):
    return [[facts(batch) for batch in step] for step in mixture.loader(config, holds_vision=False, **where)]


def test_one_list_of_micro_batches_for_each_step(filled):
    steps = list(filled.loader(filled.config(steps=3, batch=4), dp=(1, 2)))
    assert [len(step) for step in steps] == [2, 2, 2]
    for batch in steps[0]:
        assert len(batch.tokens) <= 1024 + 4 * len(batch.sample_ids)
        assert (np.diff(batch.layout.cu_seqlens) % 4 == 0).all()
        assert batch.tile_range == (0, batch.num_tiles)
        assert batch.tiles.shape == (batch.num_tiles, 3, 112, 112)


def test_resumed_stream_is_the_continuation(filled):
    config = filled.config(steps=12, position=RANDOM)
    whole = stream(filled, config)
    for start in (1, 5, 11):
        assert stream(filled, config, start_step=start) == whole[start:]
    assert stream(filled, config, start_step=12) == []


def test_order_does_not_depend_on_data_parallel_size(filled):
    config = filled.config(steps=6, batch=4, position=RANDOM)
    whole = stream(filled, config)
    for size in (2, 4):
        ranks = [stream(filled, config, dp=(rank, size)) for rank in range(size)]
        for step, expected in enumerate(whole):
            assert all(len(rank[step]) == 4 // size for rank in ranks)
            assert sorted(pack for rank in ranks for pack in rank[step]) == sorted(expected)


def test_steps_that_grow_on_any_ranks_with_workers_and_through_a_restart(filled):
    config = filled.config(steps=6, position=RANDOM)
    optim = dataclasses.replace(config.optim, global_batch_size=6, batch_rampup=(2, 2, 6))
    config = dataclasses.replace(config, optim=optim)
    whole = stream(filled, config)
    assert [len(step) for step in whole] == [2, 2, 4, 6, 6, 6]
    working = dataclasses.replace(config, data=dataclasses.replace(config.data, num_workers=1))
    for start in (2, 4):
        ranks = [stream(filled, working, dp=(rank, 2), start_step=start) for rank in range(2)]
        for step, expected in enumerate(whole[start:]):
            assert all(len(rank[step]) == len(expected) // 2 for rank in ranks)
            assert sorted(pack for rank in ranks for pack in rank[step]) == sorted(expected)


def test_workers_give_the_same_packs_and_pixels(filled):
    def read(workers):
        return list(filled.loader(filled.config(steps=3, num_workers=workers, position=RANDOM), start_step=1))

    for alone, with_workers in zip(read(0), read(2), strict=True):
        for left, right in zip(alone, with_workers, strict=True):
            assert facts(left) == facts(right)
            assert np.array_equal(left.tiles, right.tiles)


def test_tile_shares_make_up_the_pack(filled):
    config = filled.config(steps=3)
    whole = list(filled.loader(config))
    shares = [list(filled.loader(config, tile=(rank, 3))) for rank in range(3)]
    for step, batches in enumerate(whole):
        for place, batch in enumerate(batches):
            parts = [share[step][place] for share in shares]
            assert np.array_equal(np.concatenate([part.tiles for part in parts]), batch.tiles)
            sizes = [len(part.tiles) for part in parts]
            assert max(sizes) - min(sizes) <= 1
            assert all(facts(part) == facts(batch) for part in parts)


def test_a_rank_opens_only_the_images_of_its_tiles(filled, monkeypatch):
    config = filled.config(steps=4)
    filled.loader(config)  # measures
    opened = []
    real = ImageFile.open_range

    def open_range(file, *args, **keys):
        opened.append(file.path)
        real(file, *args, **keys)

    monkeypatch.setattr(ImageFile, "open_range", open_range)
    list(filled.loader(config, holds_vision=False))
    assert opened == []
    (first, *_) = list(filled.loader(config, tile=(0, 4)))
    per_rank = len(opened)
    opened.clear()
    list(filled.loader(config))
    assert 0 < per_rank < len(opened)
    assert first[0].tile_range[0] == 0


def test_strides_are_drawn_anew_in_each_epoch(filled):
    loader = filled.loader(filled.config(steps=20, position=RANDOM), holds_vision=False)
    drawn = {}
    for step in loader:
        for batch in step:
            for name, document in zip(batch.sample_ids, batch.layout.documents, strict=True):
                drawn.setdefault(name, set()).add(tuple(document.strides.tolist()))
    assert max(len(strides) for name, strides in drawn.items()) > 2


def test_bad_samples_are_named_and_skipped(mixture, caplog):
    mixture.write(
        [*[record(f"question {n}", "answer") for n in range(30)], "{", record("<image>", "x", "no.png")]
    )
    with pytest.raises(DataError, match="2 of 32 samples are bad"):
        mixture.loader(mixture.config())
    caplog.set_level("WARNING", logger="megatron_v2pe")
    loader = mixture.loader(mixture.config(steps=30, max_bad_samples=0.1))
    assert (loader.num_bad, loader.num_samples) == (2, 30)
    assert "a.jsonl:31: " in caplog.text
    assert "a.jsonl:32: " in caplog.text
    assert "no.png" in caplog.text
    seen = {name for step in loader for batch in step for name in batch.sample_ids}
    assert seen == {f"a:{line}" for line in range(1, 31)}


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_breaks_later_is_reported_by_the_rank_that_reads_it(mixture, workers):
    """Everything but the pixels is as if nothing had happened; ranks agree on the rest, see train.damaged."""
    for name in ("a.png", "b.png"):
        write_image(mixture.folder / "images" / name, 200, 60)
    mixture.write([record("<image>", "x", name) for name in ("a.png", "b.png")])
    config = mixture.config(num_workers=workers, steps=2, batch=1)
    whole = [facts(batch) for step in mixture.loader(config) for batch in step]
    ranks = [mixture.loader(config, tile=(rank, 2)) for rank in range(2)]
    damage(mixture.folder / "images" / "a.png")
    for step, steps in enumerate(zip(*ranks, strict=True)):
        batches = [batch for (batch,) in steps]
        place = batches[0].sample_ids.index("a:1")
        knowing = [rank for rank in range(2) if batches[rank].damaged]
        assert knowing == [place]  # two documents of equal size: the rank is the place
        ((document, message),) = batches[place].damaged
        assert document == place
        assert "a.png: cannot be read as an image" in message
        assert "Traceback" not in message
        assert not batches[place].tiles.any()
        assert batches[1 - place].tiles.any()
        assert all(facts(batch) == whole[step] for batch in batches)


def damage(path):
    """Break the compressed data, not the header or the end."""
    content = bytearray(path.read_bytes())
    content[200:260] = bytes(60)
    path.write_bytes(bytes(content))


def test_packs_under_way_stay_within_their_memory():
    gib, mib = 2**30, 2**20
    assert packs_under_way(75 * mib, num_workers=4, budget=2 * gib) == (4, 6)
    assert packs_under_way(600 * mib, num_workers=4, budget=2 * gib) == (3, 1)
    assert packs_under_way(3 * gib, num_workers=4, budget=2 * gib) == (1, 1)
    assert packs_under_way(3 * gib, num_workers=0, budget=2 * gib) == (0, 1)
    assert packs_under_way(1000, num_workers=2, budget=2 * gib) == (2, 16)


def test_few_workers_for_large_packs_are_announced(filled, caplog):
    caplog.set_level("WARNING", logger="megatron_v2pe")
    loader = filled.loader(filled.config(steps=1, num_workers=3, prefetch_mib=3))
    assert (
        "data.num_workers is 3, but packs of up to 1.5 MiB in data.prefetch_mib = 3 leave room for 2"
        in caplog.text
    )
    assert len(list(loader)) == 1


def test_a_killed_worker_is_explained(filled):
    loader = filled.loader(filled.config(steps=400, num_workers=2))

    def kill_workers_while_reading():
        for _ in loader:
            for child in multiprocessing.active_children():
                os.kill(child.pid, signal.SIGKILL)

    with (
        pytest.raises(DataError, match=r"data loading process ended .* lower data\.prefetch_mib"),
        explained_worker_deaths(),
    ):
        kill_workers_while_reading()


def _read_for_ever(mixture, started):
    packs = iter(mixture.loader(mixture.config(steps=400, num_workers=2)))
    next(packs)
    started.put(True)
    time.sleep(600)


def test_workers_end_with_a_rank_that_is_killed(filled):
    """They hold packs in shared memory; a rank that torchrun starts again would find less of it each time."""
    context = multiprocessing.get_context("spawn")
    started = context.Queue()
    rank = context.Process(target=_read_for_ever, args=(filled, started))
    rank.start()
    started.get(timeout=120)
    left = psutil.Process(rank.pid).children(recursive=True)
    assert len(left) >= 3  # the fork server and two workers
    os.kill(rank.pid, signal.SIGKILL)
    rank.join()
    _, alive = psutil.wait_procs(left, timeout=30)
    assert not alive


def test_equal_ids_and_odd_lines(mixture, caplog):
    """A sample is known by its data set and line: ids need not differ, or exist; odd lines are named."""
    same = {**record("hello", "hi"), "id": 7}
    mixture.write([same, same, "", record("no id", "hi"), json.dumps(same) + " " * 3])
    with open(mixture.folder / "a.jsonl", "ab") as file:
        file.write(
            b'{"conversations": "\xff\xfe"}\n\x00\n' + json.dumps(same).encode()
        )  # no line break at the end
    caplog.set_level("WARNING", logger="megatron_v2pe")
    loader = mixture.loader(mixture.config(steps=8, batch=1, max_bad_samples=0.5))
    seen = {name for step in loader for batch in step for name in batch.sample_ids}
    assert seen == {"a:1", "a:2", "a:4", "a:5", "a:8"}
    assert loader.num_bad == 2
    assert "a.jsonl:6: not utf-8" in caplog.text
    assert "a.jsonl:7: not valid json" in caplog.text


def test_an_annotation_file_that_vanishes(mixture):
    """Every sample of it is damaged; the run stops on all ranks when they are too many."""
    mixture.write([record("hello", "hi")])
    loader = mixture.loader(mixture.config(steps=1, batch=1))
    os.remove(mixture.folder / "a.jsonl")
    ((batch,),) = list(loader)
    assert batch.damaged == ((0, f"{mixture.folder / 'a.jsonl'}:1: No such file or directory"),)
    assert batch.blank == {0}


def broken_at(path, number, change):
    """Change one line of a file in its place, so that the others stay where they are."""
    lines = path.read_bytes().split(b"\n")
    changed = change(lines[number - 1])
    assert len(changed) == len(lines[number - 1])
    path.write_bytes(b"\n".join([*lines[: number - 1], changed, *lines[number:]]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda line: b"\xff" + line[1:], r"a\.jsonl:2: not utf-8"),
        (lambda line: b" " * len(line), r"a\.jsonl:2: not valid json"),
        (lambda line: line.replace(b"a.png", b"../.."), r"a\.jsonl:2: image '../..' lies outside"),
        (lambda line: line.replace(b"<image>", b"a pile."), r"a\.jsonl:2: 0 times <image> for 2 images"),
        (lambda line: line.replace(b"what", b"4444"), r"a\.jsonl:2: has \d+ tokens and 8 tiles, but had"),
    ],
)
def test_a_line_that_breaks_later_leaves_its_lengths(mixture, change, message):
    """A page of a file that went bad after it was measured: the pack keeps its shape, the sample is named."""
    write_image(mixture.folder / "images" / "a.png", 200, 60)
    mixture.write([record("hello", "hi"), record("<image> <image> what", "x", ["a.png", "a.png"])])
    config = mixture.config(steps=1, batch=1)
    ((whole,),) = list(mixture.loader(config))
    loader = mixture.loader(config)
    broken_at(mixture.folder / "a.jsonl", 2, change)
    ((batch,),) = list(loader)
    place = batch.sample_ids.index("a:2")
    assert batch.sample_ids == whole.sample_ids
    assert batch.blank == {place}
    ((document, found),) = batch.damaged
    assert document == place
    assert re.search(message, found)
    assert np.array_equal(batch.layout.cu_seqlens, whole.layout.cu_seqlens)
    assert batch.num_tiles == whole.num_tiles
    assert batch.tile_range == whole.tile_range
    assert not batch.tiles.any()
    start, end = batch.layout.cu_seqlens[place : place + 2].tolist()
    assert not batch.loss_weights[start:end].any()
    other = np.ones(len(batch.tokens), dtype=bool)
    other[start:end] = False
    assert np.array_equal(batch.tokens[other], whole.tokens[other])
    assert np.array_equal(batch.loss_weights[other], whole.loss_weights[other])


def test_batch_that_does_not_divide(filled):
    with pytest.raises(
        ConfigError, match=r"optim\.global_batch_size is 2, .* 3 data parallel ranks must divide it"
    ):
        filled.loader(filled.config(), dp=(0, 3))


def test_missing_paths(filled):
    with pytest.raises(ConfigError, match=r"runtime\.run_dir is empty"):
        filled.loader(filled.config(cache_dir=""))


def test_a_run_that_could_learn_nothing_is_refused(mixture):
    mixture.write([record("a", "b")] * 2)
    config = mixture.config(steps=1, batch=1)
    frozen = dataclasses.replace(config, model=ModelConfig(freeze_language=True))
    with pytest.raises(ConfigError, match=r"no sample of data\.meta has an image"):
        mixture.loader(frozen)
    adapted = dataclasses.replace(frozen, lora=LoRAConfig(language_rank=2))
    assert mixture.loader(adapted).num_samples == 2
    write_image(mixture.folder / "images" / "a.png", 20, 20)
    mixture.write([record("<image>", "b", "a.png")], name="b")
    assert mixture.loader(frozen).num_samples == 3


@pytest.mark.parametrize("field", ["cache_dir"])
def test_addresses_are_no_folders(mixture, field):
    with pytest.raises(ConfigError, match=rf"data\.{field} is an address \(s3://\.\.\.\)") as caught:
        mixture.config(**{field: "s3://user:secret@bucket/x"})
    assert "secret" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"runtime\.run_dir is an address"):
        RuntimeConfig(run_dir="s3://bucket/run")


def test_a_line_of_absurd_length_is_a_bad_sample(mixture, monkeypatch):
    monkeypatch.setattr("megatron_v2pe.data.index.build.MAX_LINE_BYTES", 2000)
    mixture.write([record("a", "b"), record("a" * 5000, "b"), record("c", "d")])
    loader = mixture.loader(mixture.config(steps=1, batch=1, max_bad_samples=0.5))
    assert (loader.num_samples, loader.num_bad) == (2, 1)
    with pytest.raises(DataError, match=r"a\.jsonl:2: the line has 5,\d+ bytes, more than 2,000"):
        mixture.loader(mixture.config(steps=1, batch=1, cache_dir=str(mixture.folder / "other")))
