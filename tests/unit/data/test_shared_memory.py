"""Loading processes where /dev/shm is as small as a container's: every pack arrives, or it is said what is missing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_v2pe.data import pack_reader

SCRIPT = """
import subprocess, sys, logging
from pathlib import Path
from megatron_v2pe.core.errors import DataError
from tests.support.mixture import empty_mixture, record, write_image

def main():
    logging.basicConfig(level=logging.WARNING)
    mixture = empty_mixture(Path(sys.argv[1]))
    names = [f"{number}.png" for number in range(8)]
    for name in names:
        write_image(mixture.folder / "images" / name, 224, 224)
    mixture.write([record("<image>" * 8, "ok", names)] * 4)
    config = mixture.config(steps=3, batch=1, num_workers=1, max_pack_tokens=900)
    alone = mixture.config(steps=3, batch=1, max_pack_tokens=900)
    expected = [batch.tiles.tobytes() for (batch,) in mixture.loader(alone)]
    for size in sys.argv[2:]:
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", "/dev/shm"], check=True)
        try:
            found = [batch.tiles.tobytes() for (batch,) in mixture.loader(config)]
            print(size, "equal" if found == expected else "different", len(found[0]))
        except DataError as error:
            print(size, error)

if __name__ == "__main__":
    main()
"""


def may_unshare():
    return (
        os.geteuid() == 0 and subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode == 0
    )


@pytest.mark.skipif(not may_unshare(), reason="needs the right to mount a /dev/shm of its own")
def test_every_pack_arrives_through_a_small_dev_shm(tmp_path):
    (tmp_path / "run.py").write_text(SCRIPT)
    root = Path(__file__).parents[3]
    done = subprocess.run(
        ["unshare", "-m", sys.executable, str(tmp_path / "run.py"), str(tmp_path), "64k", "1m", "64m"],
        env={**os.environ, "PYTHONPATH": str(root)}, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["64k", "1m", "64m"], done.stderr
    assert all("equal" in line or "/dev/shm has no room for the locks" in line for line in lines), lines
    assert "1m equal" in done.stdout
    assert "/dev/shm has no room for a pack" in done.stderr


def test_without_a_worker_nothing_is_shared(tmp_path):
    import numpy as np

    tiles = np.zeros((2, 3, 4, 4), dtype=np.uint8)
    assert pack_reader.sent_tiles(tiles).data_ptr() == tiles.ctypes.data
