"""What the hashes in checkpoint.json cost: to make them beside writing, and to check them before loading.

    python tools/bench_manifest.py                     1 GiB in 4 files, in a folder beside this one's temporary files
    python tools/bench_manifest.py --gib 4 --files 8 --folder /lustre/me

How to read it. Hashing one file runs on one core; `processor` is what it takes away from other work, `beside` how much
longer writing and flushing the same bytes takes when a thread hashes them on the way (the ratio to trust, both are
from one run; take it on an idle machine). `sizes` and `full` are the two values of checkpoint.verify.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from megatron_v2pe.checkpoint.files.hashing import find_damage, record_files, sha256_file

BLOCK = 8 * 2**20


def write(path: Path, num_bytes: int, *, with_hash: bool) -> None:
    """Write and flush a file of made-up bytes, hashed block by block in a second thread or not at all."""
    blocks = [os.urandom(BLOCK) for _ in range(4)]
    running = hashlib.sha256()
    with ThreadPoolExecutor(1) as hasher, path.open("wb", buffering=0) as file:
        waiting = []
        for start in range(0, num_bytes, BLOCK):
            block = blocks[start // BLOCK % len(blocks)]
            if with_hash:
                waiting.append(hasher.submit(running.update, block))
            file.write(block)
        os.fsync(file.fileno())
        for hashed in waiting:
            hashed.result()


def seconds(act: Callable[[], object]) -> tuple[float, float]:
    """Wall and processor seconds of a call."""
    wall, processor = time.perf_counter(), time.process_time()
    act()
    return time.perf_counter() - wall, time.process_time() - processor


def measure(folder: Path, *, gib: float, num_files: int) -> None:
    """Print the figures."""
    num_bytes = int(gib * 2**30 / num_files) // BLOCK * BLOCK
    total_gib = num_bytes * num_files / 2**30
    paths = [folder / f"file_{number}" for number in range(num_files)]
    plain = hashed = 0.0
    for path in paths:  # in turns, so that both meet the same disk
        plain += seconds(lambda path=path: write(path, num_bytes, with_hash=False))[0]
        hashed += seconds(lambda path=path: write(path, num_bytes, with_hash=True))[0]
    _, processor = seconds(lambda: [sha256_file(path) for path in paths])
    records = record_files(folder, paths)
    sizes, _ = seconds(lambda: find_damage(folder, records))
    full, _ = seconds(lambda: find_damage(folder, records, verify="full"))
    print(f"{total_gib:.2f} GiB in {num_files} files, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    print(f"processor  {processor / total_gib:6.2f} s per GiB to hash, from the page cache")
    print(f"write      {plain / total_gib:6.2f} s per GiB, written and flushed")
    print(f"beside     {hashed / plain:6.2f} x as long when a thread hashes what is written")
    print(f"sizes      {1000 * sizes:6.2f} ms for all files")
    print(f"full       {full / total_gib:6.2f} s per GiB, a thread for each file up to the cores")


def main() -> None:
    """Run the tool."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gib", type=float, default=1.0, help="bytes written, in GiB (default 1)")
    parser.add_argument("--files", type=int, default=4, help="files they are spread over (default 4)")
    parser.add_argument("--folder", help="where to write (default: the folder for temporary files)")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="bench_manifest_", dir=args.folder))
    try:
        measure(folder, gib=args.gib, num_files=args.files)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
