"""Checkpoints of the real model across parallel layouts: what one layout writes, every other resumes from, to the bit.

Gradients are made up from the weights, element by element, so that every layout has the same ones and an update
is exact whatever the split; clipping, whose norm sums in another order, is off. The reference is one rank, never
interrupted. Two updates follow each resume: a wrong step count of Adam shows in the second.
"""

import json

import pytest
import torch

from megatron_v2pe.checkpoint.convert.export_hf import export_hf
from megatron_v2pe.checkpoint.convert.import_hf import import_hf
from megatron_v2pe.checkpoint.files.folder import read_info, state_path
from megatron_v2pe.checkpoint.retention import complete_steps, step_path
from megatron_v2pe.checkpoint.state.reader import StateReader
from megatron_v2pe.core.errors import CheckpointError
from megatron_v2pe.verification.bits import verify
from tests.support.hf_folders import folder_bytes, random_folder
from tests.support.spawn import run_ranks

pytestmark = pytest.mark.distributed
VOCABULARY = 650  # 704 rows at tp 1, 768 at tp 2, so that layouts differ in padding too
VOCABULARY_KEYS = ("word_embeddings.weight", "output_layer.weight")


def newest_checkpoint(run_dir):
    steps = complete_steps(run_dir)
    return step_path(run_dir, steps[-1]) if steps else None


def train(rank, world_size, checkpoint, run_dir, sizes, *, steps, dtype="float32", keep=5, optim=None):
    """Resume from `run_dir`, or start from `checkpoint`; update up to step `steps[-1]`, save at each of `steps`."""
    from megatron_v2pe.assembly.build import build_model
    from megatron_v2pe.assembly.optim.optimizer import wrap_for_training
    from megatron_v2pe.checkpoint.files.folder import hf_path
    from megatron_v2pe.checkpoint.load import load_checkpoint
    from megatron_v2pe.checkpoint.run_state import RunState
    from megatron_v2pe.checkpoint.save import CheckpointSave
    from megatron_v2pe.checkpoint.state.model_state import load_model_weights
    from megatron_v2pe.config.arch.architecture import read_architecture
    from megatron_v2pe.config.schema import OptimConfig, ParallelConfig, RunConfig, RuntimeConfig
    from megatron_v2pe.parallel.topology import init_distributed, resolve, shutdown

    config = RunConfig(
        parallel=ParallelConfig(**sizes),
        optim=OptimConfig(**{"lr": 1e-2, "clip_grad": 0.0, "steps": 10, **(optim or {})}),
        runtime=RuntimeConfig(dtype=dtype),
    )
    plan = resolve(config.parallel, world_size)
    context = init_distributed(plan, seed=1, timeout_minutes=1)
    ranks = context.ranks
    model_chunks = build_model(config, read_architecture(hf_path(checkpoint)), context)
    newest = newest_checkpoint(run_dir)
    if newest is None:
        load_model_weights(checkpoint, model_chunks, ranks=ranks)
    trainer = wrap_for_training(model_chunks, config)
    step = 0
    if newest is not None:
        state = load_checkpoint(
            newest, model_chunks=trainer.wrapped, optimizer=trainer.optimizer, ranks=ranks
        )
        step = state.step
        trainer.scheduler.load_state_dict(state.schedule)
    before = torch.rand(3).tolist()
    while step < steps[-1]:
        for model_chunk in trainer.wrapped:
            for parameter in model_chunk.parameters():
                parameter.main_grad.copy_(torch.sin(7 * parameter.detach().float() + step))
        trainer.optimizer.step()
        trainer.scheduler.step(increment=1)
        step += 1
        if step in steps:
            state = RunState(
                step=step,
                consumed_packs=step,
                data_seed=0,
                data_hash="d",
                position_mode="v2pe_fixed",
                position_stride=16,
                schedule=trainer.scheduler.state_dict(),
            )
            save = CheckpointSave(
                run_dir,
                model_chunks=trainer.wrapped,
                optimizer=trainer.optimizer,
                run_state=state,
                ranks=ranks,
                hf_folder=hf_path(checkpoint),
                keep=keep,
            )
            save.write()
            save.join()
            save.commit()
            save.finish()
    shutdown()
    return before, torch.rand(3).tolist()


def train_kwargs(rank, world_size, checkpoint, run_dir, sizes, kwargs):
    return train(rank, world_size, checkpoint, run_dir, sizes, **kwargs)


def run(world_size, checkpoint, run_dir, sizes, **kwargs):
    return run_ranks(train_kwargs, world_size, checkpoint, run_dir, sizes, kwargs, timeout=120)


def tensors(folder):
    """All tensors of a checkpoint, vocabulary padding cut off."""
    reader = StateReader(state_path(folder))
    found = {key: reader.read(key) for key in reader.tensors}
    return {
        key: value[:VOCABULARY] if key.endswith(VOCABULARY_KEYS) else value for key, value in found.items()
    }


def assert_same(one, other):
    assert set(one) == set(other)
    different = [key for key in one if not torch.equal(one[key], other[key])]
    assert different == []


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source") / "hf"
    return random_folder(folder, shards=1, dtype=torch.float32, llm={"vocab_size": VOCABULARY}, vision={})


@pytest.fixture(scope="module")
def imported(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("imported") / "ckpt"
    import_hf(source, folder)
    return str(folder)


@pytest.fixture(scope="module")
def reference(imported, tmp_path_factory):
    """One rank, steps 1 to 6 in one go."""
    run_dir = tmp_path_factory.mktemp("reference")
    run(1, imported, str(run_dir), {}, steps=[2, 4, 6])
    return run_dir


def test_a_run_resumes_at_any_layout(imported, reference, tmp_path):
    """tp 2 with sequence parallelism, then pp 2, then cp 2: two updates each."""
    layouts = [{"tp": 2, "sequence_parallel": True}, {"pp": 2}, {"cp": 2}]
    for step, sizes in zip((2, 4, 6), layouts, strict=True):
        run(2, imported, str(tmp_path), sizes, steps=[step])
        assert_same(tensors(step_path(tmp_path, step)), tensors(step_path(reference, step)))
        topology = read_info(step_path(tmp_path, step)).topology
        assert topology == {"world_size": 2, "tp": 1, "pp": 1, "cp": 1, "dp": 1} | {
            key: value for key, value in sizes.items() if key != "sequence_parallel"
        }


PARTS = {"lr_vision": 2e-3, "lr_projector": 3e-2, "vision_layer_decay": 0.5}


def test_learning_rates_by_part_resume_at_any_layout(imported, reference, tmp_path):
    """Many groups, found again at every hop, each with its rate; the last stage of pp 2 has none of the tower's."""
    run(1, imported, str(tmp_path / "whole"), {}, steps=[2, 4, 6], optim=PARTS)
    layouts = [{"tp": 2, "sequence_parallel": True}, {"pp": 2}, {}]
    for step, sizes in zip((2, 4, 6), layouts, strict=True):
        run(2, imported, str(tmp_path / "hops"), sizes, steps=[step], optim=PARTS)
        found, wanted = (tensors(step_path(tmp_path / name, step)) for name in ("hops", "whole"))
        assert_same(found, wanted)
    plain = tensors(step_path(reference, 2))
    changed = {key.split(".")[0] for key, value in wanted.items() if not torch.equal(value, plain[key])}
    assert changed >= {"vision", "projector"}


def test_a_resumed_run_learns_at_the_rates_it_is_configured_with(imported, tmp_path):
    """Another lr, other groups, another decay rule than the checkpoint's.

    The first step of a warm-up has the rate 0, so after it the two runs differ in their groups alone.
    """
    warmup = {"warmup_steps": 2, "weight_decay": 0.3}
    first, then = {**warmup, **PARTS}, {**warmup, "lr": 5e-3, "lr_language": 1e-3, "decay": "release"}
    run(1, imported, str(tmp_path / "resumed"), {}, steps=[1], optim=first)
    run(1, imported, str(tmp_path / "resumed"), {}, steps=[3], optim=then)
    run(1, imported, str(tmp_path / "whole"), {}, steps=[3], optim=then)
    assert_same(*(tensors(step_path(tmp_path / name, 3)) for name in ("resumed", "whole")))


def test_from_two_data_parallel_ranks_to_one_and_generators_on_the_same_layout(imported, reference, tmp_path):
    run(2, imported, str(tmp_path), {}, steps=[1, 2], keep=1)
    assert complete_steps(tmp_path) == [2]
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step_00000002\n"
    assert_same(tensors(step_path(tmp_path, 2)), tensors(step_path(reference, 2)))
    ((_, drawn_after_save),) = run(1, imported, str(tmp_path), {}, steps=[4])
    assert_same(tensors(step_path(tmp_path, 4)), tensors(step_path(reference, 4)))
    ((drawn_after_load, _),) = run(1, imported, str(tmp_path), {}, steps=[4])
    assert drawn_after_load == drawn_after_save


def test_bfloat16_weights_load_from_float32_and_export_in_bfloat16(imported, tmp_path):
    run(1, imported, str(tmp_path), {}, steps=[1], dtype="bfloat16")
    found = tensors(step_path(tmp_path, 1))
    name = "language.decoder.layers.0.self_attention.linear_qkv.weight"
    assert found[name].dtype == torch.bfloat16
    assert found["optimizer.state.param." + name].dtype == torch.float32
    assert torch.equal(found["optimizer.state.param." + name].bfloat16(), found[name])
    export_hf(step_path(tmp_path, 1), tmp_path / "hf")
    info = import_hf(tmp_path / "hf", tmp_path / "again")
    assert info.num_parameters == read_info(imported).num_parameters


def test_a_training_checkpoint_carries_its_positions_and_exports(source, reference, tmp_path):
    folder = newest_checkpoint(reference)
    export_hf(folder, tmp_path / "hf")
    before, after = (json.loads((path / "config.json").read_text()) for path in (source, tmp_path / "hf"))
    assert after == {**before, "rope_pos_id_version": "v2pe_fix", "rope_pos_id_stride": 16}
    given, exported = folder_bytes(source), folder_bytes(tmp_path / "hf")
    assert {name: len(data) for name, data in given.items() if name != "config.json"} == {
        name: len(data) for name, data in exported.items() if name != "config.json"
    }
    changed = {name for name in given if given[name] != exported[name]}
    assert changed == {"config.json", "model-00001-of-00001.safetensors"}
    report = verify(source, folder)
    assert len(report.different) == report.num_source == 55
    assert report.unexpected == []


def load_weights_only(rank, world_size, checkpoint, sizes):
    """Load at this layout, save again without an update; returns the rows of the local embedding."""
    from megatron_v2pe.assembly.build import build_model
    from megatron_v2pe.checkpoint.files.folder import hf_path
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
    (model,) = build_model(config, read_architecture(hf_path(checkpoint)), context)
    for parameter in model.parameters():
        parameter.data.fill_(float("nan"))
    load_model_weights(checkpoint, [model], ranks=ranks)
    folder = state_path(checkpoint).with_name("resaved")
    on_first_rank(folder.mkdir)
    save_state(folder, model_sharded_state_dict([model], ranks))
    shutdown()
    return model.language.embedding.word_embeddings.weight.detach() if ranks.is_first_stage else None


def test_imported_weights_come_back_from_a_layout_with_padded_vocabulary(source, tmp_path):
    """The model has more rows than the vocabulary, the imported checkpoint has not; the padding is zero."""
    checkpoint = tmp_path / "ckpt"
    import_hf(source, checkpoint)
    results = run_ranks(load_weights_only, 2, str(checkpoint), {"tp": 2}, timeout=120)
    before, after = StateReader(state_path(checkpoint)), StateReader(checkpoint / "resaved")
    assert set(before.tensors) == set(after.tensors)
    for key in before.tensors:
        whole = after.read(key)
        rows = before.tensors[key].shape[0]
        assert torch.equal(whole[:rows], before.read(key)), key
        assert not whole[rows:].any(), key
    embedding = torch.cat([part for part in results if part is not None])
    assert embedding.shape[0] == 768
    assert not embedding[VOCABULARY:].any()


def load_expecting_refusal(rank, world_size, mine, other):
    """Load `other` into a model built for `mine`; returns the message."""
    from megatron_v2pe.assembly.build import build_model
    from megatron_v2pe.checkpoint.files.folder import hf_path
    from megatron_v2pe.checkpoint.state.model_state import load_model_weights
    from megatron_v2pe.config.arch.architecture import read_architecture
    from megatron_v2pe.config.schema import ParallelConfig, RunConfig
    from megatron_v2pe.parallel.topology import init_distributed, resolve, shutdown

    config = RunConfig(parallel=ParallelConfig(pp=world_size))
    plan = resolve(config.parallel, world_size)
    context = init_distributed(plan, seed=1, timeout_minutes=1)
    ranks = context.ranks
    model_chunks = build_model(config, read_architecture(hf_path(mine)), context)
    try:
        load_model_weights(other, model_chunks, ranks=ranks)
    except CheckpointError as error:
        message = str(error)
    shutdown()
    return message


def test_another_model_is_refused_on_all_stages_though_one_alone_sees_it(imported, tmp_path):
    other = random_folder(
        tmp_path / "hf", shards=1, dtype=torch.float32, llm={}, vision={"intermediate_size": 20}
    )
    import_hf(other, tmp_path / "other")
    messages = run_ranks(load_expecting_refusal, 2, imported, str(tmp_path / "other"), timeout=120)
    assert messages[0] == messages[1]
    assert "checkpoint of another model" in messages[0]
    assert "mlp.linear_fc1.weight is stored as (20, 64), wanted (96, 64)" in messages[0]


def save_with_full_disk(rank, world_size, checkpoint, run_dir):
    from megatron_v2pe.checkpoint.files import staging

    usage = staging.shutil.disk_usage(run_dir)
    staging.shutil.disk_usage = lambda path: usage._replace(free=10)
    try:
        train(rank, world_size, checkpoint, run_dir, {}, steps=[1])
    except CheckpointError as error:
        return str(error)
    return ""


def test_a_failed_save_is_raised_on_all_ranks_and_leaves_nothing(imported, tmp_path):
    messages = run_ranks(save_with_full_disk, 2, imported, str(tmp_path), timeout=120)
    assert messages[0] == messages[1]
    assert "its disk has" in messages[0]
    assert complete_steps(tmp_path) == []
    assert not list(tmp_path.rglob("*.incomplete"))


def save_with_one_failing_rank(rank, world_size, checkpoint, run_dir):
    """The second rank's disk is full in the middle of its file."""
    import os

    write, written = os.pwrite, []

    def fail(*args):
        written.append(1)
        if rank == 1 and len(written) > 5:
            raise OSError(28, "No space left on device")
        return write(*args)

    os.pwrite = fail
    try:
        train(rank, world_size, checkpoint, run_dir, {}, steps=[1])
    except CheckpointError as error:
        return str(error)
    return ""


def test_a_write_that_fails_on_one_rank_is_raised_on_all_and_is_no_checkpoint(imported, tmp_path):
    messages = run_ranks(save_with_one_failing_rank, 2, imported, str(tmp_path), timeout=120)
    assert all("No space left on device" in message for message in messages)
    assert all("step_00000001.incomplete" in message for message in messages)
    assert complete_steps(tmp_path) == []
