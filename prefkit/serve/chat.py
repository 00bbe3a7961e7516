"""A conversation at the terminal."""

from __future__ import annotations

import contextlib
import io
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from prefkit.config.errors import UserError
from prefkit.config.suggest import nearest
from prefkit.data.examples import Message, StoredImage
from prefkit.data.images import MediaSource
from prefkit.data.messages import PLACEHOLDER, RowError
from prefkit.serve.assistant import Answer, Assistant, PromptTooLong, Sampling, respond

PROMPT = "> "
# Two answers side by side are easier to read than one after the other from this many columns on.
_WIDE = 100
_COMMANDS = {
    "system": "TEXT  set the system message and start anew; without text, show it",
    "image": "PATH  show a picture with the next line, before its text or where it has <image>",
    "reset": "forget the conversation, keep the system message",
    "compare": "answer with the base model too, or no longer",
    "history": "show the conversation",
    "help": "show this",
    "exit": "leave; so do Ctrl-D and, at the prompt, Ctrl-C",
}
# A terminal obeys what an answer may contain only as text.
_CONTROLS = dict.fromkeys({*range(32), *range(127, 160)} - {ord("\n"), ord("\t")}, "\ufffd")


def chat(assistant: Assistant, sampling: Sampling, console: Console) -> None:
    """Talk until the person leaves; lines that do not come from a terminal are echoed."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (its import gives input() line editing and history)
    with contextlib.suppress(KeyboardInterrupt):
        _Conversation(assistant, sampling, console).run()


class _Conversation:
    """What was said, and the commands that change it: a method for each, named as the command."""

    def __init__(self, assistant: Assistant, sampling: Sampling, console: Console) -> None:
        self.assistant = assistant
        self.sampling = sampling
        self.console = console
        self.system_text = assistant.template.default_system
        self.turns: list[Message] = []
        self.images: list[StoredImage] = []  # of the turns
        self.pending: list[StoredImage] = []  # of the line that comes next
        self.compares = False
        self.over = False

    def run(self) -> None:
        self._write(f"This is {self.assistant.name}: {self.sampling.describe()}.\n")
        self.console.print("/help lists the commands, /exit leaves.")
        while not self.over and (line := self._read()) is not None:
            if line.startswith("/"):
                self._obey(line)
            elif line.strip():
                self._answer(line)

    def _read(self) -> str | None:
        """The next line, None at the end."""
        at_terminal = sys.stdin.isatty()
        try:
            line = input(PROMPT if at_terminal else "")
        except (EOFError, KeyboardInterrupt):
            self.console.print()
            return None
        if not at_terminal:
            self._write(f"{PROMPT}{line}\n")
        return line

    def _write(self, text: str) -> None:
        self.console.out(text.translate(_CONTROLS), end="", highlight=False)

    def _obey(self, line: str) -> None:
        name, _, text = line[1:].strip().partition(" ")
        if name not in _COMMANDS:
            near = nearest(name, list(_COMMANDS))
            hint = f"did you mean /{near}?" if near else "/help lists the commands."
            self._write(f"There is no /{name}: {hint} A space before the slash sends the line as text.\n")
        elif name in ("system", "image"):
            getattr(self, name)(text.strip())
        elif text:
            self._write(f"/{name} takes no text; nothing was done.\n")
        else:
            getattr(self, name)()

    def system(self, text: str) -> None:
        if not text:
            shown = f"System message: {self.system_text}" if self.system_text else "No system message is set."
            self._write(f"{shown}\n")
            return
        self.system_text = text
        self._forget()
        self.console.print("The system message is set, and the conversation starts anew.")

    def image(self, text: str) -> None:
        if self.assistant.template.vision is None:
            self._write(f"{self.assistant.name} does not see: it reads text alone.\n")
            return
        text = text.strip("\"'")
        path = Path(text).expanduser()
        if not path.is_file():
            missing = f"There is no file {text!r}: " if text else ""
            self._write(f"{missing}/image PATH shows a picture that is here, a PNG, JPEG or WebP.\n")
            return
        try:
            self.pending.append(MediaSource(path.parent).store(path.name, "The picture"))
        except (RowError, UserError) as error:
            self._write(f"{error}\n")
            return
        shown = self.pending[-1]
        many = f"{len(self.pending)} pictures are" if len(self.pending) > 1 else "It is"
        self._write(f"{path.name}, {shown.width} x {shown.height}. {many} shown with the next line.\n")

    def reset(self) -> None:
        self._forget()
        self.console.print("The conversation is forgotten.")

    def _forget(self) -> None:
        for said in (self.turns, self.images, self.pending):
            said.clear()

    def compare(self) -> None:
        if not self.assistant.compares:
            self.console.print("There is no adapter here, so there is no base model to compare with.")
            return
        self.compares = not self.compares
        goes_on = "; the conversation goes on with the tuned answer" if self.compares else ""
        self.console.print(f"Comparing with the base model is {'on' if self.compares else 'off'}{goes_on}.")

    def history(self) -> None:
        speakers = {"system": "system", "user": "you", "assistant": self.assistant.name}
        for message in self._messages():
            self._write(f"{speakers[message.role]}: {message.content}\n")
        if not self._messages():
            self.console.print("Nothing was said yet.")

    def help(self) -> None:
        for name, what in _COMMANDS.items():
            self.console.print(f"  /{name.ljust(8)} {what}")
        self.console.print("  Ctrl-C during an answer stops it and keeps what came.")

    def exit(self) -> None:
        self.over = True

    def _messages(self) -> list[Message]:
        return [*([Message("system", self.system_text)] if self.system_text else []), *self.turns]

    def _answer(self, text: str) -> None:
        """Answer a line; the two become turns only if there is an answer."""
        missing = len(self.pending) - text.count(PLACEHOLDER)
        text = PLACEHOLDER * missing + text
        messages = [*self._messages(), Message("user", text)]
        try:
            content = self._both_answers(messages) if self.compares else self._streamed(messages)
        except PromptTooLong as error:
            self._write(f"{error} This line was not sent: write a shorter one, or /reset to start anew.\n")
        except UserError as error:
            self._write(f"{error}\nThis line was not sent.\n")
        else:
            self.turns += [Message("user", text), Message("assistant", content)]
            self.images += self.pending
            self.pending = []

    def _streamed(self, messages: Sequence[Message]) -> str:
        """The answer, printed as it comes."""
        pieces = []
        with _stopped_by_interrupt() as stop:
            answer = self._respond(messages, stop)
            for piece in answer:
                self._write(piece)
                pieces.append(piece)
        note = _note(answer, stop)
        self._write(f" {note}\n" if note else "\n")
        return "".join(pieces)

    def _both_answers(self, messages: Sequence[Message]) -> str:
        """The answer of the tuned model; that of the base model is printed too."""
        if self.console.width < _WIDE:
            self.console.print("base:", style="bold")
            with self.assistant.untuned():
                self._streamed(messages)
            self.console.print("tuned:", style="bold")
            return self._streamed(messages)
        with self.assistant.untuned():
            base, base_note = self._whole(messages, "The base model answers ...")
        tuned, tuned_note = self._whole(messages, "The tuned model answers ...")
        table = Table(expand=True)
        for heading in ("base", "tuned"):
            table.add_column(heading, ratio=1, overflow="fold")
        table.add_row(
            *(
                Text(f"{text} {note}".strip().translate(_CONTROLS))
                for text, note in ((base, base_note), (tuned, tuned_note))
            )
        )
        self.console.print(table, soft_wrap=False)
        return tuned

    def _whole(self, messages: Sequence[Message], status: str) -> tuple[str, str]:
        """The answer once it is complete, and how it ended where that needs saying."""
        with _stopped_by_interrupt() as stop, self.console.status(status):
            answer = self._respond(messages, stop)
            return "".join(answer), _note(answer, stop)

    def _respond(self, messages: Sequence[Message], stop: threading.Event) -> Answer:
        images = [*self.images, *self.pending]
        return respond(self.assistant, messages, self.sampling, stop, images=images)


def _note(answer: Answer, stop: threading.Event) -> str:
    if stop.is_set():
        return "[stopped]"
    return f"[cut off after {answer.completion_tokens} tokens]" if answer.reason == "length" else ""


@contextlib.contextmanager
def _stopped_by_interrupt() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C within sets; a second one interrupts as ever."""
    stop = threading.Event()

    def interrupted(number: int, frame: Any) -> None:
        stop.set()
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, interrupted)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)
