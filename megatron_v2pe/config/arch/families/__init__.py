"""Language families that this package computes, by the class name that config.json gives them."""

from megatron_v2pe.config.arch.families import (
    gpt_oss,
    internlm2,
    internlm3,
    llama,
    phi3,
    qwen2,
    qwen3,
    qwen3_moe,
)
from megatron_v2pe.config.arch.families.family import LanguageFamily as LanguageFamily

FAMILIES: dict[str, LanguageFamily] = {
    module.FAMILY.architecture: module.FAMILY
    for module in (gpt_oss, internlm2, internlm3, llama, phi3, qwen2, qwen3, qwen3_moe)
}

NATIVE_FAMILIES: dict[str, LanguageFamily] = {
    family.native_model_type: family
    for family in (llama.FAMILY, qwen2.FAMILY, qwen3.FAMILY, qwen3_moe.FAMILY, gpt_oss.FAMILY)
}
"""By `text_config.model_type` of a native folder, where InternLM2 and InternLM3 are llamas."""

REFUSED: dict[str, str] = {
    "InternLM2VEForCausalLM": "a visual expert beside each MLP (Mono-InternVL) is another model",
    "Qwen2MoeForCausalLM": "shared experts are not in the table of any published InternVL",
    "Qwen3NextForCausalLM": "gated linear attention is not in the table of any published InternVL",
    "Qwen2VLForConditionalGeneration": "multimodal rotary positions (MRoPE) are not V2PE's",
}
"""Classes that look near, and why they are refused."""
