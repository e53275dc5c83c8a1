"""Beam search: the most probable answers as a whole, as the release's scripts ask for them (`num_beams`).

The rules are those of Hugging Face's beam search with `early_stopping` off. Candidates of a beam are the 2*B most
probable tokens; a stop token among the best B of all candidates ends an answer, which is then compared by
log-probability / tokens ** length_penalty. The search ends when no open beam can become better than the worst of B
ended answers. Beams share the keys and values of the prompt; each has its own of the answer.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

from megatron_v2pe.inference.engine import Answer, Engine
from megatron_v2pe.inference.prompts.prompt import Prompt
from megatron_v2pe.inference.sampling import Sampling

Candidate = tuple[float, int, int]  # log-probability of the answer, number of its beam, token


@dataclass(frozen=True, kw_only=True)
class Beam:
    """An answer that ended.

    Attributes:
        tokens: without the stop token.
        logprob: sum over its tokens, the stop token included.
        score: what beams are compared by.
    """

    tokens: tuple[int, ...]
    logprob: float
    score: float


@dataclass(frozen=True, eq=False)
class _Open:
    answer: Answer
    logprob: float


def search(engine: Engine, prompt: Prompt, *, sampling: Sampling, stop_ids: Collection[int]) -> list[Beam]:
    """The `num_answers` best answers, the best first; every rank of the replica calls it alike.

    Args:
        engine: the model.
        prompt: what is asked.
        sampling: number of beams and answers, longest and shortest answer, penalties.
        stop_ids: tokens that end an answer.
    """
    width = sampling.num_beams
    root = engine.begin(prompt, sampling=sampling, stop_ids=stop_ids, num_top=2 * width)
    beams, ended = [_Open(root, 0.0)], list[Beam]()
    is_done, length = False, 0
    while not is_done and length < sampling.max_new_tokens:
        length += 1
        candidates = _candidates(beams)
        beams = _grown(beams, candidates, ended, sampling=sampling, length=length, stop_ids=stop_ids)
        ended.sort(key=lambda beam: -beam.score)
        del ended[width:]
        attainable = candidates[0][0] / length**sampling.length_penalty
        is_done = len(ended) == width and ended[-1].score >= attainable
        if not is_done and length < sampling.max_new_tokens:
            engine.advance([beam.answer for beam in beams])
    if not is_done:
        ended += [_ended(beam.answer.tokens, beam.logprob, length, sampling) for beam in beams]
    ended.sort(key=lambda beam: -beam.score)
    return ended[: sampling.num_answers]


def _ended(tokens: list[int], logprob: float, length: int, sampling: Sampling) -> Beam:
    score = logprob / length**sampling.length_penalty
    return Beam(tokens=tuple(tokens), logprob=logprob, score=score)


def _candidates(beams: list[_Open]) -> list[Candidate]:
    """Every beam with each of its most probable tokens, the best first."""
    found = [
        (beam.logprob + logprob, number, token)
        for number, beam in enumerate(beams)
        for token, logprob in beam.answer.steps[-1].top
    ]
    return sorted(found, key=lambda candidate: -candidate[0])


def _grown(
    beams: list[_Open],
    candidates: list[Candidate],
    ended: list[Beam],
    *,
    sampling: Sampling,
    length: int,
    stop_ids: Collection[int],
) -> list[_Open]:
    """The beams with one more token each; answers that end are added to `ended`."""
    width = sampling.num_beams
    chosen: list[Candidate] = []
    for place, (logprob, number, token) in enumerate(candidates[: 2 * width]):
        if token in stop_ids:
            if place < width:
                tokens = beams[number].answer.tokens[:-1]
                ended.append(_ended(tokens, logprob, length, sampling))
            continue
        chosen.append((logprob, number, token))
        if len(chosen) == width:
            break
    return _continued(beams, chosen, room=sampling.max_new_tokens)


def _continued(beams: list[_Open], chosen: list[Candidate], *, room: int) -> list[_Open]:
    """Each chosen token on its beam. The first continues the beam's own cache, the others a copy of it."""
    used: set[int] = set()
    found = []
    for logprob, number, token in chosen:
        parent = beams[number].answer
        cache = parent.cache
        if number in used:
            shared = parent.prompt.layout.num_tokens
            cache = cache.branch(shared, room - (cache.num_tokens - shared))
        used.add(number)
        steps = [*parent.steps[:-1], replace(parent.steps[-1], token=token)]
        found.append(_Open(replace(parent, cache=cache, steps=steps), logprob))
    return found
