"""A conversation in a terminal: lines in, answers streamed out.

    question                ask; what was computed of the conversation so far is used again
    /image FILE  /video FILE    attach to the next question
    /stride N | own         position units of a visual token from now on
    /new                    forget the conversation
    /save DIR  /load DIR    keep the document on disk, or continue one that was kept
    /help  /quit

Rank 0 reads and writes; the others are given each line and compute along.
"""

from __future__ import annotations

import json
from collections.abc import Callable

from megatron_v2pe.core.errors import ConfigError, V2PEError
from megatron_v2pe.inference.chat import Chat, with_reply
from megatron_v2pe.inference.prompts.messages import Message
from megatron_v2pe.inference.sampling import Sampling
from megatron_v2pe.inference.session import load_session, save_session
from megatron_v2pe.parallel.replica import from_leader

HELP = """/image FILE, /video FILE   attach to the next question
/stride N, /stride own     position units of a visual token from now on
/new                       forget the conversation
/save DIR, /load DIR       keep the document on disk, or continue one that was kept
/quit                      end; so does the end of the input"""


class Terminal:
    """The conversation.

    Args:
        chat: the model; it should keep documents (`keep_tokens`).
        sampling: how answers are made.
        read: gives the next line without its end, None at the end of the input; called on rank 0 only.
        write: text of answers, as it comes; called on rank 0 only.
        say: a line beside the conversation; called on rank 0 only.
    """

    def __init__(
        self,
        chat: Chat,
        sampling: Sampling,
        *,
        read: Callable[[], str | None],
        write: Callable[[str], None],
        say: Callable[[str], None],
    ) -> None:
        self.chat, self.sampling = chat, sampling
        self._read, self._write_text, self._say_line = read, write, say
        self.messages: list[Message] = []
        self._images: list[str] = []
        self._videos: list[str] = []
        self._commands: dict[str, Callable[[str], None]] = {
            "/image": self._images.append,
            "/video": self._videos.append,
            "/stride": self._set_stride,
            "/save": self._save,
            "/load": self._load,
        }

    @property
    def _is_leader(self) -> bool:
        return self.chat.engine.ranks.rank == 0

    def _write(self, text: str) -> None:
        if self._is_leader:
            self._write_text(text)

    def _say(self, line: str) -> None:
        if self._is_leader:
            self._say_line(line)

    def _next_line(self) -> str | None:
        line = self._read() if self._is_leader else None
        content = from_leader(json.dumps(line).encode(), ranks=self.chat.engine.ranks)
        return json.loads(content)

    def run(self) -> None:
        """Talk until the input ends. A mistake is reported and the conversation continues."""
        self._say(self.chat.stride.reason)
        while (line := self._next_line()) is not None:
            line = line.strip()
            if line == "/quit":
                return
            if not line:
                continue
            try:
                self._handle(line)
            except V2PEError as error:
                self._say(str(error))

    def _handle(self, line: str) -> None:
        if not line.startswith("/"):
            self._ask(line)
            return
        name, _, argument = line.partition(" ")
        argument = argument.strip()
        if name == "/help":
            self._say(HELP)
        elif name == "/new":
            self.messages.clear()
            self._images.clear()
            self._videos.clear()
        elif name in self._commands:
            if not argument:
                raise ConfigError(f"{name} needs an argument\n{HELP}")
            self._commands[name](argument)
        else:
            raise ConfigError(f"{name} is no command\n{HELP}")

    def _ask(self, question: str) -> None:
        message = Message(role="human", text=question, images=tuple(self._images), videos=tuple(self._videos))
        messages = [*self.messages, message]
        self._images.clear()
        self._videos.clear()
        reply = self.chat.reply(messages, self.sampling)
        for piece in reply:
            self._write(piece)
        self._write("\n")
        self._say(reply.summary)
        self.messages = with_reply(messages, reply)

    def _set_stride(self, argument: str) -> None:
        if argument != "own" and not argument.isdecimal():
            raise ConfigError(f"/stride {argument}: give a number, or 'own' for the checkpoint's")
        self.chat.set_stride(None if argument == "own" else int(argument))
        self._say(self.chat.stride.reason)

    def _save(self, folder: str) -> None:
        save_session(self.chat.engine, folder, checkpoint=self.chat.checkpoint, messages=self.messages)
        self._say(f"saved in {folder}")

    def _load(self, folder: str) -> None:
        self.messages = load_session(self.chat.engine, folder, checkpoint=self.chat.checkpoint)
        self._say(f"{len(self.messages)} messages of {folder}")
