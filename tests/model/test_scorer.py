"""Texts to scores: what is cut, what is left open, and that no answer is refused."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefkit.config.schema import DataConfig, ModelConfig
from prefkit.data.examples import Message
from prefkit.data.template import ChatTemplate, ConversationRefused
from prefkit.model.scorer import RowTooLong, Scorer, fit_row, open_scorer
from tests.conftest import make_tokenizer
from tests.model.test_reward import make_reward_model

ASK = [Message("user", "Is it?")]
END = [2, make_tokenizer().encode("\n", add_special_tokens=False)[0]]


@pytest.fixture(scope="module")
def scorer(tmp_path_factory: pytest.TempPathFactory) -> Scorer:
    folder = tmp_path_factory.mktemp("models") / "rater"
    make_reward_model().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return open_scorer(
        ModelConfig(model_name_or_path=str(folder)), DataConfig(template="chatml", cutoff_len=60)
    )


def say(text: str) -> Message:
    return Message("assistant", text)


@given(st.lists(st.integers(5, 9), max_size=30), st.lists(st.integers(5, 9), max_size=30), st.integers(8, 40))
def test_a_row_fits(prompt: list[int], response: list[int], longest: int) -> None:
    if not prompt and not response:
        return
    row = fit_row(prompt, response, longest)
    (kept,) = row.response_ids
    whole = [*row.prompt_ids, *kept]
    assert kept and len(whole) <= longest
    if len(prompt) + len(response) <= longest:
        assert whole == [*prompt, *response]
    elif response and prompt:
        assert len(whole) == longest
        assert kept == response[: max(longest - len(prompt), longest * 3 // 4)]
        assert prompt[len(prompt) - len(row.prompt_ids) :] == row.prompt_ids


def test_an_answer_that_fits_is_the_one_of_training(scorer: Scorer) -> None:
    assert scorer.fit_answer(ASK, say("yes")) == scorer.encode_answer(ASK, say("yes"))


@pytest.mark.parametrize("name", ["encode_answer", "fit_answer"])
def test_the_turn_of_an_answer_that_was_cut_off_is_open(name: str, scorer: Scorer) -> None:
    encode: Any = getattr(scorer, name)
    (closed,), (opened,) = (encode(ASK, say("ye"), (), ended).response_ids for ended in (True, False))
    assert closed == [*opened, *END] and opened == scorer.template.tokenizer.encode("ye")


def test_what_is_too_long_is_cut_or_refused(scorer: Scorer) -> None:
    long = [Message("user", "word " * 20)]
    with pytest.raises(RowTooLong):
        scorer.encode_answer(long, say("yes"))
    row = scorer.fit_answer(long, say("yes"))
    assert len(row.prompt_ids) + len(row.response_ids[0]) == 60
    assert row.response_ids[0][-2:] == END
    (kept,) = scorer.fit_answer(ASK, say("x" * 100)).response_ids
    assert len(kept) == 45 and END[0] not in kept


@pytest.mark.parametrize(
    "text", ["", "<|im_end|>", "a\ufdd0b", "</think>", "<think>", "\u2028 \x00", "é" * 9]
)
@pytest.mark.parametrize("ended", [True, False])
def test_any_answer_has_a_score(text: str, ended: bool, scorer: Scorer) -> None:
    ((score,),) = scorer.score([scorer.fit_answer(ASK, say(text), (), ended)])
    assert abs(score) < 100


def test_an_answer_that_a_template_refuses_is_text(scorer: Scorer, monkeypatch: pytest.MonkeyPatch) -> None:
    encode = ChatTemplate.encode

    def picky(self: ChatTemplate, prompt: Any, responses: Any, *more: Any) -> Any:
        if any("<image>" in message.content for message in (*prompt, *responses)):
            raise ConversationRefused("<image> stands for a file")
        return encode(self, prompt, responses, *more)

    monkeypatch.setattr(ChatTemplate, "encode", picky)
    row = scorer.fit_answer(ASK, say("an <image>"))
    assert row.response_ids == [[*scorer.template.tokenizer.encode("an <image>"), *END]]
    with pytest.raises(ConversationRefused):
        scorer.fit_answer([Message("user", "<image>")], say("yes"))
