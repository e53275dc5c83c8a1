"""Two processes convert to the same bytes as one; what one of them meets ends both; layouts of a run do not matter."""

from pathlib import Path

import pytest
import torch

from megatron_v2pe.checkpoint.convert import import_plan
from megatron_v2pe.checkpoint.convert.export_hf import export_hf
from megatron_v2pe.checkpoint.convert.import_hf import import_hf
from megatron_v2pe.checkpoint.files import range_reader
from megatron_v2pe.checkpoint.hf.weights import HFWeights
from megatron_v2pe.core.errors import CheckpointError
from tests.support.hf_folders import GOLDEN, folder_bytes, golden_copy, random_folder
from tests.support.spawn import run_ranks

pytestmark = pytest.mark.distributed
FAMILIES = sorted(path.parent.name for path in GOLDEN.parent.glob("*/model.safetensors"))
SMALL_FILE = 100_000  # so that a tiny model has many files, and each rank some


def both_ways(rank, world_size, sources, target):
    """Import and export each source on these ranks; returns the bytes that this rank wrote of each."""
    import_plan.STATE_FILE_BYTES = SMALL_FILE
    shares = {}
    for name, source in sources.items():
        imported, exported = [], []
        import_hf(source, f"{target}/{name}_ckpt", progress=imported.append)
        export_hf(f"{target}/{name}_ckpt", f"{target}/{name}_back", progress=exported.append)
        shares[name] = (sum(imported), sum(exported))
    return shares


def test_two_processes_write_the_bytes_of_one(tmp_path):
    sources = {name: str(GOLDEN.parent / name) for name in FAMILIES}
    sources["sharded"] = str(
        random_folder(tmp_path / "hf", shards=3, dtype=torch.bfloat16, llm={"vocab_size": 50}, vision={})
    )
    (tmp_path / "two").mkdir()
    (tmp_path / "one").mkdir()
    shares = run_ranks(both_ways, 2, sources, str(tmp_path / "two"), timeout=120)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(import_plan, "STATE_FILE_BYTES", SMALL_FILE)
        for name, source in sources.items():
            import_hf(source, tmp_path / "one" / f"{name}_ckpt")
    for name, source in sources.items():
        one, two = (folder_bytes(tmp_path / kind / f"{name}_ckpt") for kind in ("one", "two"))
        assert sorted(one) == sorted(two)
        assert [path for path in one if one[path] != two[path]] == []
        assert folder_bytes(tmp_path / "two" / f"{name}_back") == folder_bytes(Path(source))
        total = sum(file.num_bytes for file in HFWeights(source).files)
        for mine, theirs in zip(shares[0][name], shares[1][name], strict=True):
            assert mine + theirs == total
            assert min(mine, theirs) > total / 4  # the work is shared


def damaged_for_one(rank, world_size, source, target):
    """Rank 1 loses the source in the middle of an import; returns what each rank said."""
    import_plan.STATE_FILE_BYTES = SMALL_FILE
    if rank == 1:
        range_reader.RangeReader.read_into = lambda *args, **kwargs: (_ for _ in ()).throw(OSError(5, "gone"))
    try:
        import_hf(source, target)
    except CheckpointError as error:
        return str(error)
    return ""


def test_an_error_on_one_rank_ends_all_and_leaves_nothing(tmp_path):
    source = golden_copy(tmp_path / "hf")
    for message in run_ranks(damaged_for_one, 2, str(source), str(tmp_path / "ckpt"), timeout=60):
        assert "cannot be read (gone)" in message
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def resave(rank, world_size, checkpoint, target, sizes):
    """Load a checkpoint into a model of this layout and save the model's own state as a checkpoint."""
    from megatron_v2pe.assembly.build import build_model
    from megatron_v2pe.checkpoint.convert.hf_source import copy_hf_folder
    from megatron_v2pe.checkpoint.files.folder import CheckpointInfo, hf_path, state_path, write_info
    from megatron_v2pe.checkpoint.state.model_state import load_model_weights, model_sharded_state_dict
    from megatron_v2pe.checkpoint.state.ranks import on_first_rank
    from megatron_v2pe.checkpoint.state.save import save_state
    from megatron_v2pe.config.arch.architecture import read_architecture
    from megatron_v2pe.config.schema import ParallelConfig, RunConfig, RuntimeConfig
    from megatron_v2pe.parallel.topology import init_distributed, resolve, shutdown

    config = RunConfig(parallel=ParallelConfig(**sizes), runtime=RuntimeConfig(dtype="float32"))
    plan = resolve(config.parallel, world_size)
    context = init_distributed(plan, seed=1, timeout_minutes=1)
    ranks = context.ranks
    model_chunks = build_model(config, read_architecture(hf_path(checkpoint)), context)
    load_model_weights(checkpoint, model_chunks, ranks=ranks)
    folder = tmp = Path(target)
    on_first_rank(lambda: state_path(tmp).mkdir(parents=True))
    save_state(state_path(folder), model_sharded_state_dict(model_chunks, ranks))
    info = CheckpointInfo(kind="import", step=0, family="", num_parameters=0)
    on_first_rank(
        lambda: (
            copy_hf_folder(hf_path(Path(checkpoint)), hf_path(folder)),
            write_info(folder, info),
        )
    )
    shutdown()


def export(rank, world_size, checkpoint, target):
    export_hf(checkpoint, target)


def round_trip(tmp_path, name, layouts, *, exporters):
    """Import alone, re-save at each layout, export by several numbers of processes."""
    source = GOLDEN.parent / name
    import_hf(source, tmp_path / "ckpt")
    for key, sizes in layouts.items():
        world_size = sizes.get("tp", 1) * sizes.get("pp", 1)
        saved = str(tmp_path / key)
        run_ranks(resave, world_size, str(tmp_path / "ckpt"), saved, sizes, timeout=200)
        for count in exporters:
            target = tmp_path / f"{key}_back{count}"
            if count == 1:
                export_hf(saved, target)
            else:
                run_ranks(export, count, saved, str(target), timeout=200)
            assert folder_bytes(target) == folder_bytes(source), (key, count)


def test_what_a_run_saved_at_tp2_exports_to_the_source(tmp_path):
    round_trip(tmp_path, "a_internlm2_vit300m", {"tp2": {"tp": 2}}, exporters=[1, 2])


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_what_a_run_saved_at_tp2_pp2_exports_to_the_source(tmp_path, name):
    layouts = {"tp2_pp2": {"tp": 2, "pp": 2}, "pp2": {"pp": 2}}
    round_trip(tmp_path, name, layouts, exporters=[1, 2, 4])
