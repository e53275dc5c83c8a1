"""What a forward file says of its checkpoint and cases beside tensors, against config.json, tokenizer and pack."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megatron_v2pe.batch.packed_batch import IGNORE_INDEX, PackedBatch
from megatron_v2pe.data.text.tokenizer import load_tokenizer
from megatron_v2pe.verification.golden.cases import Case, ForwardFile
from megatron_v2pe.verification.golden.rows import Row, equal


def file_rows(file: ForwardFile) -> Iterator[Row]:
    """Sizes and ids of the whole file."""
    arch = file.architecture()
    tokenizer = load_tokenizer(file.checkpoint)
    ours: dict[str, Any] = {
        "num_image_token": arch.tokens_per_tile,
        "image_size": arch.image_size,
        "vocab_size": arch.language.vocab_size,
        "num_pool_tiles": len(file.tensor("pixel_pool")),
        "token_ids": {token: tokenizer.token_id(token) for token in file.values["token_ids"]},
    }
    if arch.language.experts is not None:
        ours["router_aux_loss_coef"] = arch.language.experts.aux_loss_coefficient
    for quantity, value in ours.items():
        if quantity in file.values:
            yield _equal(f"model/{file.key}/file", quantity, value, file.values[quantity])


def case_row(name: str, case: Case, pack: PackedBatch) -> Row:
    """Lengths, labels, tiles and sparse layers of a case, of what is recorded of them."""
    documents = pack.layout.documents
    tiles = [document.num_tiles.tolist() for document in documents]
    experts = case.file.architecture().language.experts
    ours = {
        "seq_len": sum(document.num_tokens for document in documents),
        "num_label_tokens": int((pack.labels != IGNORE_INDEX).sum()),
        "sample_lengths": [document.num_tokens for document in documents],
        "sample_num_tiles": tiles,
        "num_tiles": tiles[0]
        or case.values.get("num_tiles"),  # a sample of text has a blank tile in the release
        "moe_layers": list(experts.sparse_layers) if experts else [],
    }
    recorded = [quantity for quantity in ours if case.values.get(quantity) is not None]
    return _equal(
        name,
        "sizes",
        {quantity: ours[quantity] for quantity in recorded},
        {quantity: case.values[quantity] for quantity in recorded},
    )


def _equal(name: str, quantity: str, value: Any, wanted: Any) -> Row:
    return equal(name, quantity, is_equal=value == wanted, detail=f"{value}, expected {wanted}")
