"""The model as an answerer: a question about images or a video becomes a prompt, its greedy answer becomes text.

item -> image sizes -> tiles, tokens with visual slots, one stride for every image -> engine -> text
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

from megatron_v2pe.config.schema import DataConfig, ParallelConfig
from megatron_v2pe.core.errors import DataError
from megatron_v2pe.data.samples.draw import record_tiles
from megatron_v2pe.data.samples.measure import probe_sizes
from megatron_v2pe.data.samples.records import write_images
from megatron_v2pe.evaluation.retrieval.loaded_engine import open_for_answers
from megatron_v2pe.evaluation.retrieval.questions import Answer, RetrievalItem, Share, StrideSetting
from megatron_v2pe.inference.prompts.prompt import Prompt, prompt_with


class EngineAnswerer:
    """Answers with a checkpoint; under torchrun the ranks of a replica answer together, replicas side by side.

    Args:
        checkpoint: folder written by `import-hf` or by a run.
        data: tiling and normalisation; lengths and packing are not used.
        dtype: compute dtype.
        max_new_tokens: longest answer.
        system: system text of questions that bring none; None takes the checkpoint's own.
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
        system: str | None = None,
        parallel: ParallelConfig | None = None,
    ) -> None:
        self._max_new_tokens = max_new_tokens
        self._parallel = parallel or ParallelConfig()
        opened = open_for_answers(checkpoint, data=data, dtype=dtype, parallel=self._parallel, system=system)
        self.arch, self._model, self._stop_ids = opened.arch, opened.model, opened.stop_ids
        self._tokenizer, self._header = opened.settings.text.tokenizer, opened.header
        # A question about a video has one prompt: as many frames as there may be.
        media = opened.settings.media
        video = dataclasses.replace(media.video, min_frames=media.video.max_frames)
        self._settings = dataclasses.replace(opened.settings, media=dataclasses.replace(media, video=video))

    def prepare(self, setting: StrideSetting) -> Share:
        """See `LoadedEngine.prepare`."""
        return self._model.prepare(setting)

    def answer(self, item: RetrievalItem, setting: StrideSetting) -> Answer:
        """Greedy answer; an image that cannot be decoded is its error where no other process waits for this one.

        Raises:
            DataError: an image cannot be decoded, and other processes hold parts of the model.
        """
        engine = self._model.engine
        try:
            prompt = self.prompt(item, setting)
            ids = engine.generate(prompt, max_new_tokens=self._max_new_tokens, stop_ids=self._stop_ids)
        except DataError as error:
            if self._parallel.replica_size > 1:
                raise
            return Answer(error=str(error))
        text = self._tokenizer.decode(self._header.without(ids), skip_special_tokens=True)
        return Answer(text=text, is_cut=len(ids) >= self._max_new_tokens)

    def expected(self, text: str) -> tuple[str, int]:
        """An expected answer as it comes out of the decoding that answers pass through, and its number of tokens.

        It is encoded as training encodes an answer: a control token that it spells is text, and so it is in what a
        model says after such training. Markers such as `<ref>` and `<box>` are special tokens of some tokenizers, which
        decoding leaves out.
        """
        ids, _ = self._tokenizer.encode_marked(text, (), add_bos=False, written=[(0, len(text))])
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
        """See `LoadedEngine.close`."""
        self._model.close()
