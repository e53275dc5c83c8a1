"""Plans on disk: made once, mapped by the others, made again when damaged, few are kept."""

import numpy as np
import pytest

from megatron_v2pe.config.batch_schedule import constant_batches
from megatron_v2pe.core.errors import DataError
from megatron_v2pe.data.plan import store as plan_store
from megatron_v2pe.data.plan.epoch_plan import MixturePlan
from tests.unit.data.plan.test_epoch_plan import LENGTHS, index, plan


def stored(tmp_path, **values):
    base = plan(index(LENGTHS), batch=3, **values)
    batches = constant_batches(3)
    return MixturePlan((index(LENGTHS),), data=base._data, seed=1, batches=batches, cache_dir=tmp_path)


def test_a_second_rank_maps_what_the_first_made(tmp_path, monkeypatch):
    expected = [plan(index(LENGTHS), batch=3).packs_of_step(step) for step in range(40)]
    first = stored(tmp_path)
    assert [first.packs_of_step(step) for step in range(40)] == expected
    monkeypatch.setattr(MixturePlan, "_plan_epoch", None)  # would fail if it were called
    second = stored(tmp_path)
    assert [second.packs_of_step(step) for step in range(40)] == expected
    assert isinstance(second.epoch(0, 0).rows, np.memmap)


def test_a_damaged_plan_is_made_again(tmp_path):
    first = stored(tmp_path).packs_of_step(0)
    for path in (tmp_path / "plans").glob("*-epoch0/rows.npy"):
        path.write_bytes(path.read_bytes()[:-8])
    assert stored(tmp_path).packs_of_step(0) == first


def test_other_settings_have_other_plans_and_old_ones_go(tmp_path, monkeypatch):
    monkeypatch.setattr(plan_store, "_KEPT_PLANS", 2)
    for size in (100, 200, 300):
        stored(tmp_path, max_pack_tokens=size).packs_of_step(0)
    assert len(list((tmp_path / "plans").glob("*-stage*"))) == 2


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"data\.cache_dir: .*give a folder that can be written"):
        stored(tmp_path / "file").packs_of_step(0)
