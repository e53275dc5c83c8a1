"""Learning rate and decay of the parameters of a real model, as mcore's optimizer and scheduler have them."""

import dataclasses
import re

import pytest

from megatron_v2pe.assembly.build import build_model
from megatron_v2pe.assembly.optim.optimizer import wrap_for_training
from megatron_v2pe.config.schema import (
    LoRAConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    RuntimeConfig,
    VisionConfig,
)
from megatron_v2pe.parallel.topology import ParallelPlan, init_distributed, shutdown
from tests.support.parity_cases import ARCH

LAYERS = ARCH.vision.num_layers
RATES = dict(lr=1e-3, min_lr=1e-4, lr_vision=2e-4, lr_projector=4e-3, vision_layer_decay=0.5)


@pytest.fixture(scope="module")
def context():
    yield init_distributed(ParallelPlan(), seed=0)
    shutdown()


def trainer_of(context, *, other_parts=False, dtype="float32", **sections):
    vision = dataclasses.replace(ARCH.vision, norm_type="rms_norm", qkv_bias=False, qk_normalization=True)
    arch = dataclasses.replace(ARCH, vision=vision if other_parts else ARCH.vision)
    config = RunConfig(runtime=RuntimeConfig(dtype=dtype), **sections)
    return wrap_for_training(build_model(config, arch, context), config)


def groups_by_name(trainer):
    """Parameter name -> its group in the optimizer."""
    (single,) = trainer.optimizer.chained_optimizers
    (model,) = trainer.model_chunks
    return {
        name: single.optimizer.param_groups[single.model_param_group_index_map[parameter][0]]
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def spared(trainer):
    return {name for name, group in groups_by_name(trainer).items() if group["wd_mult"] == 0}


@pytest.mark.parametrize("other_parts", [False, True])
def test_the_usual_rule_spares_biases_norms_and_layer_scale(context, other_parts):
    trainer = trainer_of(context, other_parts=other_parts, optim=OptimConfig(weight_decay=0.05))
    names = set(groups_by_name(trainer))
    wanted = {name for name in names if re.search(r"bias$|norm\.weight$|\.ls[12]$", name)}
    assert spared(trainer) == wanted
    decayed = names - wanted
    assert {"vision.class_embedding", "vision.position_embedding"} < decayed
    assert {"language.embedding.word_embeddings.weight", "language.output_layer.weight"} < decayed
    decays = {group["weight_decay"] for group in groups_by_name(trainer).values()}
    assert decays == {0.0, 0.05}


def test_the_rule_of_the_release_decays_everything(context):
    trainer = trainer_of(context, optim=OptimConfig(decay="release", weight_decay=0.05))
    assert spared(trainer) == set()
    assert {group["weight_decay"] for group in groups_by_name(trainer).values()} == {0.05}


def release_scale(name, rate):
    """The release: rate^(n - id - 1) with n = layers + 2; embeddings have id 0, layers count from 1."""
    layer = re.match(r"vision\.encoder\.layers\.(\d+)\.", name)
    number = int(layer.group(1)) + 1 if layer else 0
    return rate ** (LAYERS + 2 - number - 1)


def wanted_rate(name):
    part = name.split(".")[0]
    rates = {"projector": 4e-3, "language": 1e-3}
    return rates.get(part) or 2e-4 * release_scale(name, 0.5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rates_by_part_and_by_vision_layer(context, dtype):
    """In bfloat16 the name of a further wrapper precedes every name."""
    groups = groups_by_name(trainer_of(context, dtype=dtype, optim=OptimConfig(**RATES)))
    for name, group in groups.items():
        assert group["max_lr"] == pytest.approx(wanted_rate(name), rel=1e-12), name
        assert group["min_lr"] == pytest.approx(0.1 * wanted_rate(name), rel=1e-12), name
    assert len({id(group) for group in groups.values()}) == 2 * (LAYERS + 3)  # rates x decays


def test_decay_and_rates_go_together(context):
    both = trainer_of(context, optim=OptimConfig(**RATES))
    assert spared(both) == spared(trainer_of(context, optim=OptimConfig()))


def test_the_schedule_is_the_same_curve_for_every_group(context):
    trainer = trainer_of(context, optim=OptimConfig(**RATES, steps=10, warmup_steps=4))
    for _ in range(11):
        base = trainer.scheduler.get_lr({})
        for name, group in groups_by_name(trainer).items():
            assert group["lr"] == pytest.approx(base * wanted_rate(name) / 1e-3, rel=1e-9, abs=1e-15)
        trainer.scheduler.step(increment=1)
    assert base == pytest.approx(1e-4)


def test_groups_differ_in_what_mcore_knows_them_by(context):
    trainer = trainer_of(context, optim=OptimConfig(**RATES))
    groups = trainer.optimizer.param_groups
    assert len({(group["wd_mult"], group["lr_mult"]) for group in groups}) == len(groups)


def test_adapters_have_the_rates_of_their_part_and_layer(context):
    sections = dict(
        lora=LoRAConfig(vision_rank=2), model=ModelConfig(freeze_language=True, freeze_projector=True)
    )
    groups = groups_by_name(trainer_of(context, optim=OptimConfig(**RATES), **sections))
    assert all(".lora." in name for name in groups)
    assert {group["wd_mult"] for group in groups.values()} == {1.0}
    for name, group in groups.items():
        assert group["max_lr"] == pytest.approx(wanted_rate(name))


def test_frozen_parts_are_in_no_group(context):
    trainer = trainer_of(
        context, vision=VisionConfig(freeze=True), optim=OptimConfig(lr=1e-3, lr_projector=4e-3)
    )
    names = set(groups_by_name(trainer))
    assert {name.split(".")[0] for name in names} == {"projector", "language"}
    assert sum(len(group["params"]) for group in trainer.optimizer.param_groups) == len(names)
