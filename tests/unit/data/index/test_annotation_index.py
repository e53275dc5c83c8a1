"""The index: measured once, keyed by what changes it, safe among ranks, honest about bad lines."""

import json
import multiprocessing
import os
import signal
import time
from dataclasses import replace

import numpy as np
import pytest

from megatron_v2pe.core.errors import DataError
from megatron_v2pe.data.index import build as index_build
from megatron_v2pe.data.index import parts as index_parts
from megatron_v2pe.data.index.annotation_index import describe_settings, index_dataset
from megatron_v2pe.data.index.cache import locked
from megatron_v2pe.data.index.parts import PartFolder
from megatron_v2pe.data.index.scan import scan_file
from megatron_v2pe.data.samples.measure import LineMeasurer
from megatron_v2pe.data.sources.meta import read_meta
from megatron_v2pe.data.text.templates import TEMPLATES
from tests.support.mixture import record, write_image


def build(mixture, *, cache="cache", **data):
    (entry, *_) = read_meta(mixture.folder / "meta.json")
    return index_dataset(entry, settings=mixture.settings(**data), cache_dir=mixture.folder / cache)


@pytest.fixture
def measured(monkeypatch):
    """Counts the lines that are measured."""
    lines = []
    real = LineMeasurer.__call__

    def counting(self, line, number):
        lines.append(number)
        return real(self, line, number)

    monkeypatch.setattr(LineMeasurer, "__call__", counting)
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


@pytest.mark.parametrize(
    ("name", "digest"),
    [
        ("internlm2-chat", "2b4f85d2"),
        ("Hermes-2", "05783947"),
        ("phi3-chat", "1c20f61d"),
        ("internvl2_5", "aeb665e9"),
    ],
)
def test_parts_that_a_template_does_not_have_do_not_make_its_data_another(filled, name, digest):
    """Digests of version 0.1 before templates had headers and tools: a run that began then continues."""
    (entry, *_) = read_meta(filled.folder / "meta.json")
    settings = filled.settings()
    text = replace(settings.text, template=TEMPLATES[name])
    assert describe_settings(entry, replace(settings, text=text))["template"] == f"{name} {digest}"


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
    assert build(filled, **data).settings != first.settings
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
    assert measured[16:] == [17]  # the lines before it are known


def test_an_edited_file_is_measured_again(filled, measured):
    before = build(filled)
    path = filled.folder / "a.jsonl"
    path.write_text(json.dumps(record("first", "now")) + "\n" + path.read_text())
    after = build(filled)
    assert (len(after), len(measured)) == (17, 33)
    assert after.content != before.content
    assert after.num_tokens[1:].tolist() == before.num_tokens.tolist()


def test_a_touched_file_is_not_measured_again(filled, measured):
    before = build(filled)
    path = filled.folder / "a.jsonl"
    path.write_text(path.read_text())
    after = build(filled)
    assert (after.content, len(measured)) == (before.content, 16)
    (version,) = (filled.folder / "cache").glob("a-*/rows-*")
    build(filled)
    assert version.exists()  # the new time is known, so nothing is hashed or written again


def test_a_last_line_without_its_end_is_measured_again_when_it_grows(mixture):
    path = mixture.folder / "a.jsonl"
    mixture.write([record("one", "two")])
    whole = json.dumps(record("three", "four"))
    start = path.read_text()
    path.write_text(start + whole[:20])
    assert [bad.line_number for bad in build(mixture).bad] == [2]
    path.write_text(start + whole)
    index = build(mixture)
    assert (len(index), index.bad) == (2, ())
    assert index.line_numbers.tolist() == [1, 2]
    path.write_text(start + whole + "\n" + whole + "\n")
    assert build(mixture).line_numbers.tolist() == [1, 2, 3]


def test_a_damaged_cache_is_measured_again(filled, measured):
    build(filled)
    (cached,) = (filled.folder / "cache").glob("*/rows-*/num_tokens.npy")
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
    repaired = build(mixture)
    assert (len(repaired), repaired.bad) == (2, ())
    assert repaired.image_sizes(1) == [(30, 30)]
    assert len(build(mixture)) == 2
    assert measured == [1, 2, 2]  # what was good is not measured again


def test_repaired_lines_stand_where_they_stood(mixture):
    images = mixture.folder / "images"
    names = ["a.png", "b.png", "c.png"]
    mixture.write([record("<image>", "hi", name) for name in names])
    for place, name in enumerate(names):
        if name != "b.png":
            write_image(images / name, 30 + place, 40)
    assert build(mixture).line_numbers.tolist() == [1, 3]
    write_image(images / "b.png", 31, 40)
    index = build(mixture)
    assert index.line_numbers.tolist() == [1, 2, 3]
    assert [index.image_sizes(row) for row in range(3)] == [[(30, 40)], [(31, 40)], [(32, 40)]]
    assert (np.diff(index.offsets) > 0).all()


def _same(first, second):
    names = (
        "offsets",
        "line_numbers",
        "num_tokens",
        "num_supervised",
        "num_tiles",
        "first_image",
        "sizes",
        "units",
    )
    return all(np.array_equal(getattr(first, name), getattr(second, name)) for name in names)


def write_each_line(monkeypatch):
    """One line a turn, one part for each."""
    monkeypatch.setattr(index_build, "_TURN_S", 0.0)
    monkeypatch.setattr(index_parts, "_WRITE_EVERY_S", 0.0)


def _long_file(mixture, count):
    mixture.write([record(f"what is {number}? " * 20, "a thing") for number in range(count)])


def test_an_interrupted_pass_continues(mixture, measured, monkeypatch):
    """Parts are on the disk at once here; a stop in the middle costs the lines since the last part only."""
    _long_file(mixture, 60)
    write_each_line(monkeypatch)
    reference = build(mixture, cache="other")
    real, seen = LineMeasurer.__call__, []

    def stops(self, line, number):
        if len(seen) == 25:
            raise KeyboardInterrupt
        seen.append(number)
        return real(self, line, number)

    monkeypatch.setattr(LineMeasurer, "__call__", stops)
    with pytest.raises(KeyboardInterrupt):
        build(mixture)
    monkeypatch.setattr(LineMeasurer, "__call__", real)
    again = []
    monkeypatch.setattr(
        LineMeasurer,
        "__call__",
        lambda self, line, number: (again.append(number), real(self, line, number))[1],
    )
    index = build(mixture)
    assert again == list(range(26, 61))
    assert _same(index, reference)
    assert not list((mixture.folder / "cache").glob("*/parts-*"))


def test_a_damaged_part_is_measured_again(mixture, monkeypatch):
    _long_file(mixture, 60)
    write_each_line(monkeypatch)
    reference = build(mixture, cache="other")
    real = LineMeasurer.__call__

    def stops(self, line, number):
        if number == 40:
            raise KeyboardInterrupt
        return real(self, line, number)

    monkeypatch.setattr(LineMeasurer, "__call__", stops)
    with pytest.raises(KeyboardInterrupt):
        build(mixture)
    parts = sorted((mixture.folder / "cache").glob("*/parts-*/part-*"))
    parts[10].write_bytes(b"")
    parts[20].write_bytes(parts[20].read_bytes()[:300])
    monkeypatch.setattr(LineMeasurer, "__call__", real)
    assert _same(build(mixture), reference)


def test_processes_give_what_one_gives(mixture):
    blanks = " " * 30_000  # blocks of 1 MiB that are quickly measured
    mixture.write([json.dumps(record(f"what is {number}?", "a thing")) + blanks for number in range(120)])
    assert len(scan_file(str(mixture.folder / "a.jsonl")).blocks) > 2  # of a single one no process is started
    (entry,) = read_meta(mixture.folder / "meta.json")
    several = index_dataset(
        entry, settings=mixture.settings(), cache_dir=mixture.folder / "several", workers=2
    )
    assert _same(several, build(mixture))


def test_a_small_file_starts_no_process(filled, monkeypatch):
    """A set of a mixture that fits one block keeps one worker busy; starting it lasts longer than measuring."""
    monkeypatch.setattr(index_build, "ProcessPoolExecutor", None)
    (entry, *_) = read_meta(filled.folder / "meta.json")
    index = index_dataset(entry, settings=filled.settings(), cache_dir=filled.folder / "several", workers=8)
    assert len(index) > 0


def test_a_killed_process_of_several_is_reported_and_costs_little(mixture, monkeypatch):
    """kill -9 of one worker, as the system does when memory runs out: an error at once, and what is done is kept."""
    blanks = " " * 2000  # blocks of 1 MiB that are quickly measured
    mixture.write([json.dumps(record(f"what is {number}?", "a thing")) + blanks for number in range(3000)])
    reference = build(mixture, cache="other")
    (entry,) = read_meta(mixture.folder / "meta.json")
    monkeypatch.setattr(index_parts, "_WRITE_EVERY_S", 0.0)  # every block is written at once
    real, kept = PartFolder.add, []

    def add_and_kill(self, rows, done):
        real(self, rows, done)
        kept.extend(rows.arrays["line_numbers"].tolist())
        for child in multiprocessing.active_children()[:1]:
            os.kill(child.pid, signal.SIGKILL)

    monkeypatch.setattr(PartFolder, "add", add_and_kill)
    started = time.monotonic()
    with pytest.raises(
        DataError, match=r"a\.jsonl: a process that measured was killed .* start again with fewer"
    ):
        index_dataset(entry, settings=mixture.settings(), cache_dir=mixture.folder / "cache", workers=2)
    assert time.monotonic() - started < 60
    assert not multiprocessing.active_children()
    monkeypatch.setattr(PartFolder, "add", real)
    again, call = [], LineMeasurer.__call__
    monkeypatch.setattr(
        LineMeasurer,
        "__call__",
        lambda self, line, number: (again.append(number), call(self, line, number))[1],
    )
    assert _same(build(mixture), reference)
    assert kept
    assert sorted(kept + again) == list(range(1, 3001))


def test_scan_finds_lines_and_prefixes(tmp_path):
    path = tmp_path / "a.jsonl"
    lines = [b"x" * (number * 7000 % 300000) + b"\n" for number in range(60)]
    path.write_bytes(b"".join(lines) + b"rest")
    scan = scan_file(str(path), prefix=100000)
    assert (scan.covered_lines, scan.covered) == (60, scan.size - 4)
    assert sum(block.num_lines for block in scan.blocks) == 61
    for before, after in zip(scan.blocks, scan.blocks[1:], strict=False):
        assert (before.end, before.first_line + before.num_lines) == (after.start, after.first_line)
    path.write_bytes(path.read_bytes()[:100000])
    assert scan_file(str(path)).digest == scan.prefix_digest


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
    (folder,) = (filled.folder / "cache").iterdir()
    assert [path.name.split("-")[0] for path in sorted(folder.iterdir())] == ["lock", "rows"]


def test_a_lock_that_is_held_is_waited_for(filled, measured):
    build(filled)
    (lock,) = (filled.folder / "cache").glob("*/lock")
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(2), context.Queue()
    # Started before the lock is taken: a forked child would inherit the open file that holds it.
    worker = context.Process(target=_build_in_process, args=(filled, barrier, results), daemon=True)
    worker.start()
    with locked(lock):
        barrier.wait(timeout=60)
        time.sleep(0.5)
        assert results.empty()
    assert len(results.get(timeout=60)) == 16
    worker.join(timeout=60)


def test_unusable_cache_folder(filled):
    (filled.folder / "file").write_text("")
    with pytest.raises(DataError, match=r"data\.cache_dir: .*give a folder that can be written"):
        build(filled, cache="file")
