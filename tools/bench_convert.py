"""Import and export of a random checkpoint with the true shapes of an InternVL, against a plain copy of its files.

    python tools/bench_convert.py --size 2B                    4.4 GB, four times on the disk at most
    python tools/bench_convert.py --size 8B --folder /data     where there is room
    python tools/bench_convert.py --size 26B --layout-only     files, offsets and memory, without a byte of weights
    python tools/bench_convert.py --size my/config.json        a model of other sizes
    python tools/bench_convert.py --size 3.5-30B-A3B --layers 4     4 layers of the language model, in true width

    random weights -> HF folder --copy, sync----> copy
                                --import-hf-----> checkpoint
                                  checkpoint --export-hf--> HF folder     compared byte for byte with the first

How to read it. Copy is shutil.copyfile and fsync of each file. Each step runs in a process of its own, on files that
were evicted from the page cache (`--cache cold`, the default) or read into it (`warm`) just before, with nothing left
to flush. Virtual machines return free memory to their host, and a step that writes there waits for it; so as much
memory as a step will write is allocated and released before it, and no step pays for the one before it.

`ratio` is the rate of a step divided by that of the copy before it; `with start` includes Python's start. `private` is
the peak of private memory (Private_* of /proc/self/smaps_rollup, sampled), `rss` that of all resident memory. The load
is printed because other work on the same cores and disk distorts all figures.
"""

from __future__ import annotations

import argparse
import copy
import json
import mmap
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import pre_tokenizers
from torch import Tensor

from megatron_v2pe.checkpoint.convert.export_hf import export_hf
from megatron_v2pe.checkpoint.convert.import_hf import import_hf
from megatron_v2pe.checkpoint.convert.import_plan import plan_import
from megatron_v2pe.checkpoint.files.block_stream import BLOCK_BYTES, NUM_BUFFERS, Block, BlockStream
from megatron_v2pe.checkpoint.files.hashing import sha256_files
from megatron_v2pe.checkpoint.files.tensor_files import TensorInfo, WeightFile
from megatron_v2pe.checkpoint.hf.name_map import name_map
from megatron_v2pe.checkpoint.hf.weight_files import index_text, plan_weight_files
from megatron_v2pe.config.arch.architecture import parse_architecture
from megatron_v2pe.config.arch.published import PUBLISHED
from megatron_v2pe.core.files import sync_folder

TARGET_RATIO = 0.70
HF_SHARD_BYTES = 5 * 10**9
MIB = 2**20


def hf_config(size: str) -> dict[str, Any]:
    """config.json of a published size, or the one at a path; "SIZE@N" has N layers of the language model.

    Raises:
        SystemExit: neither of both.
    """
    if size in PUBLISHED:
        return PUBLISHED[size]
    if Path(size).is_file():
        return json.loads(Path(size).read_text(encoding="utf-8"))
    if "@" in size:  # as `with_layers` writes it
        name, _, layers = size.rpartition("@")
        config = copy.deepcopy(hf_config(name))
        config["llm_config"]["num_hidden_layers"] = int(layers)
        return config
    raise SystemExit(f"--size is {size!r}, but must be a config.json or one of {', '.join(PUBLISHED)}")


def shapes(size: str) -> dict[str, TensorInfo]:
    """Hugging Face tensors of a model, in the order of their names."""
    names = name_map(parse_architecture(hf_config(size)))
    return {name: TensorInfo(torch.bfloat16, names.hf_shape(name)) for name in sorted(names.by_hf)}


def random_blocks(num_bytes: int, generator: np.random.Generator) -> Iterator[Block]:
    """Random bfloat16 numbers between -2 and 2, some MiB at a time."""

    def fill(memory: Tensor) -> Tensor:
        numbers = np.frombuffer(generator.bytes(memory.numel()), dtype=np.uint16) & np.uint16(0xBFFF)
        memory.copy_(torch.from_numpy(numbers.view(np.uint8)))
        return memory

    for start in range(0, num_bytes, BLOCK_BYTES):
        yield Block(min(BLOCK_BYTES, num_bytes - start), fill)


def make_folder(folder: Path, size: str) -> list[WeightFile]:
    """A Hugging Face folder with random weights, written block by block."""
    folder.mkdir(parents=True)
    files = plan_weight_files(shapes(size), max_shard_bytes=HF_SHARD_BYTES)
    (folder / "config.json").write_text(json.dumps(hf_config(size), indent=2) + "\n")
    write_tokenizer(folder)
    if len(files) > 1:
        (folder / "model.safetensors.index.json").write_text(index_text(files))
    generator = np.random.default_rng(0)
    with BlockStream() as stream:
        for file in files:
            stream.open(folder / file.name)
            stream.put(file.header())
            stream.put_blocks(random_blocks(file.num_bytes, generator))
            stream.close()
    return files


def write_tokenizer(folder: Path) -> None:
    """A tokenizer of single bytes and the tokens of images and turns: import reads it before any weight."""
    letters = pre_tokenizers.ByteLevel.alphabet()
    added = ("<img>", "</img>", "<IMG_CONTEXT>", "<|im_start|>", "<|im_end|>")
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "eos_token": "<|im_end|>",
        "added_tokens_decoder": {
            str(len(letters) + i): {"content": token, "special": True} for i, token in enumerate(added)
        },
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config) + "\n")
    vocabulary = {letter: i for i, letter in enumerate(sorted(letters))}
    (folder / "vocab.json").write_text(json.dumps(vocabulary) + "\n")
    (folder / "merges.txt").write_text("#version: 0.2\n")


def copy_folder(source: Path, target: Path) -> None:
    """Copy the files and wait until they are on the disk."""
    target.mkdir()
    for path in sorted(source.iterdir()):
        shutil.copyfile(path, target / path.name)
        descriptor = os.open(target / path.name, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    sync_folder(target)


STEPS: dict[str, Callable[[Path, Path], Any]] = {
    "copy": copy_folder,
    "import": import_hf,
    "export": export_hf,
}


class PeakMemory:
    """Samples the private memory of this process until `stop`."""

    def __init__(self) -> None:
        self.peak = self.start = self._private()
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Take the last sample."""
        self._is_over.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._is_over.wait(0.02):
            self.peak = max(self.peak, self._private())

    @staticmethod
    def _private() -> int:
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
        return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Private_"))


def back_free_memory(num_bytes: int) -> None:
    """Have the host provide free memory: a child allocates it, as far as it is free, and ends."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    num_bytes = min(num_bytes, int(0.8 * free))
    process = os.fork()
    if process == 0:
        with mmap.mmap(-1, max(1, num_bytes)) as memory:
            for start in range(0, num_bytes, mmap.PAGESIZE):
                memory[start] = 1
        os._exit(0)
    os.waitpid(process, 0)


def child(step: str, source: Path, target: Path) -> None:
    """One step in this process; the figures go to stdout as json."""
    back_free_memory(sum(path.stat().st_size for path in source.rglob("*") if path.is_file()))
    os.sync()
    memory = PeakMemory()
    before, processor = time.perf_counter(), time.process_time()
    STEPS[step](source, target)
    seconds, processor = time.perf_counter() - before, time.process_time() - processor
    memory.stop()
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    figures = {"seconds": seconds, "processor": processor, "private": memory.peak, "rss": rss}
    print(json.dumps(figures | {"start": memory.start}))


def measure(step: str, source: Path, target: Path, cache: str) -> dict[str, float]:
    """Run a step in a fresh process, on files in the wanted state."""
    os.sync()
    for path in (path for path in source.rglob("*") if path.is_file()):
        prepare(path, cache)
    command = [sys.executable, __file__, "--child", step, str(source), str(target)]
    before = time.perf_counter()
    result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    whole = time.perf_counter() - before
    return {**json.loads(result.stdout.splitlines()[-1]), "whole": whole, "load": os.getloadavg()[0]}


def prepare(path: Path, cache: str) -> None:
    """Evict a file from the page cache, or read it into it."""
    with path.open("rb", buffering=0) as file:
        if cache == "cold":
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        else:
            block = bytearray(BLOCK_BYTES)
            while file.readinto(block):
                pass


def compare(one: Path, other: Path) -> bool:
    """Equal names and contents."""
    hashes = [
        {path.relative_to(folder): digest for path, digest in sha256_files(files).items()}
        for folder in (one, other)
        for files in [[path for path in folder.rglob("*") if path.is_file()]]
    ]
    return hashes[0] == hashes[1]


def print_table(rows: list[tuple[str, dict[str, float]]], num_bytes: int) -> bool:
    """Print all figures; True when import and export reach the target."""
    print("| step | seconds | MB/s | ratio | with start | processor s | private MiB | rss MiB | load |")
    print("|---|---|---|---|---|---|---|---|---|")
    is_met, copy_seconds = True, 0.0
    for name, figures in rows:
        copy_seconds = figures["seconds"] if name.startswith("copy") else copy_seconds
        ratio = copy_seconds / figures["seconds"]
        is_met = is_met and ratio >= TARGET_RATIO
        print(
            f"| {name} | {figures['seconds']:.1f} | {num_bytes / 1e6 / figures['seconds']:.0f} | {ratio:.2f} "
            f"| {copy_seconds / figures['whole']:.2f} | {figures['processor']:.1f} "
            f"| {figures['private'] / MIB:.0f} ({figures['start'] / MIB:.0f} at start) | {figures['rss'] / MIB:.0f} "
            f"| {figures['load']:.1f} |"
        )
    return is_met


def run(size: str, folder: Path, cache: list[str], repeats: int) -> bool:
    """Make, copy, import, export, compare."""
    files = make_folder(folder / "hf", size)
    num_bytes = sum(file.num_bytes for file in files)
    print(
        f"{size}: {num_bytes / 1e9:.2f} GB in {len(files)} files, {os.cpu_count()} cores",
        flush=True,
    )
    rows = []
    for state in cache * repeats:
        rows.append((f"copy, {state}", measure("copy", folder / "hf", folder / "copy", state)))
        shutil.rmtree(folder / "copy")
        rows.append((f"import, {state}", measure("import", folder / "hf", folder / "ckpt", state)))
        rows.append((f"export, {state}", measure("export", folder / "ckpt", folder / "back", state)))
        is_equal = compare(folder / "hf", folder / "back")
        print(
            f"{state}: exported folder is {'equal, byte for byte' if is_equal else 'NOT EQUAL'}", flush=True
        )
        shutil.rmtree(folder / "back")
        shutil.rmtree(folder / "ckpt")
        if not is_equal:
            return False
    return print_table(rows, num_bytes)


def layout(size: str) -> bool:
    """Check and print files, offsets and memory of a conversion, without weights."""
    tensors = shapes(size)
    names = name_map(parse_architecture(hf_config(size)))
    plan = plan_import(names.by_ours.values(), tensors, dtype="keep")
    stored = sum(shard.info.num_bytes for shards in plan.files.values() for shard in shards)
    expected = sum(info.num_bytes for info in tensors.values())
    assert stored == expected == 2 * names.num_parameters, "a tensor is missing or twice there"
    row = max(info.row_bytes for info in tensors.values())
    largest = max(tensors.items(), key=lambda item: item[1].num_bytes)
    buffers = NUM_BUFFERS * max(BLOCK_BYTES, row) + 2 * BLOCK_BYTES  # and a block that is cut or cast
    base = PeakMemory._private()
    hf_files = plan_weight_files(tensors, max_shard_bytes=HF_SHARD_BYTES)
    print(f"{size}: {names.num_parameters:,} parameters in {len(tensors)} tensors, {expected / 1e9:.2f} GB")
    print(f"largest tensor {largest[0]} {largest[1].shape}, {largest[1].num_bytes / MIB:.0f} MiB")
    print(f"state: {len(plan.files)} files, {plan.num_bytes / 1e9:.2f} GB, {len(plan.file_of)} shards")
    print(
        f"Hugging Face: {len(hf_files)} files of at most {max(file.num_bytes for file in hf_files) / 1e9:.2f} GB"
    )
    print(
        f"predicted private memory of import or export: {(base + buffers) / MIB:.0f} MiB, of which "
        f"{base / MIB:.0f} MiB are Python, torch and this plan"
    )
    return True


def main() -> int:
    """Command line."""
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]))
        return 0
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--size", default="2B", metavar="SIZE|CONFIG_JSON", help=f"{', '.join(PUBLISHED)} or a config.json"
    )
    parser.add_argument(
        "--folder", type=Path, default=Path(tempfile.gettempdir()), help="on the disk to measure"
    )
    parser.add_argument(
        "--cache", choices=("cold", "warm", "both"), default="cold", help="state of the page cache"
    )
    parser.add_argument(
        "--layers",
        type=int,
        default=0,
        metavar="N",
        help="layers of the language model, where the whole does not fit the disk; default: all",
    )
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--keep", action="store_true", help="leave the Hugging Face folder there")
    parser.add_argument(
        "--layout-only", action="store_true", help="no data: files, offsets, predicted memory"
    )
    options = parser.parse_args()
    if options.layers:
        hf_config(options.size)  # before an unknown size gets a suffix
        options.size = f"{options.size}@{options.layers}"
    if options.layout_only:
        return 0 if layout(options.size) else 1
    folder = Path(tempfile.mkdtemp(prefix=f"bench_convert_{Path(options.size).stem}_", dir=options.folder))
    states = ["cold", "warm"] if options.cache == "both" else [options.cache]
    try:
        is_met = run(options.size, folder, states, options.repeats)
    finally:
        shutil.rmtree(folder / "ckpt", ignore_errors=True)
        shutil.rmtree(folder if not options.keep else folder / "back", ignore_errors=True)
    print(f"target, {TARGET_RATIO}x of the copy: {'met' if is_met else 'NOT met'}")
    if options.keep:
        print(f"kept: {folder / 'hf'}")
    return 0 if is_met else 1


if __name__ == "__main__":
    sys.exit(main())
