"""What `private_api` assumes about torch and megatron-core, checked against the installed releases.

A failure here after an upgrade names the assumption; `checkpoint/state/private_api.py` is the file to change.
"""

import ast
import inspect
import pickle
from pathlib import Path

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory
from megatron.core.optimizer.optimizer import ChainedOptimizer
from torch.distributed.checkpoint import CheckpointException, FileSystemReader, FileSystemWriter

import megatron_v2pe.checkpoint
from megatron_v2pe.assembly.build import build_model
from megatron_v2pe.assembly.optim.optimizer import make_moments, wrap_for_training
from megatron_v2pe.checkpoint.state import private_api
from megatron_v2pe.checkpoint.state.load import load_state
from megatron_v2pe.checkpoint.state.ranks import ensure_process_group
from megatron_v2pe.checkpoint.state.save import save_state
from megatron_v2pe.config.schema import RunConfig, RuntimeConfig
from megatron_v2pe.parallel.topology import ParallelPlan, init_distributed, shutdown
from tests.support.parity_cases import ARCH

PACKAGE = Path(megatron_v2pe.checkpoint.__file__).parent
PUBLIC = {  # what other modules of the package import; stable since mcore 0.8 and torch 2.3
    "megatron.core": {"dist_checkpointing"},
    "megatron.core.dist_checkpointing.mapping": {"ShardedTensor", "ShardedObject", "ShardedTensorFactory"},
    "megatron.core.tensor_parallel": {"get_cuda_rng_tracker"},
}


def private_imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("megatron.core"):
            hidden = {alias.name for alias in node.names} - PUBLIC.get(node.module, set())
            yield from (f"{node.module}.{name}" for name in sorted(hidden))
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("torch"):
            yield from (f"{node.module}.{a.name}" for a in node.names if a.name.startswith("_"))
        elif isinstance(node, ast.Attribute) and ast.unparse(node).startswith("torch._C"):
            yield ast.unparse(node)


def test_private_names_are_imported_in_one_file():
    users = {str(path.relative_to(PACKAGE)): set(private_imports(path)) for path in PACKAGE.rglob("*.py")}
    assert {name for name, found in users.items() if found} == {"state/private_api.py"}


def build_halves(key, tensor, replica_id, flattened_range):
    return {
        name: ShardedTensor.from_rank_offsets(key, half, (0, i, 2), replica_id=replica_id)
        for i, (name, half) in enumerate(zip(("gate", "up"), tensor.chunk(2), strict=True))
    }


def state_with_factory():
    tensor = torch.arange(8.0).view(4, 2)
    halves = ShardedTensorFactory(
        "halves", tensor, build_halves, lambda parts: torch.cat(list(parts.values()))
    )
    return {
        "a": {"halves": halves, "one": ShardedTensor.from_rank_offsets("one", torch.ones(3))},
        "b": [1, "x"],
    }


def test_factories_become_shards_in_a_copy_and_are_merged_again():
    state = state_with_factory()
    expanded, factories = private_api.expand_factories(state)
    assert isinstance(state["a"]["halves"], ShardedTensorFactory)
    assert [(shard.key, shard.global_offset) for shard in private_api.shards_in(expanded)] == [
        ("halves", (0, 0)),
        ("halves", (2, 0)),
        ("one", (0,)),
    ]
    loaded = private_api.map_shards(lambda value: getattr(value, "data", value), expanded)
    merged = private_api.merge_factories(loaded, factories)
    assert torch.equal(merged["a"]["halves"], torch.arange(8.0).view(4, 2))
    assert [shard.key for shard in private_api.built_shards(state["a"]["halves"])] == ["halves", "halves"]


@pytest.mark.parametrize(("replica_id", "expected"), [(0, True), ((0, 0), True), (1, False), ((0, 2), False)])
def test_the_first_copy_is_written(replica_id, expected):
    shard = ShardedTensor.from_rank_offsets("one", torch.ones(3), replica_id=replica_id)
    assert private_api.is_written_here(shard) is expected


def test_mcore_saves_plain_values_and_hands_over_the_rest(tmp_path):
    given = []
    with ensure_process_group():
        private_api.save_through_plan(state_with_factory(), tmp_path, given.append, is_checked=True)
    assert {path.name for path in tmp_path.iterdir()} == {"common.pt", "metadata.json"}
    assert len(private_api.shards_in(given[0])) == 3


def test_the_check_finds_an_element_that_no_rank_writes(tmp_path):
    half = {"half": ShardedTensor.from_rank_offsets("half", torch.ones(2), (0, 0, 2))}
    with ensure_process_group():
        with pytest.raises((private_api.CheckpointingException, CheckpointException)):
            private_api.save_through_plan(half, tmp_path, lambda shards: None, is_checked=True)
        private_api.save_through_plan(half, tmp_path, lambda shards: None, is_checked=False)


def test_what_is_planned_and_written_is_what_torch_and_mcore_read(tmp_path):
    """A tensor, an object and a plain value, through planner, writer and mcore's own load."""
    state = {**state_with_factory(), "object": ShardedObject("object", {"seed": 3}, (1,), (0,))}
    with ensure_process_group():
        save_state(tmp_path, state)
        metadata = FileSystemReader(tmp_path).read_metadata()
        loaded = load_state(
            tmp_path, {**state_with_factory(), "object": ShardedObject("object", None, (1,), (0,))}
        )
    assert set(metadata.state_dict_metadata) >= {"halves", "one"}
    assert all(isinstance(value, private_api.StorageInfo) for value in metadata.storage_data.values())
    assert loaded["object"] == {"seed": 3}
    assert loaded["b"] == [1, "x"]
    assert torch.equal(loaded["a"]["halves"], torch.arange(8.0).view(4, 2))


def test_torchs_writer_has_the_steps_that_are_called():
    wanted = {
        "set_up_storage_writer": ["is_coordinator"],
        "prepare_local_plan": ["plan"],
        "prepare_global_plan": ["plans"],
        "finish": ["metadata", "results"],
    }
    for name, arguments in wanted.items():
        assert list(inspect.signature(getattr(FileSystemWriter, name)).parameters)[
            1 : 1 + len(arguments)
        ] == (arguments), name
    planner = private_api.save_planner()
    for name in ("set_up_planner", "create_local_plan", "create_global_plan", "finish_plan", "resolve_data"):
        assert callable(getattr(planner, name)), name
    assert "StorageInfo" in pickle.dumps(private_api.StorageInfo("file", 1, 2)).decode("latin-1")


def test_an_error_of_one_rank_is_named():
    def fail():
        raise OSError(28, "full")

    with ensure_process_group():
        ranks = private_api.all_ranks()
        assert (ranks.rank, ranks.is_coordinator) == (0, True)
        assert ranks.all_gather("step", lambda: 3) == [3]
        assert ranks.reduce_scatter("step", lambda: 3, lambda values: [2 * v for v in values]) == 6
        with pytest.raises(CheckpointException) as caught:
            ranks.all_reduce("step", fail, lambda values: None)
    assert [str(error) for error in private_api.failures_of(caught.value)] == ["[Errno 28] full"]
    plain = ValueError("plain")
    assert private_api.failures_of(plain) == [plain]


def test_the_bytes_of_a_saved_tensor_are_found(tmp_path):
    tensor = torch.arange(100)
    torch.save(tensor, tmp_path / "one.pt")
    with (tmp_path / "one.pt").open("rb") as stream:
        offset = private_api.offset_in_archive(stream, "data/0")
    data = (tmp_path / "one.pt").read_bytes()
    assert data[offset : offset + 800] == tensor.numpy().tobytes()


@pytest.fixture(scope="module")
def trainer():
    """A tiny model with its distributed optimizer, on this process alone."""
    context = init_distributed(ParallelPlan(), seed=0)
    config = RunConfig(runtime=RuntimeConfig(dtype="bfloat16"))
    model_chunks = build_model(config, ARCH, context)
    for parameter in model_chunks[0].parameters():
        torch.nn.init.uniform_(parameter)
    yield wrap_for_training(model_chunks, config)
    shutdown()


def test_a_chain_is_taken_apart_with_equal_step_counts():
    class Chain:
        chained_optimizers = ("first", "second")
        is_synchronized = False

        def _synchronize_steps(self):
            self.is_synchronized = True

    assert callable(ChainedOptimizer._synchronize_steps)
    chain = Chain()
    assert private_api.single_optimizers(chain) == ["first", "second"]
    assert chain.is_synchronized
    assert private_api.single_optimizers("single") == ["single"]


def test_the_distributed_optimizer_gives_ranges_and_states_of_its_parameters(trainer):
    (single,) = private_api.single_optimizers(trainer.optimizer)
    make_moments(trainer.optimizer)
    parameters = private_api.optimized_parameters(single)
    (model,) = trainer.model_chunks
    assert {id(p) for p in parameters} == {id(p) for p in model.parameters() if p.requires_grad}
    ranges = private_api.owned_ranges(single)
    assert private_api.owner_group(single).size() == 1
    for parameter in parameters:
        assert ranges[parameter] == (0, parameter.numel())  # one rank owns all
        states = private_api.owned_states(single, parameter)
        assert set(states) == {"param", "exp_avg", "exp_avg_sq"}
        assert {values.shape for values in states.values()} == {(parameter.numel(),)}
        assert torch.equal(states["param"].bfloat16(), parameter.detach().view(-1))
