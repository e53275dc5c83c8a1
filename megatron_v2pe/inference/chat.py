"""A checkpoint one can talk to: question and images in, text out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from megatron_v2pe.checkpoint.files.folder import hf_path, read_info
from megatron_v2pe.config.architecture import read_architecture
from megatron_v2pe.config.schema import DataConfig, ParallelConfig, RunConfig
from megatron_v2pe.core.env import launcher
from megatron_v2pe.core.errors import ConfigError
from megatron_v2pe.data.media.normalization import NORMALIZATION
from megatron_v2pe.data.samples.settings import sample_settings
from megatron_v2pe.data.text.templates import Turn
from megatron_v2pe.inference.engine import Engine
from megatron_v2pe.inference.prompt import build_prompt
from megatron_v2pe.parallel.plan import resolve


class Chat:
    """An engine with the checkpoint's template, tokenizer and tiling; all ranks of a replica call it alike.

    Args:
        checkpoint: folder of `import-hf` or of a run.
        stride: position units that a visual token advances; 0 is the default spacing.
        dtype: compute dtype.
        max_tokens: longest prompt.
        parallel: sizes of the parallel axes; their product must be the number of processes.

    Raises:
        CheckpointError: not a checkpoint folder, or one of an unknown family.
        ConfigError: the stride is out of range, the template is unknown, or the sizes do not fit.
    """

    def __init__(
        self,
        checkpoint: str | Path,
        *,
        stride: int = 0,
        dtype: Literal["float32", "bfloat16"] = "bfloat16",
        max_tokens: int = 1_000_000,
        parallel: ParallelConfig | None = None,
    ) -> None:
        parallel = parallel or ParallelConfig()
        if resolve(parallel, launcher().world_size).dp > 1:
            raise ConfigError(
                f"{launcher().world_size} processes were started for one answer, but --tp * --pp * --cp is "
                f"{parallel.tp} * {parallel.pp} * {parallel.cp}; start as many processes as their product"
            )
        read_info(checkpoint)
        hf_folder = hf_path(checkpoint)
        arch = read_architecture(hf_folder)
        if not 0 <= stride <= arch.tokens_per_tile:
            raise ConfigError(
                f"--stride is {stride}, but must lie in 1..{arch.tokens_per_tile} (visual tokens per tile of this "
                "checkpoint); omit it for the default spacing"
            )
        self.stride = stride or arch.tokens_per_tile
        config = RunConfig(data=DataConfig(max_sample_tokens=max_tokens))
        self.settings = sample_settings(config, arch, hf_folder)
        norm = NORMALIZATION[config.data.normalize_type]
        mode: Literal["default", "v2pe_fixed"] = "v2pe_fixed" if stride else "default"
        self.engine = Engine.load(checkpoint, mode=mode, norm=norm, dtype=dtype, parallel=parallel)

    def answer(
        self, question: str, images: Sequence[str] = (), *, max_new_tokens: int = 256
    ) -> Iterator[str]:
        """Yield the answer piece by piece; the pieces joined are the decoded answer.

        Raises:
            ConfigError: placeholders and images differ in number, or the prompt is too long.
            DataError: an image cannot be read.
        """
        turns = [Turn(role="human", value=question)]
        prompt = build_prompt(turns, images, settings=self.settings, stride=self.stride)
        tokenizer = self.settings.text.tokenizer
        stops = {tokenizer.eos_id, tokenizer.token_id(self.settings.text.template.stop_token)}
        tokens: list[int] = []
        shown = ""
        for step in self.engine.stream(prompt, max_new_tokens=max_new_tokens, stop_ids=stops):
            tokens.append(step.token)
            text = tokenizer.decode(tokens, skip_special_tokens=True)
            if text.startswith(shown) and not text.endswith("\ufffd"):  # a character may span several tokens
                yield text[len(shown) :]
                shown = text
        text = tokenizer.decode(tokens, skip_special_tokens=True)
        if text != shown:
            yield text[len(shown) :]
