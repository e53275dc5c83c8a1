"""Two processes evaluate what one does: the same answers, each once, and one report."""

import json

import pytest
from PIL import Image

from megatron_v2pe.checkpoint.convert.import_hf import import_hf
from megatron_v2pe.core.jsonl import read_jsonl
from tests.support.warm import run_verb


def evaluate(ranks, checkpoint, data, out, *sizes):
    options = ("--out", out, "--strides", "default,2", "--max-new-tokens", "3")
    one_thread = {"OMP_NUM_THREADS": "1"}
    done = run_verb(
        "evaluate", checkpoint, "--data", data, *sizes, *options, ranks=ranks, variables=one_thread
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.distributed
@pytest.mark.parametrize("sizes", [(), ("--cp", "2")], ids=["two replicas", "cp 2"])
def test_two_ranks_answer_like_one(request, tmp_path, sizes):
    golden = request.config.rootpath / "tests" / "golden" / "ckpt" / "a_internlm2_vit300m"
    import_hf(golden, tmp_path / "imported")
    Image.new("RGB", (112, 112), (200, 30, 90)).save(tmp_path / "a.png")
    data = tmp_path / "eval.jsonl"
    data.write_text(
        "".join(
            json.dumps(
                {
                    "id": f"q{n}",
                    "image": ["a.png"],
                    "conversations": [
                        {"from": "human", "value": f"number {n} <image> {'word ' * n}?"},
                        {"from": "gpt", "value": str(n)},
                    ],
                    "length": 10 * n,
                    "depth": 0.5,
                }
            )
            + "\n"
            for n in range(1, 6)
        )
    )
    tables = {
        name: evaluate(ranks, tmp_path / "imported", data, tmp_path / name, *given)
        for name, ranks, given in (("one", 1, ()), ("two", 2, sizes))
    }
    assert tables["one"] == tables["two"]
    for stride in ("default", "2"):
        rows = {
            name: [values for _, values in read_jsonl(tmp_path / name / f"predictions_{stride}.jsonl")]
            for name in tables
        }
        assert len(rows["two"]) == 5
        assert sorted(rows["two"], key=lambda row: row["id"]) == sorted(
            rows["one"], key=lambda row: row["id"]
        )
