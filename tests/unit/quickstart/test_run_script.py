"""run.sh refuses what it does not understand before it sets anything up."""

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
SCRIPT = ROOT / "examples" / "quickstart" / "run.sh"


def run(*arguments):
    return subprocess.run(
        ["bash", str(SCRIPT), *arguments], capture_output=True, text=True, timeout=30, cwd="/"
    )


def test_help_names_every_option():
    done = run("--help")
    assert done.returncode == 0
    for option in ("--fresh", "--steps", "--eval-share", "--work"):
        assert option in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stesp", "3"], "unknown option '--stesp'"),
        (["--steps"], "--steps needs a value"),
        (["--steps", "0"], "--steps is '0'"),
        (["--steps", "many"], "--steps is 'many'"),
        (["--eval-share", "2"], "--eval-share is '2'"),
        (["--eval-share", "0"], "--eval-share is '0'"),
    ],
)
def test_bad_options_exit_with_two(arguments, message):
    done = run(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "[quickstart" not in done.stderr


def test_the_recipe_is_a_valid_configuration():
    from megatron_v2pe.config.load import load_run_config

    config = load_run_config(ROOT / "examples" / "quickstart" / "train.yaml", [])
    assert config.position.mode == "v2pe_random"
    assert config.parallel.cp == 2
    assert config.optim.steps == 400


def test_the_recipes_stages_end_at_the_trained_length():
    import make_checkpoint
    import make_data

    from megatron_v2pe.config.load import load_run_config

    config = load_run_config(ROOT / "examples" / "quickstart" / "train.yaml", [])
    stages = tuple(stage.max_sample_tokens for stage in config.data.curriculum)
    assert stages == make_data.TRAIN_LENGTHS
    assert stages[-1] == make_checkpoint.TRAINED_LENGTH == config.data.max_sample_tokens
    assert config.data.curriculum[-1].from_step < config.optim.steps
