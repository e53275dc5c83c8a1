"""A save in three parts: what is written is the state of the time of the copy, and errors wait for `join`."""

import shutil
import threading

import pytest
import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedObject

from megatron_v2pe.checkpoint.files import block_stream
from megatron_v2pe.checkpoint.state.host_memory import HostCopy
from megatron_v2pe.checkpoint.state.ranks import ensure_process_group
from megatron_v2pe.checkpoint.state.reader import StateReader
from megatron_v2pe.checkpoint.state.save import StateSave, save_state
from megatron_v2pe.core.errors import CheckpointError


def state(seed):
    """Large and small, whole and split, of two dtypes, and an object."""
    generator = torch.Generator().manual_seed(seed)
    large = torch.randn(1500, 2000, generator=generator)  # more than a block
    split = torch.randn(6, 4, generator=generator)
    return {
        "large": ShardedTensor.from_rank_offsets("large", large),
        "half": ShardedTensor.from_rank_offsets("half", large[:3, :5].bfloat16()),
        "columns": [
            ShardedTensor.from_rank_offsets("columns", split[:, 2 * i : 2 * i + 2], (1, i, 2)) for i in (0, 1)
        ],
        "object": ShardedObject("object", {"seed": seed}, (1,), (0,)),
        "plain": [seed, "text"],
    }


def tensors_of(values):
    return [values["large"].data, values["half"].data, *(part.data for part in values["columns"])]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_written_by_a_thread_while_the_tensors_change_as_if_nothing_changed(tmp_path):
    for name in ("waited", "copied"):
        (tmp_path / name).mkdir()
    hashes = save_state(tmp_path / "waited", state(1))
    values = state(1)
    with ensure_process_group():
        save = StateSave(tmp_path / "copied", values)
        assert save.num_bytes == sum(tensor.numel() * tensor.itemsize for tensor in tensors_of(values))
        save.copy_tensors(HostCopy(is_pinned=False))
        for tensor in tensors_of(values):
            tensor.zero_()
        thread = threading.Thread(target=save.write)
        thread.start()
        thread.join()
        assert not save.has_failed
        save.join()
        assert save.complete() == hashes
    assert contents(tmp_path / "copied") == contents(tmp_path / "waited")
    assert StateReader(tmp_path / "copied").read("large").any()


def test_an_error_is_raised_by_join_as_one_message(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    with ensure_process_group():
        save = StateSave(tmp_path, state(1))
        monkeypatch.setattr(block_stream.os, "pwrite", full)
        save.write()
        assert save.has_failed
        with pytest.raises(CheckpointError, match=r"cannot be written \(OSError: .*No space left.*GiB free"):
            save.join()
    assert not (tmp_path / ".metadata").exists()


def test_the_error_is_the_one_of_writing_where_another_rank_has_removed_the_folder(tmp_path, monkeypatch):
    def broken(*args):
        raise OSError(5, "Input/output error")

    folder = tmp_path / "checkpoint"
    folder.mkdir()
    with ensure_process_group():
        save = StateSave(folder, state(1))
        monkeypatch.setattr(block_stream.os, "pwrite", broken)
        save.write()
        shutil.rmtree(folder)
        with pytest.raises(CheckpointError, match=r"cannot be written \(OSError: .*Input/output.*GiB free"):
            save.join()


def test_a_cancelled_save_stops_between_tensors(tmp_path):
    cancelled = threading.Event()
    cancelled.set()
    with ensure_process_group():
        save = StateSave(tmp_path, state(1))
        save.write(cancelled=cancelled)
        with pytest.raises(CheckpointError, match="the save was cancelled"):
            save.join()


def test_a_known_plan_is_used_for_the_same_state_and_made_again_for_another(tmp_path):
    folders = [tmp_path / name for name in ("first", "same", "other", "planned again")]
    for folder in folders:
        folder.mkdir()
    other = {**state(3), "half": ShardedTensor.from_rank_offsets("half", torch.ones(2, 5))}
    with ensure_process_group():
        known = None
        for folder, values in zip(folders[:3], (state(1), state(2), other), strict=True):
            save = StateSave(folder, values, known=known)
            assert (save.known is known) == (folder.name == "same")
            known = save.known
            save.write()
            save.join()
            save.complete()
    assert torch.equal(StateReader(folders[1]).read("large"), state(2)["large"].data)
    assert torch.equal(StateReader(folders[2]).read("half"), torch.ones(2, 5))
    save_state(folders[3], state(2))
    assert contents(folders[1]) == contents(folders[3])
