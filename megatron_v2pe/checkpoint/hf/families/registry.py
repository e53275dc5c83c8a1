"""Which table belongs to which architecture of config.json. A new family is a file in this folder, and a line here."""

from __future__ import annotations

from megatron_v2pe.checkpoint.hf.families.decoder import HEAD
from megatron_v2pe.checkpoint.hf.families.internlm2 import INTERNLM2
from megatron_v2pe.checkpoint.hf.families.internvit import PROJECTOR, vision_table
from megatron_v2pe.checkpoint.hf.families.llama import LLAMA
from megatron_v2pe.checkpoint.hf.families.phi3 import PHI3
from megatron_v2pe.checkpoint.hf.families.qwen2 import QWEN2
from megatron_v2pe.checkpoint.hf.rules import Rule
from megatron_v2pe.config.architecture import InternVLArchitecture

LANGUAGE_TABLES = {
    "InternLM2ForCausalLM": INTERNLM2,
    "Qwen2ForCausalLM": QWEN2,
    "LlamaForCausalLM": LLAMA,
    "Phi3ForCausalLM": PHI3,
}


def language_table(arch: InternVLArchitecture) -> tuple[Rule, ...]:
    """Rows of the language model. With tied embeddings, a stored copy of the embedding as head is dropped."""
    rules = LANGUAGE_TABLES[arch.language.architecture]
    if not arch.language.tie_word_embeddings:
        return rules
    tied = "is the embedding (tie_word_embeddings)"
    return tuple(Rule(rule.hf, reason=tied) if rule.ours == HEAD else rule for rule in rules)


def model_tables(arch: InternVLArchitecture) -> list[tuple[tuple[Rule, ...], int]]:
    """Rows of each part of the model, in the order of its parameters, with the number of layers of the part."""
    return [
        (vision_table(arch), arch.vision.num_layers),
        (PROJECTOR, 0),
        (language_table(arch), arch.language.num_layers),
    ]
