"""Copies in host memory, and how much of it a process may take: the machine's, or its job's."""

import psutil
import pytest
import torch

from megatron_v2pe.checkpoint.state import host_memory
from megatron_v2pe.checkpoint.state.host_memory import HostCopy, available_bytes, shortage
from megatron_v2pe.checkpoint.state.ranks import ensure_process_group

GIB = 2**30


def tensors():
    whole = torch.arange(24, dtype=torch.float32).view(4, 6)
    return [whole, whole.t(), torch.tensor(7), torch.ones(3, dtype=torch.bfloat16), torch.empty(0, 5)]


def test_copies_are_equal_contiguous_and_independent():
    given = tensors()
    copies = HostCopy(is_pinned=False).copy(given)
    for tensor, copy in zip(given, copies, strict=True):
        assert torch.equal(tensor, copy)
        assert copy.dtype == tensor.dtype
        assert copy.is_contiguous()
    given[0].zero_()
    assert copies[0].sum() == copies[1].sum() == 276


def test_the_block_is_used_again():
    memory = HostCopy(is_pinned=False)
    first = memory.copy(tensors())
    size = memory.num_bytes
    second = memory.copy(tensors())
    assert [copy.data_ptr() for copy in first[:4]] == [copy.data_ptr() for copy in second[:4]]
    assert memory.num_bytes == size
    memory.copy([*tensors(), torch.ones(1000)])
    assert memory.num_bytes > size


def fake_group(root, *, path, files, controllers):
    """A /proc and a /sys/fs/cgroup with one group."""
    (root / "proc" / "self").mkdir(parents=True)
    (root / "proc" / "self" / "cgroup").write_text(f"7:cpu,cpuacct:/\n3:{controllers}:{path}\n")
    folder = root / "cgroup" / ("memory" if controllers else "") / path.strip("/")
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_text(content)
    return root / "proc", root / "cgroup"


V2 = {
    "memory.max": "8589934592\n",
    "memory.current": "6442450944\n",
    "memory.stat": "inactive_file 1073741824\n",
}
V1 = {
    "memory.limit_in_bytes": "8589934592\n",
    "memory.usage_in_bytes": "6442450944\n",
    "memory.stat": "inactive_file 5\ntotal_inactive_file 1073741824\n",
}


@pytest.mark.parametrize(("files", "controllers"), [(V2, ""), (V1, "memory")])
@pytest.mark.parametrize("path", ["/", "/slurm/job_7"])
def test_a_jobs_limit_counts_and_page_cache_does_not(tmp_path, monkeypatch, files, controllers, path):
    machine = psutil.virtual_memory()._replace(available=100 * GIB)
    monkeypatch.setattr(host_memory.psutil, "virtual_memory", lambda: machine)
    assert available_bytes(*fake_group(tmp_path, path=path, files=files, controllers=controllers)) == 3 * GIB


def test_the_limit_of_a_group_around_the_own_one_counts(tmp_path, monkeypatch):
    machine = psutil.virtual_memory()._replace(available=100 * GIB)
    monkeypatch.setattr(host_memory.psutil, "virtual_memory", lambda: machine)
    proc, cgroups = fake_group(tmp_path, path="/job", files=V2, controllers="")
    (proc / "self" / "cgroup").write_text("0::/job/step_0\n")
    inner = cgroups / "job" / "step_0"
    inner.mkdir()
    for name, content in {**V2, "memory.max": "max\n"}.items():
        (inner / name).write_text(content)
    assert available_bytes(proc, cgroups) == 3 * GIB


def test_without_limits_the_machines_memory_counts(tmp_path, monkeypatch):
    machine = psutil.virtual_memory()._replace(available=2 * GIB)
    monkeypatch.setattr(host_memory.psutil, "virtual_memory", lambda: machine)
    assert available_bytes(tmp_path / "no_proc", tmp_path) == 2 * GIB


def test_a_shortage_names_the_host_and_both_numbers(monkeypatch):
    monkeypatch.setattr(host_memory, "available_bytes", lambda: 10 * GIB)
    monkeypatch.setattr(host_memory.socket, "gethostname", lambda: "node7")
    with ensure_process_group():
        assert shortage(8 * GIB) == ""
        message = shortage(9 * GIB)
    assert message == (
        "ranks on node7 need 9.00 GiB of host memory for it; 10.00 GiB are available, of which 80% may be used"
    )


def test_pinned_blocks_are_rounded_up_to_powers_of_two():
    """As torch's allocator of pinned memory does; what is asked for must be what will be used."""
    pinned, plain = HostCopy(is_pinned=True), HostCopy(is_pinned=False)
    assert [pinned.block_bytes(size) for size in (0, 1, 1024, 1025, 3 << 30)] == [0, 1, 1024, 2048, 4 << 30]
    assert plain.block_bytes(1025) == 1025
