"""A conversion that is stopped, by a signal or a full disk, leaves nothing that looks like a finished one."""

import os
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

from megatron_v2pe.checkpoint.convert.export_hf import export_hf
from megatron_v2pe.checkpoint.convert.import_hf import import_hf
from megatron_v2pe.checkpoint.files.folder import is_complete, read_info
from megatron_v2pe.core.errors import CheckpointError
from megatron_v2pe.verification.bits import verify
from tests.support.hf_folders import random_folder

# The verb, with every block taking its time, so that there is a middle to stop it in.
SLOW_VERB = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
from megatron_v2pe.checkpoint.files import block_stream
from megatron_v2pe.cli.main import main

write = block_stream.os.pwrite
class SlowOS:
    def __getattr__(self, name):
        return getattr(block_stream_os, name)
    @staticmethod
    def pwrite(*args):
        time.sleep(0.05)
        return write(*args)
block_stream_os = block_stream.os
block_stream.os = SlowOS()
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source") / "hf"
    return random_folder(folder, shards=2, dtype=torch.float32, llm={"vocab_size": 600}, vision={})


@pytest.fixture(scope="module")
def imported(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("imported") / "ckpt"
    import_hf(source, folder)
    return folder


def stopped(arguments, unfinished, *, by):
    """Start a verb, send a signal when it has written some data; returns its exit code and stderr."""
    command = [sys.executable, "-c", SLOW_VERB, *map(str, arguments)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        end = time.monotonic() + 60
        while not any(path.stat().st_size for path in unfinished.rglob("*.distcp")) and not any(
            unfinished.glob("*.safetensors")
        ):
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < end
            time.sleep(0.02)
        process.send_signal(by)
        _, error = process.communicate(timeout=30)
    finally:
        process.kill()
    return process.returncode, error


@pytest.mark.parametrize("verb", ["import-hf", "export-hf"])
def test_killed(source, imported, tmp_path, verb):
    given = source if verb == "import-hf" else imported
    target = tmp_path / "target"
    code, _ = stopped([verb, given, target], tmp_path / "target.incomplete", by=signal.SIGKILL)
    assert code == -signal.SIGKILL
    assert not target.exists()
    left = tmp_path / "target.incomplete"
    assert left.is_dir()
    assert not is_complete(left)
    if verb == "import-hf":
        with pytest.raises(CheckpointError, match=r"no checkpoint\.json"):
            read_info(left)
        import_hf(source, target)
        assert verify(source, target).is_equal
    else:
        export_hf(imported, target)
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


@pytest.mark.parametrize("verb", ["import-hf", "export-hf"])
def test_control_c_leaves_nothing(source, imported, tmp_path, verb):
    given = source if verb == "import-hf" else imported
    code, error = stopped(
        [verb, given, tmp_path / "target"], tmp_path / "target.incomplete", by=signal.SIGINT
    )
    assert code == 130
    assert "Traceback" not in error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("verb", ["import-hf", "export-hf"])
def test_a_write_that_fails_half_way_is_one_message(source, imported, tmp_path, verb):
    """A limit on file sizes ends a write in the middle, as a quota does."""
    given = source if verb == "import-hf" else imported
    command = [sys.executable, "-m", "megatron_v2pe", verb, str(given), str(tmp_path / "target")]
    limit = 200_000

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    done = subprocess.run(command, preexec_fn=limited, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2, done.stderr
    assert "cannot be written" in done.stderr
    assert "File too large" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.fixture
def tiny_disk(tmp_path):
    """A file system of 512 KiB."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    mount = shutil.which("mount")
    command = [mount or "mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(folder)]
    if mount is None or os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("has_forecast", [True, False])
def test_a_full_disk(source, imported, tiny_disk, monkeypatch, has_forecast):
    if not has_forecast:  # somebody else filled it in the meantime
        usage = shutil.disk_usage(source)
        monkeypatch.setattr("megatron_v2pe.checkpoint.files.staging.shutil.disk_usage", lambda path: usage)
    message = "GiB free" if has_forecast else "No space left on device"
    with pytest.raises(CheckpointError, match=message):
        import_hf(source, tiny_disk / "target")
    assert not list(tiny_disk.iterdir())
    with pytest.raises(CheckpointError, match=message):
        export_hf(imported, tiny_disk / "target")
    assert not list(tiny_disk.iterdir())
