"""Measuring a mixture: records per second of processor time, and the work that a kill -9 loses.

The mixture has a third each of samples with 0 to 1, 2 to 6 and 8 to 24 images, 7 in the mean, and 25 to 180 words each;
the tokenizer is the golden checkpoint's. It is measured twice: with 400 JPEG files that many records show, and with
every image met for the first time, where each record costs 7 openings of files. Processor time of the measuring loop
depends less than wall time on who else uses the machine, but busy cores share their caches: on two cores with a load of
10 it has been seen 1.5 times as long. The kernel's part is printed, because no program can do without it.
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import numpy as np
import psutil
from bench_support.verdict import show_load, verdict
from PIL import Image

HF_FOLDER = Path(__file__).parents[2] / "tests" / "golden" / "ckpt" / "a_internlm2_vit300m"
HELP = "records per second of processor time, and what kill -9 and a restart cost"
TARGET_RATE, TARGET_LOST_S = 3000, 5.0
SPANS = ((20, 120), (5, 60))  # words of a question and of an answer
WORDS = "quick brown fox jumps over a lazy dog while engineers measure lengths of lines"
_MEASURE = """
import os, sys, time
from megatron_v2pe.config.arch.architecture import read_architecture
from megatron_v2pe.config.load import load_run_config
from megatron_v2pe.data.index.annotation_index import index_dataset
from megatron_v2pe.data.sources.meta import read_meta
from megatron_v2pe.data.samples.settings import sample_settings
folder, hf = sys.argv[1:]
config = load_run_config(None, ["data.max_sample_tokens=32768", "data.max_pack_tokens=32768"])
settings = sample_settings(config, read_architecture(hf), hf)
(entry,) = read_meta(folder + "/meta.json")
print("ready", flush=True)
wall, before = time.perf_counter(), os.times()
index = index_dataset(entry, settings=settings, cache_dir=folder + "/cache")
wall, after = time.perf_counter() - wall, os.times()
print(wall, after.user - before.user, after.system - before.system, flush=True)
assert not index.bad
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `bench_data.py index`."""
    parser.add_argument(
        "--records", type=int, default=12000, help="records of the mixture with 400 images (default 12000)"
    )
    parser.add_argument(
        "--new-records",
        type=int,
        default=4000,
        help="records of the one with an image file for each (default 4000)",
    )


def run(arguments: argparse.Namespace) -> None:
    """Measure both mixtures in one go, then one of them with a kill in the middle."""
    show_load()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        _print_rate("images met before", folder / "few", arguments.records, num_images=400)
        wall, cpu = _print_rate("every image new", folder / "new", arguments.new_records, num_images=None)
        shutil.rmtree(folder / "new" / "cache")
        _kill_and_restart(folder / "new", wall, cpu)


def _print_rate(what: str, folder: Path, num_records: int, *, num_images: int | None) -> tuple[float, float]:
    make_mixture(folder, num_records, num_images=num_images)
    wall, user, kernel = _measure(folder)
    cpu = user + kernel
    verdict(
        f"index, {what}",
        f"{num_records / cpu:,.0f} records/s of one core ({num_records:,} records, {wall:.1f} s, {cpu:.1f} s of "
        f"processor time, {kernel / cpu:.0%} of it the kernel's)",
        target=f">= {TARGET_RATE:,}",
        is_met=num_records / cpu >= TARGET_RATE,
    )
    return wall, cpu


def make_mixture(folder: Path, num_records: int, *, num_images: int | None) -> None:
    """Images and one annotation file; without `num_images` every place has a file of its own."""
    generator = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    contents = [_jpeg(generator) for _ in range(400)]
    for number in range(num_images or 0):
        (folder / "images" / f"{number}.jpg").write_bytes(contents[number % 400])
    names = _names(folder, contents, generator, num_images)
    with open(folder / "a.jsonl", "w", encoding="utf-8") as file:
        for number in range(num_records):
            low, high = ((0, 2), (2, 7), (8, 25))[number % 3]
            own = [next(names) for _ in range(generator.integers(low, high))]
            words = [" ".join(generator.choice(WORDS.split(), generator.integers(*span))) for span in SPANS]
            turns = [
                {"from": "human", "value": "<image>\n" * len(own) + words[0]},
                {"from": "gpt", "value": words[1]},
            ]
            file.write(json.dumps({"image": own, "conversations": turns}) + "\n")
    meta = {"a": {"annotation": "a.jsonl", "root": "images", "repeat_time": 1, "data_augment": False}}
    (folder / "meta.json").write_text(json.dumps(meta))


def _jpeg(generator: np.random.Generator) -> bytes:
    width, height = generator.integers(224, 1024, 2).tolist()
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), tuple(generator.integers(0, 256, 3).tolist())).save(buffer, "JPEG")
    return buffer.getvalue()


def _names(
    folder: Path, contents: list[bytes], generator: np.random.Generator, num_images: int | None
) -> Iterator[str]:
    """Names of images: any of `num_images`, or a new file each time, a thousand to a folder."""
    for number in count():
        if num_images is not None:
            yield f"{generator.integers(num_images)}.jpg"
            continue
        place = folder / "images" / f"{number // 1000}"
        place.mkdir(exist_ok=True)
        (place / f"{number}.jpg").write_bytes(contents[number % len(contents)])
        yield f"{number // 1000}/{number}.jpg"


def _start(folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", _MEASURE, str(folder), str(HF_FOLDER)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    if process.stdout.readline().strip() != "ready":
        raise SystemExit("the measuring process did not start")
    return process


def _measure(folder: Path) -> tuple[float, float, float]:
    """Wall seconds, and processor seconds of the program and of the kernel, of a whole or remaining pass."""
    process = _start(folder)
    numbers = process.communicate()[0].split()
    if process.returncode:
        raise SystemExit(process.returncode)
    wall, user, kernel = map(float, numbers)
    return wall, user, kernel


def _kill_and_restart(folder: Path, wall: float, cpu: float) -> None:
    """Kill at two thirds of the time, start again; both together against one pass, in processor time."""
    process = _start(folder)
    start_up = _processor_seconds(process.pid)
    time.sleep(2 * wall / 3)
    used = _processor_seconds(process.pid) - start_up
    process.send_signal(signal.SIGKILL)
    process.wait()
    _, user, kernel = _measure(folder)
    again = user + kernel
    lost = max(0.0, used + again - cpu)
    verdict(
        "index, killed at two thirds and started again",
        f"{lost:.1f} s of work lost ({used:.1f} + {again:.1f} s of processor time)",
        target=f"< {TARGET_LOST_S:g} s",
        is_met=lost < TARGET_LOST_S,
    )


def _processor_seconds(pid: int) -> float:
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)
