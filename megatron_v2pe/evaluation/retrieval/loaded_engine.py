"""A checkpoint for an evaluation: how its prompts are made, and its model, loaded for one position mode at a time."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from megatron_v2pe.batch.pixel_norm import PixelNorm
from megatron_v2pe.checkpoint.model_source import require_source, source_side_files
from megatron_v2pe.config.arch.architecture import InternVLArchitecture, read_architecture
from megatron_v2pe.config.schema import DataConfig, ParallelConfig, RunConfig
from megatron_v2pe.config.trained_settings import answer_data
from megatron_v2pe.data.media.normalization import NORMALIZATION
from megatron_v2pe.data.samples.settings import SampleSettings, sample_settings, with_system
from megatron_v2pe.data.text.answers import AnswerHeader
from megatron_v2pe.evaluation.retrieval.questions import Share, StrideSetting
from megatron_v2pe.inference.engine import Engine
from megatron_v2pe.parallel.topology import shutdown
from megatron_v2pe.planning.answering import plan_prefill

PositionMode = Literal["default", "v2pe_fixed"]
_NO_LIMIT = 2**40  # an evaluation never cuts a question


@dataclass(kw_only=True)
class LoadedEngine:
    """The engine, and how it is loaded.

    Attributes:
        checkpoint: folder written by `import-hf` or by a run.
        arch: its architecture.
        norm: pixel normalisation.
        dtype: compute dtype.
        parallel: sizes of the parallel axes of one replica.
    """

    checkpoint: str | Path
    arch: InternVLArchitecture
    norm: PixelNorm
    dtype: Literal["float32", "bfloat16"]
    parallel: ParallelConfig
    _engine: Engine | None = field(default=None, init=False)
    _mode: PositionMode = field(default="default", init=False)

    @property
    def engine(self) -> Engine:
        """The model; after `prepare`."""
        if self._engine is None:
            raise RuntimeError("prepare() was not called")
        return self._engine

    def prepare(self, setting: StrideSetting) -> Share:
        """Load the model for a position mode; strides of one mode share it, as each prompt brings its own.

        Collective under torchrun.

        Raises:
            ConfigError: the parallel sizes do not divide the processes, or the model's heads or layers.
        """
        # A V2PE checkpoint rotates by plain frequencies in either mode, so one model serves all strides.
        mode = setting.mode if self.arch.position_mode == "default" else "v2pe_fixed"
        if self._engine is None or self._mode != mode:
            self.close()  # one model in memory at a time
            self._engine = Engine.load(
                self.checkpoint,
                mode=mode,
                norm=self.norm,
                dtype=self.dtype,
                parallel=self.parallel,
                plan_prefill=plan_prefill,
            )
            self._mode = mode
        plan, ranks = self._engine.context.plan, self._engine.context.ranks
        is_first = ranks.tp_rank == 0 and ranks.cp_rank == 0 and ranks.pp_rank == 0
        return Share(index=ranks.dp_rank, count=plan.dp, is_writer=is_first)

    def close(self) -> None:
        """Wait for the other processes, drop the model and leave the groups, so that another may be loaded."""
        if self._engine is not None:
            self._engine = None
            shutdown()


@dataclass(frozen=True, kw_only=True)
class Answering:
    """A checkpoint that is asked.

    Attributes:
        arch: its architecture.
        settings: how a question becomes tokens and tiles: nothing is cut, a video gives the middle of each interval.
        stop_ids: tokens that end an answer.
        header: what an answer begins with by the template; no part of its text.
        model: its weights, loaded by `prepare`.
    """

    arch: InternVLArchitecture
    settings: SampleSettings
    stop_ids: set[int]
    header: AnswerHeader
    model: LoadedEngine


def open_for_answers(
    checkpoint: str | Path,
    *,
    data: DataConfig | None,
    dtype: Literal["float32", "bfloat16"],
    parallel: ParallelConfig,
    system: str | None = None,
) -> Answering:
    """What a checkpoint says about itself; its weights are not read yet.

    Args:
        checkpoint: folder written by `import-hf` or by a run, or a Hugging Face folder.
        data: tiling and normalisation; None is what it was trained with.
        dtype: compute dtype.
        parallel: sizes of the parallel axes of one replica.
        system: system text of questions that bring none; None is the checkpoint's own.

    Raises:
        CheckpointError: the folder is not a complete checkpoint.
    """
    require_source(checkpoint)
    side_files = source_side_files(checkpoint)
    arch = read_architecture(side_files)
    settings = sample_settings(RunConfig(data=data or answer_data(side_files)), arch, side_files)
    settings = with_system(settings, system)
    text = dataclasses.replace(settings.text, max_tokens=_NO_LIMIT)
    video = dataclasses.replace(settings.media.video, sampling="middle")
    return Answering(
        arch=arch,
        settings=dataclasses.replace(
            settings, text=text, media=dataclasses.replace(settings.media, video=video)
        ),
        stop_ids={text.tokenizer.token_id(text.template.stop_token), text.tokenizer.eos_id},
        header=AnswerHeader(text.tokenizer, text.template),
        model=LoadedEngine(
            checkpoint=checkpoint,
            arch=arch,
            norm=NORMALIZATION[settings.normalize_type],
            dtype=dtype,
            parallel=parallel,
        ),
    )
