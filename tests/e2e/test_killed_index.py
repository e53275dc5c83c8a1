"""index-data killed as a whole in the middle: its workers end, and the next start loses less than 5 s of work."""

import json
import signal
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest

from tests.support.mixture import HF_FOLDER, empty_mixture, record

MAX_LOST_S = 5.0
WORDS = ["the", "river", "runs", "past", "an", "old", "stone", "bridge", "while", "two", "dogs", "sleep"]


def command(mixture, cache):
    sizes = ["data.max_sample_tokens=4096", "data.max_pack_tokens=4096"]
    meta = ["--meta", str(mixture.folder / "meta.json"), "--checkpoint", str(HF_FOLDER)]
    return [
        *(sys.executable, "-m", "megatron_v2pe", "index-data"),
        *(*meta, "--cache-dir", str(cache), "--workers", "2", *sizes),
    ]


def lines_on_disk(cache):
    """Lines that the written parts cover, and the time of the newest part."""
    count, newest = 0, 0.0
    for part in cache.glob("*/parts-*/part-*.npz"):
        with np.load(part) as stored:
            facts = json.loads(stored["facts"].tobytes())
        count += sum(lines for _, _, _, lines in facts["ranges"])
        newest = max(newest, part.stat().st_mtime)
    return count, newest


@pytest.mark.slow
def test_a_killed_pass_goes_on_where_it_was(tmp_path):
    mixture, cache = empty_mixture(tmp_path), tmp_path / "cache"
    generator = np.random.default_rng(0)
    records = [record(" ".join(generator.choice(WORDS, 400)), "a thing") for _ in range(15000)]
    mixture.write(records)
    pass_ = subprocess.Popen(
        command(mixture, cache), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while lines_on_disk(cache)[0] == 0:
        assert pass_.poll() is None, pass_.communicate()[1]
        time.sleep(0.05)
    time.sleep(1.5)  # somewhere between two parts
    workers = psutil.Process(pass_.pid).children(recursive=True)
    assert len(workers) > 2
    killed_at = time.time()
    pass_.send_signal(signal.SIGKILL)
    pass_.communicate()
    _, alive = psutil.wait_procs(workers, timeout=20)
    assert not alive, alive
    kept, newest = lines_on_disk(cache)
    assert 0 < kept < len(records)
    assert killed_at - newest < MAX_LOST_S

    again = subprocess.run(command(mixture, cache), capture_output=True, text=True, timeout=300, check=False)
    assert again.returncode == 0, again.stderr
    whole = subprocess.run(
        command(mixture, tmp_path / "other"), capture_output=True, text=True, timeout=300, check=False
    )
    assert again.stdout == whole.stdout
    assert "15,000" in again.stdout
