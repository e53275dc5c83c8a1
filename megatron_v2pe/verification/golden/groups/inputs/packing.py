"""Golden packing: the release's packs in emission order, collation with loss weights, whole data set items."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from megatron_v2pe.batch.packed_batch import IGNORE_INDEX
from megatron_v2pe.data.collate import collate_pack, shift_left, token_weights
from megatron_v2pe.data.plan.release_packing import GreedyPack, GreedySample, ReleaseGreedyPacker
from megatron_v2pe.data.samples.encode import EncodedSample
from megatron_v2pe.v2pe.layout import Int64Array, text_layout
from megatron_v2pe.verification.golden.groups.inputs import dataset_items
from megatron_v2pe.verification.golden.rows import Row, compared, equal

_REDUCTIONS = ("token", "sample", "square")
_WEIGHT_TOLERANCE = 1e-7  # float32 rounding of weights up to 1
_TOKENS_OF_FAKE_IMAGE = 3  # <img>, one visual token, </img>


def run(folder: Path, *, family: str | None) -> Iterator[Row]:
    """Every case of packing/ and of text/dataset_items.json; only the latter depend on the family."""
    packing = folder / "packing"
    if (packing / "packs.json").is_file():
        table = json.loads((packing / "packs.json").read_text(encoding="utf-8"))
        for case in table["cases"]:
            yield from _pack_rows(case, table)
    if (packing / "collate.json").is_file():
        yield from _collate_rows(packing / "collate.json")
    if (packing / "loss.json").is_file():
        yield from _weight_rows(packing / "loss.json")
    if (folder / "text" / "dataset_items.json").is_file():
        yield from dataset_items.run(folder, family=family)


def _pack_rows(case: dict[str, Any], table: dict[str, Any]) -> Iterator[Row]:
    """Packs of one case, fed in the recorded order; where the release failed, so must we, at the same place."""
    settings = case["settings"]
    samples = {
        sample.sample_id: sample
        for dataset in case["datasets"]
        for sample in map(_fake_sample, table["sample_lists"][dataset["samples"]])
    }
    packer = ReleaseGreedyPacker(
        max_tiles=settings["num_images_expected"],
        max_tokens=settings["max_packed_tokens"],
        max_buffer_size=settings["max_buffer_size"],
        allow_overflow=settings["allow_overflow"],
        strict=settings["strict_mode"],
    )
    ours: list[dict[str, Any]] = []
    failure: str | None = None
    try:
        for consumed, sample_id in enumerate(case["arrival_order"], start=1):
            ours += [_facts(pack, consumed) for pack in packer.add(samples[sample_id])]
        ours += [_facts(pack, len(case["arrival_order"])) for pack in packer.flush()]
    except ValueError as error:
        failure = str(error)
    wanted = [{key: pack[key] for key in _facts(GreedyPack(), 0)} for pack in case["packs"]]
    name = f"packing/{case['name']}"
    first = next(
        (place for place, pair in enumerate(zip(ours, wanted, strict=False)) if pair[0] != pair[1]), -1
    )
    detail = f"{len(ours)} packs, expected {len(wanted)}; first difference at pack {first}"
    yield equal(name, "packs", is_equal=ours == wanted, detail=detail)
    is_same_end = (failure is None) == (case["reference_error"] is None)
    yield equal(
        name, "failure", is_equal=is_same_end, detail=f"{failure}, expected {case['reference_error']}"
    )


def _fake_sample(row: list[int]) -> GreedySample:
    """A sample of the list: its images of three tokens start at every (tokens // images)-th token."""
    sample_id, num_tokens, num_tiles, is_text_only = row
    starts = [] if is_text_only else [image * (num_tokens // num_tiles) for image in range(num_tiles)]
    return GreedySample(
        sample_id=sample_id,
        num_tokens=num_tokens,
        num_tiles=num_tiles,
        image_spans=tuple((start, start + _TOKENS_OF_FAKE_IMAGE) for start in starts),
    )


def _facts(pack: GreedyPack, consumed: int) -> dict[str, Any]:
    return {
        "parts": [[part.sample.sample_id, part.start, part.end] for part in pack.members],
        "tokens": pack.num_tokens,
        "tiles": pack.num_tiles,
        "data_index_values": [part.document for part in pack.members],
        "arrivals_consumed": consumed,
    }


def _collate_rows(path: Path) -> Iterator[Row]:
    """Labels, document bounds and weights; the release's padding segment is a document without labels here."""
    with safe_open(path.with_suffix(".safetensors"), framework="np") as tensors:
        for case in json.loads(path.read_text(encoding="utf-8"))["cases"]:
            name = f"packing/collate_{case['index']}_{case['loss_reduction']}"
            source = f"collate_{case['same_inputs_as_index']}"
            samples = _documents(
                tensors.get_tensor(f"{source}/in_labels").astype(np.int64),
                tensors.get_tensor(f"{source}/in_data_index"),
                num_tokens=case["max_item_length"],
            )
            pack = collate_pack(
                samples,
                pad_to_multiple=1,
                pad_token_id=0,
                loss_reduction=case["loss_reduction"],
                image_size=1,
            )
            labels = shift_left(tensors.get_tensor(f"{source}/labels").astype(np.int64), fill=IGNORE_INDEX)
            weights = tensors.get_tensor(f"collate_{case['index']}/loss_weight")
            cu_seqlens = tensors.get_tensor(f"{source}/cu_seqlens").tolist()
            bounds = pack.layout.cu_seqlens.tolist()
            yield equal(
                name, "labels", is_equal=bool(np.array_equal(pack.labels, labels)), detail="labels differ"
            )
            yield equal(
                name, "cu_seqlens", is_equal=bounds == cu_seqlens, detail=f"{bounds}, expected {cu_seqlens}"
            )
            error = float(np.abs(pack.loss_weights - shift_left(weights, fill=0.0)).max())
            yield compared(name, "loss_weights", error=error, tolerance=_WEIGHT_TOLERANCE)


def _documents(labels: Int64Array, data_index: Any, *, num_tokens: int = 0) -> list[EncodedSample]:
    """Samples of a pack from its labels and the sample number of each token, padded to `num_tokens`."""
    edges = [0, *(np.flatnonzero(np.diff(data_index)) + 1).tolist(), len(labels)]
    documents = [labels[start:end] for start, end in pairwise(edges)]
    if num_tokens > len(labels):
        documents.append(np.full(num_tokens - len(labels), IGNORE_INDEX, dtype=np.int64))
    return [
        EncodedSample(
            tokens=np.zeros(len(document), dtype=np.int64),
            labels=document,
            layout=text_layout(len(document), tokens_per_tile=1),
            media=(),
            sample_id=str(number),
        )
        for number, document in enumerate(documents)
    ]


def _weight_rows(path: Path) -> Iterator[Row]:
    """Weights of the loss cases; the losses themselves belong to the model's group."""
    with safe_open(path.with_suffix(".safetensors"), framework="np") as tensors:
        names = set(tensors.keys())
        prefixes = sorted({name.rsplit("/", 1)[0] for name in names if name.endswith("/data_index")})
        for prefix in prefixes:
            labels = tensors.get_tensor(f"{prefix}/labels").astype(np.int64).reshape(-1)
            documents = _documents(labels, tensors.get_tensor(f"{prefix}/data_index").reshape(-1))
            for reduction in (each for each in _REDUCTIONS if f"{prefix}/weight_{each}" in names):
                ours = [token_weights(document.labels, loss_reduction=reduction) for document in documents]
                wanted = tensors.get_tensor(f"{prefix}/weight_{reduction}").reshape(-1)
                error = float(np.abs(np.concatenate(ours) - wanted).max())
                yield compared(
                    f"packing/loss_{prefix}", f"weight_{reduction}", error=error, tolerance=_WEIGHT_TOLERANCE
                )
