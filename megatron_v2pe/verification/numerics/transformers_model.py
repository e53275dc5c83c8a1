"""The reference with its decoder run by the class that `transformers` has for it: a third opinion.

Tower, projector and embedding stay those of `ReferenceModel`; transformers knows InternViT under other names only.
Its decoders (Llama, Qwen2, Phi-3, Qwen3 and its mixture of experts, GPT-OSS) accept fractional positions; norms and
rotary tables are float32 inside, whatever the dtype. InternLM2 and 3 are not in transformers: the released folders
bring their own code, which is not run here.

Optional: nothing else in this package needs transformers' models.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from megatron_v2pe.config.arch.architecture import InternVLArchitecture
from megatron_v2pe.config.arch.rope_scaling import RopeScaling
from megatron_v2pe.core.errors import ConfigError
from megatron_v2pe.verification.numerics.reference_model import ReadTensor, ReferenceModel

_PREFIX = "language_model."
_CLASSES = (
    "LlamaForCausalLM",
    "Qwen2ForCausalLM",
    "Phi3ForCausalLM",
    "Qwen3ForCausalLM",
    "Qwen3MoeForCausalLM",
    "GptOssForCausalLM",
)
_STACKED = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


class TransformersReference(ReferenceModel):
    """`ReferenceModel` with transformers' decoder, which is built whole: memory holds all its weights in `dtype`.

    Args:
        arch: see `ReferenceModel`.
        read: see `ReferenceModel`.
        is_v2pe: see `ReferenceModel`.
        llm_config: that section of config.json, as it is.
        dtype: see `ReferenceModel`.

    Raises:
        ConfigError: transformers is not installed, or has no such decoder.
    """

    def __init__(
        self,
        arch: InternVLArchitecture,
        read: ReadTensor,
        *,
        is_v2pe: bool,
        llm_config: dict[str, Any],
        dtype: torch.dtype = torch.float64,
    ) -> None:
        super().__init__(arch, read, is_v2pe=is_v2pe, dtype=dtype)
        self._model = _build(arch, self._scaled(llm_config)).to(dtype).eval()
        tied = arch.language.tie_word_embeddings
        wanted = [name for name in self._model.state_dict() if not (tied and name == "lm_head.weight")]
        self._model.load_state_dict({name: self._weight(_PREFIX + name) for name in wanted}, strict=not tied)

    def _weight(self, name: str) -> Tensor:
        """A tensor of transformers' decoder; version 5 stacks a layer's experts, where the files have each alone."""
        prefix, _, stacked = name.rpartition(".experts.")
        experts = self.arch.language.experts
        if (
            stacked not in _STACKED or experts is None or experts.is_clamped
        ):  # GPT-OSS is stacked in files, too
            return self.read(name)
        return torch.stack(
            [
                torch.cat([self.read(f"{prefix}.experts.{e}.{part}.weight") for part in _STACKED[stacked]])
                for e in range(experts.num_experts)
            ]
        )

    def _scaled(self, llm_config: dict[str, Any]) -> dict[str, Any]:
        """The section as transformers understands it: plain frequencies are no scaling at all."""
        scaling = self.arch.language.rope_scaling
        if scaling.kind == "none" or (self.is_v2pe and scaling.kind in ("linear", "dynamic")):
            return {**llm_config, "rope_scaling": None}
        if (
            scaling.kind == "yarn"
        ):  # also where config.json leaves it to the class, whose default differs by version
            return {**llm_config, "rope_scaling": _yarn_keys(scaling)}
        # transformers 5 reads it from inside rope_scaling; Phi-3's config.json has it beside.
        inside = {"original_max_position_embeddings": scaling.trained_positions, **llm_config["rope_scaling"]}
        return {
            **llm_config,
            "rope_scaling": inside if scaling.kind == "longrope" else llm_config["rope_scaling"],
        }

    def decoder_states(self, x: Tensor, positions: Tensor, documents: Sequence[int]) -> Iterator[Tensor]:
        """See `ReferenceModel`; each document runs alone."""
        layers = self._model.model.layers
        outputs: list[list[Tensor]] = [[] for _ in range(len(layers) + 1)]
        hooks = [
            layer.register_forward_hook(lambda _module, _args, output, kept=kept: kept.append(_first(output)))
            for layer, kept in zip(layers, outputs, strict=False)
        ]
        for start, stop in pairwise(documents):
            final = self._model.model(
                inputs_embeds=x[None, start:stop],
                position_ids=positions[None, start:stop],
                attention_mask=torch.ones(1, stop - start, dtype=torch.long),
                use_cache=False,
            )
            outputs[-1].append(final.last_hidden_state)
        for hook in hooks:
            hook.remove()
        for parts in outputs:
            yield torch.cat([part[0] for part in parts])

    def logits(self, hidden: Tensor) -> Tensor:
        """See `ReferenceModel`."""
        return self._model.lm_head(hidden)


def _yarn_keys(scaling: RopeScaling) -> dict[str, Any]:
    return {
        "rope_type": "yarn",
        "factor": scaling.factor,
        "original_max_position_embeddings": scaling.trained_positions,
        "attention_factor": scaling.attention_factor,
        "beta_fast": scaling.fast_turns,
        "beta_slow": scaling.slow_turns,
        "truncate": scaling.truncates,
    }


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _build(arch: InternVLArchitecture, llm_config: dict[str, Any]) -> Any:
    name = arch.language.architecture
    if name not in _CLASSES:
        raise ConfigError(
            f"--reference transformers: transformers has no {name}, only {', '.join(_CLASSES)}; omit --reference "
            "for the built-in model, which has all of them"
        )
    try:
        import transformers
    except ImportError as error:
        raise ConfigError(
            f"--reference transformers: cannot be imported ({error}); install the extra 'verify', or omit --reference "
            "for the built-in model"
        ) from None
    config = transformers.AutoConfig.for_model(**llm_config)
    eager = {"attn_implementation": "eager"}
    if arch.language.experts is not None:  # grouped products have no float64
        eager["experts_implementation"] = "eager"
    return transformers.AutoModelForCausalLM.from_config(config, **eager)
