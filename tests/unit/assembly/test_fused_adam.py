"""Our Adam against torch's, and the property it exists for: resuming keeps every later update."""

import copy
import subprocess
import sys

import pytest
import torch

from megatron_v2pe.assembly.optim.fused_adam import FusedAdam, install_fused_adam


def weights(seed):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64))
        for shape in ((3, 4), (5,), (2, 2, 2))
    ]


def walk(optimizer, parameters, steps, seed):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        optimizer.step()


@pytest.mark.parametrize(("decoupled", "decay"), [(True, 0.0), (True, 0.1), (False, 0.1)])
def test_updates_equal_those_of_torch(decoupled, decay):
    settings = dict(lr=1e-2, betas=(0.9, 0.95), eps=1e-6, weight_decay=decay)
    ours, theirs = weights(0), weights(0)
    walk(FusedAdam(ours, adam_w_mode=decoupled, **settings), ours, 7, seed=1)
    reference = torch.optim.AdamW if decoupled else torch.optim.Adam
    walk(reference(theirs, **settings), theirs, 7, seed=1)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)


def test_state_loaded_before_any_update_continues_exactly():
    straight, resumed = weights(0), weights(0)
    optimizer = FusedAdam(straight, lr=1e-2)
    walk(optimizer, straight, 3, seed=1)
    first = FusedAdam(resumed, lr=1e-2)
    walk(first, resumed, 3, seed=1)
    second = FusedAdam(resumed, lr=5.0)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert second.param_groups[0]["step"] == 3
    walk(optimizer, straight, 2, seed=2)
    walk(second, resumed, 2, seed=2)
    for mine, other in zip(straight, resumed, strict=True):
        assert torch.equal(mine, other)


def test_without_bias_correction_the_first_update_is_smaller():
    parameter = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    parameter.grad = torch.ones(1, dtype=torch.float64)
    FusedAdam([parameter], lr=1.0, eps=0.0, bias_correction=False).step()
    torch.testing.assert_close(parameter.item(), -0.1 / 0.001**0.5)


@pytest.mark.slow
def test_a_step_on_a_cpu_imports_no_compiler():
    """torch's own optimizers import torch._dynamo in their constructor: a second of every start."""
    script = """if True:
        import sys
        import numpy, torch
        from megatron_v2pe.assembly.optim.fused_adam import install_fused_adam
        from megatron_v2pe.assembly.optim.optimizer import build_trainer
        from megatron_v2pe.config.schema import RunConfig, RuntimeConfig
        from megatron_v2pe.planning.measured_step import MeasuredStep, StepSizes
        from megatron_v2pe.train.step import train_step
        install_fused_adam()
        config = RunConfig(runtime=RuntimeConfig(dtype="float32"))
        sizes = StepSizes(tokens=64, tiles=1, hidden=32, layers=1, vocab=64, vision_hidden=16, vision_layers=1)
        step = MeasuredStep(config=config, sizes=sizes)
        trainer = build_trainer([step.wrapped[0].module], step.wrapped, config)
        train_step(trainer, step.runner, [step.batch], ranks=step.ranks)
        print(sorted({"torch._dynamo", "torch._inductor.compile_fx", "sympy.core"} & set(sys.modules)))
    """
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.stdout.strip().endswith("['sympy.core']"), done.stdout + done.stderr[-2000:]


def test_parameters_without_gradient_and_empty_groups_are_left_alone():
    used, unused = torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.ones(2))
    used.grad = torch.ones(2)
    optimizer = FusedAdam([{"params": [used, unused]}, {"params": []}], weight_decay=0.5)
    optimizer.step()
    assert torch.equal(unused, torch.ones(2))
    assert [group.get("step") for group in optimizer.param_groups] == [1, None]


def test_mcore_takes_it_where_it_had_fallen_back_to_torch():
    import megatron.core.optimizer as optimizer
    from megatron.core.optimizer import distrib_optimizer

    for _ in range(2):
        installed = install_fused_adam()
        assert installed == (optimizer.Adam is FusedAdam)
        assert not optimizer.USING_PYTORCH_OPTIMIZER
        assert distrib_optimizer.HAVE_APEX_OR_TE
