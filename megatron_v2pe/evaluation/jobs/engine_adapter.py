"""The model as an answerer of benchmarks: the one place that knows the inference engine.

request -> files, tiles, tokens with visual slots, one stride for every image -> engine -> text, or probabilities
"""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from megatron_v2pe.config.arch.architecture import InternVLArchitecture
from megatron_v2pe.config.schema import ParallelConfig
from megatron_v2pe.core.errors import ConfigError, DataError
from megatron_v2pe.data.media.cut import CutRule
from megatron_v2pe.data.media.image import ImageFile, read_header
from megatron_v2pe.data.media.medium import IMAGE_PLACEHOLDER, DrawSeed, Medium, MediumTiles
from megatron_v2pe.data.media.video import VIDEO_PLACEHOLDER, VideoFile
from megatron_v2pe.data.samples.encode import encode_conversation
from megatron_v2pe.data.text.templates import Turn
from megatron_v2pe.evaluation.benchmarks.base import Part, Request, Response
from megatron_v2pe.evaluation.jobs.runner import BrokenReplicaError
from megatron_v2pe.evaluation.retrieval.loaded_engine import open_for_answers
from megatron_v2pe.evaluation.retrieval.questions import Share, StrideSetting, parse_strides
from megatron_v2pe.inference.prompts.prompt import Prompt, prompt_with
from megatron_v2pe.inference.prompts.stride import choose_stride
from megatron_v2pe.parallel.replica import from_leader

_log = logging.getLogger(__name__)
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")


def own_strides(arch: InternVLArchitecture, text: str, *, option: str = "--strides") -> list[StrideSetting]:
    """Strides that are asked for, or the checkpoint's own.

    Args:
        arch: of the checkpoint.
        text: comma list of `default` and position units; empty is the checkpoint's own.
        option: what the user would name them with, for messages.

    Raises:
        ConfigError: an entry is out of range, or none is given and the checkpoint has none of its own.
    """
    if not text:
        own = choose_stride(arch, None, option=option)
        _log.info("%s", own.reason)
        text = "default" if own.mode == "default" else str(own.stride)
    return parse_strides(text, tokens_per_tile=arch.tokens_per_tile)


class ModelAnswerer:
    """Answers with a checkpoint; under torchrun the ranks of a replica answer together, replicas side by side.

    Args:
        checkpoint: folder written by `import-hf` or by a run.
        dtype: compute dtype.
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
        dtype: Literal["float32", "bfloat16"],
        parallel: ParallelConfig | None = None,
    ) -> None:
        self._parallel = parallel or ParallelConfig()
        opened = open_for_answers(checkpoint, data=None, dtype=dtype, parallel=self._parallel)
        self.arch, self._settings, self._model = opened.arch, opened.settings, opened.model
        self._tokenizer, self._stop_ids = opened.settings.text.tokenizer, opened.stop_ids
        self._header = opened.header

    def prepare(self, setting: StrideSetting) -> Share:
        """See `LoadedEngine.prepare`."""
        return self._model.prepare(setting)

    def answer(self, request: Request, setting: StrideSetting) -> Response:
        """One answer; what keeps it from being given is its error.

        Raises:
            BrokenReplicaError: out of memory where other ranks wait.
        """
        start = time.perf_counter()
        try:
            prompt = self.prompt(request, setting)
            response = self._forced(request, prompt) if request.forced_answer else self._free(request, prompt)
        except (DataError, ConfigError) as error:
            response = Response(id=request.id, error=str(error))
        except (MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            torch.cuda.empty_cache()
            response = Response(id=request.id, error=f"out of memory ({str(error).splitlines()[0][:200]})")
            if self._parallel.tp * self._parallel.pp * self._parallel.cp > 1:
                raise BrokenReplicaError(response) from error
        return dataclasses.replace(response, seconds=time.perf_counter() - start)

    def _free(self, request: Request, prompt: Prompt) -> Response:
        ids = self._model.engine.generate(
            prompt, max_new_tokens=request.max_new_tokens, stop_ids=self._stop_ids
        )
        text = self._tokenizer.decode(self._header.without(ids), skip_special_tokens=True)
        for stop in request.stop:
            text = text.partition(stop)[0]
        return Response(id=request.id, text=text.strip(), **_lengths(prompt))

    def _forced(self, request: Request, prompt: Prompt) -> Response:
        """Most probable token at each place of the gold answer, given what precedes it there."""
        wanted = self._answer_tokens(request)
        chosen, logprobs = self._score(prompt, wanted)
        return Response(
            id=request.id,
            text=self._tokenizer.decode(self._header.without(chosen), skip_special_tokens=True).strip(),
            forced_match=chosen == list(wanted),
            token_logprobs=tuple(logprobs),
            **_lengths(prompt),
        )

    def _score(self, prompt: Prompt, wanted: Sequence[int]) -> tuple[list[int], list[float]]:
        """(most probable token, log-probability of the wanted one) at each place of an answer."""
        found = self._model.engine.score(prompt, wanted)
        return [each.argmax for each in found], [each.logprob for each in found]

    def _answer_tokens(self, request: Request) -> list[int]:
        """Tokens of the gold answer as the template puts it after the assistant's role, without its end mark."""
        template = self._settings.text
        asked = [Turn(role="human", value="?")]
        answered = [*asked, Turn(role="gpt", value=request.forced_answer or "")]
        before = encode_conversation(
            asked, num_tiles=[], settings=template, add_generation_prompt=True
        ).tokens
        whole = encode_conversation(answered, num_tiles=[], settings=template).tokens
        if not np.array_equal(whole[: len(before)], before):
            raise DataError(f"{request.id}: the template does not keep the prompt before an answer")
        tokens = whole[len(before) :].tolist()
        end = next((index for index, token in enumerate(tokens) if token in self._stop_ids), len(tokens))
        if not tokens[:end]:
            raise DataError(f"{request.id}: the answer {request.forced_answer!r} has no token")
        return tokens[:end]

    def prompt(self, request: Request, setting: StrideSetting) -> Prompt:
        """What the model is given: the conversation up to the assistant's role, and all tiles.

        Raises:
            DataError: a file cannot be read, or a text holds a mark that is reserved for images.
        """
        media: list[MediumTiles] = []
        text = ""
        for part in request.parts:
            if part.kind == "text":
                text += _plain(part.text, request.id)
                continue
            medium = _medium(part)
            own = self._tiles(medium, part.max_tiles or request.max_tiles, name=request.id)
            text += medium.text(len(own.images))
            media.append(own)
        turns = [Turn(role="human", value=text)]
        return prompt_with(turns, media, settings=self._settings, stride=setting.stride)

    def _tiles(self, medium: Medium, max_tiles: int, *, name: str) -> MediumTiles:
        """How a file is cut: at most so many tiles and a thumbnail, or one tile."""
        rule = CutRule(
            tiling=dataclasses.replace(self._settings.tiling, max_tiles=max_tiles, dynamic=max_tiles > 1)
        )
        rules = self._settings.media
        headers = medium.probe(rules, sample_id=name, header_of=read_header)
        sizes = [header.size for header in headers]
        images = medium.tiles(sizes, rule)
        return MediumTiles(medium=medium, images=images, rules=rules, seed=DrawSeed(identity=name))

    def shared(self, request: Request | None) -> Request | None:
        """What the replica's first rank was given, on all its ranks. Collective."""
        content = (
            b"" if request is None else json.dumps(dataclasses.asdict(request), default=_no_bytes).encode()
        )
        content = from_leader(content, ranks=self._model.engine.ranks)
        if not content:
            return None
        values = json.loads(content)
        parts = tuple(
            Part(**{**part, "clip": part["clip"] and tuple(part["clip"])}) for part in values["parts"]
        )
        return Request(**{**values, "parts": parts, "stop": tuple(values["stop"])})

    def close(self) -> None:
        """See `LoadedEngine.close`."""
        self._model.close()


def _no_bytes(value: Any) -> str:
    """Images travel as files; a part's own bytes are empty by then."""
    if value != b"":
        raise TypeError(f"{type(value).__name__} cannot be given to other ranks")
    return ""


def _lengths(prompt: Prompt) -> dict[str, Any]:
    layout = prompt.layout
    return {
        "n_prompt": len(prompt.tokens),
        "n_visual": int(layout.num_tiles.sum()) * layout.tokens_per_tile,
        "last_position": layout.next_position - 1,
    }


def _plain(text: str, name: str) -> str:
    for mark in (IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER):
        if mark in text:
            raise DataError(f"{name}: a text holds {mark}, which is reserved for images")
    return text


def _is_out_of_memory(error: BaseException) -> bool:
    text = str(error).lower()
    return isinstance(error, MemoryError) or any(phrase in text for phrase in _OUT_OF_MEMORY)


def _medium(part: Part) -> Medium:
    if part.kind == "image":
        return ImageFile(path=part.path)
    return VideoFile(
        path=part.path, clip=part.clip, fps=part.fps, min_frames=part.frames, max_frames=part.frames
    )
