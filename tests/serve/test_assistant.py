"""Answers: what is generated, how they end, what stops them."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import pytest
import torch

from prefkit.config.errors import UserError
from prefkit.data.examples import Message
from prefkit.data.template import ChatTemplate
from prefkit.serve.assistant import Assistant, PromptTooLong, Sampling, before_stop, respond
from tests.conftest import make_tokenizer
from tests.serve.conftest import expected, script

GREEDY = Sampling(do_sample=False, max_new_tokens=24)
HELLO = [Message("user", "Hello")]


def test_greedy_answer_is_that_of_generate(plain: Assistant, tuned: Assistant) -> None:
    texts = []
    for assistant in (plain, tuned):
        for sampling in (GREEDY, replace(GREEDY, do_sample=True, temperature=0)):
            answer = respond(assistant, HELLO, sampling)
            text = "".join(answer)
            assert (text, answer.completion_tokens) == expected(assistant, HELLO, 24)
            assert answer.prompt_tokens == len(assistant.template.encode(HELLO, [])[0])
            assert answer.reason == ("length" if answer.completion_tokens == 24 else "stop")
            texts.append(text)
    with tuned.untuned():
        base = "".join(respond(tuned, HELLO, GREEDY))
    assert base == texts[0] != texts[2]


def test_no_adapter_nothing_to_compare(plain: Assistant) -> None:
    with pytest.raises(UserError, match="tiny has no adapter"):
        plain.untuned()


def test_the_end_token_ends_an_answer(plain: Assistant) -> None:
    script(plain, "Two lines,\nno more: ünïcode 漢字 [x]")
    answer = respond(plain, HELLO, replace(GREEDY, max_new_tokens=99))
    assert "".join(answer) == "Two lines,\nno more: ünïcode 漢字 [x]"
    assert answer.reason == "stop"


def test_a_seed_repeats_an_answer_and_leaves_the_generator(plain: Assistant) -> None:
    sampling = Sampling(max_new_tokens=16, top_p=1.0, seed=7)
    before = torch.get_rng_state()
    first, again = ("".join(respond(plain, HELLO, sampling)) for _ in range(2))
    assert torch.equal(before, torch.get_rng_state())
    assert first == again != "".join(respond(plain, HELLO, replace(sampling, seed=8)))


def test_extremes_of_sampling(plain: Assistant) -> None:
    for changes in ({"temperature": 1e-30}, {"temperature": 2.0, "top_p": 0.0}, {"top_k": 0, "top_p": 1.0}):
        assert "".join(respond(plain, HELLO, Sampling(max_new_tokens=4, **changes)))  # type: ignore[arg-type]


def test_one_token_to_draw_from_is_the_likeliest(plain: Assistant) -> None:
    greedy = "".join(respond(plain, HELLO, GREEDY))
    for changes in ({"top_k": 1}, {"top_p": 1e-9, "top_k": 0}):
        sampling = Sampling(max_new_tokens=24, temperature=1.0, seed=1, **changes)  # type: ignore[arg-type]
        assert "".join(respond(plain, HELLO, sampling)) == greedy
    assert "".join(respond(plain, HELLO, Sampling(max_new_tokens=24, temperature=9.0, seed=1))) != greedy


def test_repetition_penalty_asks_for_other_tokens(plain: Assistant) -> None:
    text = "".join(respond(plain, HELLO, GREEDY))
    other = "".join(respond(plain, HELLO, replace(GREEDY, repetition_penalty=100.0)))
    assert len({*other}) / len(other) > len({*text}) / len(text)


def test_an_event_stops_an_answer(plain: Assistant) -> None:
    stop = threading.Event()
    script(plain, "one two three four five", lambda number: number == 9 and stop.set())
    answer = respond(plain, HELLO, GREEDY, stop)
    assert "".join(answer) == "one two th"
    assert (answer.reason, answer.completion_tokens) == ("stop", 10)


def test_whoever_leaves_stops_the_answer(plain: Assistant) -> None:
    tokens: list[int] = []
    script(plain, "x " * 50, lambda number: (tokens.append(number), number == 4 and answer._enough.wait(20)))
    answer = respond(plain, HELLO, replace(GREEDY, max_new_tokens=100))
    assert "".join(next(answer) for _ in range(3)).startswith("x ")
    answer._pieces.close()  # type: ignore[attr-defined]
    assert len(tokens) <= 5


def test_errors_of_the_generating_thread_arrive(plain: Assistant) -> None:
    def fail(number: int) -> None:
        if number == 5:
            raise RuntimeError("no memory left")

    script(plain, "one two three", fail)
    pieces: list[str] = []
    with pytest.raises(RuntimeError, match="no memory left"):
        pieces.extend(respond(plain, HELLO, GREEDY))


def test_too_long_a_conversation_says_both_numbers(plain: Assistant) -> None:
    with pytest.raises(PromptTooLong, match=r"has 619 tokens; tiny takes 512"):
        respond(plain, [Message("user", "x" * 600)], GREEDY)


def test_an_answer_ends_where_positions_end(plain: Assistant) -> None:
    messages = [Message("user", "x" * 486)]
    answer = respond(plain, messages, GREEDY)
    assert answer.prompt_tokens == 505
    "".join(answer)
    assert (answer.completion_tokens, answer.reason) == (7, "length")


def test_control_tokens_stay_text(plain: Assistant) -> None:
    answer = respond(plain, [Message("user", "<|im_end|>")], GREEDY)
    assert answer._prompt.prompt_ids.count(2) == 1
    assert answer.prompt_tokens == respond(plain, [Message("user", "x" * 10)], GREEDY).prompt_tokens


@pytest.mark.parametrize(("content", "complaint"), [("\ud800", "surrogate"), ("a\ufdd0", "noncharacters")])
def test_text_that_cannot_be_encoded(plain: Assistant, content: str, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        respond(plain, [Message("user", content)], GREEDY)


def test_a_template_that_refuses(plain: Assistant) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    assistant = replace(plain, template=ChatTemplate(tokenizer))
    with pytest.raises(UserError, match="refuses this conversation: roles must alternate"):
        respond(assistant, HELLO, GREEDY)


def test_stop_strings(plain: Assistant) -> None:
    script(plain, "one two three STOP four five six")
    answer = respond(plain, HELLO, replace(GREEDY, max_new_tokens=99), stop_strings=("STOP", "never"))
    assert "".join(answer) == "one two three "
    assert answer.reason == "stop" and answer.completion_tokens < 30


@pytest.mark.parametrize("size", [1, 2, 3, 7, 99])
@pytest.mark.parametrize(
    ("stops", "kept"),
    [
        (["##"], "a#b"),
        (["b###"], "a#b##c d"),
        (["##c d#"], "a#b##c d"),
        (["#b#x", "c "], "a#b##"),
        ([], "a#b##c d"),
    ],
)
def test_no_part_of_a_stop_string_leaks(size: int, stops: list[str], kept: str) -> None:
    text = "a#b##c d"
    found = threading.Event()
    pieces: list[Any] = [text[i : i + size] for i in range(0, len(text), size)]
    shown = ""
    for piece in before_stop(iter(pieces), stops, found):
        shown += piece
        assert kept.startswith(shown)
    assert (shown, found.is_set()) == (kept, kept != text)
