"""The server as a process: one message for a port that is taken, requests over HTTP, and an end by signal."""

import contextlib
import json
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import pytest

from megatron_v2pe.checkpoint.convert.import_hf import import_hf
from tests.support.prompts import FAMILY, GOLDEN

pytest.importorskip("starlette", reason="extra 'serve' is not installed")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    target = tmp_path_factory.mktemp("serve") / "tiny"
    import_hf(GOLDEN / FAMILY, target)
    return target


def command(checkpoint, *more):
    return [sys.executable, "-m", "megatron_v2pe", "serve", str(checkpoint), "--dtype", "float32", *more]


@contextlib.contextmanager
def running(*arguments):
    """A server process, and its address once it says it."""
    process = subprocess.Popen(command(*arguments), stderr=subprocess.PIPE, text=True)
    try:
        lines, address = [], None
        while address is None:
            line = process.stderr.readline()
            assert line, "".join(lines)
            lines.append(line)
            match = re.search(r"http://[\d.:]+", line)
            address = match.group() if match else None
        yield process, address
    finally:
        process.kill()
        process.wait()


def ask(address, **changes):
    body = {"model": "tiny", "messages": [{"role": "user", "content": "Talk"}], "max_tokens": 3, **changes}
    headers = {"content-type": "application/json"}
    request = urllib.request.Request(f"{address}/v1/chat/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.loads(answer.read())


def test_answers_and_drains_on_sigterm(checkpoint):
    with running(checkpoint, "--port", "0") as (process, address):
        assert ask(address)["usage"]["completion_tokens"] == 3
        import threading

        done = []
        thread = threading.Thread(target=lambda: done.append(ask(address, max_tokens=600)))
        thread.start()
        time.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        thread.join(timeout=60)
        assert done[0]["usage"]["completion_tokens"] == 600
        assert process.wait(timeout=30) == 0
        rest = process.stderr.read()
        assert "Traceback" not in rest
        assert "the server ends" in rest


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--host", "0.0.0.0"], "--api-key-file"),
        (["--api-key-file", "none"], "--api-key-file none"),
        (["--media-root", "none"], "--media-root"),
        (["--max-queue", "0"], "--max-queue is 0"),
        (["--port", "70000"], "--port is 70000"),
        (["--stride", "99"], "--stride is 99"),
    ],
)
def test_bad_options_are_one_message(checkpoint, capsys, more, message):
    from megatron_v2pe.cli.main import main

    port = [] if "--port" in more else ["--port", "0"]
    assert main(["serve", str(checkpoint), *port, *more]) == 2
    assert message in capsys.readouterr().err


def test_a_port_that_is_taken(checkpoint, capsys):
    from megatron_v2pe.cli.main import main

    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main(["serve", str(checkpoint), "--port", str(taken.getsockname()[1])]) == 2
    error = capsys.readouterr().err
    assert "choose another port" in error
    assert len(error.splitlines()) == 1
