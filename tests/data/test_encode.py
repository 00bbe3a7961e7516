"""What is kept and what is cut when a pair is longer than cutoff_len."""

from __future__ import annotations

import pytest

from prefkit.data.encode import encode_example
from prefkit.data.examples import Example, Message, Pair, Response
from prefkit.data.formats import Degenerate
from prefkit.data.template import ChatTemplate

END = 2
# One token a byte: "<|im_start|>user\n" is 6 tokens, "<|im_end|>\n" 2, "<|im_start|>assistant\n" 11.
AROUND = 6 + 2 + 11


def example(prompt: str | tuple[Message, ...], chosen: str, rejected: str) -> Example:
    messages = (Message("user", prompt),) if isinstance(prompt, str) else prompt
    return Example(
        messages, (Response(chosen, "chosen"), Response(rejected, "rejected")), "f:1", (Pair(0, 1),)
    )


def encode(tokenizer, row: Example, cutoff_len: int):
    return encode_example(row, ChatTemplate(tokenizer, "chatml"), cutoff_len)


def test_what_fits_is_whole(tokenizer) -> None:
    found = encode(tokenizer, example("q" * 10, "c" * 60, "r"), AROUND + 10 + 62)
    assert (len(found.prompt_ids), [len(ids) for ids in found.response_ids]) == (AROUND + 10, [62, 3])
    assert not found.truncated
    assert found.pairs == (Pair(0, 1),)


def test_one_token_more_and_the_head_of_the_prompt_goes(tokenizer) -> None:
    found = encode(tokenizer, example("0123456789", "c" * 60, "r"), AROUND + 10 + 62 - 1)
    assert (
        tokenizer.decode(found.prompt_ids) == "<|im_start|>user\n123456789<|im_end|>\n<|im_start|>assistant\n"
    )
    assert len(found.response_ids[0]) == 62
    assert found.truncated


def test_a_response_is_whole_up_to_three_quarters(tokenizer) -> None:
    found = encode(tokenizer, example("q" * 500, "c" * 73, "r"), 100)
    assert [len(ids) for ids in found.response_ids] == [75, 3]
    assert found.response_ids[0][-2] == END
    assert len(found.prompt_ids) == 25


def test_a_longer_response_loses_its_tail_and_end_token(tokenizer) -> None:
    found = encode(tokenizer, example("q" * 500, "c" * 80, "r"), 100)
    assert len(found.response_ids[0]) == 75
    assert END not in found.response_ids[0]
    assert found.response_ids[1][-2] == END


def test_a_short_prompt_leaves_more_than_three_quarters(tokenizer) -> None:
    found = encode(tokenizer, example("q", "c" * 500, "r"), 100)
    assert (len(found.prompt_ids), len(found.response_ids[0])) == (AROUND + 1, 100 - AROUND - 1)


def test_early_turns_go_first_and_the_system_turn_stays(tokenizer) -> None:
    prompt = (
        Message("system", "S"),
        Message("user", "first" * 10),
        Message("assistant", "a"),
        Message("user", "second"),
        Message("assistant", "b"),
        Message("user", "last"),
    )
    whole = len(encode(tokenizer, example(prompt, "c", "r"), 500).prompt_ids) + 3
    found = encode(tokenizer, example(prompt, "c", "r"), whole - 1)
    text = tokenizer.decode(found.prompt_ids)
    assert "first" not in text and "second" in text and text.startswith("<|im_start|>system\nS<|im_end|>")
    text = tokenizer.decode(encode(tokenizer, example(prompt, "c", "r"), 43).prompt_ids)
    assert "second" not in text and "last" in text and text.startswith("<|im_start|>system\nS<|im_end|>")


def test_text_of_several_bytes_a_character_is_cut_between_characters(tokenizer) -> None:
    found = encode(tokenizer, example("é" * 20, "c" * 60, "r"), AROUND + 40 + 62 - 3)
    assert tokenizer.decode(found.prompt_ids).count("é") == 18
    assert "\ufffd" not in tokenizer.decode(found.prompt_ids)


def test_equal_after_cutting(tokenizer) -> None:
    with pytest.raises(Degenerate, match="chosen equals rejected after truncation"):
        encode(tokenizer, example("q" * 50, "c" * 100 + "x", "c" * 100 + "y"), 100)


def test_no_room_for_a_prompt(tokenizer) -> None:
    with pytest.raises(Degenerate, match="no room for the prompt"):
        encode(tokenizer, example((Message("system", "S" * 90), Message("user", "q")), "c", "r"), 100)


@pytest.mark.parametrize(
    ("prompt", "responses", "expected"),
    [
        (300, (100, 20), (105, (100, 20))),  # the responses are short: the prompt loses its end
        (100, (300, 120), (100, (105, 105))),  # the prompt is short: both responses lose theirs
        (300, (300, 100), (103, (102, 100))),  # both are long
        (30, (300, 10), (30, (175, 10))),
    ],
)
def test_truncation(tokenizer, prompt: int, responses: tuple, expected: tuple) -> None:
    """LLaMA-Factory's rule on token counts, and what is left are the first tokens, without an end token."""
    texts = [Response(letter + "r" * (n - 1), "chosen") for n, letter in zip(responses, "xy", strict=True)]
    row = Example((Message("user", "q" * prompt),), tuple(texts), "f:1", (Pair(0, 1),))
    template = ChatTemplate(tokenizer, "empty")
    whole = encode_example(row, template, 10_000)
    found = encode_example(row, template, 205, truncation="llamafactory")
    assert found.truncated
    lengths = (len(found.prompt_ids), tuple(map(len, found.response_ids)))
    assert lengths == expected
    assert found.prompt_ids == whole.prompt_ids[: lengths[0]]
    assert found.response_ids[0] == whole.response_ids[0][: lengths[1][0]]
    assert encode_example(row, template, 205).prompt_ids[-10:] == whole.prompt_ids[-10:], "ours keeps the end"
