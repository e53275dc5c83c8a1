"""`megatron-v2pe plan` as a user calls it: reports, json, and mistakes."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_v2pe.cli.main import main
from tests.support.hf_folders import GOLDEN
from tests.support.tiny import make_data

RUN = """
data: {max_pack_tokens: 131072, max_sample_tokens: 131072}
parallel: {cp: 4}
model: {recompute: full}
vision: {micro_batch_tiles: 16}
optim: {global_batch_size: 4}
"""


@pytest.fixture
def plan(tmp_path, capsys):
    """(exit code, stdout, stderr) of `plan run.yaml ARGUMENTS`."""
    path = tmp_path / "run.yaml"
    path.write_text(RUN)

    def call(*arguments):
        code = main(["plan", str(path), *arguments])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return call


def test_a_run_that_fits(plan):
    code, out, _ = plan("--gpus", "8", "--gpu-memory", "80", "--arch", "2B")
    assert code == 0
    assert "InternVL2-2B on 8 x H100 SXM 80 GB" in out
    assert "fits:" in out
    assert "binds: attention" in out
    for block in (
        "memory of a GPU",
        "phases of stage 0",
        "FLOPs of a step",
        "sent by a GPU",
        "predicted time",
    ):
        assert block in out


def test_a_run_that_does_not_fit_says_what_to_change(plan):
    code, out, _ = plan("--gpus", "8", "--gpu-memory", "24", "--arch", "2B")
    assert code == 1
    assert "24 GB" in out
    assert "DOES NOT FIT" in out
    overrides = out.partition("advice, to make it fit: ")[2].partition("\n")[0].split()
    assert plan("--gpus", "8", "--gpu-memory", "24", "--arch", "2B", *overrides)[0] == 0


def test_a_run_that_no_layout_makes_fit_is_offered_to_train_less(plan):
    small = (
        "--gpus",
        "1",
        "--gpu-memory",
        "24",
        "--arch",
        "2B",
        "parallel.cp=1",
        "data.max_pack_tokens=8192",
    )
    small += ("data.max_sample_tokens=8192", "optim.global_batch_size=4")
    code, out, _ = plan(*small)
    assert code == 1
    assert "no small change makes it fit" in out
    rows = out.partition("training less of the model would fit")[2].splitlines()[1:]
    assert "adapters" in rows[-1]
    assert "GiB" in rows[-1]
    overrides = [word for word in rows[-1].split() if "=" in word]
    assert "lora.language_rank=16" in overrides
    assert "vision.freeze=true" in overrides
    assert plan(*small, *overrides)[0] == 0
    found = json.loads(plan(*small, "--json")[1])
    assert found["train_less"][-1]["overrides"] == overrides
    assert "training less of the model would fit" in plan(*small, "--search", "3")[1]


def test_a_folder_that_was_not_imported_says_how_adapters_would_need_it(plan):
    small = (
        "--gpus",
        "1",
        "--gpu-memory",
        "24",
        "--arch",
        "2B",
        "parallel.cp=1",
        "data.max_pack_tokens=8192",
    )
    out = plan(*small, "data.max_sample_tokens=8192", "model.hf_path=x")[1]
    assert "model.checkpoint=IMPORTED" in out
    assert "as `import-hf` stores it" in out


def test_overrides_may_be_on_both_sides_of_options(plan):
    code, out, _ = plan("parallel.cp=8", "--gpus", "8", "--arch", "2B", "model.recompute=selective", "--json")
    assert code == 0
    found = json.loads(out)
    assert found["layout"]["cp"] == 8


def test_json_says_what_the_text_says(plan):
    found = json.loads(plan("--gpus", "8", "--arch", "2B", "--json")[1])
    stage = found["stages"][0]
    parts = ("weights_bytes", "gradients_bytes", "optimizer_bytes", "activations_bytes", "lost_bytes")
    assert stage["total_bytes"] == pytest.approx(sum(stage[p] for p in parts) + stage["reserved_bytes"])
    assert found["step_seconds"] == pytest.approx(sum(found["seconds"].values()))
    assert found["room_bytes"] == pytest.approx(found["memory_bytes"] - stage["total_bytes"])
    assert found["mfu"] < found["mfu_full_attention"]


def test_the_runs_own_checkpoint_and_a_config_json_are_read(plan, tmp_path):
    shutil.copytree(GOLDEN, tmp_path / "ckpt" / "hf")
    tiny = ("data.max_pack_tokens=1024", "data.max_sample_tokens=1024", "parallel.cp=2")
    named = plan("--gpus", "2", "--json", f"model.checkpoint={tmp_path / 'ckpt'}", *tiny)
    given = plan("--gpus", "2", "--json", "--arch", str(GOLDEN / "config.json"), *tiny)
    assert named[0] == given[0] == 0
    assert json.loads(named[1])["stages"] == json.loads(given[1])["stages"]


def test_search_prints_layouts_that_plan_confirms(plan):
    code, out, _ = plan("--gpus", "8", "--arch", "2B", "--search", "3")
    assert code == 0
    lines = out.splitlines()
    best = lines[lines.index(next(line for line in lines if "step s" in line)) + 1].split()
    overrides = [word for word in best if "=" in word]
    confirmed = json.loads(plan("--gpus", "8", "--arch", "2B", "--json", *overrides)[1])
    assert confirmed["fits"]
    assert f"{confirmed['step_seconds']:,.2f}" == best[0]
    in_fp8 = json.loads(plan("--gpus", "8", "--arch", "2B", "--json", *overrides, "model.fp8=current")[1])
    assert f"with model.fp8=current the first of them takes {in_fp8['step_seconds']:,.2f} s" in lines[-1]


@pytest.mark.parametrize("where", [("--gpu", "a100"), ("model.fp8=blockwise",), ("runtime.dtype=float32",)])
def test_a_search_offers_fp8_only_where_it_works_and_the_run_does_not_have_it(plan, where):
    code, out, _ = plan("--gpus", "8", "--arch", "2B", "--search", "1", *where)
    assert code == 0
    assert "fp8=current" not in out
    assert (
        json.loads(plan("--gpus", "8", "--arch", "2B", "--search", "1", "--json", *where)[1])["fp8"] is None
    )


def test_a_ramp_up_is_shown_and_every_size_of_it_is_checked(plan):
    ramp = ("optim.global_batch_size=32", "optim.batch_rampup=[8,8,100]")
    code, out, _ = plan("--gpus", "8", "--gpu-memory", "80", "--arch", "2B", *ramp)
    assert "32 packs, 16 for each data parallel rank; at first 8 packs, 16 from step 6, " in out
    code, _, error = plan("--gpus", "64", "--arch", "2B", *ramp)
    assert code == 2
    assert "from step 1 on a step has 8 packs, but the 16 data parallel ranks must divide it" in error


def test_inference(plan):
    code, out, _ = plan("--gpus", "8", "--arch", "2B", "--inference", "1000000", "parallel.cp=8", "--json")
    assert code == 0
    (stage,) = json.loads(out)["stages"]
    assert stage["kv_cache_bytes"] == 2 * 24 * 1024 * 1_000_000 / 8 * 2
    code, out, _ = plan("--gpus", "1", "--arch", "26B", "--inference", "1000000", "parallel.cp=1")
    assert code == 1
    assert "cache of keys and values" in out


def test_inference_with_the_options_of_generate(plan):
    arguments = ("--gpus", "8", "--arch", "2B", "--inference", "1000000", "parallel.cp=8", "--json")
    (plain,) = json.loads(plan(*arguments)[1])["stages"]
    (small,) = json.loads(plan(*arguments, "--chunk-tokens", "2048", "--kv", "int8")[1])["stages"]
    assert small["prefill_bytes"] < plain["prefill_bytes"]
    # Rows of one byte a channel, and two of scale for each row of 128.
    assert small["kv_cache_bytes"] == plain["kv_cache_bytes"] * (128 + 2) / 256
    code, _, error = plan("--gpus", "8", "--arch", "2B", "--kv", "int8")
    assert (code, "--kv: only for planning an answer" in error) == (2, True)
    code, _, error = plan(*arguments, "--chunk-tokens", "0")
    assert (code, "--chunk-tokens is 0" in error) == (2, True)


def test_packs_are_measured_from_the_runs_own_data(plan, tmp_path):
    shutil.copytree(GOLDEN, tmp_path / "ckpt" / "hf")
    meta = make_data(tmp_path / "data", num_samples=12)
    arguments = (
        f"model.checkpoint={tmp_path / 'ckpt'}",
        f"data.meta={meta}",
        f"data.cache_dir={tmp_path / 'cache'}",
        "data.max_pack_tokens=640",
        "data.max_sample_tokens=600",
        "data.max_dynamic_patch=2",
        "parallel.cp=2",
        "optim.steps=3",
    )
    code, out, err = plan("--gpus", "2", "--measure-data", "--json", *arguments)
    assert code == 0, err
    pack = json.loads(out)["pack"]
    assert pack["source"] == "measured: mean of 12 planned packs"  # 3 steps of 4
    assert 0 < pack["num_tokens"] <= 640 + 4 * len(pack["document_lengths"])
    assert pack["num_tiles"] > 0
    assert 0 < pack["supervised_tokens"] < pack["num_tokens"]


RECIPES = {  # recipe: (size, GPUs)
    "internvl2_2b_32k": ("2B", 32),
    "internvl2_2b_256k": ("2B", 32),
    "internvl2_8b_256k": ("8B", 32),
    "internvl2_26b_256k": ("26B", 64),
    "internvl2_76b_256k": ("76B", 256),
    "internvl3_2b_32k": ("InternVL3-2B", 8),
    "internvl3_2b_256k": ("InternVL3-2B", 8),
    "internvl3_5_8b_32k": ("InternVL3_5-8B", 8),
    "internvl3_5_8b_256k": ("InternVL3_5-8B", 32),
    "internvl3_5_20b_a4b_32k": ("InternVL3_5-20B-A4B", 16),
    "internvl3_5_20b_a4b_256k": ("InternVL3_5-20B-A4B", 32),
    "internvl3_5_30b_a3b_32k": ("InternVL3_5-30B-A3B", 32),
    "internvl3_5_30b_a3b_256k": ("InternVL3_5-30B-A3B", 64),
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_fit_80_gb_before_their_checkpoints_exist(recipe, capsys):
    size, gpus = RECIPES[recipe]
    path = Path(__file__).parents[3] / "launch" / "recipes" / f"{recipe}.yaml"
    arguments = ["plan", str(path), "--gpus", str(gpus), "--gpu-memory", "80", "--arch", size, "--json"]
    assert main(arguments) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fits"]
    if "256k" in recipe:
        assert found["pack"]["num_tokens"] == 262_144


MISTAKES = {
    "no model": (("--gpus", "8"), "give --arch SIZE"),
    "no such checkpoint": (
        ("--gpus", "8", "model.checkpoint=/nowhere"),
        "to plan before the checkpoint is there",
    ),
    "unknown size": (("--gpus", "8", "--arch", "9B"), "--arch 9B"),
    "world": (("--gpus", "6", "--arch", "2B"), "must divide the world size 6"),
    "no gpus": (("--gpus", "0", "--arch", "2B"), "--gpus is 0"),
    "heads": (("--gpus", "12", "--arch", "2B", "parallel.tp=3"), "parallel.tp is 3"),
    "rate": (("--gpus", "8", "--arch", "2B", "--rate", "speed=1"), "no rate is called 'speed'"),
    "memory": (("--gpus", "8", "--arch", "2B", "--gpu-memory", "-1"), "--gpu-memory is -1"),
    "tiles": (("--gpus", "8", "--arch", "2B", "--tiles", "9999"), "--tiles is 9999"),
    "key": (("--gpus", "8", "--arch", "2B", "paralel.cp=1"), "paralel"),
    "adapters": (("--gpus", "8", "--arch", "2B", "lora.language_rank=8", "lora.targets=[q_proj]"), "wqkv"),
    "data without a model": (("--gpus", "8", "--arch", "2B", "--measure-data"), "model.checkpoint"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_message(name, plan):
    arguments, message = MISTAKES[name]
    code, out, err = plan(*arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


def test_planning_needs_no_torch(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(RUN)
    program = (
        "import sys; from megatron_v2pe.cli.main import main; "
        f"code = main(['plan', {str(path)!r}, '--gpus', '8', '--arch', '2B', '--search', '1']); "
        "sys.exit(code or 10 * ('torch' in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
