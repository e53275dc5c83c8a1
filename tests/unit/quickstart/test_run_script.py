"""run.sh of the quickstart and of the ablation refuse what they do not understand before they set anything up."""

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
SCRIPTS = ("quickstart", "ablation")


def run(example, *arguments):
    script = ROOT / "examples" / example / "run.sh"
    return subprocess.run(
        ["bash", str(script), *arguments], capture_output=True, text=True, timeout=30, cwd="/", check=False
    )


@pytest.mark.parametrize("example", SCRIPTS)
def test_help_names_every_option(example):
    done = run(example, "--help")
    assert done.returncode == 0
    own = {"quickstart": ["--fresh"], "ablation": ["--models"]}[example]
    for option in ("--seeds", "--steps", "--eval-share", "--ranks", "--work", *own):
        assert f"\n  {option}" in done.stdout
    assert done.stdout.rstrip().endswith("no root.")


WRONG = [
    (["--stesp", "3"], "unknown option '--stesp'"),
    (["--steps"], "--steps needs a value"),
    (["--steps", "0"], "--steps is '0'"),
    (["--steps", "many"], "--steps is 'many'"),
    (["--eval-share", "2"], "--eval-share is '2'"),
    (["--eval-share", "0"], "--eval-share is '0'"),
    (["--eval-share", ".00"], "--eval-share is '.00'"),
    (["--ranks", "3"], "--ranks is '3'"),
    (["--seeds", "0,x"], "--seeds is '0,x'"),
    (["--seeds", "1,"], "--seeds is '1,'"),
]


@pytest.mark.parametrize("example", SCRIPTS)
@pytest.mark.parametrize(("arguments", "message"), WRONG)
def test_bad_options_exit_with_two(example, arguments, message):
    done = run(example, *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert f"[{example}" not in done.stderr


@pytest.mark.parametrize("models", ["random,odd", "fixed_0", "", "fixed", "random,", "fixed_65"])
def test_unknown_models_of_the_ablation_are_refused(models):
    done = run("ablation", "--models", models)
    assert done.returncode == 2
    assert f"--models is '{models}'" in done.stderr


def test_the_recipe_is_a_valid_configuration():
    from megatron_v2pe.config.load import load_run_config

    config = load_run_config(ROOT / "examples" / "quickstart" / "train.yaml", [])
    assert config.position.mode == "v2pe_random"
    assert config.parallel.cp == 2
    assert config.optim.steps == 500


def test_the_recipes_stages_end_at_the_trained_length():
    import make_checkpoint
    import make_data

    from megatron_v2pe.config.load import load_run_config

    config = load_run_config(ROOT / "examples" / "quickstart" / "train.yaml", [])
    stages = tuple(stage.max_sample_tokens for stage in config.data.curriculum)
    assert stages == make_data.TRAIN_LENGTHS
    assert stages[-1] == make_checkpoint.TRAINED_LENGTH == config.data.max_sample_tokens
    assert config.data.curriculum[-1].from_step < config.optim.steps
