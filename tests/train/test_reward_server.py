"""A server of scores as a judge: ours over a real socket, others by their protocol, and hostile ones."""

from __future__ import annotations

import contextlib
import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from prefkit.config.errors import UserError
from prefkit.config.schema import DataConfig, ModelConfig, RewardConfig
from prefkit.data.examples import Message, ToolCall
from prefkit.model.scorer import Scorer, open_scorer
from prefkit.train import reward_server
from prefkit.train.answered import Answered, JudgeFailed
from prefkit.train.reward_server import TOKEN_VARIABLE, ServerJudge, open_server_judge
from tests.conftest import make_tokenizer
from tests.model.test_reward import make_reward_model
from tests.train.judged import TEXTS, make_answered

TOKEN = "a-secret-token-of-the-server"
Handle = Callable[[BaseHTTPRequestHandler, bytes], None]


@pytest.fixture(autouse=True)
def no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that were waited between requests, which pass at once."""
    found: list[float] = []
    monkeypatch.setattr(time, "sleep", found.append)
    return found


@contextlib.contextmanager
def serving(post: Handle, health: Handle | None = None) -> Iterator[str]:
    """A server whose POST and /health do this; its address, with a path."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            (health or (lambda handler, body: answer(handler, b"no such page", 404)))(self, b"")

        def do_POST(self) -> None:
            post(self, self.rfile.read(int(self.headers["content-length"])))

        def log_message(self, *args: Any) -> None:
            """Nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/some/path?model=a"
    finally:
        server.shutdown()
        thread.join(10)
        server.server_close()


def answer(handler: BaseHTTPRequestHandler, body: bytes, status: int = 200, **headers: str) -> None:
    handler.send_response(status)
    for name, value in {"Content-Length": str(len(body)), **headers}.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(body)


def scores(handler: BaseHTTPRequestHandler, body: bytes) -> None:
    """What a well-behaved server says: the length of each text."""
    texts = json.loads(body)["messages"]
    answer(handler, json.dumps({"scores": [len(text) for text in texts]}).encode())


def open_judge(url: str, **keys: Any) -> ServerJudge:
    settings = RewardConfig(
        reward_model=url, reward_model_type="api", **{"reward_timeout": 5.0, "reward_retries": 2, **keys}
    )
    return open_server_judge(settings, make_tokenizer(), lambda text: None)


def failing(post: Handle, answered: list[Answered], **keys: Any) -> str:
    """What the judge says when it fails."""
    with serving(post) as url:
        judge = open_judge(url, **keys)
        with pytest.raises(JudgeFailed) as caught:
            judge.score(answered)
    message = str(caught.value)
    assert message.startswith(f"reward_model: {url.partition('?')[0]}")
    assert "model=a" not in message and TOKEN not in message
    return message


def test_texts_are_sent_as_the_protocol_has_them() -> None:
    seen: list[tuple[str, Any, Any]] = []

    def note(handler: BaseHTTPRequestHandler, body: bytes) -> None:
        seen.append((handler.path, json.loads(body), handler.headers))
        scores(handler, body)

    answered = make_answered(unfinished=[1])
    with serving(note) as url:
        found = open_judge(url).score(answered)
    ((path, fields, headers),) = seen
    opened = "<|im_start|>user\nSay one<|im_end|>\n<|im_start|>assistant\n"
    assert path == "/some/path?model=a"
    assert fields == {
        "model": "model",
        "messages": [f"{opened}{text}" + ("" if i == 1 else "<|im_end|>") for i, text in enumerate(TEXTS)],
    }
    assert found == [float(len(text)) for text in fields["messages"]]
    assert headers["content-type"] == "application/json" and headers["authorization"] is None


def test_requests_have_at_most_64_responses_in_order() -> None:
    sizes: list[int] = []

    def note(handler: BaseHTTPRequestHandler, body: bytes) -> None:
        sizes.append(len(json.loads(body)["messages"]))
        scores(handler, body)

    answered = make_answered(texts=["x" * number for number in range(150)])
    with serving(note) as url:
        found = open_judge(url).score(answered)
        assert open_judge(url).score([]) == []
    assert sizes == [64, 64, 22]
    assert [score - found[0] for score in found] == [float(number) for number in range(150)]


def test_the_token_goes_along_and_is_never_shown(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(TOKEN_VARIABLE, f"{TOKEN}\n")
    caplog.set_level(logging.DEBUG)
    seen: list[str | None] = []

    def echo(handler: BaseHTTPRequestHandler, body: bytes) -> None:
        seen.append(handler.headers["authorization"])
        answer(handler, f"not {handler.headers['authorization']}".encode(), 401)

    message = failing(echo, make_answered())
    assert seen == [f"Bearer {TOKEN}"]
    assert (
        f"answers with status 401 (the token is read from the environment variable {TOKEN_VARIABLE})"
        in message
    )
    assert message.endswith(": not Bearer ***")
    assert TOKEN not in caplog.text
    monkeypatch.setenv(TOKEN_VARIABLE, "schlüssel")
    with pytest.raises(UserError, match="a token is plain letters, digits and signs"):
        open_judge("http://127.0.0.1:1/")


def drop(handler: BaseHTTPRequestHandler, body: bytes) -> None:
    handler.close_connection = True
    handler.connection.shutdown(socket.SHUT_RDWR)


def drip(handler: BaseHTTPRequestHandler, body: bytes) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    with contextlib.suppress(OSError):
        for _ in range(40):
            handler.wfile.write(b" ")
            threading.Event().wait(0.05)


def truncate(handler: BaseHTTPRequestHandler, body: bytes) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"scores": [1.0, ')
    handler.close_connection = True


def sleep(handler: BaseHTTPRequestHandler, body: bytes) -> None:
    threading.Event().wait(0.5)


TRANSIENT: dict[str, tuple[Handle, str]] = {
    "dropped": (drop, "the connection failed"),
    "truncated": (truncate, "the connection failed"),
    "slow": (sleep, "it did not answer within 0.2 seconds"),
    "dripping": (drip, "it did not answer within 0.2 seconds"),
    **{
        str(status): (
            lambda handler, body, status=status: answer(handler, b"{}", status),  # type: ignore[misc]
            f"it answers with status {status}",
        )
        for status in (429, 502, 503, 504)
    },
}


@pytest.mark.parametrize("what", TRANSIENT)
def test_what_passes_is_tried_again(what: str, waits: list[float]) -> None:
    """The same answer comes in the end, and a server that stays so ends the run."""
    fail, reason = TRANSIENT[what]
    answered = make_answered()
    left = [2]

    def at_last(handler: BaseHTTPRequestHandler, body: bytes) -> None:
        left[0] -= 1
        (fail if left[0] >= 0 else scores)(handler, body)

    with serving(at_last) as url:
        judge = open_judge(url, reward_timeout=0.2)
        found = judge.score(answered)
        assert found == judge.score(answered) and len(found) == 5
    assert waits == [0.5, 1.0]
    message = failing(fail, answered, reward_timeout=0.2)
    assert f"gave no scores, asked 3 times: {reason}" in message
    assert message.endswith("reward_retries and reward_timeout say how often and how long is tried")
    assert waits == [0.5, 1.0] * 2


def test_a_server_that_is_not_there(waits: list[float]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(JudgeFailed, match=r"gave no scores, asked once: the connection failed"):
        open_judge(f"http://127.0.0.1:{port}/x", reward_retries=0)
    assert waits == []
    for url in ("http://[::1", "http://127.0.0.1:1:2/x"):
        with pytest.raises(UserError, match="is no address"):
            open_judge(url)
    for url in ("http:///path", "http://no such host/x"):
        with pytest.raises(UserError):
            open_judge(url, reward_retries=0)


def test_retry_after_is_honoured_and_waits_grow_to_a_limit(waits: list[float]) -> None:
    asked = iter(
        ["7", formatdate(time.time() + 20, usegmt=True), formatdate(0, usegmt=True), "soon"] + [""] * 9
    )

    def busy(handler: BaseHTTPRequestHandler, body: bytes) -> None:
        answer(handler, b"", 429, Retry_After=next(asked))

    assert "asked 10 times" in failing(busy, make_answered(), reward_retries=9)
    assert waits[0] == 7 and 15 < waits[1] <= 20 and waits[2] == 0
    assert waits[3:] == [4.0, 8.0, 16.0, 30.0, 30.0, 30.0]


def test_a_server_that_asks_for_too_long_is_not_waited_for(waits: list[float]) -> None:
    message = failing(lambda handler, body: answer(handler, b"", 503, Retry_After="3600"), make_answered())
    assert "asked once: it answers with status 503 and asks to come back in 3600 seconds" in message
    assert waits == []


def says(text: str | bytes, status: int = 200, **headers: str) -> Handle:
    body = text.encode() if isinstance(text, str) else text
    return lambda handler, _: answer(handler, body, status, **headers)


WRONG: dict[str, tuple[Handle, str]] = {
    "500": (says("Traceback", 500), "answers with status 500: Traceback"),
    "400": (says('{"error": "no"}', 400), 'answers with status 400: {"error": "no"}'),
    "404": (says("", 404), "answers with status 404"),
    "redirect": (
        says("", 307, Location="http://127.0.0.1:9/"),
        "answers with status 307 (redirects are not followed: write the address it leads to)",
    ),
    "html": (says("<html>\n <b>hi</b>"), "answers with no JSON: <html> <b>hi</b>"),
    "bytes": (says(b"\xff\xfe"), "answers with no JSON: "),
    "nothing": (says(""), "answers with no JSON"),
    "deep": (says("[" * 100_000), "answers with no JSON: [["),
    "a list": (says("[1, 2, 3, 4, 5]"), 'answers without a list "scores": [1, 2'),
    "other field": (says('{"rewards": [1]}'), 'answers without a list "scores": {"rewards"'),
    "no list": (says('{"scores": 1}'), 'answers without a list "scores": {"scores": 1}'),
    "too few": (says('{"scores": [1, 2]}'), "answers with 2 scores for 5 responses"),
    "too many": (says('{"scores": [1, 2, 3, 4, 5, 6]}'), "answers with 6 scores for 5 responses"),
    "nan": (says('{"scores": [1, NaN, 3, 4, 5]}'), "answers with nan as score 2 of 5, no finite number"),
    "infinity": (says('{"scores": [1, 2, 1e999, 4, 5]}'), "answers with inf as score 3 of 5"),
    "null": (says('{"scores": [1, 2, 3, 4, null]}'), "answers with None as score 5 of 5"),
    "text": (says('{"scores": ["1", 2, 3, 4, 5]}'), "answers with '1' as score 1 of 5"),
    "true": (says('{"scores": [true, 2, 3, 4, 5]}'), "answers with True as score 1 of 5"),
    "nested": (says('{"scores": [[1], [2], [3], [4], [5]]}'), "answers with [1] as score 1 of 5"),
    "encoding": (says(b"no gzip", Content_Encoding="gzip"), "DecodingError"),
    "large": (says(b" " * 16_000_001), "answers with more than 16000000 bytes"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_answer_ends_the_run_at_once(what: str, waits: list[float]) -> None:
    asked: list[int] = []

    def once(handler: BaseHTTPRequestHandler, body: bytes) -> None:
        asked.append(1)
        WRONG[what][0](handler, body)

    message = failing(once, make_answered())
    assert WRONG[what][1] in message and len(message) < 500
    assert len(asked) == 1 and waits == []


def test_proxies_of_the_environment_are_not_used_for_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9/")
    with serving(scores) as url:
        assert len(open_judge(url).score(make_answered())) == 5
    with serving(says("", 502)) as proxy:  # elsewhere they are: this one is all that answers
        monkeypatch.setenv("HTTP_PROXY", proxy.partition("/some")[0])
        monkeypatch.setenv("http_proxy", proxy.partition("/some")[0])
        with pytest.raises(JudgeFailed, match="it answers with status 502"):
            open_judge("http://scores.invalid/x", reward_retries=0).score(make_answered())


# Servers of prefkit


@pytest.fixture(scope="module")
def scorer(tmp_path_factory: pytest.TempPathFactory) -> Scorer:
    """A reward model whose template is another than the policy's."""
    folder = tmp_path_factory.mktemp("models") / "rater"
    make_reward_model().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return open_scorer(
        ModelConfig(model_name_or_path=str(folder)), DataConfig(template="llama3", cutoff_len=200)
    )


@pytest.fixture(scope="module")
def ours(scorer: Scorer) -> Iterator[str]:
    pytest.importorskip("fastapi")
    from tests.serve.test_rewards import running

    with running(scorer, token=TOKEN) as url:
        yield url


def expected(scorer: Scorer, answered: list[Answered]) -> list[float]:
    rows = [
        scorer.fit_answer(one.prompt, Message("assistant", one.text), one.tools, one.ended)
        for one in answered
    ]
    return [score for (score,) in scorer.score(rows)]


@pytest.mark.parametrize("path", ["", "/", "/v1/score/evaluation", "/v1/rewards"])
def test_a_server_of_prefkit_gets_chat_messages(
    path: str, ours: str, scorer: Scorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(TOKEN_VARIABLE, TOKEN)
    judge = open_judge(ours + path)
    answered = make_answered(unfinished=[1, 3]) + make_answered(texts=["z"] * 70)
    assert judge.score(answered) == pytest.approx(expected(scorer, answered), abs=1e-5)


def test_it_cuts_what_is_too_long_and_is_told_of_tools(
    ours: str, scorer: Scorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(TOKEN_VARIABLE, TOKEN)
    answered = make_answered(texts=("yes", "x" * 300), prompt=[Message("user", "word " * 60)])
    call = Message("assistant", "", (ToolCall("f", {"a": 1}),))
    prompt = [Message("user", "Q"), call, Message("tool", "R")]
    tools = [{"name": "f", "parameters": {"type": "object"}}]
    mixed = [*answered, *make_answered(prompt=prompt, tools=tools, texts=("a", "b")), *make_answered()]
    assert open_judge(ours).score(mixed) == pytest.approx(expected(scorer, mixed), abs=1e-5)


def test_it_says_when_a_token_is_wanted(ours: str) -> None:
    with pytest.raises(JudgeFailed, match=f"status 401 .*{TOKEN_VARIABLE}.*Send the token of this server"):
        open_judge(ours).score(make_answered())


def test_what_only_looks_like_a_server_of_prefkit_is_none() -> None:
    told: list[str] = []
    for health in ({"server": "prefkit", "serves": "answers"}, ["prefkit"], {"status": "ok"}):
        with serving(scores, says(json.dumps(health))) as url:
            settings = RewardConfig(reward_model=url, reward_model_type="api")
            judge = open_server_judge(settings, make_tokenizer(), told.append)
            assert len(judge.score(make_answered())) == 5
    assert all("it gets texts in the policy's template" in text for text in told)


def test_the_wrong_number_of_rewards_of_a_server_of_prefkit() -> None:
    health = says(json.dumps({"server": "prefkit", "serves": "rewards"}))
    with serving(says('{"rewards": [1.0]}'), health) as url:
        judge = open_judge(url)
        with pytest.raises(JudgeFailed, match="answers with 1 scores for 5 responses"):
            judge.score(make_answered())


def test_the_limits_are_what_the_documentation_says() -> None:
    doc = str(reward_server.Connection.__doc__)
    assert reward_server._FIRST_WAIT == 0.5 and "after half a second" in doc
    assert reward_server._LONGEST_WAIT == 30 and "up to 30 seconds" in doc
    assert set(reward_server._BUSY) == {429, 502, 503, 504} and "429, 502, 503" in doc


def test_the_timeout_and_the_number_of_tries_are_those_of_the_keys(
    waits: list[float], tmp_path: Path
) -> None:
    """`reward_timeout` and `reward_retries`."""
    asked: list[float] = []

    def slow(handler: BaseHTTPRequestHandler, body: bytes) -> None:
        asked.append(time.monotonic())
        threading.Event().wait(1.0)

    with serving(slow) as url:
        judge = open_judge(url, reward_timeout=0.15, reward_retries=3)
        started = time.monotonic()
        with pytest.raises(JudgeFailed, match=r"within 0\.15 seconds"):
            judge.score(make_answered())
        assert 0.6 <= time.monotonic() - started < 3
    assert len(asked) == 4 and len(waits) == 3
