"""The server of scores, over a real socket."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

pytest.importorskip("fastapi")
httpx = pytest.importorskip("httpx")

from prefkit.data.examples import Message  # noqa: E402
from prefkit.model.scorer import Scorer  # noqa: E402
from prefkit.serve import rewards  # noqa: E402
from tests.serve.conftest import alone  # noqa: E402
from tests.serve.serving import eventually, running_app  # noqa: E402

TEXTS, CHATS = "/v1/score/evaluation", "/v1/rewards"
ASK = {"role": "user", "content": "Say one"}
CHAT = [ASK, {"role": "assistant", "content": "one"}]


def running(scorer: Scorer, **options: Any) -> contextlib.AbstractContextManager[str]:
    """A server in a thread; its URL."""
    return running_app(rewards.make_app(scorer, **options))


@pytest.fixture(scope="module")
def url(scorer: Scorer) -> Iterator[str]:
    with running(scorer, max_rows=40, max_body=20_000) as address:
        yield address


def post(url: str, path: str, **fields: Any) -> Any:
    return httpx.post(url + path, json=fields, timeout=30)


def templated(scorer: Scorer, answer: str, question: str = "Say one") -> str:
    prompt, (response,) = scorer.template.encode([Message("user", question)], [Message("assistant", answer)])
    return str(scorer.template.tokenizer.decode([*prompt, *response]))


def test_texts_have_the_scores_that_transformers_gives(url: str, scorer: Scorer) -> None:
    texts = [templated(scorer, answer) for answer in ("one", "two three", "x" * 60, "")] + ["plain", "p"]
    found = post(url, TEXTS, model="any name", messages=texts).json()
    assert found["scores"] == pytest.approx([alone(scorer, text) for text in texts], abs=1e-5)
    assert found["object"] == "score.evaluation" and found["id"].startswith("scoreval-")
    assert found.keys() == {"id", "object", "model", "scores"} and found["model"] == "rater"


def test_a_long_text_is_cut_where_it_is_said(url: str, scorer: Scorer) -> None:
    text = templated(scorer, "one two three")
    ids = scorer.template.tokenizer.encode(text, add_special_tokens=False)[:20]
    cut = alone(scorer, scorer.template.tokenizer.decode(ids))
    assert post(url, TEXTS, messages=[text, "short"], max_length=20).json()["scores"][0] == pytest.approx(
        cut, abs=1e-5
    )
    refused = post(url, TEXTS, messages=["short", "x" * 300])
    assert refused.status_code == 400
    assert refused.json()["error"] == {
        "message": "messages[1]: it has 300 tokens, and at most 256 are read (cutoff_len).",
        "type": "invalid_request_error",
        "param": "messages[1]",
        "code": "context_length_exceeded",
    }


def test_chats_are_templated(url: str, scorer: Scorer) -> None:
    expected = alone(scorer, templated(scorer, "one"))
    one = post(url, CHATS, messages=CHAT).json()
    assert one["rewards"] == pytest.approx([expected], abs=1e-5) and one["object"] == "reward"
    several = [CHAT, [ASK, {"role": "assistant", "content": "two"}], CHAT]
    found = post(url, CHATS, messages=several).json()["rewards"]
    other = alone(scorer, templated(scorer, "two"))
    assert found == pytest.approx([expected, other, expected], abs=1e-5)


def test_what_is_too_long_is_cut_where_that_is_asked_for(url: str, scorer: Scorer) -> None:
    long = [{**ASK, "content": "word " * 80}, CHAT[1]]
    refused = post(url, CHATS, messages=[CHAT, long])
    assert refused.json()["error"]["code"] == "context_length_exceeded"
    found = post(url, CHATS, messages=[CHAT, long], truncate=True).json()["rewards"]
    tokenizer = scorer.template.tokenizer
    ids = tokenizer.encode(templated(scorer, "one", "word " * 80), add_special_tokens=False)[-256:]
    expected = [alone(scorer, text) for text in (templated(scorer, "one"), tokenizer.decode(ids))]
    assert found == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("truncate", [False, True])
def test_an_unfinished_answer_has_no_end(truncate: bool, url: str, scorer: Scorer) -> None:
    fields = {"unfinished": [1], "truncate": truncate}
    found = post(url, CHATS, messages=[CHAT, CHAT], **fields).json()["rewards"]
    text = templated(scorer, "one")
    assert text.endswith("one<|im_end|>\n")
    expected = [alone(scorer, text), alone(scorer, text.removesuffix("<|im_end|>\n"))]
    assert found == pytest.approx(expected, abs=1e-5)
    for wrong in ([2], [-1], ["x"]):
        assert post(url, CHATS, messages=[CHAT, CHAT], unfinished=wrong).status_code == 400


def test_a_prompt_is_computed_once_for_its_answers(url: str, scorer: Scorer) -> None:
    lengths: list[int] = []
    decoder: Any = scorer.model.model
    hook = decoder.model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    chats = [[ASK, {"role": "assistant", "content": f"number {i}"}] for i in range(8)]
    post(url, CHATS, messages=chats)
    hook.remove()
    prompt = len(scorer.template.encode([Message("user", "Say one")], [])[0])
    answer = len(
        scorer.encode_answer([Message("user", "Say one")], Message("assistant", "number 1")).response_ids[0]
    )
    assert lengths == [prompt + 8 * answer]


def test_what_waits_is_scored_together_and_alike(scorer: Scorer, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    free = threading.Event()

    def score(self: Scorer, rows: Any) -> Any:
        free.wait(20)
        sizes.append(len(rows))
        return self.model.score(rows)

    monkeypatch.setattr(Scorer, "score", score)
    with running(scorer) as url, ThreadPoolExecutor(12) as pool:
        texts = [templated(scorer, f"number {i}" + "!" * i) for i in range(12)]
        replies = [pool.submit(post, url, TEXTS, messages=[text]) for text in texts]
        eventually(lambda: pool._work_queue.empty())
        free.set()
        found = [reply.result().json()["scores"][0] for reply in replies]
    assert found == pytest.approx([alone(scorer, text) for text in texts], abs=1e-5)
    assert sum(sizes) == 12 and len(sizes) < 12


REFUSED: dict[str, tuple[str, Any, str]] = {
    "no JSON": (TEXTS, b"{", "The body is not JSON."),
    "no object": (TEXTS, b"[]", "The body is not a JSON object."),
    "no messages": (TEXTS, {}, "messages: Field required."),
    "none": (TEXTS, {"messages": []}, "messages: List should have at least 1 item"),
    "no text": (TEXTS, {"messages": [3]}, "messages[0]: Input should be a valid string."),
    "empty text": (TEXTS, {"messages": [""]}, "messages[0]: there is no token to score."),
    "half a character": (TEXTS, b'{"messages": ["\\ud800"]}', "messages[0]: it has half a surrogate pair"),
    "chat for text": (TEXTS, {"messages": CHAT}, "messages[0]: Input should be a valid string."),
    "unknown field": (TEXTS, {"messages": ["x"], "max_lenght": 3}, "did you mean max_length?"),
    "max_length 0": (TEXTS, {"messages": ["x"], "max_length": 0}, "max_length: Input should be greater"),
    "too many": (TEXTS, {"messages": ["x"] * 41}, "There are 41 messages; 40 are allowed."),
    "text for chat": (CHATS, {"messages": ["x"]}, "messages[0]: the conversation is a list of messages"),
    "no answer": (CHATS, {"messages": [ASK]}, "messages ends without a message by the assistant to score."),
    "no question": (
        CHATS,
        {"messages": [CHAT[1]]},
        "messages: the conversation: user and",
    ),
    "two questions": (CHATS, {"messages": [CHAT, [ASK, ASK]]}, "messages[1]: the conversation: user and"),
    "unknown role": (CHATS, {"messages": [{"role": "x", "content": "y"}]}, "unknown role 'x'"),
    "picture": (
        CHATS,
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}, CHAT[1]]},
        "There are images, and this model does not see.",
    ),
    "tools": (CHATS, {"messages": CHAT, "tools": [3]}, "tools: it lists objects with 'name'"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_scored_is_refused_by_name(what: str, url: str) -> None:
    path, body, message = REFUSED[what]
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    response = httpx.post(url + path, content=content, headers={"Content-Type": "application/json"})
    assert response.status_code == 400 and message in response.json()["error"]["message"]
    assert httpx.get(f"{url}/health").json()["status"] == "ok"


def test_caps_token_and_place(url: str, scorer: Scorer) -> None:
    assert post(url, TEXTS, messages=["x" * 20_000]).status_code == 413
    assert httpx.post(url + TEXTS, content=b"{}").status_code == 415
    assert httpx.get(url + TEXTS).status_code == 405
    assert httpx.post(url + TEXTS, json={"messages": ["x"]}, headers={"Host": "evil"}).status_code == 421
    health = httpx.get(f"{url}/health").json()
    assert (health["server"], health["serves"], health["max_length"]) == ("prefkit", "rewards", 256)
    assert httpx.get(f"{url}/v1/models").json()["data"][0]["id"] == "rater"
    with running(scorer, token="secret") as guarded:
        assert post(guarded, TEXTS, messages=["x"]).status_code == 401
        key = {"Authorization": "Bearer secret"}
        assert httpx.post(guarded + TEXTS, json={"messages": ["x"]}, headers=key).status_code == 200


def test_more_than_may_wait_is_told_to_come_back(scorer: Scorer, monkeypatch: pytest.MonkeyPatch) -> None:
    busy, free = threading.Event(), threading.Event()
    original: Callable[..., Any] = Scorer.score

    def score(self: Scorer, rows: Any) -> Any:
        busy.set()
        free.wait(20)
        return original(self, rows)

    monkeypatch.setattr(Scorer, "score", score)
    with running(scorer, max_waiting=3) as url, ThreadPoolExecutor(1) as pool:
        first = pool.submit(post, url, TEXTS, messages=["a", "b"])
        busy.wait(20)
        assert post(url, TEXTS, messages=["c", "d"]).status_code == 429
        free.set()
        assert len(first.result().json()["scores"]) == 2


def test_an_error_of_ours_is_one(scorer: Scorer, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Scorer, rows: Any) -> Any:
        raise RuntimeError("secret path")

    with running(scorer) as url:
        with monkeypatch.context() as patch:
            patch.setattr(Scorer, "score", broken)
            failed = post(url, TEXTS, messages=["x"])
            assert failed.status_code == 500 and "secret" not in failed.text
        assert post(url, TEXTS, messages=["x"]).status_code == 200
