"""Greedy generation against the release: the same tokens, and the same five best logits at each step."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_v2pe.config.arch.architecture import read_architecture
from megatron_v2pe.config.schema import ParallelConfig
from megatron_v2pe.core.errors import CheckpointError
from megatron_v2pe.data.samples.encode import TextSettings, encode_conversation
from megatron_v2pe.data.text.templates import Turn, get_template
from megatron_v2pe.data.text.tokenizer import IMAGE_CONTEXT, load_tokenizer
from megatron_v2pe.inference.engine import Engine
from megatron_v2pe.inference.prompts.prompt import Prompt
from megatron_v2pe.inference.prompts.tiles import ArrayTiles
from megatron_v2pe.v2pe.layout import SampleLayout, find_images
from megatron_v2pe.verification.golden.cases import ForwardFile
from megatron_v2pe.verification.golden.checkpoints import (
    fitting_layout,
    imported_checkpoints,
    is_left_out,
)
from megatron_v2pe.verification.golden.rows import Row, compared, equal, unsupported

LOGITS_ATOL = 2e-3  # below the smallest margin between first and second choice of any case, 0.0097


def run(folder: Path, *, family: str | None, parallel: ParallelConfig) -> Iterator[Row]:
    """All greedy cases; see `rows` for the contract of a model group."""
    path = folder / "generation" / "greedy.json"
    tensors = load_file(path.with_suffix(".safetensors"))
    checkpoints = imported_checkpoints(folder, family)
    for case in json.loads(path.read_text(encoding="utf-8"))["cases"]:
        if family is not None and not case["ckpt"].startswith(family):
            continue
        name = f"generation/{case['name']}"
        checkpoint = checkpoints[case["ckpt"]]
        if is_left_out(parallel, checkpoint):
            continue
        if isinstance(checkpoint, CheckpointError):
            yield unsupported(name, "all", reason=str(checkpoint).splitlines()[0])
            continue
        engine = Engine.load(
            checkpoint,
            mode="default" if case["version"] == "default" else "v2pe_fixed",
            parallel=fitting_layout(parallel, read_architecture(folder / "ckpt" / case["ckpt"])),
        )
        prompt = _prompt(case, folder, tensors)
        yield _question_row(name, case, folder, prompt)
        yield from _case_rows(name, case, prompt, tensors, engine)


def _case_rows(
    name: str, case: dict[str, Any], prompt: Prompt, tensors: dict[str, Tensor], engine: Engine
) -> Iterator[Row]:
    wanted = tensors[f"{case['name']}/new_tokens"].tolist()
    steps = list(engine.stream(prompt, max_new_tokens=len(wanted), stop_ids=(), logits=True))
    tokens = [step.token for step in steps]
    yield equal(name, "new_tokens", is_equal=tokens == wanted, detail=f"{tokens} instead of {wanted}")
    positions = torch.tensor([float(step.position) for step in steps])
    deviation = (positions - tensors[f"{case['name']}/step_positions"]).abs().max()
    yield compared(name, "step_positions", error=float(deviation), tolerance=0.0)
    logits = torch.stack([step.logits for step in steps if step.logits is not None]).cpu()
    best = logits.gather(1, tensors[f"{case['name']}/step_top5_ids"].long())
    error = float((best - tensors[f"{case['name']}/step_top5_values"]).abs().max())
    yield compared(name, "step_top5_values", error=error, tolerance=LOGITS_ATOL)


def _question_row(name: str, case: dict[str, Any], folder: Path, prompt: Prompt) -> Row:
    """The question in the checkpoint's own template, as `generate` encodes it, against the recorded prompt."""
    hf_folder = folder / "ckpt" / case["ckpt"]
    arch = read_architecture(hf_folder)
    settings = TextSettings(
        tokenizer=load_tokenizer(hf_folder),
        template=get_template(arch.template),
        tokens_per_tile=arch.tokens_per_tile,
        max_tokens=len(prompt.tokens),
    )
    turns = [Turn(role="human", value=case["question"])]
    encoded = encode_conversation(
        turns, num_tiles=case["num_tiles"], settings=settings, add_generation_prompt=True
    )
    is_equal = encoded.tokens.tolist() == prompt.tokens.tolist()
    detail = f"{encoded.num_uncut_tokens} tokens, expected {len(prompt.tokens)}, or other ids"
    return equal(name, "prompt", is_equal=is_equal, detail=detail)


def _prompt(case: dict[str, Any], folder: Path, tensors: dict[str, Tensor]) -> Prompt:
    arch = read_architecture(folder / "ckpt" / case["ckpt"])
    tokens = tensors[f"{case['name']}/input_ids"].long().numpy()
    per_tile = arch.tokens_per_tile
    image_token = load_tokenizer(folder / "ckpt" / case["ckpt"]).token_id(IMAGE_CONTEXT)
    num_tiles = np.array(case["num_tiles"], dtype=np.int64)
    layout = SampleLayout(
        num_tokens=len(tokens),
        image_starts=find_images(
            tokens, image_token_id=image_token, num_tiles=num_tiles.tolist(), tokens_per_tile=per_tile
        ),
        num_tiles=num_tiles,
        strides=np.full(len(num_tiles), case["stride"] or per_tile, dtype=np.int64),
        tokens_per_tile=per_tile,
    )
    file = ForwardFile.open(folder, folder / "forward" / f"{case['ckpt']}.json")
    pool = file.tensor("pixel_pool").float()
    tiles = pool[tensors[f"{case['name']}/tile_index"].long()].numpy()
    return Prompt(tokens=tokens, layout=layout, tiles=ArrayTiles(tiles, num_tiles.tolist()))
