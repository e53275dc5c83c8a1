"""Where a built model is: on the device of its rank, whichever module made a parameter.

mcore's modules ask for the GPU themselves, ours do not. The meta device represents a GPU that this host does not have.
"""

import dataclasses

import torch

from megatron_v2pe.assembly.build import build_model
from megatron_v2pe.config.schema import RunConfig
from megatron_v2pe.parallel.topology import ParallelPlan, init_distributed, shutdown
from tests.te.bodies import architecture


def test_every_parameter_is_on_the_device_of_the_rank():
    try:
        context = init_distributed(ParallelPlan(), seed=0)
        on_meta = dataclasses.replace(context.ranks, device=torch.device("meta"))
        (model,) = build_model(RunConfig(), architecture(), dataclasses.replace(context, ranks=on_meta))
    finally:
        shutdown()
    places = {
        name: tensor.device.type
        for name, tensor in model.state_dict(keep_vars=True).items()
        if tensor is not None
    }
    assert places.keys() > {"vision.class_embedding", "vision.patch_embedding.weight"}
    assert set(places.values()) == {"meta"}, {name for name, place in places.items() if place != "meta"}
