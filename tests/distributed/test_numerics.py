"""`verify-numerics`: every family at tp 2, pp 2, cp 2 against the plain PyTorch model, stage by stage."""

import json
from pathlib import Path

import pytest
import torch
from megatron.core import parallel_state

from megatron_v2pe.checkpoint.convert.import_hf import import_hf
from megatron_v2pe.config.schema import ParallelConfig
from megatron_v2pe.parallel.topology import shutdown
from megatron_v2pe.verification.numerics.compare import compare_numerics
from tests.support.hf_folders import random_folder
from tests.support.spawn import run_ranks

CKPT = Path(__file__).parents[1] / "golden" / "ckpt"
KEYS = ("a_internlm2_vit300m", "b_internlm2_vit6b", "c_qwen2_vit300m", "d_llama_vit6b", "e_phi3_vit300m")
LAYOUTS = {
    "tp2": dict(tp=2),
    "tp2 sp split tower": dict(tp=2, sequence_parallel=True, vision="tensor"),
    "pp2": dict(pp=2),
    "cp2": dict(cp=2),
    "tp2 sp": dict(tp=2, sequence_parallel=True),
}
NUM_STAGES = 10  # 2 vision and 2 decoder layers: 4 of the tower, projector, input, 2, norm, logits


def imported_families(root):
    """(Hugging Face folder, checkpoint) of each family; random weights where the golden folder has none."""
    found = []
    for key in KEYS:
        source = CKPT / key
        if not (source / "model.safetensors").exists():
            values = json.loads((source / "config.json").read_text())
            source = random_folder(
                root / f"hf_{key}",
                shards=2,
                dtype=torch.float32,
                llm=values["llm_config"],
                vision=values["vision_config"],
                top={"force_image_size": values["force_image_size"]},
                scaled=True,
            )
        import_hf(source, root / key)
        found.append((source, root / key))
    return found


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return imported_families(tmp_path_factory.mktemp("numerics"))


def compare_all(rank, world_size, folders, layouts, stride):
    results = {}
    for name, layout in layouts.items():
        for source, checkpoint in folders:
            parallel = ParallelConfig(**layout)
            rows = compare_numerics(
                source, checkpoint, parallel=parallel, world_size=world_size, stride=stride, every=1
            )
            results[name, checkpoint.name] = rows
        parallel_state.destroy_model_parallel()  # the next layout joins groups of its own
    return results


def test_one_rank(folders):
    """Ordinary positions; V2PE positions run below, on several ranks."""
    results = compare_all(0, 1, folders, {"one": {}}, 0)
    shutdown()
    check(results, layouts=1)


@pytest.mark.distributed
def test_two_ranks(folders):
    by_rank = run_ranks(compare_all, 2, folders, LAYOUTS, 1, timeout=280)
    assert by_rank[0] == by_rank[1]
    check(by_rank[0], layouts=len(LAYOUTS))


def check(results, *, layouts):
    assert len(results) == len(KEYS) * layouts
    for which, rows in results.items():
        assert len(rows) >= NUM_STAGES
        assert [row for row in rows if not row.passes] == [], which
        assert rows[0].name == "vision.embedding"
        assert rows[-1].name == "logits"
