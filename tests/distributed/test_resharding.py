"""A run that changes its parallel layout at every step: nothing of its state is lost, and its losses are one rank's.

At each hop two things are checked. What the new layout has loaded is saved again before anything is computed: all
tensors of weights and of the optimizer equal the loaded checkpoint, bit for bit. Then it trains a step with the real
model, data and schedule: its loss equals that of one rank that was never interrupted, to 1e-5. A step count or moment
that went wrong shows in the losses of the hops that follow.
"""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_v2pe.checkpoint.convert.import_hf import import_hf
from megatron_v2pe.checkpoint.files.folder import read_info, state_path
from megatron_v2pe.checkpoint.retention import step_path
from megatron_v2pe.checkpoint.state.reader import StateReader
from tests.support import tiny
from tests.support.hf_folders import edit_config, edit_weights, golden_copy
from tests.support.spawn import run_ranks

pytestmark = pytest.mark.distributed
VPP = ["parallel.pp=2", "parallel.vpp=2", "parallel.pipeline_layout=E|t|t|L"]
TP_SP = ["parallel.tp=2", "parallel.sequence_parallel=true"]
LAYOUTS = [TP_SP, ["parallel.pp=2"], VPP, [], ["parallel.tp=2"], ["parallel.cp=2"], "one rank"]
"""tp -> pp -> vpp -> dp -> tp, sequence parallelism off -> cp -> one rank."""
VOCABULARY = 600


def hop(rank, world_size, config_path, run_dir, layout, rendezvous):
    """Resume at a layout, save what was loaded to `run_dir/again`, train a step. World of one: rank 0 alone."""
    import torch.distributed as dist

    from megatron_v2pe.config.load import load_run_config
    from megatron_v2pe.preflight.disk import run_sizes
    from megatron_v2pe.train.loop import steps
    from megatron_v2pe.train.saving import Saver
    from megatron_v2pe.train.setup import Outside, build_run

    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    if world_size > 1:
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
        os.environ.update(MASTER_ADDR="nobody", MASTER_PORT="1")  # ranks meet in a file
        dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world_size)
    overrides = [*layout, f"runtime.run_dir={run_dir}", "checkpoint.save_every=1", "checkpoint.keep=99"]
    config = load_run_config(config_path, [*overrides, f"optim.steps={len(LAYOUTS)}"])
    with build_run(config, Outside(sizes_of=run_sizes)) as run:
        if run.state.step:
            again = load_run_config(config_path, [*overrides, f"runtime.run_dir={Path(run_dir) / 'again'}"])
            folder = Path(config.model.checkpoint) / "hf"
            Saver(again, run.trainer, ranks=run.ranks, hf_folder=folder).after_step(
                run.state, is_interrupted=True
            )
        (run.run_dir / "stop").touch()  # one step is enough
        steps(run)


def hops(rank, world_size, config_path, run_dir, layouts):
    """All hops in one process, which starts only once."""
    import torch.distributed as dist

    dist.destroy_process_group()  # the spawner's; each hop makes its own
    for number, layout in enumerate(layouts):
        if layout != "one rank":
            hop(rank, world_size, config_path, run_dir, layout, f"{run_dir}/../meet_{number}")
        elif rank == 0:
            hop(rank, 1, config_path, run_dir, [], "")


def tensors(folder):
    reader = StateReader(state_path(folder))
    found = {key: reader.read(key) for key in reader.tensors}
    padded = ("word_embeddings.weight", "output_layer.weight")
    return {key: value[:VOCABULARY] if key.endswith(padded) else value for key, value in found.items()}


def check_chain(folder, config, wanted):
    """Run all hops and compare; `wanted` is the curve of one rank."""
    (folder / "run").mkdir()
    run_ranks(hops, 2, str(config), str(folder / "run"), LAYOUTS, timeout=280)
    np.testing.assert_allclose(tiny.curve(folder / "run"), wanted, rtol=1e-5)
    for step in range(1, len(LAYOUTS)):
        saved, loaded = (tensors(step_path(run, step)) for run in (folder / "run", folder / "run" / "again"))
        assert any(key.startswith("optimizer.state.exp_avg_sq.") for key in saved)
        assert set(saved) == set(loaded)
        assert [key for key in saved if not torch.equal(saved[key], loaded[key])] == []
    infos = [read_info(step_path(folder / "run", step + 1), verify="full") for step in range(len(LAYOUTS))]
    assert [info.topology["tp"] for info in infos] == [2, 1, 1, 1, 2, 1, 1]
    assert [info.topology["world_size"] for info in infos] == [2, 2, 2, 2, 2, 2, 1]


def prepared(root, hf):
    """Configuration and curve of one rank for a Hugging Face folder."""
    import_hf(hf, root / "checkpoint")
    meta = tiny.make_data(root / "data")
    config = tiny.run_yaml(root / "run.yaml", checkpoint=root / "checkpoint", meta=meta, run_dir=root / "one")
    tiny.train(config, [f"optim.steps={len(LAYOUTS)}"])
    return config, tiny.curve(root / "one")


def test_tied_embeddings_with_biases_go_through_every_layout(tmp_path):
    """The tied weight lies on two stages, and its padding changes; Qwen2's biases are split over tp."""
    hf = golden_copy(tmp_path / "hf", key="c_qwen2_vit300m")
    edit_config(hf, llm_config={"tie_word_embeddings": True}, template="internlm2-chat")
    edit_weights(hf, language_model__lm_head__weight=None)
    for name in ("vocab.json", "merges.txt"):
        (hf / name).unlink()
    for name in ("tokenizer.model", "tokenizer_config.json", "added_tokens.json", "special_tokens_map.json"):
        shutil.copyfile(tiny.GOLDEN_HF / name, hf / name)
    config, wanted = prepared(tmp_path, hf)
    check_chain(tmp_path, config, wanted)


@pytest.mark.slow
def test_internlm2_loads_at_every_layout(tmp_path):
    config, wanted = prepared(tmp_path, tiny.GOLDEN_HF)
    check_chain(tmp_path, config, wanted)
