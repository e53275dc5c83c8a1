"""Slices of a Hugging Face folder: any box of any parameter equals the same box of the imported checkpoint."""

import numpy as np
import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from megatron_v2pe.checkpoint.convert.export_hf import export_hf
from megatron_v2pe.checkpoint.convert.hf_source import copy_hf_folder, open_hf
from megatron_v2pe.checkpoint.convert.import_hf import import_hf
from megatron_v2pe.checkpoint.convert.load_hf import BoxReader
from megatron_v2pe.checkpoint.files.folder import hf_path, state_path
from megatron_v2pe.checkpoint.state.reader import StateReader
from tests.support.hf_folders import GOLDEN, folder_bytes

KEYS = sorted(path.name for path in GOLDEN.parent.iterdir() if (path / "model.safetensors").is_file())


def shard(key, whole, box, *, global_shape=None, dtype=None):
    """The shard of `key` that covers `box`, with nonsense in it."""
    shape = [part.stop - part.start for part in box]
    data = torch.full(shape, float("nan"), dtype=dtype or whole.dtype)
    return ShardedTensor(
        key=key,
        data=data,
        dtype=data.dtype,
        local_shape=tuple(shape),
        global_shape=tuple(global_shape or whole.shape),
        global_offset=tuple(part.start for part in box),
        axis_fragmentations=None,
        allow_shape_mismatch=global_shape is not None,
    )


@pytest.fixture(scope="module", params=KEYS)
def folder(request, tmp_path_factory):
    """A golden folder, and the tensors of its import."""
    target = tmp_path_factory.mktemp("hf_load") / "ckpt"
    import_hf(GOLDEN.parent / request.param, target)
    reader = StateReader(state_path(target))
    return GOLDEN.parent / request.param, {key: reader.read(key) for key in reader.tensors}


def reader_of(path):
    weights, _, names = open_hf(path)
    return BoxReader(weights, names)


def test_every_parameter_whole(folder):
    path, tensors = folder
    reader = reader_of(path)
    for key, whole in tensors.items():
        asked = shard(key, whole, [slice(0, size) for size in whole.shape])
        assert list(reader.problems(asked)) == []
        assert torch.equal(reader.filled(asked), whole), key
    assert reader.num_bytes == sum(whole.numel() * whole.itemsize for whole in tensors.values())


def test_any_box_reads_its_own_bytes_and_no_others(folder):
    path, tensors = folder
    generator = np.random.default_rng(0)
    for key, whole in tensors.items():
        ends = [sorted(generator.choice(size + 1, 2, replace=False)) for size in whole.shape]
        box = tuple(slice(int(a), int(b)) for a, b in ends)
        reader = reader_of(path)
        assert torch.equal(reader.filled(shard(key, whole, box)), whole[box]), key
        assert reader.num_bytes == whole[box].numel() * whole.itemsize


def test_padding_is_zero_wherever_a_rank_meets_it(folder):
    """A vocabulary padded to four ranks: the third has some real rows, the last has none."""
    path, tensors = folder
    key = "language.embedding.word_embeddings.weight"
    whole = tensors[key]
    rows, columns = whole.shape
    per_rank = rows // 2 - 7
    reader = reader_of(path)
    parts = [
        reader.filled(
            shard(
                key,
                whole,
                (slice(r * per_rank, (r + 1) * per_rank), slice(0, columns)),
                global_shape=(4 * per_rank, columns),
            )
        )
        for r in range(4)
    ]
    padded = torch.cat(parts)
    assert torch.equal(padded[:rows], whole)
    assert not padded[rows:].any()


def test_values_are_rounded_as_a_stored_import_would_be(folder):
    path, tensors = folder
    key = "projector.mlp.linear_fc1.weight"
    whole = tensors[key]
    asked = shard(key, whole, [slice(0, size) for size in whole.shape], dtype=torch.bfloat16)
    assert torch.equal(reader_of(path).filled(asked), whole.bfloat16())


def test_other_shapes_and_unknown_keys_are_problems(folder):
    path, tensors = folder
    reader = reader_of(path)
    key, whole = "projector.norm.weight", tensors["projector.norm.weight"]
    wrong = shard(key, whole, (slice(0, 3),))
    wrong.global_shape = (3,)
    assert list(reader.problems(wrong)) == [f"{key} is {tuple(whole.shape)} in the folder, wanted (3,)"]
    assert list(reader.problems(shard("lm.head", whole, (slice(0, 3),)))) == ["lm.head is not in the folder"]


def test_the_side_folder_of_a_run_is_that_of_an_import(tmp_path):
    """So that what was trained from a folder exports to files like the folder's."""
    import_hf(GOLDEN, tmp_path / "ckpt")
    copy_hf_folder(GOLDEN, tmp_path / "from_hf")
    copy_hf_folder(hf_path(tmp_path / "ckpt"), tmp_path / "from_checkpoint")
    assert folder_bytes(tmp_path / "from_hf") == folder_bytes(tmp_path / "from_checkpoint")
    export_hf(tmp_path / "ckpt", tmp_path / "out")
    assert set(folder_bytes(tmp_path / "from_hf")) - {"weights_layout.json"} < set(
        folder_bytes(tmp_path / "out")
    )
