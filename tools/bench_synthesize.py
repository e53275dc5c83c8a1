"""Time and memory of one very long synthetic sample, as a new user's command makes it.

    python tools/bench_synthesize.py --tokens 1M --kinds image-retrieval,text-retrieval
    python tools/bench_synthesize.py --qwen2-size --kinds text-retrieval

Sources are made on the spot: Python's language reference as texts, smooth noise at the sizes of photographs as JPEG
files. Each kind runs twice in processes of their own, `megatron-v2pe synthesize` with one worker, and beside it the
floor: the same text tokenised once and the same images read once. Columns: wall and processor seconds of the whole
command (start of Python and reading of the sources included), of the making alone, of the floor, and the peak of
resident memory.

Targets for a sample of 1M tokens: 5 s (with images), 500 MB. --qwen2-size uses a byte-level tokenizer with 151,643
made-up entries, because a tokenizer needs memory for its vocabulary; a text-only sample of that family needs most.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
from bench_support.big_vocabulary import make_big
from bench_support.verdict import show_load, verdict
from PIL import Image

ROOT = Path(__file__).parents[1]
TOKENIZER = ROOT / "tests" / "golden" / "ckpt" / "a_internlm2_vit300m"
QWEN2 = ROOT / "tests" / "golden" / "ckpt" / "c_qwen2_vit300m"
TILE_PIXELS, PATCH_PIXELS = 448, 14
PHOTO_SIZES = ((1280, 960), (1024, 768), (800, 1200), (640, 480))
TARGET_S, TARGET_MB = 5.0, 500


def make_sources(folder: Path, num_images: int) -> None:
    """Texts, images, and a Hugging Face folder with tiles of the released size."""
    (folder / "texts").mkdir()
    for name, text in topics.items():
        (folder / "texts" / f"{name.replace('/', '_')}.txt").write_text(text, encoding="utf-8")
    (folder / "images").mkdir()
    random = np.random.default_rng(0)
    for number in range(num_images):
        width, height = PHOTO_SIZES[number % len(PHOTO_SIZES)]
        coarse = Image.fromarray(random.integers(0, 256, (height // 32, width // 32, 3), dtype=np.uint8))
        photo = coarse.resize((width, height), Image.Resampling.BICUBIC)
        photo.save(folder / "images" / f"{number:04d}.jpg", quality=90)


def make_tokenizer(source: Path, folder: Path) -> None:
    """The tokenizer's files with a config.json of 448-pixel tiles, 256 visual tokens each; no weights."""
    folder.mkdir()
    for path in source.iterdir():
        if path.suffix in (".json", ".model", ".txt"):
            shutil.copy(path, folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config.update(force_image_size=TILE_PIXELS, downsample_ratio=0.5)
    config["vision_config"].update(image_size=TILE_PIXELS, patch_size=PATCH_PIXELS)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def run_verb(folder: Path, kind: str, tokens: str) -> tuple[float, float, float, float]:
    """Wall and processor seconds of the command, seconds of the making, peak MB."""
    out = folder / f"out-{kind}"
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "megatron_v2pe", "synthesize", kind, "--tokens", tokens, "--count", "1"]
    command += ["--texts", str(folder / "texts"), "--tokenizer", str(folder / "hf"), "--out", str(out)]
    command += ["--workers", "1"] + ([] if kind.startswith("text") else ["--images", str(folder / "images")])
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wall, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(done.stderr)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    making = float(done.stderr.strip().splitlines()[-1].split(" made in ")[1].split()[0])
    return wall, cpu, making, after.ru_maxrss * 1024 / 1e6  # the largest child so far


def floor_seconds(folder: Path, kind: str) -> float:
    """Tokenise the sample's text once and read its images once; nothing else."""
    from megatron_v2pe.data.text.tokenizer import load_tokenizer

    out = folder / f"out-{kind}"
    tokenizer = load_tokenizer(folder / "hf")
    record = json.loads((out / f"{kind}.jsonl").read_text(encoding="utf-8"))
    started = time.perf_counter()
    tokenizer.encode(record["conversations"][0]["value"].replace("<image>", "<img></img>"))
    for name in record.get("image", []):
        (out / name).read_bytes()
    return time.perf_counter() - started


def describe(folder: Path, kind: str) -> str:
    """Text tokens and images of what was made."""
    meta = json.loads((folder / f"out-{kind}" / f"{kind}.jsonl").read_text(encoding="utf-8"))["meta"]
    return f"{meta['context_length_text']:>9,} {meta['num_images']:>6}"


def bench(kind: str, source: str, is_big: bool, tokens: str, num_images: int, rounds: int) -> None:
    """One kind in this process, whose largest child is then the command."""
    with tempfile.TemporaryDirectory(prefix="bench_synthesize") as name:
        folder = Path(name)
        make_sources(folder, num_images)
        if is_big:
            make_big(QWEN2, folder / "big")
        make_tokenizer(folder / "big" if is_big else Path(source), folder / "hf")
        runs = [run_verb(folder, kind, tokens) for _ in range(rounds)]
        wall, cpu, making = (min(column) for column in list(zip(*runs, strict=True))[:3])
        floor = min(floor_seconds(folder, kind) for _ in range(rounds))
        row = f"{kind:<16} {tokens:>7} {describe(folder, kind)} {wall:>7.2f} {cpu:>7.2f} {making:>7.2f} {floor:>7.2f}"
        print(f"{row} {making / floor:>6.1f}x {runs[-1][3]:>7.0f}", flush=True)
        has_images = not kind.startswith("text")
        if has_images:
            verdict(
                f"{kind}, the whole command",
                f"{wall:.1f} s",
                target=f"< {TARGET_S} s",
                is_met=wall < TARGET_S,
            )
        peak = runs[-1][3]
        verdict(kind, f"peak {peak:.0f} MB", target=f"< {TARGET_MB} MB", is_met=peak < TARGET_MB)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", default="1M", help="length of the sample")
    parser.add_argument("--kinds", default="image-retrieval,image-counting,text-retrieval", help="comma list")
    parser.add_argument(
        "--tokenizer", default=str(TOKENIZER), help="Hugging Face folder; weights are not needed"
    )
    parser.add_argument(
        "--qwen2-size",
        action="store_true",
        help="instead a byte-level tokenizer with 151,643 made-up entries",
    )
    parser.add_argument("--images", type=int, default=300, help="photographs to choose from")
    parser.add_argument("--rounds", type=int, default=2, help="the best counts")
    arguments = parser.parse_args()
    show_load()
    print("kind              tokens text tok. images    wall     cpu  making   floor  ratio peak MB")
    context = multiprocessing.get_context("spawn")
    for kind in arguments.kinds.split(","):
        source = (arguments.tokenizer, arguments.qwen2_size)
        inputs = (kind, *source, arguments.tokens, arguments.images, arguments.rounds)
        process = context.Process(target=bench, args=inputs)
        process.start()
        process.join()
        if process.exitcode:
            raise SystemExit(process.exitcode)


if __name__ == "__main__":
    main()
