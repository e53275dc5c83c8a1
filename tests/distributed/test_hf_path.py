"""model.hf_path: a run from a Hugging Face folder is that of its import, to the bit; each rank reads its slices."""

import re

import pytest
import torch

from megatron_v2pe.checkpoint.convert.export_hf import export_hf
from megatron_v2pe.checkpoint.convert.import_hf import import_hf
from megatron_v2pe.checkpoint.files.folder import hf_path
from megatron_v2pe.checkpoint.retention import step_path
from megatron_v2pe.cli.main import main
from tests.support import tiny
from tests.support.hf_folders import GOLDEN, edit_weights, folder_bytes, golden_copy
from tests.support.spawn import run_ranks

pytestmark = pytest.mark.distributed


def both_ways(rank, world_size, checkpoint, hf, sizes, dtype):
    """Load at a layout from the checkpoint and from the folder.

    Returns:
        Names of parameters that differ, bytes read by this rank, bytes of its parameters that are not whole on
        every rank.
    """
    from megatron_v2pe.assembly.build import build_model
    from megatron_v2pe.checkpoint.convert.load_hf import load_hf_weights
    from megatron_v2pe.checkpoint.state.model_state import load_model_weights
    from megatron_v2pe.config.arch.architecture import read_architecture
    from megatron_v2pe.config.schema import ParallelConfig, RunConfig, RuntimeConfig
    from megatron_v2pe.parallel.topology import init_distributed, resolve, shutdown

    config = RunConfig(parallel=ParallelConfig(**sizes), runtime=RuntimeConfig(dtype=dtype))
    plan = resolve(config.parallel, world_size)
    context = init_distributed(plan, seed=1, timeout_minutes=2)
    ranks = context.ranks
    arch = read_architecture(hf_path(checkpoint))
    imported, direct = (build_model(config, arch, context) for _ in range(2))
    for model_chunk in [*imported, *direct]:
        for parameter in model_chunk.parameters():
            parameter.data.fill_(float("nan"))
    load_model_weights(checkpoint, imported, ranks=ranks)
    num_bytes = load_hf_weights(hf, direct, ranks=ranks)
    different = [
        name
        for one, other in zip(imported, direct, strict=True)
        for name, parameter in one.named_parameters()
        if not torch.equal(parameter, dict(other.named_parameters())[name])
    ]
    own_bytes = sum(p.numel() * 4 for model_chunk in direct for p in model_chunk.parameters())
    shutdown()
    return different, num_bytes, own_bytes


LAYOUTS = {
    "one": (1, {}),
    "tp2": (2, {"tp": 2}),
    "tp2 split tower": (2, {"tp": 2, "vision": "tensor"}),
    "pp2": (2, {"pp": 2}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_are_those_of_the_import_and_no_rank_reads_more_than_its_own(tmp_path, layout):
    """Every parameter, in bfloat16 too (rounded alike). The folder is float32: a rank reads 4 bytes for each number
    that it holds, less the padding of its vocabulary, which exists in no file."""
    world_size, sizes = LAYOUTS[layout]
    import_hf(GOLDEN, tmp_path / "ckpt")
    dtype = "bfloat16" if layout == "tp2" else "float32"
    arguments = (str(tmp_path / "ckpt"), str(GOLDEN), sizes, dtype)
    results = run_ranks(both_ways, world_size, *arguments, timeout=120)
    total = sum(path.stat().st_size for path in GOLDEN.glob("*.safetensors"))
    for different, num_bytes, own_bytes in results:
        assert different == []
        assert 0.95 * own_bytes < num_bytes <= own_bytes
        assert world_size == 1 or num_bytes < (0.85 if layout == "tp2" else 0.75) * total


def test_a_folder_with_problems_is_refused_before_anything_starts(tmp_path, capsys):
    """All problems at once, exit code 2, no run folder."""
    hf = golden_copy(tmp_path / "hf")
    edit_weights(hf, mlp1__0__bias=None, mlp1__0__weight=torch.zeros(3))
    run_yaml = tmp_path / "run.yaml"
    run_yaml.write_text(
        f"{{model: {{hf_path: {hf}}}, data: {{meta: m}}, runtime: {{run_dir: {tmp_path / 'run'}}}}}\n"
    )
    assert main(["train", str(run_yaml)]) == 2
    message = capsys.readouterr().err
    assert "mlp1.0.bias: missing" in message
    assert "mlp1.0.weight: has shape (3,)" in message
    assert not (tmp_path / "run").exists()
    assert main(["train", str(run_yaml), "model.checkpoint=elsewhere"]) == 2
    assert "weights come from one place; set one of the two to ''" in capsys.readouterr().err


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    root = tmp_path_factory.mktemp("hf_path")
    config = tiny.prepared(root)
    return root, config


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [(1, []), pytest.param(2, ["parallel.tp=2"], marks=pytest.mark.slow)],
    ids=["one", "tp2"],
)
def test_a_run_from_the_folder_is_the_run_from_its_import(setup, tmp_path, ranks, layout):
    """Equal losses to the bit, checkpoints that export to the same bytes, and a resume without the import."""
    _, config = setup
    steps = [*layout, "optim.steps=3"]
    tiny.train(config, [*steps, f"runtime.run_dir={tmp_path / 'imported'}"], ranks=ranks)
    direct = [
        *steps,
        "model.checkpoint=''",
        f"model.hf_path={GOLDEN}",
        f"runtime.run_dir={tmp_path / 'direct'}",
    ]
    log = tiny.train(config, direct, ranks=ranks)
    assert tiny.curve(tmp_path / "direct") == tiny.curve(tmp_path / "imported")
    shares = re.search(r"read ([\d., ]+) of ([\d.]+) MiB, by rank", log)
    assert shares is not None, log
    assert len(shares[1].split(", ")) == ranks
    for name in ("direct", "imported"):
        export_hf(step_path(tmp_path / name, 3), tmp_path / f"{name}_hf")
    assert folder_bytes(tmp_path / "direct_hf") == folder_bytes(tmp_path / "imported_hf")
    if ranks == 1:  # resumed at once: the folder still gives configuration and tokenizer
        log = tiny.train(config, [*direct, "optim.steps=4"])
        assert "at step 3" in log
        assert len(tiny.curve(tmp_path / "direct")) == 4
