"""What a language family is: its names in both folder formats, and how it differs from a plain llama.

    config.json's class name --FAMILIES--> LanguageFamily --architecture.py--> LanguageArchitecture
                                                          `-- checkpoint.hf.tables --> names, shapes, transforms

A family is one file of this folder; docs/adding_a_family.md adds one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from megatron_v2pe.config.arch.families.rules import Rule


@dataclass(frozen=True, kw_only=True)
class LanguageFamily:
    """One class of language model.

    Attributes:
        architecture: `llm_config.architectures[0]` of a GitHub folder.
        native_model_type: `text_config.model_type` of a native (-hf) folder; empty where transformers has none.
        github: names in a GitHub folder.
        native: names in a native folder, in the published spelling; empty means the same as `github`.
        native_values: what a native `text_config` says beyond the keys that both formats share.
        class_defaults: values of the class for keys that are absent, of keys whose default differs between classes.
        fixed: keys of the class and the one value that this package computes; another value is refused.
        qkv_bias: queries, keys and values have a bias, by the class and without a key.
        proj_bias: the output projection of attention has a bias.
        qk_norm: RMSNorm of each head's queries and keys before the rotation.
        reads_head_dim: the class reads `head_dim`, which may differ from hidden_size / heads.
        default_head_dim: the class's own where the key is absent; 0 divides the hidden size.
        always_windowed: `sliding_window` acts as soon as it is given (Phi-3), not only with `use_sliding_window`.
        alternates_windows: layers of `layer_types` see `sliding_window` tokens; without the key layers 0, 2, ... do.
        sinks: each query head has a learned logit that joins its softmax.
        experts: key of the number of experts, in the order in which they are looked for; empty for a dense family.
        clamped_experts: experts of GPT-OSS, of `intermediate_size`, in every layer; the router has a bias.
        yarn: the class computes YaRN frequencies.
        template: chat template of native folders, which do not name one.
    """

    architecture: str
    native_model_type: str
    github: tuple[Rule, ...]
    native: tuple[Rule, ...] = ()
    native_values: dict[str, Any] = field(default_factory=dict)
    class_defaults: dict[str, Any] = field(default_factory=dict)
    fixed: dict[str, Any] = field(default_factory=dict)
    qkv_bias: bool = False
    proj_bias: bool = False
    qk_norm: bool = False
    reads_head_dim: bool = False
    default_head_dim: int = 0
    always_windowed: bool = False
    alternates_windows: bool = False
    sinks: bool = False
    experts: tuple[str, ...] = ()
    clamped_experts: bool = False
    yarn: bool = False
    template: str = "internvl2_5"

    @property
    def native_table(self) -> tuple[Rule, ...]:
        """Names in a native folder."""
        return self.native or self.github
