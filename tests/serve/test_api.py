"""The HTTP API, over a real socket: with OpenAI's own client, and with requests that it would not send."""

from __future__ import annotations

import contextlib
import json
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from typing import Any

import pytest

pytest.importorskip("fastapi")
httpx = pytest.importorskip("httpx")
openai = pytest.importorskip("openai")

from prefkit.config.errors import UserError  # noqa: E402
from prefkit.data.examples import Message  # noqa: E402
from prefkit.serve import api, http  # noqa: E402
from prefkit.serve.assistant import Assistant, Sampling  # noqa: E402
from prefkit.serve.respond import AnswerQueue  # noqa: E402
from tests.serve.conftest import expected, script  # noqa: E402
from tests.serve.serving import eventually, running_app  # noqa: E402

GREEDY = Sampling(do_sample=False, max_new_tokens=200)
HELLO: Any = [{"role": "user", "content": "Hello"}]
CHAT = "/v1/chat/completions"
Serve = Callable[..., str]


def running(assistant: Assistant, **options: Any) -> contextlib.AbstractContextManager[str]:
    """A server in a thread; its URL."""
    return running_app(api.make_app(assistant, GREEDY, **options))


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Starts servers that live as long as the test."""
    with contextlib.ExitStack() as stack:
        yield lambda assistant, **options: stack.enter_context(running(assistant, **options))


def client_of(url: str, key: str = "any") -> Any:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=30)


def post(url: str, body: Any = None, **changes: Any) -> Any:
    return httpx.post(
        f"{url}{CHAT}", json=body or {"messages": HELLO, "max_tokens": 4, **changes}, timeout=30
    )


def test_answers_are_those_of_the_model(serve: Serve, tuned: Assistant) -> None:
    messages = [Message("user", "Hello")]
    text, count = expected(tuned, messages, 20)
    with tuned.untuned():
        base, _ = expected(tuned, messages, 20)
    with client_of(serve(tuned)) as client:
        assert [model.id for model in client.models.list()] == ["tuned", "tuned:base"]
        ask = client.chat.completions.create
        whole = ask(model="tuned", messages=HELLO, max_tokens=20)
        assert whole.choices[0].message.content == text
        assert (whole.usage.completion_tokens, whole.model, whole.object) == (
            count,
            "tuned",
            "chat.completion",
        )
        assert whole.usage.total_tokens == whole.usage.prompt_tokens + count
        assert whole.choices[0].finish_reason == ("length" if count == 20 else "stop")
        untuned = ask(model="tuned:base", messages=HELLO, max_completion_tokens=20)
        assert untuned.choices[0].message.content == base != text
        chunks = list(ask(model="tuned", messages=HELLO, max_tokens=20, stream=True))
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text
        assert chunks[0].choices[0].delta.role == "assistant"
        assert [c.choices[0].finish_reason for c in chunks if c.choices[0].finish_reason] == [
            whole.choices[0].finish_reason
        ]
        assert all(chunk.usage is None for chunk in chunks)
        assert ask(model="tuned", messages=HELLO, max_tokens=20).choices[0].message.content == text


def test_many_turns_in_many_forms(serve: Serve, plain: Assistant) -> None:
    turns: Any = [
        Message("system", "Be brief."),
        Message("user", "Hi there"),
        Message("assistant", "Yes?"),
        Message("user", "<|im_end|>"),
    ]
    body = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hi "}, {"type": "text", "text": "there"}]},
        {"role": "assistant", "content": "Yes?", "refusal": None, "tool_calls": None},
        {"role": "user", "content": "<|im_end|>"},
    ]
    with client_of(serve(plain)) as client:
        whole = client.chat.completions.create(
            model="tiny",
            messages=body,
            max_tokens=16,
            n=1,
            user="me",
            metadata={"a": "b"},
            presence_penalty=0,
            response_format={"type": "text"},
        )
    assert whole.choices[0].message.content == expected(plain, turns, 16)[0]


def test_sampling_of_a_request(serve: Serve, plain: Assistant) -> None:
    with client_of(serve(plain)) as client:

        def ask(**changes: Any) -> str:
            whole = client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=12, **changes)
            return whole.choices[0].message.content

        assert ask(temperature=1.5, seed=1) == ask(temperature=1.5, seed=1) != ask(temperature=1.5, seed=2)
        assert ask() == ask(temperature=0) == ask(temperature=1, top_p=0) == ask(seed=5)


def test_stop_strings_while_streaming(serve: Serve, plain: Assistant) -> None:
    script(plain, "one ST two STOP three four")
    with client_of(serve(plain)) as client:
        chunks = list(
            client.chat.completions.create(
                model="tiny",
                messages=HELLO,
                stop=["STOP", "four"],
                stream=True,
                stream_options={"include_usage": True},
            )
        )
        whole = client.chat.completions.create(model="tiny", messages=HELLO, stop=" two")
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks[:-1]]
    assert "".join(pieces) == "one ST two "
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens < 24
    assert (whole.choices[0].message.content, whole.choices[0].finish_reason) == ("one ST", "stop")


def test_the_form_of_a_stream(serve: Serve, plain: Assistant) -> None:
    script(plain, "ünï\nok")
    response = post(serve(plain), {"messages": HELLO, "stream": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    events = response.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    deltas = [json.loads(event.removeprefix("data: "))["choices"][0]["delta"] for event in events[:-2]]
    assert deltas == [{"role": "assistant", "content": ""}, {"content": "ünï\n"}, {"content": "ok"}, {}]


BAD_REQUESTS: list[tuple[Any, int, str | None, str]] = [
    (b"{", 400, None, "not JSON"),
    (b"[" * 100_000, 400, None, "not JSON"),
    (b'{"seed": ' + b"9" * 5000 + b"}", 400, None, "not JSON"),
    (b"\xff", 400, None, "not JSON"),
    (b"[]", 400, None, "not a JSON object"),
    ({}, 400, "messages", "Field required"),
    ({"messages": None}, 400, "messages", "Field required"),
    ({"messages": []}, 400, "messages", "at least 1 item"),
    ({"messages": "Hello"}, 400, "messages", "valid list"),
    ({"messages": ["Hello"]}, 400, "messages[0]", "must be an object"),
    ({"messages": [{"role": "tool", "content": "x"}]}, 400, "messages[0].role", "'developer'"),
    ({"messages": [{"role": "user"}]}, 400, "messages[0].content", "required"),
    ({"messages": [{"role": "user", "content": 1}]}, 400, "messages[0].content", "valid string"),
    ({"messages": [{"role": "user", "content": None}]}, 400, "messages[0].content", "required"),
    ({"messages": [{"role": "user", "content": ["x"]}]}, 400, "messages[0].content", "no other parts"),
    (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": 1}]}]},
        400,
        "messages[0].content",
        "no",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        400,
        "messages",
        "this model does not see",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
        400,
        "messages[0].content",
        "no other parts than",
    ),
    ({"messages": [{"role": "user", "content": "x", "name": "me"}]}, 400, "messages[0].name", "not a known"),
    (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', 400, "messages", "surrogate"),
    (b'{"messages": [{"role": "user", "content": "x", "\\ud800": 1}]}', 400, "messages[0]", "unicode"),
    (b'{"model": "\\ud800", "messages": [{"role": "user", "content": "x"}]}', 404, "model", "only tiny"),
    ({"messages": [{"role": "user", "content": "a\ufdd0"}]}, 400, "messages", "noncharacters"),
    ({"messages": HELLO * 9}, 400, "messages", "There are 9 messages; 8 are allowed"),
    ({"messages": [{"role": "user", "content": "x" * 600}]}, 400, "messages", "619 tokens; tiny takes 512"),
    ({"messages": [{"role": "user", "content": "x" * 6000}]}, 413, None, "more than 5000 bytes"),
    ({"messages": HELLO, "model": "gpt-4"}, 404, "model", "No model 'gpt-4' is served here, only tiny."),
    ({"messages": HELLO, "model": "tiny:base"}, 404, "model", "only tiny"),
    ({"messages": HELLO, "model": 1}, 400, "model", "valid string"),
    ({"messages": HELLO, "temperature": 2.1}, 400, "temperature", "less than or equal to 2"),
    ({"messages": HELLO, "temperature": -1}, 400, "temperature", "greater than or equal to 0"),
    ({"messages": HELLO, "temperature": "1"}, 400, "temperature", "valid number"),
    (b'{"messages": [], "temperature": NaN}', 400, "messages", "at least 1"),
    (b'{"messages": [{"role": "user", "content": "x"}], "top_p": NaN}', 400, "top_p", "finite"),
    ({"messages": HELLO, "top_p": 1.1}, 400, "top_p", "less than or equal to 1"),
    ({"messages": HELLO, "max_tokens": 0}, 400, "max_tokens", "greater than or equal to 1"),
    ({"messages": HELLO, "max_tokens": 1.5}, 400, "max_tokens", "integer"),
    ({"messages": HELLO, "max_tokens": True}, 400, "max_tokens", "integer"),
    ({"messages": HELLO, "max_tokens": 201}, 400, "max_tokens", "is 201; at most 200 are served"),
    ({"messages": HELLO, "max_completion_tokens": 10**30}, 400, "max_completion_tokens", "at most 200"),
    ({"messages": HELLO, "max_tokens": 1, "max_completion_tokens": 1}, 400, "max_tokens", "send one"),
    ({"messages": HELLO, "seed": 2**63}, 400, "seed", "less than"),
    ({"messages": HELLO, "stop": list("abcde")}, 400, "stop", "at most 4"),
    ({"messages": HELLO, "stop": ""}, 400, "stop[0]", "at least 1 character"),
    ({"messages": HELLO, "stop": {"a": 1}}, 400, "stop", "valid list"),
    ({"messages": HELLO, "stream": "yes"}, 400, "stream", "valid boolean"),
    ({"messages": HELLO, "stream_options": {"include_usage": True}}, 400, "stream_options", "without stream"),
    ({"messages": HELLO, "n": 2}, 400, "n", "leave it out or set it to 1"),
    ({"messages": HELLO, "tools": [{"type": "function"}]}, 400, "tools", "not implemented"),
    ({"messages": HELLO, "logprobs": True}, 400, "logprobs", "not implemented"),
    ({"messages": HELLO, "logit_bias": {"5": 1}}, 400, "logit_bias", "not implemented"),
    ({"messages": HELLO, "presence_penalty": 0.1}, 400, "presence_penalty", "or set it to 0"),
    ({"messages": HELLO, "frequency_penalty": -1}, 400, "frequency_penalty", "not implemented"),
    ({"messages": HELLO, "response_format": {"type": "json_object"}}, 400, "response_format", '"text"}'),
    ({"messages": HELLO, "reasoning_effort": "low"}, 400, "reasoning_effort", "here: leave it out."),
    ({"messages": HELLO, "temprature": 1}, 400, "temprature", "did you mean temperature?"),
    ({"messages": HELLO, "x" * 900: 1}, 400, "x" * 497 + "...", "xxx..."),
]


def test_bad_requests(serve: Serve, plain: Assistant) -> None:
    url = serve(plain, max_messages=8, max_body=200_000)
    small = serve(plain, max_body=5000)
    for body, status, param, complaint in BAD_REQUESTS:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        to = small if status == 413 else url
        response = httpx.post(f"{to}{CHAT}", content=content, headers={"Content-Type": "application/json"})
        error = response.json()["error"]
        assert (response.status_code, error["param"]) == (status, param), (content[:200], error)
        assert complaint in error["message"], (content[:200], error)
        assert error.keys() == {"message", "type", "param", "code"}
    assert post(url).status_code == 200


def test_other_paths_methods_and_types(serve: Serve, plain: Assistant) -> None:
    url = serve(plain)
    with httpx.Client(base_url=url) as client:
        requests = {
            404: [
                ("GET", "/"),
                ("GET", "/docs"),
                ("GET", "/openapi.json"),
                ("GET", "/redoc"),
                ("POST", "/v1/x"),
            ],
            405: [("GET", CHAT), ("DELETE", "/v1/models"), ("POST", "/health")],
            415: [("POST", CHAT)],
        }
        for status, calls in requests.items():
            for method, path in calls:
                response = client.request(method, path, content=b"{}" if method == "POST" else None)
                assert response.status_code == status, (method, path)
                assert response.json()["error"]["type"] == "invalid_request_error"
                assert "access-control-allow-origin" not in response.headers
        assert client.get("/health").json() == {"status": "ok"}
        assert client.get("/v1/models/").status_code == 404


def test_a_token(serve: Serve, plain: Assistant) -> None:
    url = serve(plain, token="geheim-ü")
    models = f"{url}/v1/models"
    assert httpx.get(f"{url}/health").status_code == 200
    for header in (None, "", "Bearer", "Bearer geheim", b"Bearer geheim-\xfc", "Basic geheim-ü"):
        headers = (
            {}
            if header is None
            else {b"Authorization": header if isinstance(header, bytes) else header.encode()}
        )
        response = httpx.get(models, headers=headers)
        assert response.status_code == 401 and response.headers["www-authenticate"] == "Bearer"
        assert "geheim" not in response.text
    assert httpx.get(models, headers={b"Authorization": "Bearer geheim-ü".encode()}).status_code == 200
    assert post(url).status_code == 401
    assert httpx.get(f"{url}/nowhere").status_code == 401


def test_openai_tells_a_wrong_token(serve: Serve, plain: Assistant) -> None:
    url = serve(plain, token="right")
    with client_of(url, "wrong") as client, pytest.raises(openai.AuthenticationError):
        client.models.list()
    with client_of(url, "right") as client:
        assert [model.id for model in client.models.list()] == ["tiny"]
        with pytest.raises(openai.NotFoundError, match="only tiny"):
            client.chat.completions.create(model="other", messages=HELLO)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "localhost"}, 200),
        ({"Host": "LOCALHOST:99"}, 200),
        ({"Host": "[::1]:8000"}, 200),
        ({"Host": "model.lan"}, 200),
        ({"Host": "evil.example"}, 421),
        ({"Host": "localhost.evil.example"}, 421),
        ({"Host": "evil.example:127.0.0.1"}, 421),
        ({"Host": "127.0.0.1@evil.example"}, 421),
        ({"Host": ""}, 421),
        ({"Host": "localhost", "Origin": "http://localhost"}, 200),
        ({"Host": "localhost:80", "Origin": "http://localhost"}, 403),
        ({"Host": "localhost", "Origin": "https://localhost"}, 403),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": ""}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Sec-Fetch-Site": "none"}, 200),
    ],
)
def test_hosts_and_origins(served: str, headers: dict[str, str], status: int) -> None:
    for path in ("/health", "/v1/models"):
        assert httpx.get(f"{served}{path}", headers=headers).status_code == status
    response = httpx.post(f"{served}{CHAT}", json={"messages": HELLO, "max_tokens": 1}, headers=headers)
    assert response.status_code == status


@pytest.fixture(scope="module")
def served() -> Iterator[str]:
    from prefkit.data.template import ChatTemplate
    from tests.conftest import make_model, make_tokenizer

    assistant = Assistant(make_model().eval(), ChatTemplate(make_tokenizer()), "tiny", compares=False)
    with running(assistant, hosts=["model.lan"]) as url:
        yield url


def raw(url: str, request: bytes) -> bytes:
    """What the server sends to bytes that no client would send, until it closes the connection."""
    host, _, port = url.removeprefix("http://").partition(":")
    received = b""
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(request)
        with contextlib.suppress(ConnectionResetError):
            while piece := connection.recv(65536):
                received += piece
    return received


def test_requests_no_client_sends(serve: Serve, plain: Assistant, monkeypatch: pytest.MonkeyPatch) -> None:
    url = serve(plain, max_body=1000)
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    chunks = b"64\r\n" + b"x" * 100 + b"\r\n"
    without_length = raw(url, head + b"Transfer-Encoding: chunked\r\n\r\n" + chunks * 11)
    assert without_length.startswith(b"HTTP/1.1 413 ") and b"more than 1000 bytes" in without_length
    with monkeypatch.context() as patch:
        patch.setattr(http, "_BODY_SECONDS", 0.1)
        assert raw(url, head + b"Content-Length: 9\r\n\r\n{").startswith(b"HTTP/1.1 408 ")
    for request in (
        b"GET /health HTTP/1.1\r\nConnection: close\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\nConnection: close\r\n\r\n",
        head + b"Content-Length: x\r\n\r\n",
        b"\x16\x03\x01 hello\r\n\r\n",
    ):
        assert raw(url, request).startswith(b"HTTP/1.1 400 ")
    assert raw(url, b"GET /health HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.1 421 ")
    assert post(url).status_code == 200


def test_one_at_a_time_and_some_wait(serve: Serve, plain: Assistant) -> None:
    gate = threading.Event()
    running_now: list[int] = []
    most: list[int] = []

    def hold(number: int) -> None:
        running_now.append(number)
        most.append(len(running_now))
        gate.wait(20)
        running_now.remove(number)

    script(plain, "ok", hold)
    url = serve(plain, max_waiting=2)
    with ThreadPoolExecutor(4) as pool:
        requests = {pool.submit(post, url) for _ in range(4)}
        refused, others = wait(requests, 20, FIRST_COMPLETED)
        gate.set()
        (response,) = [request.result() for request in refused]
        assert response.status_code == 429 and int(response.headers["retry-after"]) > 0
        assert response.json()["error"]["code"] == "queue_full"
        answers = [request.result().json()["choices"][0]["message"]["content"] for request in others]
    assert answers == ["ok"] * 3 and max(most) == 1
    assert post(url).status_code == 200


@pytest.fixture
def queues(monkeypatch: pytest.MonkeyPatch) -> list[AnswerQueue]:
    """The queues of the servers that are started."""
    made: list[AnswerQueue] = []
    monkeypatch.setattr(api, "AnswerQueue", lambda size: made.append(AnswerQueue(size)) or made[-1])
    return made


@contextlib.contextmanager
def asking(url: str, body: Any) -> Iterator[None]:
    """A client that sends a request and leaves at the end of the block."""
    content = json.dumps(body).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as connection:
        connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
        yield


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_the_model(
    serve: Serve, plain: Assistant, queues: list[AnswerQueue], stream: bool
) -> None:
    numbers: list[int] = []

    def wait_for_the_end(number: int) -> None:
        numbers.append(number)
        if number == 4:
            (job,) = queues[0]._jobs
            assert job._stop.wait(20)

    script(plain, "x " * 50, wait_for_the_end)
    url = serve(plain)
    with asking(url, {"messages": HELLO, "stream": stream}):
        eventually(lambda: 4 in numbers)
    eventually(lambda: not queues[0]._jobs)
    assert numbers == [0, 1, 2, 3, 4]
    assert post(url, max_tokens=2).status_code == 200


def test_a_client_that_leaves_the_queue_frees_its_place(
    serve: Serve, plain: Assistant, queues: list[AnswerQueue]
) -> None:
    begun, gate = threading.Event(), threading.Event()
    script(plain, "ok", lambda number: (begun.set(), gate.wait(20)))
    url = serve(plain, max_waiting=1)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(post, url)
        assert begun.wait(20)
        with asking(url, {"messages": HELLO}):
            eventually(lambda: len(queues[0]._jobs) == 2)
            assert post(url).status_code == 429
        eventually(lambda: len(queues[0]._jobs) == 1)
        gate.set()
        assert first.result().status_code == 200
    assert post(url).status_code == 200


def test_our_own_errors(serve: Serve, plain: Assistant, caplog: pytest.LogCaptureFixture) -> None:
    def fail(number: int) -> None:
        if number == 6:
            raise RuntimeError("a secret detail")

    script(plain, "one two three", fail)
    url = serve(plain)
    prompt = [{"role": "user", "content": "a private question"}]
    response = post(url, {"messages": prompt})
    assert response.status_code == 500 and response.json()["error"]["type"] == "server_error"
    streamed = post(url, {"messages": prompt, "stream": True})
    assert streamed.status_code == 200 and '"server_error"' in streamed.text
    assert "[DONE]" not in streamed.text
    for text in (response.text, streamed.text):
        assert "secret" not in text and "Traceback" not in text
    assert "private question" not in caplog.text


def test_the_server_ends_while_a_request_runs(
    plain: Assistant, queues: list[AnswerQueue], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http, "_SHUTDOWN_SECONDS", 0.1)
    begun = threading.Event()
    script(plain, "x", lambda number: (begun.set(), next(iter(queues[0]._jobs))._stop.wait(20)))
    with ThreadPoolExecutor(1) as pool:
        with running(plain) as url:
            request = pool.submit(lambda: httpx.post(f"{url}{CHAT}", json={"messages": HELLO}, timeout=30))
            assert begun.wait(20)
        with contextlib.suppress(httpx.HTTPError):
            request.result()


def test_only_loopback_needs_no_token(plain: Assistant) -> None:
    for host in ("0.0.0.0", "192.168.1.5", "::", "", "example.org"):
        with pytest.raises(UserError, match="needs a token"):
            api.serve(plain, GREEDY, host, 0, None)
        http.check_address(host, "token")
    for host in ("127.0.0.1", "127.1.2.3", "::1", "localhost"):
        http.check_address(host, None)
    with pytest.raises(UserError, match="token is empty"):
        http.check_address("127.0.0.1", " ")


def test_a_port_that_is_taken(plain: Assistant) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"cannot listen on 127.0.0.1:{port}: Address already in use"):
            api.serve(plain, GREEDY, "127.0.0.1", port, None)


def test_serve_says_where(
    plain: Assistant, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(self: Any, sockets: list[socket.socket]) -> None:
        for listener in sockets:
            listener.close()
        raise KeyboardInterrupt

    monkeypatch.setattr(http.uvicorn.Server, "run", interrupted)
    api.serve(plain, GREEDY, "127.0.0.1", 0, None)
    said = capsys.readouterr().out
    assert said.startswith("Serving tiny on http://127.0.0.1:") and said.endswith(
        "/v1; Ctrl-C ends it.\nStopped.\n"
    )


def test_a_missing_extra_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    for name in ("api", "http"):
        monkeypatch.delitem(sys.modules, f"prefkit.serve.{name}")
    with pytest.raises(UserError, match=r"pip install 'prefkit\[serve\]'"):
        import prefkit.serve.api  # noqa: F401
