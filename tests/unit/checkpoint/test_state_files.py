"""Our state files are torch_dist: mcore and torch read what is written here, and what they write is read here."""

import io
import queue

import pytest
import torch
import torch.distributed.checkpoint as dcp
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.strategies import filesystem_async

from megatron_v2pe.checkpoint.convert.import_hf import import_hf
from megatron_v2pe.checkpoint.files.folder import state_path
from megatron_v2pe.checkpoint.files.hashing import sha256_file
from megatron_v2pe.checkpoint.files.tensor_files import TensorInfo
from megatron_v2pe.checkpoint.state.ranks import ensure_process_group
from megatron_v2pe.checkpoint.state.reader import StateReader
from megatron_v2pe.checkpoint.state.records import data_offset, load_record, record_frame
from megatron_v2pe.checkpoint.state.save import save_state
from megatron_v2pe.core.errors import CheckpointError
from tests.support.hf_folders import GOLDEN

TENSORS = [
    torch.arange(12, dtype=torch.float32).view(3, 4),
    torch.randn(5).to(torch.bfloat16),
    torch.tensor(7),
    torch.empty(0, 3),
    torch.ones(2, 3, 4, dtype=torch.float16),
]


def info_of(tensor):
    return TensorInfo(tensor.dtype, tuple(tensor.shape))


def bytes_of(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("tensor", TENSORS)
def test_torch_loads_a_record_that_it_did_not_fill_itself(tmp_path, tensor):
    frame = record_frame(info_of(tensor))
    record = frame.head + bytes_of(tensor) + frame.tail
    loaded = torch.load(io.BytesIO(record), weights_only=True)
    assert loaded.dtype == tensor.dtype
    assert torch.equal(loaded, tensor)
    (tmp_path / "file").write_bytes(b"before" + record + b"after")
    offset = data_offset(tmp_path / "file", start=6, length=len(record), info=info_of(tensor))
    assert offset == 6 + len(frame.head)


def test_a_record_of_torch_itself_is_found_and_one_of_strides_is_loaded_whole(tmp_path):
    for tensor in (torch.arange(12.0).view(3, 4)[1:], torch.arange(12.0).view(3, 4).t()):
        stream = io.BytesIO()
        torch.save(tensor, stream)
        record = stream.getvalue()
        (tmp_path / "file").write_bytes(b"before" + record)
        place = {"path": tmp_path / "file", "start": 6, "length": len(record)}
        offset = data_offset(**place, info=info_of(tensor))
        if tensor.is_contiguous():
            data = (tmp_path / "file").read_bytes()[offset : offset + tensor.numel() * 4]
            assert data == bytes_of(tensor)
        else:
            assert offset is None
        assert torch.equal(load_record(**place), tensor)
        with pytest.raises(RuntimeError, match="is expected"):
            data_offset(**place, info=TensorInfo(torch.float32, (3, 3)))


def whole(key, tensor):
    return ShardedTensor.from_rank_offsets(key, tensor)


def test_a_column_split_tensor_is_read_by_rows(tmp_path):
    """As a run at tp 2 leaves row-parallel weights: each file has half of every row."""
    tensor = torch.randn(7, 6)
    shards = {
        str(i): ShardedTensor.from_rank_offsets("w", tensor[:, 3 * i : 3 * i + 3], (1, i, 2)) for i in (0, 1)
    }
    hashes = save_state(tmp_path, shards)
    reader = StateReader(tmp_path)
    assert torch.equal(reader.read("w"), tensor)
    out = torch.empty(3, 6)
    reader.read_rows("w", 2, 5, out)
    assert torch.equal(out, tensor[2:5])
    assert hashes == {"__0_0.distcp": sha256_file(tmp_path / "__0_0.distcp")}


def test_mcores_own_writer_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(filesystem_async, "_results_queue", queue.Queue())  # without a manager process
    tensors = {f"t{i}": tensor for i, tensor in enumerate(TENSORS) if tensor.numel()}
    with ensure_process_group():
        dist_checkpointing.save({key: whole(key, tensor) for key, tensor in tensors.items()}, str(tmp_path))
    reader = StateReader(tmp_path)
    assert set(reader.tensors) == set(tensors)
    assert all(torch.equal(reader.read(key), tensor) for key, tensor in tensors.items())


def test_mcore_and_torch_read_an_imported_checkpoint(tmp_path):
    import_hf(GOLDEN, tmp_path / "ckpt")
    state = state_path(tmp_path / "ckpt")
    reader = StateReader(state)
    request = {
        key: whole(key, torch.empty(info.shape, dtype=info.dtype)) for key, info in reader.tensors.items()
    }
    with ensure_process_group():
        by_mcore = dist_checkpointing.load(request, str(state))
    by_torch = {key: torch.empty(info.shape, dtype=info.dtype) for key, info in reader.tensors.items()}
    dcp.load(by_torch, checkpoint_id=str(state), no_dist=True)
    for key in reader.tensors:
        assert torch.equal(by_mcore[key], reader.read(key))
        assert torch.equal(by_torch[key], reader.read(key))


def test_a_missing_shard_is_no_zeros(tmp_path):
    save_state(tmp_path, {"w": whole("w", torch.randn(4, 2))})
    reader = StateReader(tmp_path)
    reader._shards["w"].clear()
    with pytest.raises(CheckpointError, match="w cannot be read: 8 of its values are not stored"):
        reader.read("w")


def test_a_short_file_is_named(tmp_path):
    save_state(tmp_path, {"w": whole("w", torch.randn(400, 200))})
    path = tmp_path / "__0_0.distcp"
    reader = StateReader(tmp_path)
    path.write_bytes(path.read_bytes()[:100_000])
    with pytest.raises(CheckpointError, match="w cannot be read"):
        reader.read("w")
