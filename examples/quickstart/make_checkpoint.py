"""A tiny InternVL2 checkpoint with random weights, in the Hugging Face layout of the released ones.

    prose --sentencepiece--> tokenizer.model (byte pair encoding, 1024 pieces + 6 chat slots)
    sizes below          --> config.json (the released key set) --> model.safetensors (float32)

The tokenizer has InternLM2's structure: byte fallback, no dummy prefix, the six chat tokens laid over the
last six sentencepiece ids and nine image tokens after them. The Chinese system prompt of the template is in
the vocabulary as two pieces, because at 512 tokens of context it would otherwise be a sixth of every sample.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import shutil
from pathlib import Path

import numpy as np
import sentencepiece
from numpy.typing import NDArray
from prose import MARK, prose_words
from safetensors.numpy import save
from sentencepiece import sentencepiece_model_pb2

from megatron_v2pe.core.files import commit_folder
from megatron_v2pe.data.text.templates import get_template

TEMPLATE = "internlm2-chat"
NUM_PIECES = 1024
TRAINED_LENGTH = 512
ROPE_BASE = 10_000
"""Smaller than the released 1,000,000, as 512 positions are fewer than 32K: with that base most rotations would hardly
turn within the trained length, and would not notice positions beyond it."""
TILES = {64: (64, 4), 4: (56, 14)}
"""Visual tokens of a tile: its width and that of a patch in pixels."""
VIT_WIDTH, VIT_LAYERS, VIT_HEADS, VIT_FFN = 64, 1, 2, 128
WIDTH, LAYERS, HEADS, KV_HEADS, FFN = 128, 3, 4, 2, 256
# In the order of the released ids: the first six end the sentencepiece range, the others follow it.
CHAT_TOKENS = (
    "<|plugin|>",
    "<|interpreter|>",
    "<|action_end|>",
    "<|action_start|>",
    "<|im_end|>",
    "<|im_start|>",
)
IMAGE_TOKENS = (
    "<img>",
    "</img>",
    "<IMG_CONTEXT>",
    "<quad>",
    "</quad>",
    "<ref>",
    "</ref>",
    "<box>",
    "</box>",
)
VOCAB_SIZE = NUM_PIECES + len(CHAT_TOKENS) + len(IMAGE_TOKENS)

Array = NDArray[np.float32]


def train_tokenizer() -> bytes:
    """Serialised sentencepiece model of NUM_PIECES pieces and six unused slots for the chat tokens."""
    words = prose_words("train")
    system = get_template(TEMPLATE).system.removeprefix("<|im_start|>system\n")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(" ".join(words[i : i + 200]) for i in range(0, len(words), 200)),
        model_writer=model,
        model_type="bpe",
        vocab_size=NUM_PIECES,
        byte_fallback=True,
        split_digits=True,
        character_coverage=1.0,
        required_chars="0123456789",
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        user_defined_symbols=[*system.split(" "), "system", "user", "assistant", MARK],
        num_threads=1,
        minloglevel=2,
    )
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(model.getvalue())
    for slot in range(len(CHAT_TOKENS)):
        piece = proto.pieces.add(piece=f"[UNUSED_TOKEN_{slot + 141}]", score=0.0)
        piece.type = sentencepiece_model_pb2.ModelProto.SentencePiece.USER_DEFINED
    proto.trainer_spec.vocab_size = len(proto.pieces)
    return proto.SerializeToString()


def tokenizer_files() -> dict[str, bytes]:
    """Tokenizer files of the folder, by name."""
    ids = {token: NUM_PIECES + index for index, token in enumerate(CHAT_TOKENS + IMAGE_TOKENS)}
    additional = [*reversed(CHAT_TOKENS), *IMAGE_TOKENS]
    roles = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>", "unk_token": "<unk>"}
    decoder = {"<unk>": 0, "<s>": 1, "</s>": 2, **ids}
    config = {
        "added_tokens_decoder": {str(i): {**_added(token), "special": True} for token, i in decoder.items()},
        "additional_special_tokens": additional,
        "auto_map": {"AutoTokenizer": ["tokenization_internlm2.InternLM2Tokenizer", None]},
        "clean_up_tokenization_spaces": False,
        "model_max_length": 8192,
        "tokenizer_class": "InternLM2Tokenizer",
        **roles,
    }
    special = {"additional_special_tokens": [_added(token) for token in additional], **roles}
    return {
        "tokenizer.model": train_tokenizer(),
        "tokenizer_config.json": _json(config),
        "added_tokens.json": _json({token: ids[token] for token in IMAGE_TOKENS}),
        "special_tokens_map.json": _json(special),
    }


def model_config(tokens_per_tile: int) -> dict[str, object]:
    """Contents of config.json, with the keys of the released InternVL2 checkpoints."""
    return {
        "_commit_hash": None,
        "architectures": ["InternVLChatModel"],
        "auto_map": {
            "AutoConfig": "configuration_internvl_chat.InternVLChatConfig",
            "AutoModel": "modeling_internvl_chat.InternVLChatModel",
            "AutoModelForCausalLM": "modeling_internvl_chat.InternVLChatModel",
        },
        "downsample_ratio": 0.5,
        "dynamic_image_size": False,
        "force_image_size": TILES[tokens_per_tile][0],
        "llm_config": _language_config(),
        "max_dynamic_patch": 1,
        "min_dynamic_patch": 1,
        "model_type": "internvl_chat",
        "pad2square": False,
        "ps_version": "v2",
        "select_layer": -1,
        "template": TEMPLATE,
        "torch_dtype": "float32",
        "use_backbone_lora": 0,
        "use_llm_lora": 0,
        "use_thumbnail": False,
        "vision_config": _vision_config(*TILES[tokens_per_tile]),
    }


def model_weights(seed: int, tokens_per_tile: int) -> dict[str, Array]:
    """Random weights under the released names, scaled for training from scratch.

    The decoder starts at standard deviation 0.02 with smaller residual outputs, as language models do; the
    vision tower and the projector start at 1/sqrt(inputs), because their width of 64 would otherwise pass
    on hardly any of the image.
    """
    return _Weights(np.random.default_rng(seed), *TILES[tokens_per_tile]).all()


class _Weights:
    """Draws tensors in a fixed order."""

    def __init__(self, generator: np.random.Generator, tile: int, patch: int) -> None:
        self._generator, self._tile, self._patch = generator, tile, patch

    def all(self) -> dict[str, Array]:
        weights = self._vision()
        for layer in range(LAYERS):
            weights |= self._decoder_layer(f"language_model.model.layers.{layer}.")
        joined = 4 * VIT_WIDTH
        return {
            **weights,
            "language_model.model.tok_embeddings.weight": self._normal((VOCAB_SIZE, WIDTH), 0.02),
            "language_model.model.norm.weight": _ones(WIDTH),
            "language_model.output.weight": self._normal((VOCAB_SIZE, WIDTH), 0.02),
            **_norm("mlp1.0", joined),
            **self._linear("mlp1.1", joined, WIDTH),
            **self._linear("mlp1.3", WIDTH, WIDTH),
        }

    def _decoder_layer(self, prefix: str) -> dict[str, Array]:
        head_dim = WIDTH // HEADS
        qkv_rows = (HEADS + 2 * KV_HEADS) * head_dim
        residual = 0.02 / math.sqrt(2 * LAYERS)
        return {
            prefix + "attention.wqkv.weight": self._normal((qkv_rows, WIDTH), 0.02),
            prefix + "attention.wo.weight": self._normal((WIDTH, WIDTH), residual),
            prefix + "feed_forward.w1.weight": self._normal((FFN, WIDTH), 0.02),
            prefix + "feed_forward.w3.weight": self._normal((FFN, WIDTH), 0.02),
            prefix + "feed_forward.w2.weight": self._normal((WIDTH, FFN), residual),
            prefix + "attention_norm.weight": _ones(WIDTH),
            prefix + "ffn_norm.weight": _ones(WIDTH),
        }

    def _vision(self) -> dict[str, Array]:
        patches, inputs = (self._tile // self._patch) ** 2, 3 * self._patch**2
        prefix = "vision_model.embeddings."
        weights = {
            prefix + "class_embedding": self._normal((1, 1, VIT_WIDTH), 0.02),
            prefix + "position_embedding": self._normal((1, 1 + patches, VIT_WIDTH), 0.02),
            prefix + "patch_embedding.weight": self._normal(
                (VIT_WIDTH, 3, self._patch, self._patch), inputs**-0.5
            ),
            prefix + "patch_embedding.bias": _zeros(VIT_WIDTH),
        }
        for layer in range(VIT_LAYERS):
            prefix = f"vision_model.encoder.layers.{layer}."
            weights |= {
                **self._linear(prefix + "attn.qkv", VIT_WIDTH, 3 * VIT_WIDTH),
                **self._linear(prefix + "attn.proj", VIT_WIDTH, VIT_WIDTH),
                **self._linear(prefix + "mlp.fc1", VIT_WIDTH, VIT_FFN),
                **self._linear(prefix + "mlp.fc2", VIT_FFN, VIT_WIDTH),
                **_norm(prefix + "norm1", VIT_WIDTH),
                **_norm(prefix + "norm2", VIT_WIDTH),
                prefix + "ls1": _ones(VIT_WIDTH),
                prefix + "ls2": _ones(VIT_WIDTH),
            }
        return weights

    def _linear(self, name: str, inputs: int, outputs: int) -> dict[str, Array]:
        weight = self._normal((outputs, inputs), inputs**-0.5)
        return {name + ".weight": weight, name + ".bias": _zeros(outputs)}

    def _normal(self, shape: tuple[int, ...], deviation: float) -> Array:
        return self._generator.normal(0.0, deviation, shape).astype(np.float32)


def _ones(size: int) -> Array:
    return np.ones(size, dtype=np.float32)


def _zeros(size: int) -> Array:
    return np.zeros(size, dtype=np.float32)


def _norm(name: str, size: int) -> dict[str, Array]:
    return {name + ".weight": _ones(size), name + ".bias": _zeros(size)}


def _language_config() -> dict[str, object]:
    return {
        "architectures": ["InternLM2ForCausalLM"],
        "attn_implementation": "flash_attention_2",
        "auto_map": {
            "AutoConfig": "configuration_internlm2.InternLM2Config",
            "AutoModel": "modeling_internlm2.InternLM2ForCausalLM",
            "AutoModelForCausalLM": "modeling_internlm2.InternLM2ForCausalLM",
        },
        "bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": WIDTH,
        "initializer_range": 0.02,
        "intermediate_size": FFN,
        "max_position_embeddings": TRAINED_LENGTH,
        "model_type": "internlm2",
        "num_attention_heads": HEADS,
        "num_hidden_layers": LAYERS,
        "num_key_value_heads": KV_HEADS,
        "pad_token_id": 2,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {"factor": 2.0, "type": "dynamic"},
        "rope_theta": ROPE_BASE,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "use_cache": True,
        "vocab_size": VOCAB_SIZE,
    }


def _vision_config(tile: int, patch: int) -> dict[str, object]:
    return {
        "architectures": ["InternVisionModel"],
        "attention_dropout": 0.0,
        "drop_path_rate": 0.0,
        "dropout": 0.0,
        "hidden_act": "gelu",
        "hidden_size": VIT_WIDTH,
        "image_size": tile,
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
        "intermediate_size": VIT_FFN,
        "layer_norm_eps": 1e-06,
        "model_type": "intern_vit_6b",
        "norm_type": "layer_norm",
        "num_attention_heads": VIT_HEADS,
        "num_channels": 3,
        "num_hidden_layers": VIT_LAYERS,
        "patch_size": patch,
        "qk_normalization": False,
        "qkv_bias": True,
        "torch_dtype": "float32",
        "use_bfloat16": False,
        "use_flash_attn": True,
    }


def _added(token: str) -> dict[str, object]:
    return {"content": token, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}


def _json(value: object) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def write_checkpoint(folder: Path, *, seed: int, tokens_per_tile: int = 64) -> int:
    """Write the whole folder aside, then give it its name; returns the number of parameters.

    Args:
        folder: to create.
        seed: of the weights.
        tokens_per_tile: visual tokens of a tile, a key of TILES.

    Raises:
        FileExistsError: `folder` exists.
    """
    weights = model_weights(seed, tokens_per_tile)
    generation = {"_from_model_config": True, "eos_token_id": 2, "transformers_version": "4.44.2"}
    files = {
        **tokenizer_files(),
        "config.json": _json(model_config(tokens_per_tile)),
        "generation_config.json": _json(generation),
        "model.safetensors": save(weights, metadata={"format": "pt"}),
    }
    aside = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    for name, content in files.items():
        (aside / name).write_bytes(content)
    commit_folder(aside, folder)
    return sum(weight.size for weight in weights.values())


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="folder to create")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random weights (default 0)")
    parser.add_argument(
        "--tokens-per-tile",
        type=int,
        choices=tuple(TILES),
        default=64,
        help="visual tokens of a tile: 64 (64 pixels wide) or 4 (56 pixels), default 64",
    )
    arguments = parser.parse_args()
    count = write_checkpoint(arguments.folder, seed=arguments.seed, tokens_per_tile=arguments.tokens_per_tile)
    print(f"{arguments.folder}: InternVL2 with {count:,} random parameters, vocabulary {VOCAB_SIZE}")


if __name__ == "__main__":
    main()
