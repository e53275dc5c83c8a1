"""Tokenizer files of each kind (sentencepiece, byte level, tokenizer.json), changed, read, and used."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

from tests.support.fuzzing.mutations import change_any

_GOLDEN = Path(__file__).parents[2]
_SOURCES = (
    *(
        _GOLDEN / "golden" / "ckpt" / key
        for key in ("a_internlm2_vit300m", "c_qwen2_vit300m", "d_llama_vit6b")
    ),
    _GOLDEN / "golden" / "ckpt" / "e_phi3_vit300m",
    _GOLDEN / "golden_families" / "ckpt_hf" / "i_qwen3_vit6b",
)
_TEXT = "<|im_start|>user\n<img><IMG_CONTEXT></img> Hello, \u4e16\u754c! 123\n<|im_end|>"


class Fuzzer:
    """See the package."""

    modules = ("megatron_v2pe.checkpoint.convert.hf_source",)

    def prepare(self, root: Path) -> None:
        """Copies of the golden folders without weights."""
        skipped = shutil.ignore_patterns("*.safetensors", "*.py")
        for source in _SOURCES:
            shutil.copytree(source, root / source.name, ignore=skipped, copy_function=shutil.copyfile)

    def mutate(self, root: Path, folder: Path, generator: random.Random) -> str:
        """One or two files of one folder."""
        source = root / generator.choice(_SOURCES).name
        target = folder / "hf"
        shutil.copytree(source, target, copy_function=shutil.copyfile)
        files = sorted(path for path in target.iterdir() if path.name not in ("config.json",))
        chosen = generator.sample(files, k=generator.choice((1, 1, 2)))
        return f"{source.name}: " + "; ".join(change_any(path, generator) for path in chosen)

    def run(self, folder: Path) -> None:
        """What import, train and generate do with a tokenizer."""
        from megatron_v2pe.checkpoint.convert.hf_source import check_tokenizer
        from megatron_v2pe.config.arch.architecture import read_architecture
        from megatron_v2pe.data.text.tokenizer import load_tokenizer

        check_tokenizer(folder / "hf", read_architecture(folder / "hf"))
        tokenizer = load_tokenizer(folder / "hf")
        ids = tokenizer.encode(_TEXT)
        assert all(0 <= index < tokenizer.vocab_size for index in ids)
        tokenizer.decode(ids)
