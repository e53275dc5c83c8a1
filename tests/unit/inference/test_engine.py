"""Further questions, given answers, batches and beams: each equals what one plain prefill gives, in float64."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_v2pe.core.env import Launcher
from megatron_v2pe.core.errors import ConfigError, DataError
from megatron_v2pe.inference import engine as engine_module
from megatron_v2pe.inference import memory_check
from megatron_v2pe.inference.beams import search
from megatron_v2pe.inference.sampling import Sampling
from tests.support.prompts import random_prompt

TOLERANCE = 1e-10  # float64; sums in another order
DOCUMENT = [10, ("image", 3), 20, ("image", 2), 15]


def prompt_of(engine, pieces=DOCUMENT, **how):
    return random_prompt(engine.arch, pieces, **how)


def plain_logits(engine, prompt, tokens):
    """Logits after the prompt and each of some tokens, every time by a prefill from nothing."""
    found = []
    for length in range(len(tokens) + 1):
        answer = engine.begin(prompt.with_tokens(tokens[:length]), logits=True)
        found.append(answer.steps[0].logits)
    return torch.stack(found)


def test_a_further_question_computes_its_own_tokens_only(engine):
    engine.documents.max_tokens = 10_000
    first = prompt_of(engine)
    answer = engine.begin(first, sampling=Sampling(max_new_tokens=3))
    while not answer.is_done:
        engine.advance([answer])
    engine.finish(answer)
    further = first.with_tokens([*answer.tokens, 33, 44, 55])
    opened = further.tiles.opened
    again = engine.begin(further, logits=True)
    assert again.reused_tokens == first.layout.num_tokens + 2  # the last token chosen was never fed
    assert further.tiles.opened == opened
    engine.documents.clear()
    wanted = engine.begin(further, logits=True)
    assert wanted.reused_tokens == 0
    assert float((again.steps[0].logits - wanted.steps[0].logits).abs().max()) < TOLERANCE


@pytest.mark.parametrize("cut", [1, 10, 13, 60, 100])
def test_another_question_about_the_same_document(engine, cut):
    """The two prompts differ from token `cut` on: in text, or inside an image, which then counts as shared."""
    engine.documents.max_tokens = 10_000
    first = prompt_of(engine)
    engine.finish(engine.begin(first))
    tokens = first.tokens.copy()
    is_text = tokens != 0
    tokens[cut:][is_text[cut:]] += 1
    other = replace(first, tokens=tokens)
    found = engine.begin(other, logits=True)
    different = np.flatnonzero(other.tokens != first.tokens)
    assert found.reused_tokens == different[0]
    engine.documents.clear()
    wanted = engine.begin(other, logits=True)
    assert float((found.steps[0].logits - wanted.steps[0].logits).abs().max()) < TOLERANCE


def test_other_pixels_or_strides_are_not_shared(engine):
    engine.documents.max_tokens = 10_000
    first = prompt_of(engine, image_seed=1)
    engine.finish(engine.begin(first))
    others = {
        "pixels": prompt_of(engine, image_seed=2),
        "stride": replace(first, layout=first.layout.with_strides([1, 2])),
    }
    starts = first.layout.image_starts.tolist()
    assert engine.begin(others["pixels"]).reused_tokens == starts[0]
    assert engine.begin(others["stride"]).reused_tokens == starts[1]


def test_the_oldest_document_is_forgotten(engine):
    engine.documents.max_tokens = 250
    prompts = [prompt_of(engine, [100], seed=seed) for seed in range(3)]
    for prompt in prompts:
        engine.finish(engine.begin(prompt, sampling=Sampling(max_new_tokens=1)))
    assert engine.documents.num_documents == 2
    reused = [engine.begin(prompt, sampling=Sampling(max_new_tokens=1)).reused_tokens for prompt in prompts]
    assert reused[0] == 0
    assert reused[2] == 99


def test_a_given_answer_is_scored_as_it_would_be_generated(engine):
    prompt = prompt_of(engine)
    steps = list(engine.stream(prompt, max_new_tokens=5))
    tokens = [step.token for step in steps]
    forced = engine.score(prompt, tokens)
    assert [token.argmax for token in forced] == tokens
    assert [token.logprob for token in forced] == pytest.approx([step.logprob for step in steps], abs=1e-9)
    other = [tokens[0], 7, 8]
    logits = plain_logits(engine, prompt, other)[:-1].double().log_softmax(-1)
    wanted = [float(row[token]) for row, token in zip(logits, other, strict=True)]
    assert [token.logprob for token in engine.score(prompt, other)] == pytest.approx(wanted, abs=1e-5)
    with pytest.raises(ConfigError, match="empty"):
        engine.score(prompt, [])


def test_a_batch_gives_the_answers_of_each_prompt_alone(engine):
    prompts = [prompt_of(engine, [n, ("image", 1), 3], seed=n) for n in (4, 40, 90)]
    alone = [engine.generate(prompt, max_new_tokens=6) for prompt in prompts]
    assert engine.generate_batch(prompts, sampling=Sampling(max_new_tokens=6)) == alone
    stop = alone[1][2]
    together = engine.generate_batch(prompts, sampling=Sampling(max_new_tokens=6), stop_ids=[stop])
    assert together == [tokens[: tokens.index(stop)] if stop in tokens else tokens for tokens in alone]


def test_several_answers_of_one_prompt_are_those_of_each_alone(engine):
    prompt = prompt_of(engine, [40, ("image", 2), 9])
    samplings = [
        Sampling(max_new_tokens=length, temperature=1.5, seed=seed)
        for length, seed in ((6, 1), (3, 2), (5, 3))
    ]
    alone = [list(engine.stream(prompt, sampling=sampling)) for sampling in samplings]
    assert len({tuple(step.token for step in steps[:3]) for steps in alone}) == 3
    opened = prompt.tiles.opened
    steps = engine.begin_stepwise(prompt, samplings=samplings)
    answers = None
    while answers is None:
        try:
            next(steps)
        except StopIteration as end:
            answers = end.value
    assert prompt.tiles.opened == opened + 2  # once for all three
    while pending := [answer for answer in answers if not answer.is_done]:
        engine.advance(pending)
    for answer, wanted in zip(answers, alone, strict=True):
        assert answer.answer == [step.token for step in wanted]
        # Every token of the prompt is attended to: a missing one would change probabilities, not always the draw.
        logprobs = [step.logprob for step in wanted]
        assert [step.logprob for step in answer.steps] == pytest.approx(logprobs, abs=TOLERANCE)
    blocks = {id(block) for answer in answers for block, _ in answer.cache.blocks}
    assert len(blocks) == 3  # the prompt's with room for the first answer, and one for each other answer


def slow_beams(engine, prompt, *, width, length, stop):
    """The rules of Hugging Face's search, every candidate by a prefill from nothing."""
    beams, ended = [((), 0.0)], []
    for step in range(1, length + 1):
        candidates = []
        for tokens, total in beams:
            logits = engine.begin(prompt.with_tokens(tokens), logits=True).steps[0].logits.double()
            values, indices = logits.log_softmax(-1).topk(2 * width)
            candidates += [
                ((*tokens, int(t)), total + float(v)) for t, v in zip(indices, values, strict=True)
            ]
        candidates.sort(key=lambda candidate: -candidate[1])
        beams = []
        for place, (tokens, total) in enumerate(candidates[: 2 * width]):
            if tokens[-1] == stop:
                ended += [(tokens[:-1], total / step)] if place < width else []
            elif len(beams) < width:
                beams.append((tokens, total))
        ended = sorted(ended, key=lambda found: -found[1])[:width]
        if len(ended) == width and ended[-1][1] >= candidates[0][1] / step:
            return ended
    return sorted(ended + [(tokens, total / length) for tokens, total in beams], key=lambda found: -found[1])


@pytest.mark.parametrize("place", [1, 3, None])
def test_beams_follow_the_rules(engine, place):
    prompt = prompt_of(engine, [9, ("image", 1), 4])
    greedy = engine.generate(prompt, max_new_tokens=4)
    stop = -1 if place is None else greedy[place]
    wanted = slow_beams(engine, prompt, width=3, length=4, stop=stop)
    sampling = Sampling(max_new_tokens=4, num_beams=3, num_answers=3)
    found = search(engine, prompt, sampling=sampling, stop_ids=[stop])
    assert [beam.tokens for beam in found] == [tokens for tokens, _ in wanted[:3]]
    assert [beam.score for beam in found] == pytest.approx([score for _, score in wanted[:3]], abs=1e-6)


def test_most_probable_tokens_are_reported_with_each_step(engine):
    answer = engine.begin(prompt_of(engine), num_top=4, logits=True)
    values, indices = answer.steps[0].logits.double().log_softmax(-1).topk(4)
    assert [token for token, _ in answer.steps[0].top] == indices.tolist()
    assert [logprob for _, logprob in answer.steps[0].top] == pytest.approx(values.tolist(), abs=1e-5)
    assert answer.steps[0].logprob == answer.steps[0].top[0][1]


@pytest.mark.parametrize(("kind", "largest"), [("int8", 0.02), ("fp8", 0.06)])
def test_eight_bit_keys_and_values_change_little_and_say_how_much(engine, kind, largest):
    prompt = prompt_of(engine)
    exact = engine.begin(prompt, logits=True)
    engine.kv = kind
    coarse = engine.begin(prompt, logits=True)
    assert exact.cache.relative_error == 0
    assert 0.001 < coarse.cache.relative_error < largest
    error = (coarse.steps[0].logits - exact.steps[0].logits).abs().max()
    assert 1e-6 < float(error) < largest * float(exact.steps[0].logits.abs().max())
    assert coarse.cache.num_bytes < exact.cache.num_bytes / 6  # 16 channels of 8 bytes against 16 + 2


def test_a_whole_vocabulary_row_is_gathered_for_draws_and_logits_only(engine, monkeypatch):
    prompt = prompt_of(engine)

    def gathered(*_args, **_kwargs):
        raise AssertionError("a vocabulary row was sent")

    monkeypatch.setattr(engine_module, "whole_vocabulary", gathered)
    answer = engine.begin(prompt, sampling=Sampling(max_new_tokens=3, repetition_penalty=1.2), num_top=5)
    while not answer.is_done:
        engine.advance([answer])
    engine.score(prompt, answer.tokens)
    for how in ({"logits": True}, {"sampling": Sampling(temperature=1.0)}):
        with pytest.raises(AssertionError, match="row was sent"):
            engine.begin(prompt, **how)


class Broken:
    """Tiles whose second cannot be read."""

    def __init__(self, tiles):
        self._tiles, self.tile_size, self.opened = tiles, tiles.tile_size, 0

    def load(self, first, last):
        if first <= 1 < last:
            raise DataError("b.png: cannot be read as an image; repair it")
        return self._tiles.load(first, last)


def test_an_image_that_cannot_be_read_is_an_error_and_the_engine_lives_on(engine):
    prompt = prompt_of(engine)
    wanted = engine.generate(prompt, max_new_tokens=2)
    with pytest.raises(DataError, match=r"b\.png"):
        engine.begin(replace(prompt, tiles=Broken(prompt.tiles)))
    assert engine.generate(prompt, max_new_tokens=2) == wanted


def test_a_prompt_longer_than_memory_is_refused_before_prefill(engine, monkeypatch):
    prompt = prompt_of(engine, [100])
    row = 2 * 2 * 2 * 16 * 8  # keys and values, layers, heads, channels, bytes
    monkeypatch.setattr(memory_check, "free_bytes", lambda _device: 60 * row)
    with pytest.raises(ConfigError, match=r"101 tokens.* 60 tokens would fit.*--cp"):
        engine.begin(prompt, sampling=Sampling(max_new_tokens=1))
    assert prompt.tiles.opened == 0


def test_what_a_prefill_chunk_takes_is_counted_too(engine, monkeypatch):
    """300 tokens would fit beside the weights, but not beside a chunk that takes the room of 200; 99 fit."""
    prompt = prompt_of(engine, [60, ("image", 3), 20])  # 128 tokens, in chunks of 32: most with two tiles
    row = 2 * 2 * 2 * 16 * 8
    asked = []

    def prefill_bytes(tokens, tiles):
        asked.append((tokens, tiles))
        return "vision tower", 201 * row

    monkeypatch.setattr(memory_check, "free_bytes", lambda _device: 300 * row)
    monkeypatch.setattr(engine, "prefill_bytes", prefill_bytes)
    with pytest.raises(
        ConfigError, match=r"weights \(.*\(vision tower\).* 99 tokens would fit.*--chunk-tokens"
    ):
        engine.begin(prompt, sampling=Sampling(max_new_tokens=1))
    assert asked == [(32, 2)]
    monkeypatch.setattr(engine, "prefill_bytes", lambda _tokens, _tiles: ("vision tower", 171 * row))
    assert len(engine.generate(prompt, max_new_tokens=1)) == 1  # 129 tokens, to the row
    monkeypatch.setattr(memory_check, "launcher", lambda: Launcher(world_size=2, local_size=2))
    with pytest.raises(ConfigError, match="0 tokens would fit"):  # two ranks share the host's memory
        engine.begin(prompt, sampling=Sampling(max_new_tokens=1))


def test_an_empty_prompt_is_refused(engine):
    with pytest.raises(ConfigError, match="empty"):
        engine.begin(prompt_of(engine, []))


def test_steps_count_positions_from_the_prompt(engine):
    prompt = prompt_of(engine, [5, ("image", 2), 2])  # 5 + 2 * 1 + 2 whole positions at stride 1
    positions = [step.position for step in itertools.islice(engine.stream(prompt, max_new_tokens=3), 3)]
    assert positions == [8, 9, 10]
