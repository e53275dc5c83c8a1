"""The index: measured once, keyed by what changes it, safe among ranks, honest about bad lines."""

import json
import multiprocessing
import time

import numpy as np
import pytest

from megatron_v2pe.core.errors import DataError
from megatron_v2pe.data import index as index_module
from megatron_v2pe.data.index import index_dataset
from megatron_v2pe.data.meta import read_meta
from tests.support.mixture import record, write_image


def build(mixture, *, cache="cache", **data):
    (entry, *_) = read_meta(mixture.folder / "meta.json")
    return index_dataset(entry, settings=mixture.settings(**data), cache_dir=mixture.folder / cache)


@pytest.fixture
def measured(monkeypatch):
    """Counts the lines that are measured."""
    lines = []
    real = index_module.measure_line

    def counting(line, number, **rest):
        lines.append(number)
        return real(line, number, **rest)

    monkeypatch.setattr(index_module, "measure_line", counting)
    return lines


def test_offsets_and_lengths(filled):
    index = build(filled)
    lines = (filled.folder / "a.jsonl").read_bytes()
    assert len(index) == index.num_records == 16
    for row in range(len(index)):
        line = lines[index.offsets[row] :].split(b"\n")[0]
        assert len(json.loads(line).get("image", [])) == len(index.image_sizes(row))
    assert index.line_numbers.tolist() == list(range(1, 17))
    assert index.num_tiles[0] == 0 < index.num_tiles[1]
    assert (index.num_supervised > 0).all()


def test_second_start_reads_the_cache(filled, measured):
    first = build(filled)
    assert len(measured) == 16
    second = build(filled)
    assert len(measured) == 16
    for name in ("offsets", "num_tokens", "num_tiles", "first_image", "sizes"):
        assert np.array_equal(getattr(first, name), getattr(second, name))


@pytest.mark.parametrize(
    "data", [{"max_dynamic_patch": 2}, {"max_sample_tokens": 900}, {"use_thumbnail": False}], ids=str
)
def test_settings_that_change_lengths_measure_again(filled, measured, data):
    first = build(filled)
    assert build(filled, **data).key != first.key
    assert len(measured) == 32


def test_settings_that_do_not_change_lengths_keep_the_cache(filled, measured):
    build(filled)
    build(filled, max_pack_tokens=2048, pad2square=True, loss_reduction="token", shuffle=False)
    assert len(measured) == 16


def test_a_changed_file_is_measured_again(filled, measured):
    build(filled)
    path = filled.folder / "a.jsonl"
    path.write_text(path.read_text() + json.dumps(record("more", "text")) + "\n")
    assert len(build(filled)) == 17


def test_a_damaged_cache_is_measured_again(filled, measured):
    build(filled)
    (cached,) = (filled.folder / "cache").glob("*.npz")
    cached.write_bytes(cached.read_bytes()[:100])
    assert len(build(filled)) == 16
    assert len(measured) == 32


def test_bad_lines_are_collected_with_their_identity(mixture):
    good = record("hello", "hi")
    mixture.write([good, '{"broken', record("<image>", "hi", "gone.png"), "", good])
    index = build(mixture)
    assert [bad.sample_id for bad in index.bad] == ["a:2", "a:3"]
    assert "a.jsonl:2: not valid json" in index.bad[0].message
    assert "gone.png: no such image" in index.bad[1].message
    assert index.line_numbers.tolist() == [1, 5]
    assert index.num_records == 4
    assert build(mixture).bad == index.bad


def test_a_repaired_image_counts_at_the_next_start(mixture, measured):
    mixture.write([record("hello", "hi"), record("<image>", "hi", "late.png")])
    assert len(build(mixture)) == 1
    write_image(mixture.folder / "images" / "late.png", 30, 30)
    assert len(build(mixture)) == 2


def _build_in_process(mixture, barrier, results):
    barrier.wait()
    results.put(build(mixture).num_tokens.tolist())


def test_concurrent_ranks_get_the_same_index(filled):
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(2), context.Queue()
    workers = [
        context.Process(target=_build_in_process, args=(filled, barrier, results), daemon=True)
        for _ in range(2)
    ]
    for worker in workers:
        worker.start()
    lengths = [results.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join(timeout=60)
    assert lengths[0] == lengths[1] == build(filled).num_tokens.tolist()
    assert [path.suffix for path in sorted((filled.folder / "cache").iterdir())] == [".lock", ".npz"]


def test_a_lock_that_is_held_is_waited_for(filled, measured):
    build(filled)
    (lock,) = (filled.folder / "cache").glob("*.lock")
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(2), context.Queue()
    # Started before the lock is taken: a forked child would inherit the open file that holds it.
    worker = context.Process(target=_build_in_process, args=(filled, barrier, results), daemon=True)
    worker.start()
    with index_module._locked(lock):
        barrier.wait(timeout=60)
        time.sleep(0.5)
        assert results.empty()
    assert len(results.get(timeout=60)) == 16
    worker.join(timeout=60)


def test_unusable_cache_folder(filled):
    (filled.folder / "file").write_text("")
    with pytest.raises(DataError, match=r"data\.cache_dir: .*give a folder that can be written"):
        build(filled, cache="file")
