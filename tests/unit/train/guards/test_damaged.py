"""Packs with documents taken out of the loss or made blank; that ranks agree is in tests/distributed."""

import numpy as np

from megatron_v2pe.batch.packed_batch import IGNORE_INDEX, blanked, without_loss
from megatron_v2pe.data.loader import explained_worker_deaths


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


def test_a_blank_document_keeps_its_lengths_only(filled):
    """All ranks that share a pack must lay it out alike, also those that could read the document."""
    batch, number = next(
        (batch, number)
        for (batch,) in filled.loader(filled.config(batch=1))
        for number, document in enumerate(batch.layout.documents)
        if document.num_images > 1 and len(batch.layout.documents) > 1
    )
    blank, bounds = blanked(batch, {number}), batch.layout.cu_seqlens.tolist()
    own = slice(bounds[number], bounds[number + 1])
    tiles = [[each.total_tiles for each in pack.layout.documents] for pack in (batch, blank)]
    assert tiles[0] == tiles[1]
    assert blank.layout.cu_seqlens.tolist() == bounds
    assert blank.layout.documents[number].image_starts.tolist() == [0]
    assert blank.layout.documents[number - 1] is batch.layout.documents[number - 1]
    assert not blank.tokens[own].any()
    assert batch.tokens[own].any()
    assert (blank.labels[own] == IGNORE_INDEX).all()
    assert not blank.loss_weights[own].any()
    assert blanked(batch, set()) is batch


def test_other_errors_are_not_explained_away():
    error = RuntimeError("something else")
    try:
        with explained_worker_deaths():
            raise error
    except RuntimeError as caught:
        found = caught
    assert found is error
