"""How a checkpoint stretches its rotary frequencies, as `llm_config.rope_scaling` says it.

none       theta^(-2j/d)
linear     divided by factor
dynamic    theta grows with the sequence once it is longer than trained (NTK)
longrope   divided by a factor of its own for each j, one list up to the trained length and one beyond it;
           cos and sin times one attention factor (Phi-3; also called "su")
llama3     low frequencies divided by factor, high ones kept, a ramp between them (Llama 3.1)
yarn       the same by another ramp, over the index j instead of the frequency; cos and sin times an attention factor
           (arXiv 2309.00071; GPT-OSS, and Qwen folders that were extended)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from megatron_v2pe.config.arch.section import Section
from megatron_v2pe.core.errors import CheckpointError
from megatron_v2pe.core.excerpt import shortened

ScalingKind = Literal["none", "linear", "dynamic", "longrope", "llama3", "yarn"]

# 'v2pe' is what the release saves for plain frequencies, and cannot read again.
_KINDS: dict[str, ScalingKind] = {
    "none": "none",
    "default": "none",
    "v2pe": "none",
    "linear": "linear",
    "dynamic": "dynamic",
    "su": "longrope",
    "longrope": "longrope",
    "llama3": "llama3",
    "yarn": "yarn",
}


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Scaling of rotary frequencies; see the module docstring for the kinds.

    Attributes:
        kind: which formula.
        factor: of linear, dynamic, llama3 and yarn.
        trained_positions: length M that was trained without scaling; dynamic, longrope, llama3 and yarn read it.
        short_factors: of longrope up to M, one for each of the d/2 frequencies.
        long_factors: of longrope beyond M.
        attention_factor: multiplies cos and sin.
        low_frequency_factor: of llama3; wavelengths above M / this are divided by `factor`.
        high_frequency_factor: of llama3; wavelengths below M / this are kept.
        fast_turns: of yarn (`beta_fast`); frequencies that turn more often within M are kept.
        slow_turns: of yarn (`beta_slow`); frequencies that turn less often are divided by `factor`.
        truncates: of yarn; the two ends of the ramp are rounded outwards to whole indices.
    """

    kind: ScalingKind = "none"
    factor: float = 1.0
    trained_positions: int = 0
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()
    attention_factor: float = 1.0
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 1.0
    fast_turns: float = 32.0
    slow_turns: float = 1.0
    truncates: bool = True

    @property
    def is_trained_in(self) -> bool:
        """The weights know only these frequencies, at every length; V2PE keeps them.

        Linear and dynamic scaling are ways to reach beyond the trained length, which V2PE replaces: the
        release rotates by plain frequencies whichever of the two a checkpoint has.
        """
        return self.kind in ("longrope", "llama3", "yarn")


def parse_rope_scaling(language: Section, *, head_dim: int, has_yarn: bool = False) -> RopeScaling:
    """Read `rope_scaling` of a language model's section.

    Args:
        language: `llm_config`.
        head_dim: rotary dimension d.
        has_yarn: the class computes YaRN frequencies.

    Raises:
        CheckpointError: an unknown type, one that the class does not have, or a list of factors of the wrong length.
    """
    if not language.get("rope_scaling", {}):
        return RopeScaling()
    scaling = language.section("rope_scaling")
    _refuse_other_rotations(scaling)
    name = str(scaling.get("rope_type", scaling.get("type", None)))
    if name not in _KINDS:
        raise CheckpointError(f"{scaling.path}.type {shortened(name)} is unknown; known: {', '.join(_KINDS)}")
    kind = _KINDS[name]
    trained = int(language.get("max_position_embeddings", 2048))
    if kind == "yarn":
        if not has_yarn:
            raise CheckpointError(
                f"{scaling.path}.type is 'yarn', but the class of this language model has no such frequencies; set "
                "rope_scaling to null, or reach beyond the trained length by V2PE (position.mode)"
            )
        return _parse_yarn(language, scaling, longest=trained)
    if kind in ("none", "linear", "dynamic"):
        factor = 1.0 if kind == "none" else float(scaling.need("factor"))
        return RopeScaling(kind=kind, factor=factor, trained_positions=trained)
    original = int(_beside_or_inside(language, scaling, "original_max_position_embeddings"))
    if kind == "llama3":
        return RopeScaling(
            kind=kind,
            factor=float(scaling.need("factor")),
            trained_positions=original,
            low_frequency_factor=float(scaling.need("low_freq_factor")),
            high_frequency_factor=float(scaling.need("high_freq_factor")),
        )
    return RopeScaling(
        kind=kind,
        trained_positions=original,
        short_factors=_factors(scaling, "short_factor", head_dim=head_dim),
        long_factors=_factors(scaling, "long_factor", head_dim=head_dim),
        attention_factor=float(
            scaling.get("attention_factor", _attention_factor(longest=trained, original=original))
        ),
    )


def _parse_yarn(language: Section, scaling: Section, *, longest: int) -> RopeScaling:
    """As transformers 5 reads these keys; `factor` counts, whatever `max_position_embeddings` is."""
    factor = float(scaling.need("factor"))
    original = language.get("original_max_position_embeddings", None)
    fast, slow = float(scaling.get("beta_fast", 32.0)), float(scaling.get("beta_slow", 1.0))
    theta = float(language.get("rope_theta", 10000.0))
    if factor < 1.0 or fast < slow or theta <= 1.0:
        raise CheckpointError(
            f"{scaling.path}: factor is {factor:g}, beta_fast {fast:g}, beta_slow {slow:g} and rope_theta {theta:g}, "
            "but YaRN has a factor of at least 1, beta_fast not below beta_slow, and rope_theta above 1"
        )
    return RopeScaling(
        kind="yarn",
        factor=factor,
        trained_positions=int(original or scaling.get("original_max_position_embeddings", longest)),
        attention_factor=float(scaling.get("attention_factor", _yarn_attention_factor(scaling, factor))),
        fast_turns=fast,
        slow_turns=slow,
        truncates=bool(scaling.get("truncate", True)),
    )


def _yarn_attention_factor(scaling: Section, factor: float) -> float:
    """0.1 ln(factor) + 1; with both `mscale` and `mscale_all_dim` the quotient of two such (DeepSeek's keys)."""

    def grown(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1.0

    above, below = float(scaling.get("mscale", 0.0)), float(scaling.get("mscale_all_dim", 0.0))
    return grown(above) / grown(below) if above and below else grown(1.0)


def flat_rope(language: Section) -> Section:
    """The section with `rope_theta` and `rope_scaling` where transformers 5 wrote `rope_parameters`.

    Raises:
        CheckpointError: both are there and disagree, or a rotation of another kind: one for each type of layer, three
            positions (MRoPE), a part of each head.
    """
    rope = language.get("rope_parameters", None)
    if rope is None:
        return language
    inner, values = Section(rope, f"{language.path}: rope_parameters"), dict(language.values)
    del values["rope_parameters"]
    nested = [key for key, value in rope.items() if isinstance(value, dict)]
    if nested:
        raise CheckpointError(
            f"{inner.path}: has an object for {', '.join(sorted(nested))}; every layer here has the same frequencies"
        )
    theta = inner.get("rope_theta", values.get("rope_theta"))
    if theta is not None and values.get("rope_theta") not in (None, theta):
        raise CheckpointError(
            f"{language.path}: rope_theta is {shortened(values['rope_theta'])} and rope_parameters.rope_theta {theta}; "
            "transformers 4 reads the first and 5 the second, so keep one"
        )
    if theta is not None:
        values["rope_theta"] = theta
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    is_plain = inner.get("rope_type", inner.get("type", "default")) == "default"
    _refuse_other_rotations(Section(scaling, inner.path))
    values["rope_scaling"] = None if is_plain else scaling
    return Section(values, language.path)


def _refuse_other_rotations(scaling: Section) -> None:
    scaling.choice("partial_rotary_factor", 1.0, (1.0,))
    if scaling.get("mrope_section", None):
        raise CheckpointError(
            f"{scaling.path}: mrope_section is set; multimodal rotary positions (MRoPE) are not V2PE's"
        )


def _beside_or_inside(language: Section, scaling: Section, key: str) -> Any:
    """Phi-3 writes this key beside `rope_scaling`, Llama 3.1 inside it."""
    beside = language.get(key, None)
    return scaling.need(key) if beside is None else beside


def _factors(scaling: Section, key: str, *, head_dim: int) -> tuple[float, ...]:
    factors = tuple(float(factor) for factor in scaling.need(key))
    if len(factors) != head_dim // 2:
        raise CheckpointError(
            f"{scaling.path}.{key} has {len(factors)} factors, but a head of {head_dim} channels has "
            f"{head_dim // 2} frequencies"
        )
    return factors


def _attention_factor(*, longest: int, original: int) -> float:
    """sqrt(1 + ln(s) / ln(M)) for positions stretched s-fold beyond M; 1.19 for 128K over 4K."""
    stretch = longest / original
    return math.sqrt(1.0 + math.log(stretch) / math.log(original)) if stretch > 1.0 else 1.0
