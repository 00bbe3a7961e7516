"""The conversation at the terminal, fed with lines."""

from __future__ import annotations

import io
import os
import pty
import signal
from dataclasses import replace

import pytest
from rich.console import Console

from prefkit.data.examples import Message
from prefkit.runs.report import make_console
from prefkit.serve.assistant import Assistant, Sampling
from prefkit.serve.chat import chat
from tests.serve.conftest import expected, script

GREEDY = Sampling(do_sample=False, max_new_tokens=12)


@pytest.fixture
def talk(monkeypatch: pytest.MonkeyPatch):
    """Says lines to an assistant; what the terminal shows."""

    def run(assistant: Assistant, *lines: str, sampling: Sampling = GREEDY, width: int = 80) -> str:
        screen = io.StringIO()
        console = make_console(screen)
        console.width = width
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        chat(assistant, sampling, console)
        return screen.getvalue()

    return run


def visible(text: str) -> str:
    return "".join("\ufffd" if (ord(c) < 32 and c not in "\n\t") or 127 <= ord(c) < 160 else c for c in text)


def test_each_turn_sees_the_ones_before(talk, plain: Assistant) -> None:
    shown = talk(plain, "Hi", "", "And you?", "Bye")
    said: list[Message] = []
    for line in ("Hi", "And you?", "Bye"):
        said.append(Message("user", line))
        answer, _ = expected(plain, said, 12)
        said.append(Message("assistant", answer))
        assert f"> {line}\n{visible(answer).expandtabs(8)}" in shown
    assert shown.startswith("This is tiny: greedy, up to 12 tokens an answer.\n")
    assert "\x1b" not in shown


def test_model_text_is_not_interpreted(talk, plain: Assistant) -> None:
    text = "[bold]no[/bold] :smile: \x1b[2Jx\n" + "long " * 30
    script(plain, text)
    shown = talk(plain, "Hi", sampling=replace(GREEDY, max_new_tokens=300))
    assert text.replace("\x1b", "\ufffd") + "\n" in shown


def test_a_cut_answer_says_so(talk, plain: Assistant) -> None:
    script(plain, "one two three four")
    assert "one two thre [cut off after 12 tokens]\n" in talk(plain, "Hi")


@pytest.mark.parametrize(
    ("lines", "shown"),
    [
        (["/exit", "Hi"], "/help lists the commands, /exit leaves.\n> /exit\n"),
        (["/rest"], "There is no /rest: did you mean /reset? A space before the slash"),
        (["/zzzzzz"], "There is no /zzzzzz: /help lists the commands."),
        (["/"], "There is no /: /help lists"),
        ([" /etc"], ">  /etc\nok\n"),
        (["/system"], "No system message is set.\n"),
        (["/system Be brief.", "/system"], "starts anew.\n> /system\nSystem message: Be brief.\n"),
        (["Hi", "/system S", "/history"], "> /history\nsystem: S\n\n"),
        (["/system S", "Hi", "/reset", "/history"], "forgotten.\n> /history\nsystem: S\n\n"),
        (["Hi", "/history"], "> /history\nyou: Hi\ntiny: ok\n"),
        (["/history"], "Nothing was said yet.\n"),
        (["/reset now"], "/reset takes no text; nothing was done.\n"),
        (
            ["/compare", "Hi"],
            "There is no adapter here, so there is no base model to compare with.\n> Hi\nok\n",
        ),
        (["/help"], "  /compare  answer with the base model too, or no longer\n"),
    ],
)
def test_commands(talk, plain: Assistant, lines: list[str], shown: str) -> None:
    script(plain, "ok")
    assert shown in talk(plain, *lines)


def test_the_system_message_reaches_the_model(talk, plain: Assistant) -> None:
    prompt = [Message("system", "Be brief."), Message("user", "Hi")]
    assert visible(expected(plain, prompt, 12)[0]) in talk(plain, "Hello", "/system Be brief.", "Hi")


@pytest.mark.parametrize("width", [80, 140])
def test_both_answers(talk, tuned: Assistant, width: int) -> None:
    first = [Message("user", "Hi")]
    with tuned.untuned():
        base, _ = expected(tuned, first, 12)
    answer, _ = expected(tuned, first, 12)
    assert base != answer
    then, _ = expected(tuned, [*first, Message("assistant", answer), Message("user", "Bye")], 12)
    shown = talk(tuned, "/compare", "Hi", "/compare", "Bye", width=width)
    assert "with the base model is on; the conversation goes on with the tuned answer.\n" in shown
    assert f"is off.\n> Bye\n{visible(then)}" in shown
    if width == 80:
        assert f"base:\n{visible(base)}" in shown and f"tuned:\n{visible(answer)}" in shown


def test_side_by_side_on_a_wide_terminal(talk, tuned: Assistant) -> None:
    script(tuned, "[b]same")
    lines = talk(tuned, "/compare", "Hi", width=120).splitlines()
    assert any("base" in line and "tuned" in line for line in lines)
    assert any(line.count("[b]same") == 2 and len(line) == 120 for line in lines)


def test_too_long_a_conversation_goes_on_after_reset(talk, plain: Assistant) -> None:
    script(plain, "ok")
    shown = talk(plain, "x" * 600, "/history", "Hi", "x" * 400, "/reset", "Hi")
    assert "has 619 tokens; tiny takes 512, its answer included. This line was not sent" in shown
    assert "/reset to start anew.\n> /history\nNothing was said yet.\n> Hi\nok\n" in shown
    assert shown.endswith("forgotten.\n> Hi\nok\n\n")


def test_an_interrupt_ends_the_answer_only(talk, plain: Assistant) -> None:
    def interrupt(number: int) -> None:
        if number == 8:
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    script(plain, "one two three four five six seven " * 5, interrupt)
    shown = talk(plain, "Hi", "/history", sampling=replace(GREEDY, max_new_tokens=200))
    answer = shown.split("> Hi\n")[1].split(" [stopped]\n")[0]
    assert "one two three four".startswith(answer[:8]) and len(answer) < 100
    assert f"tiny: {answer}\n" in shown
    assert signal.getsignal(signal.SIGINT) is before


def test_a_terminal_has_a_prompt_and_an_interrupt_there_leaves(
    monkeypatch: pytest.MonkeyPatch, plain: Assistant
) -> None:
    prompts: list[str] = []

    def interrupted(prompt: str) -> str:
        prompts.append(prompt)
        raise KeyboardInterrupt

    ours, theirs = pty.openpty()
    with os.fdopen(ours, "rb", buffering=0), os.fdopen(theirs, encoding="utf-8") as terminal:
        monkeypatch.setattr("sys.stdin", terminal)
        monkeypatch.setattr("builtins.input", interrupted)
        screen = io.StringIO()
        chat(plain, GREEDY, Console(file=screen))
    assert prompts == ["> "]
    assert screen.getvalue().endswith("/exit leaves.\n\n")
