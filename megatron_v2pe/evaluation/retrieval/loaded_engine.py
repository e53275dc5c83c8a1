"""A checkpoint's model for an evaluation: loaded for one position mode at a time, on replicas side by side."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from megatron_v2pe.batch.pixel_norm import PixelNorm
from megatron_v2pe.config.arch.architecture import InternVLArchitecture
from megatron_v2pe.config.schema import ParallelConfig
from megatron_v2pe.evaluation.retrieval.questions import Share, StrideSetting
from megatron_v2pe.inference.engine import Engine
from megatron_v2pe.parallel.topology import shutdown
from megatron_v2pe.planning.answering import plan_prefill

PositionMode = Literal["default", "v2pe_fixed"]


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
