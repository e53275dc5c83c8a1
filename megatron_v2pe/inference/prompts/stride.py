"""Which stride an answer uses: the checkpoint's own, or the one that was named.

checkpoint       no --stride                       --stride N
v2pe_fixed       its own stride                    N, said to differ from the trained one
v2pe_random      the recommended one, or an error  N
default          whole positions, as trained       N, a choice of the user: not trained with V2PE
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_v2pe.config.arch.architecture import InternVLArchitecture
from megatron_v2pe.core.errors import ConfigError

PositionMode = Literal["default", "v2pe_fixed"]


@dataclass(frozen=True, kw_only=True)
class StrideChoice:
    """How visual tokens advance positions in an answer.

    Attributes:
        stride: position units of 1/T that a visual token advances.
        mode: of the rotary embedding: `default` takes whole positions only.
        reason: one line that says which stride is used and why.
    """

    stride: int
    mode: PositionMode
    reason: str


def choose_stride(arch: InternVLArchitecture, asked: int | None, *, option: str = "--stride") -> StrideChoice:
    """The stride of an answer.

    Args:
        arch: of the checkpoint; it says how positions were trained and which stride is recommended.
        asked: named by the user, None where none was named.
        option: what the user would name it with, for messages.

    Raises:
        ConfigError: out of range, or none is known where one is needed.
    """
    whole = arch.tokens_per_tile
    if asked is not None:
        if not 1 <= asked <= whole:
            raise ConfigError(
                f"{option} is {asked}, but must lie in 1..{whole} (visual tokens per tile of this checkpoint); omit it "
                "for the checkpoint's own"
            )
        return StrideChoice(stride=asked, mode="v2pe_fixed", reason=_asked_reason(arch, asked, option))
    if arch.position_mode == "default":
        reason = f"stride {whole} of {whole}: whole positions, as this checkpoint was trained (no V2PE)"
        return StrideChoice(stride=whole, mode="default", reason=reason)
    if 1 <= arch.position_stride <= whole:
        kind = "was trained with" if arch.position_mode == "v2pe_fixed" else "recommends"
        reason = f"stride {arch.position_stride} of {whole}, which this checkpoint {kind}"
        return StrideChoice(stride=arch.position_stride, mode="v2pe_fixed", reason=reason)
    if arch.position_mode == "v2pe_fixed":
        raise ConfigError(
            "config.json of this checkpoint says that it was trained with one stride (rope_pos_id_version), but not "
            f"with which (rope_pos_id_stride); name it with {option} 1..{whole}, or write it into config.json"
        )
    raise ConfigError(
        f"this checkpoint was trained with random strides and recommends none; name one with {option} 1..{whole} "
        "(small strides reach further), or record one with `export-hf --stride N`"
    )


def _asked_reason(arch: InternVLArchitecture, asked: int, option: str) -> str:
    text = f"stride {asked} of {arch.tokens_per_tile}, named by {option}"
    if arch.position_mode == "default":
        return f"{text}; this checkpoint was trained without V2PE, on whole positions"
    if arch.position_mode == "v2pe_fixed" and arch.position_stride != asked:
        return f"{text}; this checkpoint was trained with stride {arch.position_stride}"
    return text
