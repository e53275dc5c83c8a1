"""The model as an answerer: a question about images becomes a prompt, its greedy answer becomes text.

item -> image sizes -> tiles, tokens with visual slots, one stride for every image -> engine -> text
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

import numpy as np

from megatron_v2pe.checkpoint.folder import hf_path, read_info
from megatron_v2pe.config.architecture import read_architecture
from megatron_v2pe.config.schema import DataConfig, RunConfig
from megatron_v2pe.data.encode import encode_conversation
from megatron_v2pe.data.images import NORMALIZATION, image_size, load_tile_range
from megatron_v2pe.data.meta import DatasetEntry
from megatron_v2pe.data.samples import image_refs, sample_settings
from megatron_v2pe.evaluation.retrieval import RetrievalItem, StrideSetting
from megatron_v2pe.inference.engine import Engine, Prompt
from megatron_v2pe.parallel.topology import shutdown
from megatron_v2pe.v2pe.layout import SampleLayout

PositionMode = Literal["default", "v2pe_fixed"]
_NO_LIMIT = 2**40  # an evaluation never cuts a sample


class EngineAnswerer:
    """Answers with a checkpoint on one rank; call `close` when done (`contextlib.closing`).

    Args:
        checkpoint: folder written by `import-hf` or by a run.
        data: tiling and normalisation; lengths and packing are not used.
        dtype: compute dtype.
        max_new_tokens: longest answer.

    Attributes:
        arch: architecture of the checkpoint.

    Raises:
        CheckpointError: the folder is not a complete checkpoint.
    """

    def __init__(
        self,
        checkpoint: str | Path,
        *,
        data: DataConfig,
        dtype: Literal["float32", "bfloat16"],
        max_new_tokens: int,
    ) -> None:
        read_info(checkpoint)
        self._checkpoint, self._dtype, self._max_new_tokens = checkpoint, dtype, max_new_tokens
        self.arch = read_architecture(hf_path(checkpoint))
        settings = sample_settings(RunConfig(data=data), self.arch, hf_path(checkpoint))
        text = dataclasses.replace(settings.text, max_tokens=_NO_LIMIT)
        self._settings = dataclasses.replace(settings, text=text)
        self._tokenizer = text.tokenizer
        self._stop_ids = {self._tokenizer.token_id(text.template.separator), self._tokenizer.eos_id}
        self._engine: Engine | None = None
        self._mode: PositionMode = "default"

    def answer(self, item: RetrievalItem, setting: StrideSetting) -> str:
        """Greedy answer as text.

        Raises:
            DataError: an image cannot be read.
        """
        ids = self._engine_for(setting.mode).generate(
            self.prompt(item, setting), max_new_tokens=self._max_new_tokens, stop_ids=self._stop_ids
        )
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def prompt(self, item: RetrievalItem, setting: StrideSetting) -> Prompt:
        """What the model is given: the conversation up to the assistant's role, and all tiles."""
        record = item.record
        sizes = [image_size(path, max_pixels=self._settings.max_image_pixels) for path in record.images]
        refs = image_refs(record, sizes, entry=_plain_entry(record.where), settings=self._settings)
        num_tiles = np.array([ref.grid.num_tiles for ref in refs], dtype=np.int64)
        encoded = encode_conversation(
            record.turns,
            num_tiles=num_tiles.tolist(),
            settings=self._settings.text,
            add_generation_prompt=True,
        )
        layout = SampleLayout(
            num_tokens=len(encoded.tokens),
            image_starts=encoded.image_starts,
            num_tiles=num_tiles,
            strides=np.full(len(refs), setting.stride, dtype=np.int64),
            tokens_per_tile=self.arch.tokens_per_tile,
        )
        tiles = load_tile_range(refs, image_size=self.arch.image_size, tile_range=(0, int(num_tiles.sum())))
        return Prompt(tokens=encoded.tokens, layout=layout, tiles=tiles)

    def close(self) -> None:
        """Drop the model and leave the process groups, so that another one may be loaded."""
        if self._engine is not None:
            self._engine = None
            shutdown()

    def _engine_for(self, mode: PositionMode) -> Engine:
        """Engine of a position mode; strides of one mode share it, because each prompt brings its own."""
        if self._engine is None or self._mode != mode:
            self.close()  # one model in memory at a time
            mean, std = NORMALIZATION[self._settings.normalize_type]
            self._engine = Engine.load(self._checkpoint, mode=mode, mean=mean, std=std, dtype=self._dtype)
            self._mode = mode
        return self._engine


def _plain_entry(name: str) -> DatasetEntry:
    """A data set without overrides and without augmentation."""
    return DatasetEntry(
        name=name,
        annotation=name,
        root="",
        root2="",
        http_root="",
        repeat_time=1.0,
        data_augment=False,
        max_dynamic_patch=None,
        dynamic_image_size=None,
    )
