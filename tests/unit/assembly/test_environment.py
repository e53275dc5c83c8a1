"""doctor: what is found and what follows from it."""

import importlib.util
import subprocess
import sys

import pytest
import torch

from megatron_v2pe.assembly import environment
from megatron_v2pe.cli.main import main


def test_the_report_names_everything(capsys):
    assert main(["doctor"]) == 0
    output = capsys.readouterr().out
    for name in (
        "torch",
        "cuda",
        "nccl",
        "transformer engine",
        "apex",
        "megatron-core",
        "slurm",
        "cpu",
        "memory",
    ):
        assert f"  {name} " in output
    for name in ("runtime", "attention and layers", "optimizer Adam"):
        assert f"  {name} " in output
    assert torch.__version__ in output


@pytest.mark.skipif(torch.cuda.is_available(), reason="about hosts without CUDA")
def test_a_host_without_cuda():
    choices = dict(environment.describe_choices())
    assert "gloo" in choices["runtime"]
    assert "native ring attention (no CUDA device)" in choices["attention and layers"]


def install(folder, name, files):
    """A package of that name, found before any other."""
    for file in files:
        path = folder / name / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")


@pytest.fixture
def packages(tmp_path, monkeypatch):
    if importlib.util.find_spec("apex") or importlib.util.find_spec("amp_C"):
        pytest.skip("apex is installed here")
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def test_the_unrelated_apex_is_recognised(packages):
    install(packages, "apex", ["__init__.py", "authentication.py"])
    findings = dict(environment.describe_environment())
    assert "unrelated" in findings["apex"]
    assert not environment.has_nvidia_apex()
    assert environment.adam_source().startswith("this package's")


def test_nvidias_apex_is_recognised(packages, monkeypatch):
    install(packages, "apex", ["__init__.py", "optimizers/fused_adam.py"])
    assert "without CUDA kernels" in dict(environment.describe_environment())["apex"]
    assert not environment.has_nvidia_apex()
    install(packages, "amp_C", ["__init__.py"])
    assert environment.has_nvidia_apex()
    assert environment.adam_source() == "this package's FusedAdam (no CUDA device)"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert environment.adam_source() == "apex's FusedAdam"


def test_slurm_is_asked_for_its_version(tmp_path, monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    command = tmp_path / "sinfo"
    command.write_text(f"#!{sys.executable}\nprint('slurm 24.05')\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert dict(environment.describe_environment())["slurm"] == "slurm 24.05"
    monkeypatch.setenv("SLURM_JOB_ID", "99")
    assert dict(environment.describe_environment())["slurm"] == "inside job 99"


def test_the_module_form_is_the_same_program():
    done = subprocess.run(
        [sys.executable, "-m", "megatron_v2pe", "doctor"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "will use" in done.stdout
