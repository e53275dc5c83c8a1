"""Speed of the training loader against bare Pillow on the same images, over workers, and what cp 4 decodes.

    JPEG files + jsonl in a folder of our own -> the loader that `train` uses, tokenizer of the golden checkpoint

CPU seconds are the measure (this process and its workers); they depend little on who else uses the machine. Rounds of
both sides alternate and the best of each counts. Rates over workers are wall time and mean something on idle cores
only.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from bench_support.verdict import show_load, verdict
from PIL import Image

from megatron_v2pe.config.arch.architecture import InternVLArchitecture, read_architecture
from megatron_v2pe.config.schema import DataConfig, OptimConfig, PositionConfig, RunConfig, RuntimeConfig
from megatron_v2pe.data.loader import TrainLoader
from megatron_v2pe.data.media.cut import ImageTiles
from megatron_v2pe.data.media.image import ImageFile
from megatron_v2pe.data.media.medium import MediumTiles

HF_FOLDER = Path(__file__).parents[2] / "tests" / "golden" / "ckpt" / "a_internlm2_vit300m"
TARGET_RATIO, TARGET_SPEED = 1.10, 1.80
OpenedImage = tuple[str, ImageTiles]
HELP = "the loader against bare Pillow, with 1 and 2 workers, and the decoded pixels of each rank at cp 4"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `bench_data.py loader`."""
    parser.add_argument("--samples", type=int, default=60, help="samples of 1 to 4 images (default 60)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each side (default 3)")
    parser.add_argument("--work", type=Path, help="folder to keep the data in; default a temporary one")


def run(arguments: argparse.Namespace) -> None:
    """Make the data, then print the three tables."""
    with tempfile.TemporaryDirectory() as temporary:
        work = arguments.work or Path(temporary)
        if not (work / "meta.json").exists():
            make_data(work, num_samples=arguments.samples)
        arch = replace(read_architecture(HF_FOLDER), image_size=448)
        show_load()
        compare_with_pillow(work, arch, rounds=arguments.rounds)
        compare_workers(work, arch)
        show_shares(work, arch)


def make_data(work: Path, *, num_samples: int, seed: int = 0) -> None:
    """JPEG files of 300 to 1600 pixels with smooth content, and conversations about them."""
    generator = np.random.default_rng(seed)
    (work / "images").mkdir(parents=True, exist_ok=True)
    lines = []
    for number in range(num_samples):
        names = []
        for place in range(int(generator.integers(1, 5))):
            width, height = generator.integers(300, 1600, 2).tolist()
            noise = generator.integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8)
            name = f"{number}_{place}.jpg"
            image = Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
            image.save(work / "images" / name, quality=90)
            names.append(name)
        question = (
            "<image>\n" * len(names) + "What do the pages say about the weather of the last three weeks?"
        )
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": "It rained. " * 40}]
        lines.append(json.dumps({"image": names, "conversations": turns}))
    (work / "a.jsonl").write_text("\n".join(lines) + "\n")
    entry = {"annotation": "a.jsonl", "root": "images", "repeat_time": 1, "data_augment": False}
    (work / "meta.json").write_text(json.dumps({"a": entry}))


def open_loader(
    work: Path,
    arch: InternVLArchitecture,
    *,
    workers: int = 0,
    tile: tuple[int, int] = (0, 1),
    steps: int = 8,
) -> TrainLoader:
    """The loader of `train` over 16K packs."""
    config = RunConfig(
        data=DataConfig(
            meta=str(work / "meta.json"),
            max_pack_tokens=16384,
            max_sample_tokens=16384,
            cache_dir=str(work / "cache"),
            num_workers=workers,
        ),
        position=PositionConfig(mode="v2pe_random"),
        optim=OptimConfig(steps=steps, global_batch_size=1),
        runtime=RuntimeConfig(),
    )
    return TrainLoader(
        config,
        arch,
        HF_FOLDER,
        dp_rank=0,
        dp=1,
        tile_rank=tile[0],
        tile_ranks=tile[1],
        holds_vision=True,
        pad_to_multiple=8,
        start_step=0,
    )


def compare_with_pillow(work: Path, arch: InternVLArchitecture, *, rounds: int) -> None:
    """CPU time per tile: packs of the loader against opening, resizing and cropping the same images."""
    opened: list[OpenedImage] = []
    restore = _spy(opened.append)
    try:
        num_tiles = sum(batch.num_tiles for step in open_loader(work, arch) for batch in step)
    finally:
        restore()
    loader_ms, pillow_ms = [], []
    for _ in range(rounds):
        pillow_ms.append(_cpu_ms(lambda: [bare_tiles(*each, arch.image_size) for each in opened]) / num_tiles)
        loader = open_loader(work, arch)
        loader_ms.append(_cpu_ms(lambda loader=loader: list(loader)) / num_tiles)  # type: ignore[misc]
    ratio = min(loader_ms) / min(pillow_ms)
    print(f"\nCPU per tile, {num_tiles} tiles of {len(opened)} images, best of {rounds} rounds")
    print(f"  bare Pillow (decode, resize, crop)   {min(pillow_ms):6.2f} ms")
    print(f"  loader (text, packing, pixels)       {min(loader_ms):6.2f} ms")
    verdict(
        "loader against bare Pillow",
        f"{ratio:.3f}x",
        target=f"<= {TARGET_RATIO}x",
        is_met=ratio <= TARGET_RATIO,
    )


def bare_tiles(path: str, tiles_of: ImageTiles, size: int) -> list[Image.Image]:
    """What any loader must do for an image."""
    with Image.open(path) as opened:
        image = opened.convert("RGB")
    columns, rows = tiles_of.grid.columns, tiles_of.grid.rows
    grid = image.resize((size * columns, size * rows), Image.Resampling.BICUBIC)
    tiles = []
    for cell in range(columns * rows):
        top, left = cell // columns * size, cell % columns * size
        tiles.append(grid.crop((left, top, left + size, top + size)))
    if tiles_of.grid.has_thumbnail:
        tiles.append(image.resize((size, size), Image.Resampling.BICUBIC))
    return tiles


def compare_workers(work: Path, arch: InternVLArchitecture, *, steps: int = 80) -> None:
    """Tokens per second with 1 and 2 workers once they run, and the CPU time of all processes."""
    rates = []
    print("\nworkers   tokens/s   tiles/s   CPU ms per tile")
    for workers in (1, 2):
        batches = iter(open_loader(work, arch, workers=workers, steps=steps))
        for _ in range(workers + 1):  # processes start, the first packs are made
            next(batches)
        started, before, tokens, tiles = time.perf_counter(), _cpu_of_all(), 0, 0
        for step in batches:
            tokens += sum(document.num_tokens for batch in step for document in batch.layout.documents)
            tiles += sum(batch.num_tiles for batch in step)
            after = _cpu_of_all()
        seconds = time.perf_counter() - started
        rates.append(tokens / seconds)
        cpu_ms = 1e3 * (after - before) / tiles
        print(f"{workers:7}   {tokens / seconds:8,.0f}   {tiles / seconds:7,.1f}   {cpu_ms:15.2f}")
    speed = rates[1] / rates[0]
    verdict(
        "2 workers against 1 on two idle cores",
        f"{speed:.2f}x",
        target=f">= {TARGET_SPEED}x",
        is_met=speed >= TARGET_SPEED,
    )


def show_shares(work: Path, arch: InternVLArchitecture, *, ranks: int = 4, steps: int = 4) -> None:
    """Tiles and pixels that each rank of cp 4 decodes."""
    print(f"\nshare of each rank at cp {ranks}, {steps} packs")
    print(
        "rank   tiles     share   furthest from a quarter of a pack   images opened   source megapixels   CPU"
    )
    whole_ms = _cpu_ms(lambda: list(open_loader(work, arch, steps=steps)))
    furthest = 0.0
    for rank in range(ranks):
        opened: list[OpenedImage] = []
        restore = _spy(opened.append)
        try:
            batches: list[Any] = []
            loader = open_loader(work, arch, tile=(rank, ranks), steps=steps)
            own_ms = _cpu_ms(lambda loader=loader, batches=batches: batches.extend(loader))  # type: ignore[misc]
        finally:
            restore()
        packs = [batch for step in batches for batch in step]
        own, total = sum(len(pack.tiles) for pack in packs), sum(pack.num_tiles for pack in packs)
        worst = max(abs(len(pack.tiles) - pack.num_tiles / ranks) for pack in packs)
        furthest = max(furthest, worst)
        source = sum(image.size[0] * image.size[1] for _, image in opened) / 1e6
        print(
            f"{rank:4}   {own:5}   {own / total:7.2%}   {worst:28.2f} tiles   {len(opened):13}   {source:17.1f}   "
            f"{own_ms / whole_ms:.0%}"
        )
    verdict(
        f"tiles of a rank of cp {ranks}",
        f"at most {furthest:.2f} tiles from an equal share of a pack",
        target="1 tile",
        is_met=furthest <= 1,
    )


def _spy(note: Callable[[OpenedImage], None]) -> Callable[[], None]:
    """Report each image that is opened; returns what ends it."""
    real = ImageFile.open_range

    def open_range(file: ImageFile, own: MediumTiles, *rest: Any) -> None:
        note((file.path, own.images[0]))
        real(file, own, *rest)

    ImageFile.open_range = open_range  # type: ignore[method-assign]

    def restore() -> None:
        ImageFile.open_range = real  # type: ignore[method-assign]

    return restore


def _cpu_ms(work: Callable[[], Any]) -> float:
    before = resource.getrusage(resource.RUSAGE_SELF)
    work()
    after = resource.getrusage(resource.RUSAGE_SELF)
    return 1e3 * (after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)


def _cpu_of_all() -> float:
    """CPU seconds of this process and of those below it that are alive."""
    processes: Sequence[psutil.Process] = [psutil.Process(), *psutil.Process().children(recursive=True)]
    total = 0.0
    for process in processes:
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system
    return total
