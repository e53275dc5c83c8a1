"""Text in, text out: stop texts, conversations, videos, the terminal, and the verbs."""

import json
import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megatron_v2pe.checkpoint.convert.import_hf import import_hf
from megatron_v2pe.checkpoint.files.folder import hf_path
from megatron_v2pe.cli.main import main
from megatron_v2pe.config.arch.architecture import read_architecture
from megatron_v2pe.config.schema import ParallelConfig, RunConfig, RuntimeConfig, VisionConfig
from megatron_v2pe.core.errors import ConfigError, DataError
from megatron_v2pe.inference import memory_check
from megatron_v2pe.inference.cache.memory import Stage
from megatron_v2pe.inference.chat import Chat, ChatOptions, with_reply
from megatron_v2pe.inference.prompts.messages import Message
from megatron_v2pe.inference.runner import ModelRunner
from megatron_v2pe.inference.sampling import Sampling
from megatron_v2pe.inference.terminal import Terminal
from megatron_v2pe.inference.text_stream import TextStream
from megatron_v2pe.parallel.plan import resolve
from megatron_v2pe.planning.answering import plan_prefill
from tests.support.hf_folders import edit_config, golden_copy
from tests.support.videos import write_frames

LONG = Sampling(max_new_tokens=12)


@pytest.fixture(scope="module")
def chat(checkpoint):
    return Chat(checkpoint, ChatOptions(dtype="float32", keep_tokens=100_000, chunk_tokens=64))


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (112, 240, 3), dtype=np.uint8)).save(path)
    return str(path)


def asked(text, *images, videos=()):
    return Message(role="human", text=text, images=images, videos=tuple(videos))


def test_pieces_join_to_the_answer(chat, image):
    reply = chat.reply([asked("What is it?", image)], LONG)
    pieces = list(reply)
    assert (
        "".join(pieces) == reply.text == chat.tokenizer.decode(reply.answer.answer, skip_special_tokens=True)
    )
    assert reply.finish_reason == "length"
    assert reply.prompt.layout.num_tiles.tolist() == [3]
    assert "48 visual" in reply.summary
    assert f"positions 0..{reply.last_position}" in reply.summary


def test_a_stop_text_ends_the_answer_before_it(chat, image):
    whole = "".join(chat.answer("What is it?", [image], sampling=LONG))
    for stop in (whole[3:5], whole[-2:], whole[0]):
        reply = chat.reply([asked("What is it?", image)], Sampling(max_new_tokens=12, stop=("never", stop)))
        assert "".join(reply) == whole[: whole.index(stop)]
        assert reply.finish_reason == "stop"
    never = chat.reply([asked("What is it?", image)], Sampling(max_new_tokens=12, stop=("never met",)))
    assert "".join(never) == whole
    assert never.finish_reason == "length"


def test_a_stop_text_over_several_pieces_is_held_back():
    class Letters:
        def decode(self, tokens, *, skip_special_tokens):
            return "".join(tokens)

    stream = TextStream(Letters(), stop=["END", "xyz"])
    text, given = "helxy ENDless", []
    for length in range(1, len(text) + 1):
        given.append(stream.feed(text[:length]))
    assert "".join(given) == "helxy "
    assert stream.is_stopped
    plain = TextStream(Letters(), stop=["END"])
    assert plain.feed("abcEN") + plain.finish("abcEN") == "abcEN"
    half = TextStream(Letters())
    assert [half.feed("a\ufffd"), half.feed("a\u00e9"), half.finish("a\u00e9")] == ["", "a\u00e9", ""]


def test_long_answers_are_decoded_a_few_tokens_at_a_time(chat):
    tokens = np.random.default_rng(3).integers(3, 500, size=700).tolist()
    decoded = []

    class Counting:
        def decode(self, some, **how):
            decoded.append(len(some))
            return chat.tokenizer.decode(some, **how)

    stream = TextStream(Counting())
    text = "".join(stream.feed(tokens[:length]) for length in range(1, 701)) + stream.finish(tokens)
    assert text == chat.tokenizer.decode(tokens, skip_special_tokens=True)
    assert max(decoded) <= 4 * 64


def test_a_further_question_about_the_same_images(chat, image):
    chat.engine.documents.clear()
    first = chat.reply([asked("What is it?", image)], LONG)
    list(first)
    messages = [*with_reply([asked("What is it?", image)], first), asked("And then?")]
    further = chat.reply(messages, LONG)
    text = "".join(further)
    assert further.answer.reused_tokens >= first.prompt.layout.num_tokens - 1
    chat.engine.documents.clear()
    fresh = chat.reply(messages, LONG)
    assert "".join(fresh) == text
    assert fresh.answer.reused_tokens == 0


def test_images_and_videos_stand_where_their_placeholders_are(chat, image, tmp_path):
    write_frames(tmp_path / "film", 8)
    video = str(tmp_path / "film")
    prompt = chat.prompt([asked("see <video> then <image> what?", image, videos=[video])])
    assert prompt.layout.num_tiles.tolist() == [1] * 8 + [3]
    text = chat.tokenizer.decode([t for t in prompt.tokens.tolist() if t != chat.tokenizer.image_token_id])
    assert text.index("Frame1") < text.index("Frame8") < text.index("then") < text.index("what")
    first = chat.prompt([asked("what?", image, videos=[video])])
    assert first.layout.num_tiles.tolist() == [3] + [1] * 8


@pytest.mark.parametrize(
    ("message", "error", "text"),
    [
        (asked("  "), ConfigError, "the question is empty"),
        (asked("<image> <image>", "a.png"), ConfigError, "2 <image> for 1 images"),
        (asked("what?", "none.png"), DataError, r"none\.png"),
        (asked("what?", videos=["none.mp4"]), DataError, r"none\.mp4"),
    ],
)
def test_bad_questions(chat, message, error, text):
    with pytest.raises(error, match=text):
        chat.prompt([message])


def test_the_terminal(chat, image, tmp_path):
    lines = [
        f"/image {image}", "What is it?", "And then?", "/stride 99", "/save", "/nothing", "/image none.png", "What?",
        f"/save {tmp_path / 's'}", "/new", "Who?", f"/load {tmp_path / 's'}", "So?", "/help", "/quit", "never",
    ]  # fmt: skip
    chat.engine.documents.clear()
    written, said = [], []
    rest = iter(lines)
    terminal = Terminal(
        chat, Sampling(max_new_tokens=3), read=lambda: next(rest, None), write=written.append, say=said.append
    )
    terminal.run()
    assert next(rest) == "never"
    assert "".join(written).count("\n") == 4
    assert said[0].startswith("stride 16 of 16")
    assert "(48 visual, 0 known already)" in said[1]
    assert ", 0 known already" not in said[2]
    assert "--stride is 99" in said[3]
    assert "/save needs an argument" in said[4]
    assert "/nothing is no command" in said[5]
    assert "none.png" in said[6]
    assert said[-1].startswith("/image FILE")
    assert [message.role for message in terminal.messages] == ["human", "gpt"] * 3


def test_the_terminal_with_a_video_at_another_stride(checkpoint, tmp_path):
    """Positions follow the stride; `own` is the checkpoint's again."""
    write_frames(tmp_path / "film", 4)
    film = str(tmp_path / "film")
    chat = Chat(checkpoint, ChatOptions(dtype="float32", stride=4, chunk_tokens=64))
    lines = iter(
        [f"/video {film}", "What is it?", "/new", "/stride 8", f"/video {film}", "What is it?", "/stride x"]
    )
    written, said = [], []
    read = partial(next, lines, None)
    Terminal(chat, Sampling(max_new_tokens=2), read=read, write=written.append, say=said.append).run()
    last = [int(re.search(r"positions 0\.\.(\d+)", line).group(1)) for line in (said[1], said[3])]
    assert all("(64 visual" in line for line in (said[1], said[3]))  # four frames of one tile of 16 tokens
    assert last[1] - last[0] == 64 * (8 - 4) // 16
    assert said[2].startswith("stride 8 of 16")
    assert "give a number" in said[4]


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--max-new-tokens", "0"], "--max-new-tokens is 0"),
        (["--stride", "17"], "--stride is 17"),
        (["--image", "none.png"], "none.png"),
        (["--image", "cut.png"], "cut.png"),
        (["--chunk-tokens", "0"], "--chunk-tokens is 0"),
        (["--session", "nowhere"], "nowhere"),
        (["--max-tokens", "3"], "more than the limit of 3"),
        (["--score", ""], "empty"),
    ],
)
def test_generate_refuses_with_one_message(checkpoint, image, tmp_path, capsys, monkeypatch, extra, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cut.png").write_bytes(Path(image).read_bytes()[:300])  # its header is whole
    assert main(["generate", str(checkpoint), "What?", "--dtype", "float32", *extra]) == 2
    out, said = capsys.readouterr()
    assert message in said
    assert out == ""


def test_an_empty_question_is_refused(checkpoint, capsys):
    assert main(["generate", str(checkpoint), " ", "--dtype", "float32"]) == 2
    assert "the question is empty" in capsys.readouterr().err


def test_a_prompt_longer_than_memory_is_one_message_with_the_planners_figure(
    checkpoint, image, capsys, monkeypatch
):
    """Before anything is computed, at the command line."""
    ask = ["generate", str(checkpoint), "What is it?", "--image", image, "--dtype", "float32"]
    monkeypatch.setattr(memory_check, "free_bytes", lambda _device: 100_000)
    monkeypatch.setattr(ModelRunner, "run", lambda *_args: pytest.fail("a chunk was computed"))
    assert main(ask) == 2
    said = capsys.readouterr().err
    arch = read_architecture(hf_path(checkpoint))
    stage = Stage(
        config=RunConfig(runtime=RuntimeConfig(dtype="float32"), vision=VisionConfig(micro_batch_tiles=16)),
        arch=arch,
        plan=resolve(ParallelConfig(), 1),
        num_layers=arch.language.num_layers,
        is_first=True,
        is_last=True,
        on_cpu=True,
    )
    tokens = int(re.search(r"add (\d+) tokens", said).group(1)) - 256
    part, chunk = plan_prefill(stage)(tokens, 3)
    assert f"({part}) {chunk / 2**30:.2f} GiB" in said
    room = int((100_000 - chunk) / (2 * 2 * 2 * 16 * 4)) if chunk < 100_000 else 0
    assert f"; {room} tokens would fit" in said


def test_generate_saves_continues_scores_and_searches(checkpoint, image, tmp_path, capsys):
    ask = ["generate", str(checkpoint), "--dtype", "float32", "--max-new-tokens", "4"]
    folder = str(tmp_path / "s")
    assert main([*ask, "What is it?", "--image", image, "--save-session", folder]) == 0
    answer, said = capsys.readouterr()
    assert "stride 16 of 16" in said
    assert main([*ask, "And then?", "--session", folder]) == 0
    assert "0 known already" not in capsys.readouterr().err
    assert main([*ask, "What is it?", "--image", image, "--score", answer.strip() or "a"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert all(row["logprob"] <= 0 for row in rows)
    assert main([*ask, "What is it?", "--image", image, "--num-beams", "3", "--num-answers", "2"]) == 0
    out, said = capsys.readouterr()
    assert len(out.splitlines()) == 2
    assert said.count("score -") == 2


def test_the_stride_is_the_checkpoints(tmp_path, capsys):
    folder = golden_copy(tmp_path / "hf")
    edit_config(folder, rope_pos_id_version="v2pe_fix", rope_pos_id_stride=4)
    import_hf(folder, tmp_path / "fixed")
    edit_config(folder, rope_pos_id_version="v2pe_rnd", rope_pos_id_stride=None)
    import_hf(folder, tmp_path / "random")
    ask = ["What?", "--dtype", "float32", "--max-new-tokens", "2"]
    assert main(["generate", str(tmp_path / "fixed"), *ask]) == 0
    assert "stride 4 of 16, which this checkpoint was trained with" in capsys.readouterr().err
    assert main(["generate", str(tmp_path / "random"), *ask]) == 2
    assert "name one with --stride" in capsys.readouterr().err


def test_a_checkpoint_without_tokenizer(tmp_path, checkpoint, capsys):
    import shutil

    shutil.copytree(checkpoint, tmp_path / "c")
    (tmp_path / "c" / "hf" / "tokenizer.model").unlink()
    assert main(["generate", str(tmp_path / "c"), "What?"]) == 2
    assert "tokenizer.model" in capsys.readouterr().err


def test_the_chat_verb(checkpoint, image, capsys, monkeypatch):
    import io

    monkeypatch.setattr("sys.stdin", io.StringIO(f"/image {image}\nWhat is it?\nAnd then?\n"))
    assert (
        main(["chat", str(checkpoint), "--dtype", "float32", "--max-new-tokens", "3", "--chunk-tokens", "64"])
        == 0
    )
    answers, said = capsys.readouterr()
    assert answers.count("\n") == 2
    assert "stride 16 of 16" in said
    assert ", 0 known already" in said
    assert main(["chat", str(checkpoint), "--keep-tokens", "-1"]) == 2
    assert "--keep-tokens is -1" in capsys.readouterr().err
