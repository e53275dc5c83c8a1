"""The stand-in for CUDA's libraries, built once, and the environment in which torch uses it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import tiny

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


@pytest.fixture(scope="session")
def cuda_python():
    """A Python whose torch is built for CUDA 13."""
    named = os.environ.get("NULLGPU_PYTHON")
    own = ROOT / ".venv-nullgpu" / "bin" / "python"
    python = named or (str(own) if (own.parents[1] / "stamp").exists() else sys.executable)
    ask = "import torch; print(torch.version.cuda or '')"
    done = subprocess.run([python, "-c", ask], capture_output=True, text=True, timeout=120, check=False)
    if not done.stdout.startswith("13."):
        pytest.fail(
            f"{python} has no torch for CUDA 13 ({done.stdout.strip() or done.stderr[-300:]}); run "
            "bash tests/nullgpu/install.sh, or name one in NULLGPU_PYTHON"
        )
    return python


@pytest.fixture(scope="session")
def libraries(cuda_python, tmp_path_factory):
    """Folder with the stand-ins: libnullgpu.so, loaded before torch, and a driver that torch can open."""
    folder = tmp_path_factory.mktemp("nullgpu")
    ask = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
    packages = subprocess.run(
        [cuda_python, "-c", ask], capture_output=True, text=True, check=True
    ).stdout.strip()
    headers = ["-I", HERE / "headers", "-I", Path(packages) / "nvidia" / "cu13" / "include"]
    flags = ["-O1", "-fPIC", "-shared", "-Wall", "-Werror"]
    sources = [HERE / "cuda.cpp", HERE / "nccl.cpp"]
    compile_it = [
        "g++",
        "-std=c++17",
        *flags,
        *headers,
        *sources,
        "-lpthread",
        "-o",
        folder / "libnullgpu.so",
    ]
    subprocess.run(compile_it, check=True, timeout=200)
    subprocess.run(["gcc", *flags, HERE / "driver.c", "-o", folder / "libcuda.so.1"], check=True, timeout=60)
    return folder


def environment(libraries, **changes):
    """Of a process whose torch sees eight H100."""
    return {
        **os.environ,
        "LD_PRELOAD": str(libraries / "libnullgpu.so"),
        "LD_LIBRARY_PATH": str(libraries),
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:False",  # needs a real driver
        "TORCH_NCCL_ENABLE_MONITORING": "0",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        **changes,
    }


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    """A tiny checkpoint and data."""
    folder = tmp_path_factory.mktemp("run")
    return tiny.prepared(folder)


@pytest.fixture
def run(cuda_python, libraries, prepared, tmp_path):
    """(arguments of the driver, overrides, ranks) -> the finished process; the run folder is `tmp_path / "run"`."""

    def start(*overrides, ranks=1, driver=(), **changes):
        launch = (
            ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
        )
        command = [cuda_python, *launch, "-m", "tests.nullgpu.driver", *driver, "train", str(prepared)]
        common = [f"runtime.run_dir={tmp_path / 'run'}", "runtime.dtype=bfloat16", "optim.steps=5"]
        return subprocess.run(
            [*command, *common, *overrides],
            env=environment(libraries, **changes),
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=280,
            check=False,
        )

    return start
