"""Shapes between pipeline stages: looked up in the order of mcore's schedule, never sent."""

import types

import pytest
import torch.distributed as dist

from megatron_v2pe.assembly.schedule import KnownShapes, StageRows

CONFIG = types.SimpleNamespace(
    hidden_size=8, virtual_pipeline_model_parallel_size=None, microbatch_group_size_per_vp_stage=None
)
ROWS = (5, 7, 9)


def communicator(monkeypatch, *, rank, size, num_model_chunks):
    monkeypatch.setattr(dist, "get_global_rank", lambda group, number: number)
    group = types.SimpleNamespace(size=lambda: size, rank=lambda: rank)
    stages = StageRows(rows=ROWS, groups=types.SimpleNamespace(pp=group))
    return KnownShapes(stages, CONFIG, num_model_chunks=num_model_chunks)


def received(shapes, *, forward):
    """Rows of everything that a rank receives from one neighbour."""
    rows = []
    while shapes._from_previous if forward else shapes._from_next:
        previous, following = shapes._communicate_shapes(None, None, forward, not forward)
        assert (following if forward else previous) == [0, 0, 0]
        number, *others = previous if forward else following
        assert others == [1, 8]
        rows.append(number)
    return rows


def test_one_stage_after_the_other(monkeypatch):
    first = communicator(monkeypatch, rank=0, size=2, num_model_chunks=1)
    assert received(first, forward=True) == []
    assert received(first, forward=False) == list(ROWS)
    last = communicator(monkeypatch, rank=1, size=2, num_model_chunks=1)
    assert received(last, forward=True) == list(ROWS)
    assert received(last, forward=False) == []


def test_virtual_stages_in_groups(monkeypatch):
    """Two micro batches through all virtual stages, then the third; between the ends of the pipeline one round less."""
    first = communicator(monkeypatch, rank=0, size=2, num_model_chunks=2)
    assert received(first, forward=True) == [5, 7, 9]
    assert received(first, forward=False) == [5, 7, 5, 7, 9, 9]
    last = communicator(monkeypatch, rank=1, size=2, num_model_chunks=2)
    assert received(last, forward=True) == [5, 7, 5, 7, 9, 9]
    assert received(last, forward=False) == [5, 7, 9]


def test_a_schedule_that_is_another_one_is_an_error(monkeypatch):
    shapes = communicator(monkeypatch, rank=1, size=2, num_model_chunks=1)
    with pytest.raises(RuntimeError, match="3 hidden states and 0 gradients of the step were not received"):
        shapes.check_done()
