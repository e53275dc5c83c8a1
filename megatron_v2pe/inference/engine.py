"""Answers: prefill in chunks, then one token at a time over a cache of keys and values.

    prompt --plan_chunks--> chunks --schedule--> hidden row of the last token --choose--> token --+
                                                       ^                                           |
                                                       +---- new token, position + 1 --------------+

Each context parallel rank keeps the keys and values of its share of every chunk, and all of them compute each new token
(see `parallel.attention.cached`). A generated token is text: it advances the position by 1 from the prompt's last one,
whatever the strides of the prompt's images. Dynamic NTK keeps the prompt's base for the whole answer, so that cached
keys and new queries agree (the release changes the base in mid-generation).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from megatron_v2pe.assembly.mcore_config import DTYPES
from megatron_v2pe.batch.pixel_norm import PixelNorm
from megatron_v2pe.checkpoint.model_loading import load_model
from megatron_v2pe.checkpoint.model_source import require_source, source_side_files
from megatron_v2pe.config.arch.architecture import read_architecture
from megatron_v2pe.config.schema import ParallelConfig, PositionConfig, RunConfig, RuntimeConfig, VisionConfig
from megatron_v2pe.core.env import launcher
from megatron_v2pe.core.errors import ConfigError, DataError
from megatron_v2pe.inference.cache.kv_cache import KVCache, token_step
from megatron_v2pe.inference.cache.memory import KVKind, PlanPrefill, PrefillBytes, Stage
from megatron_v2pe.inference.cache.prefix import Content, PrefixStore
from megatron_v2pe.inference.chunks import (
    DEFAULT_CHUNK_TOKENS,
    MICRO_BATCH_TILES,
    PrefillChunk,
    plan_chunks,
)
from megatron_v2pe.inference.memory_check import check_memory
from megatron_v2pe.inference.prompts.prompt import Prompt
from megatron_v2pe.inference.runner import ModelRunner, Work
from megatron_v2pe.inference.sampling import GREEDY, Sampling, adjusted, draw
from megatron_v2pe.parallel.replica import (
    agree_on_problem,
    best_of_vocabulary,
    from_last_stage,
    highest,
    least,
    top_of_vocabulary,
    whole_vocabulary,
)
from megatron_v2pe.parallel.topology import init_distributed, resolve
from megatron_v2pe.v2pe.layout import Int64Array
from megatron_v2pe.v2pe.rope import inverse_frequencies

CHUNKS_PER_STAGE = 8  # of one call of the schedule; with more stages there are more, so that few of them wait
SCORE_ROWS = 256  # whose logits are worked out at a time


@dataclass(frozen=True, kw_only=True, eq=False)
class Step:
    """One generated token.

    Attributes:
        token: its id.
        position: whole position of the token that was fed to get it: the prompt's last, then one more each.
        logprob: its log-probability, before temperature and cuts.
        top: the most probable tokens and their log-probabilities, as many as were asked for.
        logits: float32 [vocab_size], where they were asked for.
    """

    token: int
    position: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    logits: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class ForcedToken:
    """A token of a given answer, and what the model would have said in its place.

    Attributes:
        token: of the answer.
        logprob: log-probability of it.
        argmax: the most probable token there.
    """

    token: int
    logprob: float
    argmax: int


@dataclass(eq=False)
class Answer:
    """A document that is being continued.

    Attributes:
        prompt: what was asked.
        cache: keys and values of prompt and answer, but for the last token chosen.
        rope_length: by which dynamic NTK chooses its base, the prompt's.
        sampling: how tokens are chosen.
        stop_ids: tokens that end the answer.
        num_top: most probable tokens that are reported with each step.
        steps: tokens chosen so far.
        reused_tokens: of the prompt, found in the cache of an earlier document.
    """

    prompt: Prompt
    cache: KVCache
    rope_length: int
    sampling: Sampling
    stop_ids: frozenset[int]
    num_top: int = 0
    reused_tokens: int = 0
    steps: list[Step] = field(default_factory=list)

    @property
    def tokens(self) -> list[int]:
        """Token ids chosen so far."""
        return [step.token for step in self.steps]

    @property
    def is_done(self) -> bool:
        """The answer has ended, by a stop token or by its length."""
        return bool(self.steps) and (
            self.steps[-1].token in self.stop_ids or len(self.steps) >= self.sampling.max_new_tokens
        )

    @property
    def answer(self) -> list[int]:
        """Token ids of the answer, without the stop token."""
        tokens = self.tokens
        return tokens[:-1] if tokens and tokens[-1] in self.stop_ids else tokens


OnProgress = Callable[[int, int], None]


class Engine:
    """A model that answers; every rank of a replica calls it alike.

    Args:
        runner: the model on this rank.
        chunk_tokens: longest prefill chunk.
        kv: how keys and values are stored.
        keep_tokens: tokens of earlier documents that are kept, so that a further question about one of them
            computes its own tokens only; 0 keeps none.
        prefill_bytes: what a prefill chunk takes, for the check before a prefill; None checks keys and values alone.
    """

    def __init__(
        self,
        runner: ModelRunner,
        *,
        chunk_tokens: int = DEFAULT_CHUNK_TOKENS,
        kv: KVKind = "model",
        keep_tokens: int = 0,
        prefill_bytes: PrefillBytes | None = None,
    ) -> None:
        if chunk_tokens < 1:
            raise ConfigError(f"--chunk-tokens is {chunk_tokens}, but must be at least 1")
        self.runner, self.chunk_tokens, self.kv = runner, chunk_tokens, kv
        self.prefill_bytes = prefill_bytes
        self.context, self.plan, self.ranks = runner.context, runner.plan, runner.ranks
        self.arch = runner.arch
        self.documents = PrefixStore(keep_tokens)

    @classmethod
    def load(
        cls,
        checkpoint: str | Path,
        *,
        mode: Literal["default", "v2pe_fixed"],
        norm: PixelNorm | None = None,
        dtype: Literal["float32", "bfloat16", "float64"] = "float32",
        parallel: ParallelConfig | None = None,
        chunk_tokens: int = DEFAULT_CHUNK_TOKENS,
        kv: KVKind = "model",
        keep_tokens: int = 0,
        plan_prefill: PlanPrefill | None = None,
    ) -> Engine:
        """Build an engine from a checkpoint folder; under torchrun, one stage or slice of it on each rank.

        Args:
            checkpoint: folder written by `import-hf` or by a run, or a Hugging Face folder.
            mode: `default` rotates as the checkpoint says and takes whole positions only; `v2pe_fixed`
                rotates by plain frequencies and takes any stride.
            norm: pixel normalisation; None where tiles of prompts are normalised already.
            dtype: compute dtype.
            parallel: sizes of the parallel axes; one rank when None. Sequence parallelism is left out,
                because a single new token cannot be split; so is a split tower, because tiles are assigned over tp.
            chunk_tokens: see the class.
            kv: see the class.
            keep_tokens: see the class.
            plan_prefill: gives `prefill_bytes`, see the class.

        Raises:
            ConfigError: the sizes do not make up the world.
        """
        parallel = replace(parallel or ParallelConfig(), sequence_parallel=False, vision="replicated")
        require_source(checkpoint)
        arch = read_architecture(source_side_files(checkpoint))
        # The stride of a run's config is a default for data; here every prompt brings its own strides.
        position = PositionConfig(mode=mode, stride=1 if mode == "v2pe_fixed" else 0)
        runtime = RuntimeConfig(dtype=dtype)  # type: ignore[arg-type]
        vision = VisionConfig(micro_batch_tiles=MICRO_BATCH_TILES)
        config = RunConfig(position=position, parallel=parallel, runtime=runtime, vision=vision)
        plan = resolve(parallel, launcher().world_size)
        context = init_distributed(plan, seed=config.runtime.seed)
        models = load_model(checkpoint, config, arch, context)
        runner = ModelRunner(models[0], arch, context=context, dtype=DTYPES[dtype], norm=norm)
        stage = Stage(
            config=config,
            arch=arch,
            plan=plan,
            num_layers=len(models[0].language.decoder.layers),
            is_first=context.ranks.is_first_stage,
            is_last=context.ranks.is_last_stage,
            on_cpu=runner.device.type != "cuda",
        )
        prefill_bytes = None if plan_prefill is None else plan_prefill(stage)
        return cls(
            runner, chunk_tokens=chunk_tokens, kv=kv, keep_tokens=keep_tokens, prefill_bytes=prefill_bytes
        )

    def content(self, prompt: Prompt, rope_length: int) -> Content:
        """What a prompt's keys and values depend on; reads its images where documents are kept."""
        spec = self.runner.model.language.rope
        frequencies = tuple(inverse_frequencies(spec, rope_length).tolist())
        digests = prompt.tiles.digests() if self.documents.max_tokens else ()
        return Content(tokens=prompt.tokens, layout=prompt.layout, digests=digests, frequencies=frequencies)

    def _cache_for(self, prompt: Prompt, rope_length: int, new_tokens: int) -> tuple[KVCache, int]:
        """A cache that holds the prompt's longest known prefix, and the tokens of it."""
        known, found = 0, None
        if self.documents.max_tokens:
            known, found = self.documents.longest(self.content(prompt, rope_length))
            # At least the last token is computed, whose hidden state chooses the first of the answer.
            known = int(least(float(min(known, prompt.layout.num_tokens - 1)), ranks=self.ranks))
            self.documents.make_room(prompt.layout.num_tokens - known + new_tokens, found if known else None)
        if not known or found is None:
            return KVCache(self.runner.place(self.kv)), 0
        return found.fork(known), known

    def _prefill(
        self,
        prompt: Prompt,
        cache: KVCache,
        *,
        rope_length: int,
        wanted: Int64Array,
        rooms: Sequence[int] = (0,),
    ) -> Generator[tuple[int, int], None, Tensor | None]:
        """Compute what the cache does not hold yet; yields (tokens done, all) after each call of the schedule.

        Args:
            prompt: the whole prompt.
            cache: holds a prefix of it, or nothing.
            rope_length: by which dynamic NTK chooses its base.
            wanted: rising token indices whose hidden states are wanted.
            rooms: new tokens of each answer that will be made; the first one's are kept in this cache.

        Returns:
            Hidden rows [n, 1, H] of the wanted tokens that are on this rank, None where there are none.

        Raises:
            ConfigError: it would not fit into memory.
            DataError: an image cannot be read; on all ranks alike.
        """
        start = cache.num_tokens
        sizes = dict(cp=self.plan.cp, tile_ranks=self.runner.tile_ranks.size)
        chunks = plan_chunks(prompt.layout, chunk_tokens=self.chunk_tokens, start=start, **sizes)
        prefill_bytes = self.prefill_bytes
        check_memory(self.runner, chunks, new_tokens=sum(rooms), kind=self.kv, prefill_bytes=prefill_bytes)
        cache.reserve(chunks, rooms[0])
        window = 1 if self.plan.pp == 1 else CHUNKS_PER_STAGE * self.plan.pp
        hidden: list[Tensor] = []
        for first in range(0, len(chunks), window):
            some = chunks[first : first + window]
            make = partial(self._chunk_work, prompt, cache, rope_length, wanted, start)
            outputs = self.runner.run([partial(make, chunk) for chunk in some])
            hidden += [output for output in outputs if output is not None and len(output)]
            self._raise_problem()
            yield some[-1].stop, prompt.layout.num_tokens
        return torch.cat(hidden) if hidden else None

    def _chunk_work(
        self,
        prompt: Prompt,
        cache: KVCache,
        rope_length: int,
        wanted: Int64Array,
        start: int,
        chunk: PrefillChunk,
    ) -> Work:
        is_first = chunk.start == start
        return self.runner.chunk_work(
            prompt, chunk, cache, rope_length=rope_length, is_first=is_first, wanted=wanted
        )

    def _raise_problem(self) -> None:
        problem = agree_on_problem(self.runner.problem, ranks=self.ranks)
        self.runner.problem = ""
        if problem:
            raise DataError(problem)

    def begin(
        self,
        prompt: Prompt,
        *,
        sampling: Sampling = GREEDY,
        stop_ids: Collection[int] = (),
        num_top: int = 0,
        logits: bool = False,
        on_progress: OnProgress | None = None,
    ) -> Answer:
        """Prefill a prompt and choose the first token of its answer; see `begin_stepwise`.

        Args:
            prompt: what is asked.
            sampling: how tokens are chosen.
            stop_ids: tokens that end the answer.
            num_top: most probable tokens to report with each step.
            logits: give the whole vocabulary row of the step.
            on_progress: given the tokens prefilled so far, and all.
        """
        steps = self.begin_stepwise(
            prompt, samplings=[sampling], stop_ids=stop_ids, num_top=num_top, logits=logits
        )
        while True:
            try:
                done, total = next(steps)
            except StopIteration as end:
                return end.value[0]
            if on_progress is not None:
                on_progress(done, total)

    def begin_stepwise(
        self,
        prompt: Prompt,
        *,
        samplings: Sequence[Sampling] = (GREEDY,),
        stop_ids: Collection[int] = (),
        num_top: int = 0,
        logits: bool = False,
    ) -> Generator[tuple[int, int], None, list[Answer]]:
        """Prefill a prompt step by step, so that other answers may be continued in between.

        One prompt at a time: the router of image features remembers one cut tile. A prompt that is not prefilled to
        its end is simply left.

        Args:
            prompt: what is asked.
            samplings: how each answer to it is made, one or more; the prompt is computed once for all of them.
            stop_ids: tokens that end an answer.
            num_top: most probable tokens to report with each step.
            logits: give the whole vocabulary row of the step.

        Yields:
            Tokens prefilled so far, and all.

        Returns:
            The answers with their first tokens, in the order of `samplings`.

        Raises:
            ConfigError: the prompt is empty, or longer than memory.
            DataError: an image cannot be read.
        """
        if prompt.layout.num_tokens == 0:
            raise ConfigError("the prompt is empty; ask something")
        rope_length, rooms = prompt.layout.next_position, [each.max_new_tokens for each in samplings]
        cache, known = self._cache_for(prompt, rope_length, sum(rooms))
        last = np.array([prompt.layout.num_tokens - 1], dtype=np.int64)
        hidden = yield from self._prefill(prompt, cache, rope_length=rope_length, wanted=last, rooms=rooms)
        caches = [cache]
        for room in rooms[1:]:
            caches.append(cache.fork(prompt.layout.num_tokens))
            caches[-1].reserve([], room)
        answers = [
            Answer(
                prompt=prompt,
                cache=own,
                rope_length=rope_length,
                sampling=sampling,
                stop_ids=frozenset(stop_ids),
                num_top=num_top,
                reused_tokens=known,
            )
            for sampling, own in zip(samplings, caches, strict=True)
        ]
        self._choose(None if hidden is None else hidden.expand(len(answers), -1, -1), answers, logits=logits)
        return answers

    def advance(self, answers: Sequence[Answer], *, logits: bool = False) -> None:
        """Feed the last token of each answer and choose the next; answers of one base of dynamic NTK go together."""
        groups: dict[int, list[Answer]] = {}
        depends = self.runner.model.language.rope.scaling.kind in ("dynamic", "longrope")
        for answer in answers:
            groups.setdefault(answer.rope_length if depends else 0, []).append(answer)
        for group in groups.values():
            self._advance_together(group, logits=logits)

    def _advance_together(self, answers: Sequence[Answer], *, logits: bool) -> None:
        tokens = [answer.steps[-1].token for answer in answers]
        positions = [answer.steps[-1].position + 1 for answer in answers]
        step = token_step([answer.cache for answer in answers])
        work = self.runner.token_work(tokens, positions, rope_length=answers[0].rope_length, step=step)
        (hidden,) = self.runner.run([lambda: work])
        self._choose(hidden, answers, logits=logits)

    def _choose(self, hidden: Tensor | None, answers: Sequence[Answer], *, logits: bool) -> None:
        """Append the next token of each answer, the same on all ranks of the replica.

        Args:
            hidden: [b, 1, H] on ranks that have them, None elsewhere.
            answers: b of them.
            logits: keep the whole rows.
        """
        chosen, rows = None, None
        if hidden is not None:
            chosen, rows = self._choices(hidden, answers, logits=logits)
        most = max(answer.num_top for answer in answers)
        found = from_last_stage(chosen, shape=(len(answers), 2 + 2 * most), ranks=self.ranks).tolist()
        if logits:
            shape = (len(answers), self.arch.language.vocab_size)
            rows = from_last_stage(rows, shape=shape, ranks=self.ranks)
        for index, (answer, (token, logprob, *top)) in enumerate(zip(answers, found, strict=True)):
            before = answer.prompt.layout.next_position - 1
            step = Step(
                token=int(token),
                position=before + len(answer.steps),
                logprob=logprob,
                top=tuple((int(t), p) for t, p in zip(top[:most], top[most:], strict=True))[: answer.num_top],
                logits=rows[index].float() if logits and rows is not None else None,
            )
            answer.steps.append(step)

    def _choices(
        self, hidden: Tensor, answers: Sequence[Answer], *, logits: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Tokens, log-probabilities and the most probable ones, float64 [b, 2 + 2*top], and whole rows if wanted."""
        plain, group = self.runner.logits(hidden), self.ranks.groups.tp
        first = self.runner.first_index
        local = torch.stack(
            [
                adjusted(
                    row,
                    sampling=answer.sampling,
                    generated=answer.tokens,
                    stop_ids=answer.stop_ids,
                    first_index=first,
                )
                for row, answer in zip(plain, answers, strict=True)
            ]
        )
        token, largest, total = best_of_vocabulary(local, first_index=first, group=group)
        logprob = largest - total
        drawn = [index for index, answer in enumerate(answers) if not answer.sampling.is_greedy]
        if drawn:
            whole = whole_vocabulary(local[drawn], vocab_size=self.arch.language.vocab_size, group=group)
            for index, row in zip(drawn, whole, strict=True):
                answer = answers[index]
                token[index] = draw(row.float(), sampling=answer.sampling, number=len(answer.steps))
                logprob[index] = row[token[index]].double() - total[index]
        rows = None
        if logits:
            rows = whole_vocabulary(plain, vocab_size=self.arch.language.vocab_size, group=group)
        chosen = torch.stack([token.double(), logprob], dim=1)
        most = max(answer.num_top for answer in answers)
        if most:
            values, tokens = top_of_vocabulary(local, most, first_index=first, group=group)
            chosen = torch.cat([chosen, tokens.double(), values - total.unsqueeze(1)], dim=1)
        return chosen, rows

    def finish(self, answer: Answer) -> None:
        """Keep the document of an answer, so that a further question about it computes its own tokens only."""
        if not self.documents.max_tokens:
            return
        prompt = answer.prompt.with_tokens(answer.tokens)
        content = self.content(prompt, answer.rope_length)
        self.documents.add(replace(content, tokens=content.tokens[: answer.cache.num_tokens]), answer.cache)

    def stream(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int | None = None,
        stop_ids: Collection[int] = (),
        sampling: Sampling = GREEDY,
        logits: bool = False,
        on_progress: OnProgress | None = None,
    ) -> Iterator[Step]:
        """Yield steps one by one; a stop token ends the answer and is not yielded.

        Args:
            prompt: what is asked.
            max_new_tokens: longest answer; that of `sampling` when None.
            stop_ids: tokens that end it.
            sampling: how tokens are chosen.
            logits: give the whole vocabulary row of each step.
            on_progress: given the tokens prefilled so far, and all.
        """
        if max_new_tokens is not None:
            sampling = replace(sampling, max_new_tokens=max_new_tokens)
        how = dict(sampling=sampling, stop_ids=stop_ids, logits=logits, on_progress=on_progress)
        answer = self.begin(prompt, **how)  # type: ignore[arg-type]
        try:
            while True:
                if answer.steps[-1].token in answer.stop_ids:
                    return
                yield answer.steps[-1]
                if answer.is_done:
                    return
                self.advance([answer], logits=logits)
        finally:
            self.finish(answer)

    def generate(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int | None = None,
        stop_ids: Collection[int] = (),
        sampling: Sampling = GREEDY,
    ) -> list[int]:
        """An answer as token ids, without the stop token."""
        steps = self.stream(prompt, max_new_tokens=max_new_tokens, stop_ids=stop_ids, sampling=sampling)
        return [step.token for step in steps]

    def generate_batch(
        self, prompts: Sequence[Prompt], *, sampling: Sampling = GREEDY, stop_ids: Collection[int] = ()
    ) -> list[list[int]]:
        """Answers of several prompts: prefilled one after the other, then continued together."""
        answers = [self.begin(prompt, sampling=sampling, stop_ids=stop_ids) for prompt in prompts]
        while pending := [answer for answer in answers if not answer.is_done]:
            self.advance(pending)
        for answer in answers:
            self.finish(answer)
        return [answer.answer for answer in answers]

    def score(self, prompt: Prompt, tokens: Sequence[int]) -> list[ForcedToken]:
        """Probability of a given answer, token by token, in one prefill (teacher-forced).

        Args:
            prompt: what is asked.
            tokens: of the answer, at least one.

        Raises:
            ConfigError: the answer is empty.
        """
        if not tokens:
            raise ConfigError("the answer to be scored is empty; give at least one token")
        rope_length, asked = prompt.layout.next_position, prompt.layout.num_tokens
        cache, _ = self._cache_for(prompt, rope_length, len(tokens))
        wanted = np.arange(asked - 1, asked + len(tokens) - 1, dtype=np.int64)
        whole = prompt.with_tokens(list(tokens)[:-1])
        hidden = _result(self._prefill(whole, cache, rope_length=rope_length, wanted=wanted))
        values = None
        if hidden is not None:
            mine = self._held_rows(cache, wanted)
            values = torch.full(
                (len(tokens), 2), float("-inf"), dtype=torch.float64, device=self.runner.device
            )
            for start in range(0, len(mine), SCORE_ROWS):
                part = slice(start, start + SCORE_ROWS)
                targets = torch.tensor([tokens[index] for index in mine[part]], device=self.runner.device)
                values[mine[part]] = self._scores(hidden[part], targets)
        found = from_last_stage(values, shape=(len(tokens), 2), ranks=self.ranks).tolist()
        return [
            ForcedToken(token=token, logprob=logprob, argmax=int(argmax))
            for token, (argmax, logprob) in zip(tokens, found, strict=True)
        ]

    def _held_rows(self, cache: KVCache, wanted: Int64Array) -> list[int]:
        """Which of the wanted tokens this rank holds, as indices into `wanted`."""
        rank = self.plan.cp, self.ranks.cp_rank
        found = []
        for index, token in enumerate(wanted.tolist()):
            rows = (cache.rows_of(rank[1], token + 1), cache.rows_of(rank[1], token))
            if rows[0] > rows[1]:
                found.append(index)
        return found

    def _scores(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Most probable token and log-probability of the target of each row, float64 [n, 2]."""
        logits, first, group = self.runner.logits(hidden), self.runner.first_index, self.ranks.groups.tp
        best, _, total = best_of_vocabulary(logits, first_index=first, group=group)
        column = targets - first
        is_here = (column >= 0) & (column < logits.shape[1])
        own = logits.gather(1, column.clamp(0, logits.shape[1] - 1).unsqueeze(1)).squeeze(1).double()
        own = highest(own.masked_fill(~is_here, float("-inf")), group=group)
        return torch.stack([best.double(), own - total], dim=1)


def _result(steps: Generator[tuple[int, int], None, Tensor | None]) -> Tensor | None:
    """What a generator returns, its steps unseen."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value
