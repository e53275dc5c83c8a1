"""A line that one rank cannot read any more: all ranks agree on it before anything of the step is sent.

At cp 2 rank 1 alone reads garbage, as from one node's bad cache; both share the pack and must lay it out alike. At
dp 2 the rank that draws it does; they have packs of their own and must count alike.
"""

from pathlib import Path

import numpy as np
import pytest

from megatron_v2pe.batch.packed_batch import IGNORE_INDEX
from tests.support.mixture import Mixture, empty_mixture, record, write_image
from tests.support.spawn import run_ranks

pytestmark = pytest.mark.distributed

BAD = "a:2"


def masked(rank, world_size, folder, sizes, share):
    """What a rank trains on, over two steps; the message of the refusal instead if there is one."""
    from megatron_v2pe.core.errors import DataError
    from megatron_v2pe.data import pack_reader
    from megatron_v2pe.parallel.topology import ParallelPlan, init_distributed, shutdown
    from megatron_v2pe.train.guards.damaged import DamagedSamples

    plan = ParallelPlan(**sizes)
    ranks = init_distributed(plan, seed=0, timeout_minutes=1).ranks
    mixture = Mixture(Path(folder))
    loader = mixture.loader(
        mixture.config(steps=2, batch=2, max_pack_tokens=256, max_sample_tokens=256, max_bad_samples=share),
        dp=(ranks.dp_rank, plan.dp),
        tile=(ranks.tile_rank, plan.tile_ranks),
    )
    if rank == 1 or plan.dp == 2:
        real = pack_reader.read_line
        pack_reader.read_line = lambda path, offset: spoiled(real(path, offset))
    damaged = DamagedSamples(
        run_dir=Path(folder) / "run",
        ranks=ranks,
        num_bad=loader.num_bad,
        num_samples=loader.num_samples,
        max_share=share,
    )
    found = []
    try:
        for step, batches in enumerate(loader, 1):
            found.append([facts(batch) for batch in damaged.mask_damaged(batches, step=step)])
        outcome = found, damaged.num_skipped
    except DataError as error:
        outcome = str(error)
    shutdown()
    return outcome


def spoiled(line):
    return b"\xff" * len(line) if b"the bad one" in line else line


def facts(batch):
    spans = [
        (each.num_tokens, each.image_starts.tolist(), each.num_tiles.tolist())
        for each in batch.layout.documents
    ]
    return batch.sample_ids, spans, batch.tokens, batch.labels, batch.loss_weights, batch.layout.cu_seqlens


def fill(folder):
    """Four samples, one to a pack; the second is the one that breaks."""
    mixture = empty_mixture(folder)
    (folder / "run").mkdir()
    write_image(folder / "images" / "a.png", 112, 112)
    texts = ["one", "the bad one", "three", "four"]
    mixture.write([record(f"<image> and <image>: {text}", "x " * 20, ["a.png", "a.png"]) for text in texts])
    mixture.loader(mixture.config(steps=2, batch=2, max_pack_tokens=256, max_sample_tokens=256))
    return mixture


@pytest.mark.parametrize("sizes", [{"cp": 2}, {"dp": 2}], ids=["cp 2", "dp 2"])
def test_ranks_agree_on_a_line_that_one_cannot_read(tmp_path, sizes):
    fill(tmp_path)
    first, second = run_ranks(masked, 2, str(tmp_path), sizes, 0.5, timeout=90)
    met = 0
    for mine, theirs in zip(first[0], second[0], strict=True):
        for own, other in zip(mine, theirs, strict=True):
            if "cp" in sizes:
                assert own[:2] == other[:2]
                assert all(np.array_equal(*pair) for pair in zip(own[2:], other[2:], strict=True))
            for ids, spans, tokens, labels, weights, _ in [own] if "cp" in sizes else [own, other]:
                is_bad = ids == (BAD,)
                met += is_bad
                assert is_bad == (not tokens.any()) == (not weights.any())
                assert is_bad == bool((labels == IGNORE_INDEX).all())
                assert not is_bad or spans[0][1] == [0]
    assert met == 1
    assert first[1] == second[1] == 1
    assert BAD in (tmp_path / "run" / "bad_samples.jsonl").read_text()


def test_ranks_stop_together_when_too_many_are_damaged(tmp_path):
    fill(tmp_path)
    first, second = run_ranks(masked, 2, str(tmp_path), {"cp": 2}, 0.0, timeout=90)
    assert first == second
    assert first.startswith("1 of 4 samples are bad, 1 of them found while training")
    assert "a.jsonl:2: not utf-8" in first
