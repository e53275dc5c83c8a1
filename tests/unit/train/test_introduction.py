"""What a run says before its first step, and the room for its first checkpoint."""

import types

import pytest

from megatron_v2pe.config.load import load_run_config
from megatron_v2pe.core.errors import ConfigError
from megatron_v2pe.parallel.plan import ParallelPlan
from megatron_v2pe.train import introduction as module
from megatron_v2pe.train.introduction import RunSizes, check_room, describe_data, introduction

SIZES = RunSizes(parameters=2_000_000, trained=500_000, checkpoint_bytes=10**9)


def text(*overrides, resume_from=None):
    config = load_run_config(None, ["model.checkpoint=c", "optim.steps=1000", *overrides])
    return introduction(
        config,
        plan=ParallelPlan(),
        architecture="InternLM2ForCausalLM",
        template="internlm2-chat",
        sizes=SIZES,
        resume_from=resume_from,
    )


def test_version_device_and_trained_share_are_there():
    said = text()
    assert "megatron_v2pe 0." in said
    assert "0.5 M parameters, 25.0% of the model" in said


def test_another_template_than_the_checkpoints_is_said():
    assert "template internlm2-chat\n" in text()
    assert "template internlm2-chat\n" in text("data.template=internlm2-chat")
    assert (
        "template internvl2_5, where the checkpoint's config.json says internlm2-chat: the run teaches another"
        in text("data.template=internvl2_5")
    )


@pytest.mark.parametrize(
    ("every", "step", "said"),
    [
        (0, 0, "every 30 minutes (checkpoint.save_minutes) and at the end; the newest 2 are kept"),
        (5000, 0, "at the end only: no checkpoint before step 1000"),
        (300, 0, "every 300 steps, the next after step 300"),
        (300, 450, "every 300 steps, the next after step 600"),
    ],
)
def test_the_next_save_is_named(tmp_path, every, step, said):
    resume_from = tmp_path / f"step_{step:08d}" if step else None
    assert said in text(f"checkpoint.save_every={every}", resume_from=resume_from)


def test_a_run_without_checkpoints_before_its_end_says_so():
    assert "at the end only: no checkpoint before step 1000" in text("checkpoint.save_minutes=0")


def test_epochs_follow_from_packs():
    config = load_run_config(None, ["optim.steps=10", "optim.global_batch_size=2"])
    loader = types.SimpleNamespace(num_samples=24, source_names=("a", "b"), packs_of_first_epoch=8)
    assert describe_data(config, loader) == (
        "data: 24 samples of 2 data sets, 8 packs an epoch; 20 packs are 2.50 epochs"
    )


@pytest.mark.parametrize(("free_gb", "warned"), [(4.5, False), (2.5, True)])
def test_room_for_all_kept_checkpoints(tmp_path, monkeypatch, caplog, free_gb, warned):
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=free_gb * 1e9))
    config = load_run_config(None, ["optim.steps=1000", "checkpoint.save_every=100"])
    check_room(config, tmp_path, SIZES)
    assert ("checkpoints may need 3 GB" in caplog.text) == warned


def test_no_room_for_the_first_checkpoint_is_refused_before_the_first_step(tmp_path, monkeypatch):
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=0.5e9))
    with pytest.raises(
        ConfigError, match=r"has 0\.5 GB free, but one checkpoint of this run has about 1 GB"
    ) as caught:
        check_room(load_run_config(None), tmp_path, SIZES)
    assert not caught.value.is_final
