"""The model as an answerer: a question about images or a video becomes a prompt, its greedy answer becomes text.

item -> image sizes -> tiles, tokens with visual slots, one stride for every image -> engine -> text
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

from megatron_v2pe.checkpoint.files.folder import hf_path
from megatron_v2pe.checkpoint.model_loading import check_model
from megatron_v2pe.config.arch.architecture import read_architecture
from megatron_v2pe.config.schema import DataConfig, ParallelConfig, RunConfig
from megatron_v2pe.core.errors import DataError
from megatron_v2pe.data.media.normalization import NORMALIZATION
from megatron_v2pe.data.samples.draw import record_tiles
from megatron_v2pe.data.samples.measure import probe_sizes
from megatron_v2pe.data.samples.records import write_images
from megatron_v2pe.data.samples.settings import sample_settings
from megatron_v2pe.evaluation.retrieval.questions import Answer, RetrievalItem, Share, StrideSetting
from megatron_v2pe.inference.engine import Engine
from megatron_v2pe.inference.prompts.prompt import Prompt, prompt_with
from megatron_v2pe.parallel.topology import shutdown

PositionMode = Literal["default", "v2pe_fixed"]
_NO_LIMIT = 2**40  # an evaluation never cuts a sample


class EngineAnswerer:
    """Answers with a checkpoint; under torchrun the ranks of a replica answer together, replicas side by side.

    Args:
        checkpoint: folder written by `import-hf` or by a run.
        data: tiling and normalisation; lengths and packing are not used.
        dtype: compute dtype.
        max_new_tokens: longest answer.
        parallel: sizes of the parallel axes of one replica.

    Attributes:
        arch: architecture of the checkpoint.

    Raises:
        CheckpointError: the folder is not a complete checkpoint.
    """

    def __init__(
        self,
        checkpoint: str | Path,
        *,
        data: DataConfig,
        dtype: Literal["float32", "bfloat16"],
        max_new_tokens: int,
        parallel: ParallelConfig | None = None,
    ) -> None:
        check_model(checkpoint)
        self._checkpoint = checkpoint
        self._dtype = dtype
        self._max_new_tokens = max_new_tokens
        self._parallel = parallel or ParallelConfig()
        self.arch = read_architecture(hf_path(checkpoint))
        settings = sample_settings(RunConfig(data=data), self.arch, hf_path(checkpoint))
        text = dataclasses.replace(settings.text, max_tokens=_NO_LIMIT)
        # A question about a video has one prompt: as many frames as there may be, the middle of each interval.
        video = settings.media.video
        video = dataclasses.replace(video, min_frames=video.max_frames, sampling="middle")
        media = dataclasses.replace(settings.media, video=video)
        self._settings = dataclasses.replace(settings, text=text, media=media)
        self._tokenizer = text.tokenizer
        self._stop_ids = {self._tokenizer.token_id(text.template.stop_token), self._tokenizer.eos_id}
        self._engine: Engine | None = None
        self._mode: PositionMode = "default"

    def prepare(self, setting: StrideSetting) -> Share:
        """Load the model for a position mode; strides of one mode share it, as each prompt brings its own.

        Collective under torchrun.

        Raises:
            ConfigError: the parallel sizes do not divide the processes, or the model's heads or layers.
        """
        # A V2PE checkpoint rotates by plain frequencies in either mode, so one model serves all strides.
        mode = setting.mode if self.arch.position_mode == "default" else "v2pe_fixed"
        if self._engine is None or self._mode != mode:
            self.close()  # one model in memory at a time
            self._engine = Engine.load(
                self._checkpoint,
                mode=mode,
                norm=NORMALIZATION[self._settings.normalize_type],
                dtype=self._dtype,
                parallel=self._parallel,
            )
            self._mode = mode
        plan, ranks = self._engine.context.plan, self._engine.context.ranks
        is_first = ranks.tp_rank == 0 and ranks.cp_rank == 0 and ranks.pp_rank == 0
        return Share(index=ranks.dp_rank, count=plan.dp, is_writer=is_first)

    def answer(self, item: RetrievalItem, setting: StrideSetting) -> Answer:
        """Greedy answer; an image that cannot be decoded is its error where no other process waits for this one.

        Raises:
            DataError: an image cannot be decoded, and other processes hold parts of the model.
        """
        if self._engine is None:
            raise RuntimeError("prepare() was not called")
        try:
            prompt = self.prompt(item, setting)
            ids = self._engine.generate(prompt, max_new_tokens=self._max_new_tokens, stop_ids=self._stop_ids)
        except DataError as error:
            if self._parallel.replica_size > 1:
                raise
            return Answer(error=str(error))
        text = self._tokenizer.decode(ids, skip_special_tokens=True)
        return Answer(text=text, is_cut=len(ids) >= self._max_new_tokens)

    def expected(self, text: str) -> tuple[str, int]:
        """An expected answer as it comes out of the decoding that answers pass through, and its number of tokens.

        Markers such as `<ref>` and `<box>` are special tokens of some tokenizers, which decoding leaves out.
        """
        ids = self._tokenizer.encode(text)
        return self._tokenizer.decode(ids, skip_special_tokens=True).strip(), len(ids)

    def check_media(self, item: RetrievalItem) -> None:
        """Read the headers of a question's images and videos.

        Raises:
            DataError: one is missing or cannot be used.
        """
        probe_sizes(item.record, settings=self._settings)

    def prompt(self, item: RetrievalItem, setting: StrideSetting) -> Prompt:
        """What the model is given: the conversation up to the assistant's role, and all tiles.

        Images are cut as in training, so limits of the data set come before those of the command.
        """
        sizes = probe_sizes(item.record, settings=self._settings)
        media = record_tiles(item.record, sizes, entry=item.entry, settings=self._settings)
        turns = write_images(item.record, sizes).messages
        return prompt_with(turns, media, settings=self._settings, stride=setting.stride)

    def close(self) -> None:
        """Wait for the other processes, drop the model and leave the groups, so that another may be loaded."""
        if self._engine is not None:
            self._engine = None
            shutdown()
