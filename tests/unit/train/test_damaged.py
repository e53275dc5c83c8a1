"""Packs with documents taken out of the loss; agreement over ranks is in tests/e2e/test_data_order.py."""

import numpy as np

from megatron_v2pe.batch.packed_batch import IGNORE_INDEX
from megatron_v2pe.data.loader import explained_worker_deaths
from megatron_v2pe.train.damaged import without_loss


def test_only_the_named_documents_lose_labels_and_weights(filled):
    batch = next(batch for (batch,) in filled.loader(filled.config(batch=1)) if len(batch.sample_ids) > 2)
    bounds = batch.layout.cu_seqlens
    kept = np.ones(len(batch.tokens), dtype=bool)
    kept[bounds[1] : bounds[2]] = False
    less = without_loss(batch, {1})
    assert np.array_equal(less.labels[kept], batch.labels[kept])
    assert np.array_equal(less.loss_weights[kept], batch.loss_weights[kept])
    assert (less.labels[~kept] == IGNORE_INDEX).all()
    assert not less.loss_weights[~kept].any()
    assert batch.loss_weights[~kept].any()  # the pack itself is not changed
    assert np.array_equal(less.tokens, batch.tokens)
    assert without_loss(batch, set()) is batch


def test_other_errors_are_not_explained_away():
    error = RuntimeError("something else")
    try:
        with explained_worker_deaths():
            raise error
    except RuntimeError as caught:
        found = caught
    assert found is error
