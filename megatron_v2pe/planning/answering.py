"""The planner's figure of a prefill chunk for the engine's check before a prefill; see `inference.memory_check`."""

from __future__ import annotations

from functools import lru_cache

from megatron_v2pe.inference.cache.memory import PrefillBytes, Stage
from megatron_v2pe.planning.estimate import backend_of
from megatron_v2pe.planning.memory.inference import prefill_moments
from megatron_v2pe.planning.memory.setting import Setting
from megatron_v2pe.planning.request.stages import ModelChunk
from megatron_v2pe.planning.request.workload import Pack


def plan_prefill(stage: Stage) -> PrefillBytes:
    """Bytes of prefill chunks on a rank, as `plan --inference` says."""
    model_chunk = ModelChunk(num_layers=stage.num_layers, is_first=stage.is_first, is_last=stage.is_last)

    @lru_cache(maxsize=64)
    def prefill_bytes(tokens: int, tiles: int) -> tuple[str, float]:
        pack = Pack(
            document_lengths=(tokens,), num_tiles=tiles, supervised_tokens=0, source="a prefill chunk"
        )
        setting = Setting(
            config=stage.config,
            arch=stage.arch,
            plan=stage.plan,
            pack=pack,
            backend="native" if stage.on_cpu else backend_of(stage.config, stage.arch),
            on_cpu=stage.on_cpu,
        )
        moments = prefill_moments(setting, model_chunk)
        part = max(moments, key=lambda name: moments[name])
        return part, moments[part]

    return prefill_bytes
