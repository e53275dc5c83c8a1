"""Tokenizers and templates of the golden checkpoints, one of each family."""

from pathlib import Path

from megatron_v2pe.data.text.templates import get_template
from megatron_v2pe.data.text.tokenizer import load_tokenizer

CHECKPOINTS = Path(__file__).parents[1] / "golden" / "ckpt"
FOLDERS = {
    "internlm2": CHECKPOINTS / "a_internlm2_vit300m",
    "internlm2_dummy_prefix": CHECKPOINTS / "b_internlm2_vit6b",
    "qwen2": CHECKPOINTS / "c_qwen2_vit300m",
    "yi": CHECKPOINTS / "d_llama_vit6b",
    "phi3": CHECKPOINTS / "e_phi3_vit300m",
}
TOKENIZERS = {name: load_tokenizer(folder) for name, folder in FOLDERS.items()}
TEMPLATES = {
    "internlm2": get_template("internlm2-chat"),
    "internlm2_dummy_prefix": get_template("internlm2-chat"),
    "qwen2": get_template("Hermes-2"),
    "yi": get_template("Hermes-2"),
    "phi3": get_template("phi3-chat"),
}
