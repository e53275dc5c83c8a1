"""The published sizes of InternVL 2, 2.5, 3 and 3.5 as config.json contents, for true shapes without weights.

    PUBLISHED["2B"] --parse_architecture--> InternVLArchitecture --name_map--> 517 tensors, 2,205,754,368 numbers

Written from what is publicly known of the models, not read from released folders; the totals below agree with the
published parameter counts. What a real folder's own config.json says is what counts when one is opened. Phi-3's rotary
factors are a smooth stand-in of the right length: no shape depends on them.

    size  vision  language                       parameters (sum over `name_map`)
    1B    300M    Qwen2-0.5B                        938,158,976
    2B    300M    InternLM2-1.8B                  2,205,754,368
    4B    300M    Phi-3-mini-128k                 4,146,855,936
    8B    300M    InternLM2.5-7B                  8,075,365,376
    26B   6B      InternLM2-20B                  25,514,186,112
    40B   6B      Yi-34B                         40,068,712,832
    76B   6B      Llama-3-70B                    76,262,358,400

Keys of the later series begin with the series: "3-2B", "3.5-30B-A3B". Their towers are the same two.
"""

from __future__ import annotations

import math
from typing import Any

_COMMON: dict[str, Any] = {
    "architectures": ["InternVLChatModel"],
    "downsample_ratio": 0.5,
    "dynamic_image_size": True,
    "force_image_size": 448,
    "max_dynamic_patch": 12,
    "min_dynamic_patch": 1,
    "model_type": "internvl_chat",
    "pad2square": False,
    "ps_version": "v2",
    "select_layer": -1,
    "torch_dtype": "bfloat16",
    "use_backbone_lora": 0,
    "use_llm_lora": 0,
    "use_thumbnail": True,
}
_VISION: dict[str, Any] = {
    "architectures": ["InternVisionModel"],
    "attention_dropout": 0.0,
    "drop_path_rate": 0.0,
    "dropout": 0.0,
    "hidden_act": "gelu",
    "image_size": 448,
    "layer_norm_eps": 1e-06,
    "model_type": "intern_vit_6b",
    "num_channels": 3,
    "patch_size": 14,
    "torch_dtype": "bfloat16",
}
_VIT_300M: dict[str, Any] = {
    **_VISION,
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "initializer_factor": 1.0,
    "norm_type": "layer_norm",
    "qk_normalization": False,
    "qkv_bias": True,
}
_VIT_6B: dict[str, Any] = {
    **_VISION,
    "hidden_size": 3200,
    "num_hidden_layers": 45,
    "num_attention_heads": 25,
    "intermediate_size": 12800,
    "initializer_factor": 0.1,
    "norm_type": "rms_norm",
    "qk_normalization": True,
    "qkv_bias": False,
}
_INTERNLM2: dict[str, Any] = {
    "architectures": ["InternLM2ForCausalLM"],
    "model_type": "internlm2",
    "bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000,
    "vocab_size": 92553,
}
_QWEN2: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "use_sliding_window": False,
    "vocab_size": 151655,
}
_PHI3: dict[str, Any] = {
    "architectures": ["Phi3ForCausalLM"],
    "model_type": "phi3",
    "attention_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 32000,
    "pad_token_id": 32000,
    "max_position_embeddings": 131072,
    "original_max_position_embeddings": 4096,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 262144,
    "vocab_size": 32020,
}
_LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "attention_bias": False,
    "mlp_bias": False,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
}
_YI: dict[str, Any] = {
    **_LLAMA,
    "bos_token_id": 1,
    "eos_token_id": 7,
    "pad_token_id": 0,
    "max_position_embeddings": 4096,
    "rope_theta": 5000000.0,
    "vocab_size": 64009,
}
_LLAMA_3: dict[str, Any] = {
    **_LLAMA,
    "bos_token_id": 128000,
    "eos_token_id": 128003,
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
    "vocab_size": 128265,
}
_QWEN2_5: dict[str, Any] = {
    **_QWEN2,
    "rope_scaling": {"factor": 2.0, "rope_type": "dynamic", "type": "dynamic"},
    "vocab_size": 151674,
}
_INTERNLM3: dict[str, Any] = {
    "architectures": ["InternLM3ForCausalLM"],
    "model_type": "internlm3",
    "bias": False,
    "qkv_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
    "head_dim": 128,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {"factor": 6.0, "rope_type": "dynamic"},
    "rope_theta": 50000000,
    "vocab_size": 128512,
}
_QWEN3: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "attention_bias": False,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000,
    "vocab_size": 151936,
}
_QWEN3_MOE: dict[str, Any] = {
    **_QWEN3,
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "router_aux_loss_coef": 0.001,
}


_GPT_OSS: dict[str, Any] = {
    "architectures": ["GptOssForCausalLM"],
    "model_type": "gpt_oss",
    "attention_bias": True,
    "eos_token_id": 200002,
    "experts_per_token": 4,
    "head_dim": 64,
    "initial_context_length": 4096,
    "layer_types": ["sliding_attention", "full_attention"] * 12,
    "max_position_embeddings": 131072,
    "num_experts_per_tok": 4,
    "num_local_experts": 32,
    "pad_token_id": 199999,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "rope_type": "yarn",
        "truncate": False,
    },
    "rope_theta": 150000,
    "router_aux_loss_coef": 0.9,
    "sliding_window": 128,
    "swiglu_limit": 7.0,
    "vocab_size": 201088,
}


def _dynamic(factor: float) -> dict[str, Any]:
    return {"rope_scaling": {"factor": factor, "type": "dynamic"}}


def _longrope(num_frequencies: int) -> dict[str, Any]:
    """Factors that rise from 1 to 2.8 (short) and to 64 (long); see the module docstring."""

    def rising(last: float) -> list[float]:
        step = math.log(last) / (num_frequencies - 1)
        return [round(math.exp(i * step), 4) for i in range(num_frequencies)]

    return {"rope_scaling": {"long_factor": rising(64.0), "short_factor": rising(2.8), "type": "su"}}


def _model(
    vision: dict[str, Any],
    family: dict[str, Any],
    template: str,
    *,
    layers: int,
    hidden: int,
    heads: tuple[int, int],
    ffn: int,
    rope: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """A config.json; `heads` are query heads and kv heads."""
    language = {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "intermediate_size": ffn,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
    }
    llm_config = {**family, **language, **(rope or {})}
    return {**_COMMON, "template": template, "llm_config": llm_config, "vision_config": dict(vision)}


_Row = tuple[dict[str, Any], dict[str, Any], int, int, tuple[int, int], int]
"""Vision, language family, layers, hidden, heads, ffn."""


def _series(series: str, rows: dict[str, _Row]) -> dict[str, dict[str, Any]]:
    """The sizes of a series after InternVL2; all of them but GPT-OSS have the template of 2.5."""
    return {
        f"{series}-{size}": _model(
            vision,
            family,
            "internvl3_5_gpt_oss" if family is _GPT_OSS else "internvl2_5",
            layers=layers,
            hidden=hidden,
            heads=heads,
            ffn=ffn,
        )
        for size, (vision, family, layers, hidden, heads, ffn) in rows.items()
    }


def published_key(name: str) -> str:
    """Key of a published model from its name: `InternVL3_5-8B`, `3.5-8B` and `internvl2-2b` are understood."""
    size = name.upper().replace("_", ".").removeprefix("INTERNVL")
    return size.removeprefix("2-").removeprefix("-")


# fmt: off
PUBLISHED: dict[str, dict[str, Any]] = {
    "1B": _model(_VIT_300M, _QWEN2, "Hermes-2", layers=24, hidden=896, heads=(14, 2), ffn=4864),
    "2B": _model(_VIT_300M, _INTERNLM2, "internlm2-chat", layers=24, hidden=2048, heads=(16, 8), ffn=8192,
                 rope=_dynamic(2.0)),
    "4B": _model(_VIT_300M, _PHI3, "phi3-chat", layers=32, hidden=3072, heads=(32, 32), ffn=8192,
                 rope=_longrope(48)),
    "8B": _model(_VIT_300M, _INTERNLM2, "internlm2-chat", layers=32, hidden=4096, heads=(32, 8), ffn=14336,
                 rope=_dynamic(2.0)),
    "26B": _model(_VIT_6B, _INTERNLM2, "internlm2-chat", layers=48, hidden=6144, heads=(48, 8), ffn=16384,
                  rope=_dynamic(3.0)),
    "40B": _model(_VIT_6B, _YI, "Hermes-2", layers=60, hidden=7168, heads=(56, 8), ffn=20480),
    "76B": _model(_VIT_6B, _LLAMA_3, "internlm2-chat", layers=80, hidden=8192, heads=(64, 8), ffn=28672),
    **_series("2.5", {
        "1B": (_VIT_300M, _QWEN2_5, 24, 896, (14, 2), 4864),
        "2B": (_VIT_300M, _INTERNLM2 | _dynamic(2.0), 24, 2048, (16, 8), 8192),
        "4B": (_VIT_300M, _QWEN2_5, 36, 2048, (16, 2), 11008),
        "8B": (_VIT_300M, _INTERNLM2 | _dynamic(2.0), 32, 4096, (32, 8), 14336),
        "26B": (_VIT_6B, _INTERNLM2 | _dynamic(3.0), 48, 6144, (48, 8), 16384),
        "38B": (_VIT_6B, _QWEN2_5, 64, 5120, (40, 8), 27648),
        "78B": (_VIT_6B, _QWEN2_5, 80, 8192, (64, 8), 29568),
    }),
    **_series("3", {
        "1B": (_VIT_300M, _QWEN2_5, 24, 896, (14, 2), 4864),
        "2B": (_VIT_300M, _QWEN2_5, 28, 1536, (12, 2), 8960),
        "8B": (_VIT_300M, _QWEN2_5, 28, 3584, (28, 4), 18944),
        "9B": (_VIT_300M, _INTERNLM3, 48, 4096, (32, 2), 10240),
        "14B": (_VIT_300M, _QWEN2_5, 48, 5120, (40, 8), 13824),
        "38B": (_VIT_6B, _QWEN2_5, 64, 5120, (40, 8), 27648),
        "78B": (_VIT_6B, _QWEN2_5, 80, 8192, (64, 8), 29568),
    }),
    **_series("3.5", {
        "1B": (_VIT_300M, _QWEN3, 28, 1024, (16, 8), 3072),
        "2B": (_VIT_300M, _QWEN3, 28, 2048, (16, 8), 6144),
        "4B": (_VIT_300M, _QWEN3, 36, 2560, (32, 8), 9728),
        "8B": (_VIT_300M, _QWEN3, 36, 4096, (32, 8), 12288),
        "14B": (_VIT_300M, _QWEN3, 40, 5120, (40, 8), 17408),
        "20B-A4B": (_VIT_300M, _GPT_OSS, 24, 2880, (64, 8), 2880),
        "30B-A3B": (_VIT_300M, _QWEN3_MOE | {"moe_intermediate_size": 768}, 48, 2048, (32, 4), 6144),
        "38B": (_VIT_6B, _QWEN3, 64, 5120, (64, 8), 25600),
        "241B-A28B": (_VIT_6B, _QWEN3_MOE | {"moe_intermediate_size": 1536}, 94, 4096, (64, 4), 12288),
    }),
}
# fmt: on
