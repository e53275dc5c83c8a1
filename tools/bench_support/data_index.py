"""Measuring a mixture: records per second of processor time, and the work that a kill -9 loses.

The mixture has a third each of samples with 0 to 1, 2 to 6 and 8 to 24 images, 7 in the mean, of 400 JPEG files, and 25
to 180 words each; the tokenizer is the golden checkpoint's. Processor time of the measuring loop depends little on who
else uses the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
from PIL import Image

HF_FOLDER = Path(__file__).parents[2] / "tests" / "golden" / "ckpt" / "a_internlm2_vit300m"
HELP = "records per second of processor time, and what kill -9 and a restart cost"
TARGET_RATE, TARGET_LOST_S = 3000, 5.0
WORDS = "quick brown fox jumps over a lazy dog while engineers measure lengths of lines"
_MEASURE = """
import sys, time
from megatron_v2pe.config.architecture import read_architecture
from megatron_v2pe.config.load import load_run_config
from megatron_v2pe.data.index import index_dataset
from megatron_v2pe.data.meta import read_meta
from megatron_v2pe.data.samples import sample_settings
folder, hf = sys.argv[1:]
config = load_run_config(None, ["data.max_sample_tokens=32768", "data.max_pack_tokens=32768"])
settings = sample_settings(config, read_architecture(hf), hf)
(entry,) = read_meta(folder + "/meta.json")
print("ready", flush=True)
wall, cpu = time.perf_counter(), time.process_time()
index = index_dataset(entry, settings=settings, cache_dir=folder + "/cache")
print(len(index), time.perf_counter() - wall, time.process_time() - cpu, flush=True)
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `bench_data.py index`."""
    parser.add_argument("--records", type=int, default=12000, help="records of the mixture (default 12000)")


def run(arguments: argparse.Namespace) -> None:
    """Measure once in one go, once with a kill in the middle."""
    print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_mixture(folder, arguments.records)
        wall, cpu = _measure(folder)
        rate = arguments.records / cpu
        print(
            f"one pass: {arguments.records:,} records, {wall:.1f} s, {cpu:.1f} s of processor time: {rate:,.0f} "
            f"records per second of one core (target {TARGET_RATE:,})"
        )
        _clear(folder)
        _kill_and_restart(folder, wall, cpu)


def make_mixture(folder: Path, num_records: int) -> None:
    """Images and one annotation file."""
    generator = np.random.default_rng(0)
    (folder / "images").mkdir()
    for number in range(400):
        width, height = generator.integers(224, 1024, 2).tolist()
        color = tuple(generator.integers(0, 256, 3).tolist())
        Image.new("RGB", (width, height), color).save(folder / "images" / f"{number}.jpg")
    with open(folder / "a.jsonl", "w", encoding="utf-8") as file:
        for number in range(num_records):
            low, high = ((0, 2), (2, 7), (8, 25))[number % 3]
            names = [f"{image}.jpg" for image in generator.integers(400, size=generator.integers(low, high))]
            question = "<image>\n" * len(names) + " ".join(
                generator.choice(WORDS.split(), generator.integers(20, 120))
            )
            answer = " ".join(generator.choice(WORDS.split(), generator.integers(5, 60)))
            turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
            file.write(json.dumps({"image": names, "conversations": turns}) + "\n")
    meta = {"a": {"annotation": "a.jsonl", "root": "images", "repeat_time": 1, "data_augment": False}}
    (folder / "meta.json").write_text(json.dumps(meta))


def _start(folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", _MEASURE, str(folder), str(HF_FOLDER)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    if process.stdout.readline().strip() != "ready":
        raise SystemExit("the measuring process did not start")
    return process


def _measure(folder: Path) -> tuple[float, float]:
    """Wall and processor seconds of a whole or remaining pass."""
    process = _start(folder)
    numbers = process.communicate()[0].split()
    if process.returncode:
        raise SystemExit(process.returncode)
    return float(numbers[1]), float(numbers[2])


def _clear(folder: Path) -> None:
    shutil.rmtree(folder / "cache")


def _kill_and_restart(folder: Path, wall: float, cpu: float) -> None:
    """Kill at two thirds of the time, start again; both together against one pass, in processor time."""
    process = _start(folder)
    start_up = _processor_seconds(process.pid)
    time.sleep(2 * wall / 3)
    used = _processor_seconds(process.pid) - start_up
    process.send_signal(signal.SIGKILL)
    process.wait()
    again = _measure(folder)[1]
    print(
        f"killed after {used:.1f} s of processor time, finished in {again:.1f} s more: "
        f"{max(0.0, used + again - cpu):.1f} s of work lost (target < {TARGET_LOST_S:g})"
    )


def _processor_seconds(pid: int) -> float:
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)
