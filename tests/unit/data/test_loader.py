"""The loader: the same stream at any number of ranks, workers and starts; pixels only where they are due."""

import os

import numpy as np
import pytest

from megatron_v2pe.config.schema import PositionConfig
from megatron_v2pe.core.errors import ConfigError, DataError
from megatron_v2pe.data import images
from tests.support.mixture import record, write_image

RANDOM = PositionConfig(mode="v2pe_random")


def facts(batch):
    """Everything of a pack but its pixels."""
    strides = [document.strides.tolist() for document in batch.layout.documents]
    arrays = (batch.tokens, batch.labels, batch.loss_weights, batch.layout.cu_seqlens)
    return batch.sample_ids, strides, batch.num_tiles, tuple(array.tobytes() for array in arrays)


def stream(mixture, config, **where):
    return [[facts(batch) for batch in step] for step in mixture.loader(config, holds_vision=False, **where)]


def test_one_list_of_micro_batches_for_each_step(filled):
    steps = list(filled.loader(filled.config(steps=3, batch=4), dp=(1, 2)))
    assert [len(step) for step in steps] == [2, 2, 2]
    for batch in steps[0]:
        assert len(batch.tokens) <= 1024 + 4 * len(batch.sample_ids)
        assert (np.diff(batch.layout.cu_seqlens) % 4 == 0).all()
        assert batch.tile_range == (0, batch.num_tiles)
        assert batch.tiles.shape == (batch.num_tiles, 3, 112, 112)


def test_resumed_stream_is_the_continuation(filled):
    config = filled.config(steps=12, position=RANDOM)
    whole = stream(filled, config)
    for start in (1, 5, 11):
        assert stream(filled, config, start_step=start) == whole[start:]
    assert stream(filled, config, start_step=12) == []


def test_order_does_not_depend_on_data_parallel_size(filled):
    config = filled.config(steps=6, batch=4, position=RANDOM)
    whole = stream(filled, config)
    for size in (2, 4):
        ranks = [stream(filled, config, dp=(rank, size)) for rank in range(size)]
        for step, expected in enumerate(whole):
            dealt = [ranks[place % size][step][place // size] for place in range(4)]
            assert dealt == expected


def test_workers_give_the_same_packs_and_pixels(filled):
    def read(workers):
        return list(filled.loader(filled.config(steps=3, num_workers=workers, position=RANDOM), start_step=1))

    for alone, with_workers in zip(read(0), read(2), strict=True):
        for left, right in zip(alone, with_workers, strict=True):
            assert facts(left) == facts(right)
            assert np.array_equal(left.tiles, right.tiles)


def test_tile_shares_make_up_the_pack(filled):
    config = filled.config(steps=3)
    whole = list(filled.loader(config))
    shares = [list(filled.loader(config, tile=(rank, 3))) for rank in range(3)]
    for step, batches in enumerate(whole):
        for place, batch in enumerate(batches):
            parts = [share[step][place] for share in shares]
            assert np.array_equal(np.concatenate([part.tiles for part in parts]), batch.tiles)
            sizes = [len(part.tiles) for part in parts]
            assert max(sizes) - min(sizes) <= 1
            assert all(facts(part) == facts(batch) for part in parts)


def test_a_rank_opens_only_the_images_of_its_tiles(filled, monkeypatch):
    config = filled.config(steps=4)
    filled.loader(config)  # measures
    opened = []
    real = images.load_tiles
    monkeypatch.setattr(
        images, "load_tiles", lambda ref, **rest: opened.append(ref.path) or real(ref, **rest)
    )
    list(filled.loader(config, holds_vision=False))
    assert opened == []
    (first, *_) = list(filled.loader(config, tile=(0, 4)))
    per_rank = len(opened)
    opened.clear()
    list(filled.loader(config))
    assert 0 < per_rank < len(opened)
    assert first[0].tile_range[0] == 0


def test_strides_are_drawn_anew_in_each_epoch(filled):
    loader = filled.loader(filled.config(steps=20, position=RANDOM), holds_vision=False)
    drawn = {}
    for step in loader:
        for batch in step:
            for name, document in zip(batch.sample_ids, batch.layout.documents, strict=True):
                drawn.setdefault(name, set()).add(tuple(document.strides.tolist()))
    assert max(len(strides) for name, strides in drawn.items()) > 2


def test_bad_samples_are_named_and_skipped(mixture, caplog):
    mixture.write(
        [*[record(f"question {n}", "answer") for n in range(30)], "{", record("<image>", "x", "no.png")]
    )
    with pytest.raises(DataError, match="2 of 32 samples are bad"):
        mixture.loader(mixture.config())
    caplog.set_level("WARNING", logger="megatron_v2pe")
    loader = mixture.loader(mixture.config(steps=30, max_bad_samples=0.1))
    assert (loader.num_bad, loader.num_samples) == (2, 30)
    assert "skipped a:31" in caplog.text
    assert "skipped a:32" in caplog.text
    assert "no.png" in caplog.text
    seen = {name for step in loader for batch in step for name in batch.sample_ids}
    assert seen == {f"a:{line}" for line in range(1, 31)}


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_breaks_later_stops_with_one_clear_message(mixture, workers):
    write_image(mixture.folder / "images" / "a.png", 60, 60)
    mixture.write([record("<image>", "x", "a.png")])
    config = mixture.config(num_workers=workers)
    loader = mixture.loader(config)
    content = bytearray((mixture.folder / "images" / "a.png").read_bytes())
    content[200:260] = bytes(60)
    (mixture.folder / "images" / "a.png").write_bytes(bytes(content))
    with pytest.raises(DataError, match=r"^\S*a\.png: cannot be read as an image") as caught:
        list(loader)
    assert "Traceback" not in str(caught.value)


def test_an_annotation_file_that_vanishes(mixture):
    mixture.write([record("hello", "hi")])
    loader = mixture.loader(mixture.config())
    os.remove(mixture.folder / "a.jsonl")
    with pytest.raises(DataError, match=r"a\.jsonl: No such file"):
        list(loader)


def test_batch_that_does_not_divide(filled):
    with pytest.raises(ConfigError, match=r"optim\.global_batch_size is 2, .* size 3 must divide it"):
        filled.loader(filled.config(), dp=(0, 3))


def test_missing_paths(filled):
    with pytest.raises(ConfigError, match=r"runtime\.run_dir is empty"):
        filled.loader(filled.config(cache_dir=""))
