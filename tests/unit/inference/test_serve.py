"""The server with the real `openai` client, and with requests that it has to refuse."""

import base64
import contextlib
import http.client
import json
import socket
import threading
import time

import numpy as np
import pytest
from PIL import Image

from megatron_v2pe.core.errors import ConfigError
from megatron_v2pe.inference import memory_check
from megatron_v2pe.inference.chat import Chat, ChatOptions
from megatron_v2pe.inference.prompts.messages import Message
from megatron_v2pe.inference.sampling import Sampling

pytest.importorskip("starlette", reason="extra 'serve' is not installed")
openai = pytest.importorskip("openai", reason="extra 'test' is not installed")

import uvicorn  # noqa: E402

from megatron_v2pe.inference.serve.app import Server  # noqa: E402
from megatron_v2pe.inference.serve.jobs import Inbox  # noqa: E402
from megatron_v2pe.inference.serve.metrics import Metrics  # noqa: E402
from megatron_v2pe.inference.serve.run import bind  # noqa: E402
from megatron_v2pe.inference.serve.wire import Limits, RequestError, parse_request  # noqa: E402
from megatron_v2pe.inference.serve.worker import Worker  # noqa: E402

KEY = "secret"


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    folder = tmp_path_factory.mktemp("media")
    pixels = np.random.default_rng(0).integers(0, 255, (112, 240, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "a.png")
    (folder / "broken.png").write_bytes((folder / "a.png").read_bytes()[:200])
    (folder.parent / "outside.png").write_bytes((folder / "a.png").read_bytes())
    return folder


@pytest.fixture(scope="module")
def chat(checkpoint):
    options = ChatOptions(dtype="float32", stride=4, keep_tokens=100_000, chunk_tokens=32)
    return Chat(checkpoint, options)


@contextlib.contextmanager
def serving(chat, *, max_waiting=8, max_running=4, **limits):
    """A server in threads of this process."""
    inbox, metrics = Inbox(max_waiting), Metrics()
    server = Server(inbox=inbox, metrics=metrics, limits=Limits(model="tiny", **limits), api_key=KEY)
    listener = bind("127.0.0.1", 0, api_key="")
    http = uvicorn.Server(uvicorn.Config(server.app(), log_level="warning", lifespan="off"))
    worker = Worker(chat, inbox=inbox, metrics=metrics, max_running=max_running)
    threads = [
        threading.Thread(target=http.run, kwargs={"sockets": [listener]}, daemon=True),
        threading.Thread(target=worker.run, daemon=True),
    ]
    for thread in threads:
        thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", inbox
    finally:
        inbox.drain()
        threads[1].join(timeout=30)
        http.should_exit = True
        threads[0].join(timeout=30)
    assert not any(thread.is_alive() for thread in threads)


@pytest.fixture(scope="module")
def address(chat, media):
    with serving(chat, media_root=str(media), max_new_tokens=5000) as (address, _):
        yield address


@pytest.fixture(scope="module")
def client(address):
    return openai.OpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=0)


def send(address, path, body=None, *, key=KEY):
    """Status and text of a plain HTTP request; json is sent as json, bytes as they are."""
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=30)
    content = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"authorization": f"Bearer {key}"}
    connection.request("GET" if body is None else "POST", path, content, headers)
    with contextlib.closing(connection), connection.getresponse() as answer:
        return answer.status, answer.read().decode()


def post(address, body):
    """Status and json of a completion."""
    status, text = send(address, "/v1/chat/completions", body)
    return status, json.loads(text)


def data_url(path):
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def question(text, *urls):
    images = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [{"role": "user", "content": [*images, {"type": "text", "text": text}]}]


def direct(chat, text, *images, **how):
    message = Message(role="human", text="<image>\n" * len(images) + text, images=tuple(map(str, images)))
    reply = chat.reply([message], Sampling(**how))
    return "".join(reply), reply


def test_an_answer_is_that_of_generate(client, chat, media):
    wanted, reply = direct(chat, "What is it?", media / "a.png", max_new_tokens=8)
    for url in (data_url(media / "a.png"), "a.png", f"file://{media / 'a.png'}"):
        found = client.chat.completions.create(
            model="tiny", messages=question("What is it?", url), max_tokens=8
        )
        assert found.choices[0].message.content == wanted
        assert found.choices[0].finish_reason == "length"
        assert found.usage.prompt_tokens == reply.prompt.layout.num_tokens
        assert found.usage.completion_tokens == 8
        assert found.usage.v2pe == {"visual_tokens": 48, "last_position": reply.last_position, "stride": 4}
    assert found.usage.prompt_tokens_details.cached_tokens == reply.prompt.layout.num_tokens - 1


def test_what_vlmevalkit_sends_with_our_configuration_is_answered(address, client, media, request):
    """Its class for such servers sends the options it does not know, such as the stride, in the body."""
    path = request.config.rootpath / "examples" / "vlmevalkit" / "config.json"
    (options,) = json.loads(path.read_text())["model"].values()
    own = (
        "class",
        "model",
        "api_base",
        "key",
        "temperature",
        "max_tokens",
        "img_size",
        "img_detail",
        "timeout",
    )
    more = {name: value for name, value in options.items() if name not in own}
    assert more == {"stride": 64}
    assert options["key"].startswith("sk-"), "it refuses other keys"
    assert options["api_base"].endswith("/v1/chat/completions")
    url = {"url": data_url(media / "a.png"), "detail": options["img_detail"]}
    parts = [{"type": "image_url", "image_url": url}, {"type": "text", "text": "What is it?"}]
    body = {
        "model": "tiny",
        "messages": [{"role": "user", "content": parts}],
        "max_tokens": options["max_tokens"],
        "n": 1,
        "temperature": options["temperature"],
        **more,
        "stride": 2,
    }
    status, found = post(address, body)
    assert status == 200
    assert found["usage"]["v2pe"]["stride"] == 2
    wanted = client.chat.completions.create(
        model="tiny", messages=question("What is it?", "a.png"), max_tokens=100, extra_body={"stride": 2}
    )
    assert found["choices"][0]["message"]["content"] == wanted.choices[0].message.content


def test_a_stream_joins_to_the_answer_and_counts(client, chat):
    wanted, _ = direct(chat, "Who are you?", max_new_tokens=9)
    events = list(
        client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": "Who are you?"}],
            max_completion_tokens=9,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert "".join(event.choices[0].delta.content for event in events if event.choices) == wanted
    assert events[0].choices[0].delta.role == "assistant"
    assert [event.choices[0].finish_reason for event in events if event.choices][-1] == "length"
    assert events[-1].usage.completion_tokens == 9


def test_stride_sampling_stop_and_system(client, chat, media):
    def ask(**how):
        return client.chat.completions.create(
            model="tiny",
            messages=question("What is it?", "a.png"),
            max_tokens=8,
            logprobs=True,
            top_logprobs=2,
            **how,
        ).choices[0]

    plain = ask()
    other = ask(extra_body={"stride": 16})
    assert plain.logprobs.content[0].logprob != other.logprobs.content[0].logprob
    assert len(plain.logprobs.content[0].top_logprobs) == 2
    assert plain.logprobs.content[0].top_logprobs[0].logprob == plain.logprobs.content[0].logprob
    text = plain.message.content
    stopped = ask(stop=[text[2:4]])
    assert stopped.message.content == text[: text.index(text[2:4])]
    assert stopped.finish_reason == "stop"
    drawn = [ask(temperature=2.0, seed=seed).message.content for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    messages = [{"role": "system", "content": "Be short."}, *question("What is it?", "a.png")]
    system = client.chat.completions.create(model="tiny", messages=messages, max_tokens=1)
    assert system.usage.prompt_tokens != 0


def test_several_answers_share_one_prefill(client, chat, media):
    """Answer i is that of seed + i alone; the prompt's tokens and tiles are counted once."""

    def ask(**how):
        return client.chat.completions.create(
            model="tiny",
            messages=question("What is it?", "a.png"),
            max_tokens=8,
            temperature=2.0,
            logprobs=True,
            **how,
        )

    alone = [ask(seed=seed).choices[0] for seed in (7, 8, 9)]
    texts = [choice.message.content for choice in alone]
    assert len(set(texts)) > 1
    chat.engine.documents.clear()
    together = ask(seed=7, n=3)
    assert [choice.index for choice in together.choices] == [0, 1, 2]
    assert [choice.message.content for choice in together.choices] == texts
    for found, wanted in zip(together.choices, alone, strict=True):
        assert found.finish_reason == wanted.finish_reason
        logprobs = [token.logprob for token in wanted.logprobs.content]
        assert [token.logprob for token in found.logprobs.content] == pytest.approx(logprobs, abs=1e-4)
    assert together.usage.prompt_tokens_details.cached_tokens == 0
    assert together.usage.completion_tokens == sum(len(choice.logprobs.content) for choice in alone)
    streamed, roles = {}, {}
    for event in ask(seed=7, n=3, stream=True):
        (choice,) = event.choices
        streamed[choice.index] = streamed.get(choice.index, "") + choice.delta.content
        roles.setdefault(choice.index, []).append(choice.delta.role)
    assert [streamed[index] for index in range(3)] == texts
    assert all(found[0] == "assistant" and set(found[1:]) <= {None} for found in roles.values())


def test_an_answer_that_ends_early_waits_for_the_others(client, chat):
    def ask(**how):
        messages = [{"role": "user", "content": "Talk"}]
        return client.chat.completions.create(
            model="tiny", messages=messages, max_tokens=12, temperature=2.0, seed=3, n=2, **how
        ).choices

    long, other = (choice.message.content for choice in ask())
    stop = next(character for character in long if character not in other)
    first, second = ask(stop=[stop])
    assert (first.finish_reason, first.message.content) == ("stop", long[: long.index(stop)])
    assert (second.finish_reason, second.message.content) == ("length", other)


def test_requests_at_the_same_time_get_their_own_answers(client, chat):
    texts = [f"Question {number}? " * (number * 3 + 1) for number in range(6)]
    wanted = [direct(chat, text.strip(), max_new_tokens=6)[0] for text in texts]
    found = [""] * len(texts)

    def ask(number):
        messages = [{"role": "user", "content": texts[number]}]
        answer = client.chat.completions.create(model="tiny", messages=messages, max_tokens=6)
        found[number] = answer.choices[0].message.content

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(texts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert found == wanted


@pytest.mark.parametrize(
    ("url", "code", "message"),
    [
        ("broken.png", "cannot_answer", "broken.png"),
        ("none.png", "file_not_found", "none.png"),
        ("../outside.png", "file_not_found", "outside.png"),
        ("/etc/passwd", "file_not_found", "passwd"),
        ("https://example.com/a.png", "unsupported_url", "not fetched"),
        ("data:image/png;base64,@@", "bad_request", "base64"),
        ("data:text/html;base64,aa==", "bad_request", "base64 of one of"),
    ],
)
def test_images_that_cannot_be_read_are_refused_and_others_live_on(client, url, code, message):
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model="tiny", messages=question("What?", url), max_tokens=2)
    assert refused.value.code == code
    assert message in str(refused.value)
    alive = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "Hello"}], max_tokens=2
    )
    assert alive.choices[0].finish_reason == "length"


def test_a_prompt_longer_than_memory_is_refused_and_others_live_on(client, chat, monkeypatch):
    def ask(text):
        messages = [{"role": "user", "content": text}]
        return client.chat.completions.create(model="tiny", messages=messages, max_tokens=2)

    chat.engine.documents.clear()
    monkeypatch.setattr(memory_check, "free_bytes", lambda _device: 200 * 512)  # a row takes 512 bytes
    with pytest.raises(openai.BadRequestError, match=r"add \d+ tokens.* 200 tokens would fit") as refused:
        ask("Hello " * 200)
    assert refused.value.code == "cannot_answer"
    assert ask("Hello").choices[0].finish_reason == "length"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"messages": []}, "at least one message"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "role is 'tool'"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "alternate"),
        ({"messages": [{"role": "user", "content": " "}]}, "the question is empty"),
        ({"max_tokens": 0}, "--max-new-tokens is 0"),
        ({"max_tokens": 6000}, "limit is 5000"),
        ({"stride": 99}, "stride is 99"),
        ({"stride": "4"}, "whole number"),
        ({"temperature": "hot"}, "temperature must be a number"),
        ({"top_p": 0, "temperature": 1}, "--top-p"),
        ({"n": 5}, "n is 5, but must lie in 1..4"),
        ({"n": 0}, "n is 0"),
        ({"n": "2"}, "n must be a whole number"),
        ({"tools": []}, "unknown fields tools"),
        ({"stream": 1}, "stream must be true or false"),
        ({"top_logprobs": 99, "logprobs": True}, "0..20"),
        ({"stop": [3]}, "stop must be"),
        ({"stop": 5}, "stop must be"),
        ({"stop": {"a": 1}}, "stop must be"),
        ({"stop": ["a"] * 65}, "at most 64 texts"),
        ({"seed": float("inf")}, "seed must be a whole number"),
        ({"top_k": float("nan"), "temperature": 1}, "top_k must be a whole number"),
        ({"temperature": 10**400}, "temperature must be a number"),
        ({"temperature": 1e-320}, "--temperature is 1e-320, but must be 0 (greedy)"),
        ({"repetition_penalty": 1e-320}, "--repetition-penalty is 1e-320, but must be positive"),
        ({"stream_options": "usage"}, "stream_options is 'usage'"),
        ({"stream_options": {"include": True}}, "must be an object with include_usage"),
        ({"messages": [{"role": [], "content": "x"}]}, "role is []"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [1]}]}, "has tool_calls"),
        ({"messages": [{"role": "user", "content": [{"type": []}]}]}, "part of type"),
        ({"messages": question("x", "//[")}, "is no address"),
        ({"messages": question("x", "a%00b")}, "is no file of this server's media folder"),
        ({"messages": question("x", "a" * 5000)}, "is no file of this server's media folder"),
        ({"messages": question("x", "\ud800")}, "is no file of this server's media folder"),
    ],
)
def test_bad_requests(address, changes, message):
    body = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2, **changes}
    status, found = post(address, body)
    assert status == 400
    assert message in found["error"]["message"]


def test_texts_that_no_tokenizer_encodes_end_their_request_only(address):
    """An escape of json spells half a character; it reaches the model's own thread, which must live on."""
    texts = {
        "half of a surrogate pair": [
            question("half \ud800"),
            [{"role": "system", "content": "\udfff"}, *question("x")],
        ],
        "which Unicode keeps out of texts": [question("<\ufdd0image>")],
    }
    for message, conversations in texts.items():
        for messages in conversations:
            status, found = post(address, {"model": "tiny", "messages": messages, "max_tokens": 2})
            assert (status, message in found["error"]["message"]) == (400, True), found
    assert post(address, {"model": "tiny", "messages": question("Hello"), "max_tokens": 1})[0] == 200


@pytest.mark.parametrize("text", ["see <image>", "<video> and \\\\<image>"])
def test_placeholders_in_texts_are_text(chat, text):
    """Images are parts of their own, so what a text spells is for the model to read."""
    body = {
        "model": "tiny",
        "messages": [
            {"role": "system", "content": f"About {text}"},
            {"role": "user", "content": text},
            {"role": "assistant", "content": text},
            {"role": "user", "content": [{"type": "text", "text": text}]},
        ],
    }
    request = parse_request(body, Limits(model="tiny"))
    prompt = chat.prompt(request.messages, system=request.system)
    assert prompt.layout.num_visual_tokens == 0
    shown = chat.tokenizer.decode(prompt.tokens.tolist())
    assert shown.count(text) == 4


def test_model_key_and_json(address, client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="other", messages=[{"role": "user", "content": "x"}])
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{address}/v1", api_key="wrong", max_retries=0).models.list()
    status, found = post(address, b"{")
    assert (status, found["error"]["code"]) == (400, "bad_json")


def test_health_and_metrics(address, client):
    client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "Hi"}], max_tokens=2)
    assert json.loads(send(address, "/health")[1]) == {"status": "ok"}
    text = send(address, "/metrics")[1]
    assert 'v2pe_requests_total{status="200"}' in text
    assert "v2pe_generated_tokens_total" in text
    assert "v2pe_first_token_seconds_bucket" in text


def metric(address, name):
    lines = send(address, "/metrics")[1].splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(f"{name} "))


def generated(address):
    return metric(address, "v2pe_generated_tokens_total")


def wait_for(address, name):
    """Until a metric is above 0."""
    end = time.monotonic() + 20
    while metric(address, name) == 0:
        assert time.monotonic() < end, name
        time.sleep(0.01)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_ends_its_answer(address, stream):
    body = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "Talk"}],
        "max_tokens": 5000,
        "stream": stream,
    }
    before = generated(address)
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=0.5)
    headers = {"authorization": f"Bearer {KEY}"}
    connection.request("POST", "/v1/chat/completions", json.dumps(body).encode(), headers)
    with contextlib.closing(connection), contextlib.suppress(TimeoutError):
        connection.getresponse().readline()
    stopped = last = generated(address)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:  # the server notices at its next token
        time.sleep(0.5)
        last, stopped = stopped, generated(address)
        if last == stopped:
            break
    assert last == stopped < before + 4000


def test_a_full_queue_refuses_and_draining_answers_what_is_there(chat):
    with serving(chat, max_waiting=1, max_running=1) as (address, inbox):
        client = openai.OpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=0)
        done = []

        def ask(length):
            messages = [{"role": "user", "content": "Talk"}]
            done.append(client.chat.completions.create(model="tiny", messages=messages, max_tokens=length))

        threads = [threading.Thread(target=ask, args=(600,)) for _ in range(2)]
        threads[0].start()
        wait_for(address, "v2pe_running_requests")
        threads[1].start()
        wait_for(address, "v2pe_waiting_requests")
        with pytest.raises(openai.RateLimitError) as refused:
            ask(2)
        assert refused.value.code == "queue_full"
        inbox.drain()
        assert send(address, "/health")[0] == 503
        with pytest.raises(openai.InternalServerError) as ended:
            ask(2)
        assert ended.value.code == "draining"
        for thread in threads:
            thread.join(timeout=60)
        assert [answer.usage.completion_tokens for answer in done] == [600, 600]


def test_an_address_that_is_taken_or_open():
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(ConfigError, match="cannot be bound"):
        bind("127.0.0.1", taken.getsockname()[1], api_key="")
    with pytest.raises(ConfigError, match="--api-key-file"):
        bind("0.0.0.0", 0, api_key="")
    bind("0.0.0.0", 0, api_key="x").close()


def test_a_body_that_is_too_large(chat):
    with serving(chat, max_body_bytes=1000) as (address, _):
        status, found = post(address, b"x" * 2000)
        assert (status, found["error"]["code"]) == (413, "too_large")


def test_requests_travel_to_other_ranks_unchanged():
    from megatron_v2pe.inference.serve.wire import ChatRequest

    body = {
        "model": "m",
        "messages": question("What?", "data:image/png;base64,aGk="),
        "stop": ["a", "b"],
        "temperature": 0.5,
        "top_k": 3,
        "stride": 2,
        "logprobs": True,
        "n": 3,
    }
    request = parse_request(body, Limits(model="m"))
    assert ChatRequest.from_json(json.loads(json.dumps(request.to_json()))) == request
    with pytest.raises(RequestError, match="reads no files"):
        parse_request({**body, "messages": question("What?", "a.png")}, Limits(model="m"))
