"""Training a model with biased queries, keys and values and tied embeddings: the same curve on every axis.

Both need care over ranks: a bias is split over tp, and with pipeline stages the tied weight lies on two of them.
"""

import shutil

import numpy as np
import pytest

from megatron_v2pe.checkpoint.convert.export_hf import export_hf
from megatron_v2pe.checkpoint.convert.import_hf import import_hf
from megatron_v2pe.checkpoint.hf.weights import HFWeights
from tests.support import tiny
from tests.support.hf_folders import edit_config, edit_weights, golden_copy

TOKENIZER_FILES = ("tokenizer.model", "tokenizer_config.json", "added_tokens.json", "special_tokens_map.json")


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    """A tied Qwen2 with the InternLM2 folder's tokenizer of as many words, its data, and the curve of one rank."""
    root = tmp_path_factory.mktemp("qwen2")
    hf = golden_copy(root / "hf", key="c_qwen2_vit300m")
    edit_config(hf, llm_config={"tie_word_embeddings": True}, template="internlm2-chat")
    edit_weights(hf, language_model__lm_head__weight=None)
    for name in ("vocab.json", "merges.txt"):
        (hf / name).unlink()
    for name in TOKENIZER_FILES:
        shutil.copyfile(tiny.GOLDEN_HF / name, hf / name)
    import_hf(hf, root / "checkpoint")
    meta = tiny.make_data(root / "data")
    config = tiny.run_yaml(
        root / "run.yaml", checkpoint=root / "checkpoint", meta=meta, run_dir=root / "single"
    )
    tiny.train(config, [])
    return hf, config, tiny.curve(root / "single")


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(
    "overrides",
    [["parallel.tp=2", "parallel.sequence_parallel=true"], ["parallel.pp=2"]],
    ids=["tp2sp", "pp2"],
)
def test_two_ranks_give_the_curve_of_one_and_export(setup, overrides, tmp_path):
    hf, config, wanted = setup
    tiny.train(config, [*overrides, f"runtime.run_dir={tmp_path / 'run'}"], ranks=2)
    np.testing.assert_allclose(tiny.curve(tmp_path / "run"), wanted, rtol=1e-5)
    export_hf(tmp_path / "run" / "checkpoints" / "step_00000005", tmp_path / "out")
    assert HFWeights(tmp_path / "out").tensors == HFWeights(hf).tensors
    biases = [name for name in HFWeights(hf).tensors if name.endswith("k_proj.bias")]
    assert len(biases) == 2
