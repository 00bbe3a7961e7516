"""An HTTP API in the form of OpenAI's chat completions, for one model.

A request goes through `_Gate` (who asks), `_read_body` and `parse_request` (what is asked) and the
`AnswerQueue` (when it is answered). Nothing of a conversation is logged.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import hmac
import ipaddress
import json
import logging
import re
import socket
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, nullcontext, suppress
from typing import Any

from prefkit.config.errors import UserError
from prefkit.serve.assistant import Answer, Assistant, PromptTooLong, Sampling, respond

try:
    import uvicorn
    from fastapi import FastAPI, Request
    from fastapi.responses import JSONResponse, Response, StreamingResponse
    from starlette.datastructures import Headers
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect
    from starlette.types import ASGIApp, Receive, Scope, Send

    from prefkit.serve.respond import AnswerQueue, ApiError, ChatRequest, Job, QueueFull, parse_request
except ImportError as missing:
    raise UserError("prefkit api needs fastapi and uvicorn: pip install 'prefkit[serve]'") from missing

logger = logging.getLogger(__name__)

_BODY_SECONDS, _RETRY_SECONDS, _SHUTDOWN_SECONDS = 10, 5, 3
_OUR_ERROR = "An error of the server; its log says more."
_LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")


def serve(
    assistant: Assistant,
    sampling: Sampling,
    host: str = "127.0.0.1",
    port: int = 8000,
    token: str | None = None,
    hosts: Sequence[str] = (),
) -> None:
    """Serve until interrupted. `hosts` are further names under which clients reach this machine.

    Raises `UserError` where others could reach it without a token, and when the address is not to be had.
    """
    check_address(host, token)
    app = make_app(assistant, sampling, token=token, hosts=[_bracketed(host), *hosts])
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, port), family=family)
    except OSError as error:
        raise UserError(f"cannot listen on {_bracketed(host)}:{port}: {error.strerror or error}") from error
    address = f"http://{_bracketed(host)}:{listener.getsockname()[1]}/v1"
    print(f"Serving {' and '.join(_model_names(assistant))} on {address}; Ctrl-C ends it.", flush=True)
    with suppress(KeyboardInterrupt):
        make_server(app).run(sockets=[listener])
    print("Stopped.")


def check_address(host: str, token: str | None) -> None:
    """Raises `UserError` where anybody but this machine could reach `host` without a token."""
    if token is not None and not token.strip():
        raise UserError("the token is empty: give one, or none and a loopback host")
    try:
        is_loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_loopback = host == "localhost"
    if token is None and not is_loopback:
        raise UserError(
            f"{host} can be reached from other machines: that needs a token in the environment variable "
            "API_KEY. Without one only 127.0.0.1 is served."
        )


def make_server(app: FastAPI) -> uvicorn.Server:
    """The server, without what a machine that serves one model does not need."""
    config = uvicorn.Config(
        app,
        http="h11",
        ws="none",
        proxy_headers=False,
        server_header=False,
        access_log=False,
        log_level="warning",
        timeout_graceful_shutdown=_SHUTDOWN_SECONDS,
    )
    return uvicorn.Server(config)


def make_app(
    assistant: Assistant,
    sampling: Sampling,
    *,
    token: str | None = None,
    hosts: Sequence[str] = (),
    max_body: int = 1_000_000,
    max_messages: int = 256,
    max_waiting: int = 8,
) -> FastAPI:
    """The application: `sampling` is what holds where a request says nothing, its `max_new_tokens` the most
    that a request may ask for; `hosts` are names besides loopback's that a request may have as Host."""
    queue = AnswerQueue(max_waiting)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(queue.close)

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False, lifespan=lifespan)
    app.add_middleware(_Gate, hosts=hosts, token=token)
    gone = (ClientDisconnect, concurrent.futures.CancelledError)
    for kind in (HTTPException, UserError, QueueFull, *gone, Exception):
        app.add_exception_handler(kind, _respond_to_error)
    models = _model_names(assistant)
    started = int(time.time())

    @app.get("/health")
    async def health() -> Response:
        return JSONResponse({"status": "ok"})

    @app.get("/v1/models")
    async def list_models() -> Response:
        shared = {"object": "model", "created": started, "owned_by": "prefkit"}
        return JSONResponse({"object": "list", "data": [{"id": name, **shared} for name in models]})

    @app.post("/v1/chat/completions")
    async def complete(request: Request) -> Response:
        body = await _read_body(request, max_body)
        asked = parse_request(body, models, sampling, max_messages)
        job = queue.submit(
            lambda stop: respond(assistant, asked.messages, asked.sampling, stop, asked.stop),
            nullcontext if asked.model == assistant.name else assistant.untuned,
        )
        return await _respond(request, asked, job)

    return app


def _model_names(assistant: Assistant) -> list[str]:
    return [assistant.name, *([f"{assistant.name}:base"] if assistant.compares else [])]


async def _read_body(request: Request, limit: int) -> bytes:
    """The body of a request for JSON. Raises `ApiError` as soon as it is too long or too slow."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "The Content-Type must be application/json.")
    body = bytearray()
    try:
        async with asyncio.timeout(_BODY_SECONDS):
            async for chunk in request.stream():
                body += chunk
                if len(body) > limit:
                    raise ApiError(413, f"The body has more than {limit} bytes.", Connection="close")
    except TimeoutError as error:
        message = f"The body did not arrive within {_BODY_SECONDS} seconds."
        raise ApiError(408, message, Connection="close") from error
    return bytes(body)


async def _respond(request: Request, asked: ChatRequest, job: Job) -> Response:
    job.watch(request.receive)
    answer = await job.begun()
    head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": asked.model}
    if asked.stream:
        events = _events(job, answer, head, asked.include_usage)
        return StreamingResponse(events, 200, {"Cache-Control": "no-store"}, "text/event-stream")
    text = "".join([piece async for piece in job])
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": answer.reason}
    body = {**head, "object": "chat.completion", "choices": [choice], "usage": _usage(answer)}
    return JSONResponse(body)


async def _events(job: Job, answer: Answer, head: dict[str, Any], with_usage: bool) -> AsyncIterator[str]:
    """The answer as server-sent events: role, pieces of text, how it ended, usage if asked for."""
    head = {**head, "object": "chat.completion.chunk", **({"usage": None} if with_usage else {})}

    def chunk(delta: dict[str, str], reason: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        return _event({**head, "choices": [choice]})

    yield chunk({"role": "assistant", "content": ""})
    try:
        async for piece in job:
            yield chunk({"content": piece})
    except Exception:
        logger.exception("an answer failed while it was sent")
        yield _event(_error_body(500, _OUR_ERROR))
        return
    yield chunk({}, answer.reason)
    if with_usage:
        yield _event({**head, "choices": [], "usage": _usage(answer)})
    yield "data: [DONE]\n\n"


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


def _usage(answer: Answer) -> dict[str, int]:
    return {
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": answer.completion_tokens,
        "total_tokens": answer.prompt_tokens + answer.completion_tokens,
    }


def _error_body(status: int, message: str, param: str | None = None, code: str | None = None) -> Any:
    kind = "server_error" if status >= 500 else "invalid_request_error"
    shown = {"message": _shown(message), "type": kind, "param": param and _shown(param)}
    return {"error": {**shown, "code": code}}


def _shown(text: str) -> str:
    """A text that may quote the request: short, and without halves of surrogate pairs."""
    text = text if len(text) <= 500 else text[:497] + "..."
    return text.encode(errors="replace").decode()


async def _respond_to_error(request: Request, error: Exception) -> Response:
    """The response to whatever a request raised; 500 for what is our own error."""
    if isinstance(error, ClientDisconnect | concurrent.futures.CancelledError):
        return Response(status_code=499)  # nobody reads it
    if isinstance(error, HTTPException):
        return JSONResponse(_error_body(error.status_code, error.detail), error.status_code, error.headers)
    refusal = _refusal(error)
    if refusal is None:
        return JSONResponse(_error_body(500, _OUR_ERROR), 500)
    body = _error_body(refusal.status, str(refusal), refusal.param, refusal.code)
    return JSONResponse(body, refusal.status, refusal.headers)


def _refusal(error: Exception) -> ApiError | None:
    """What the client can mend, None where that is nothing."""
    if isinstance(error, QueueFull):
        message = "The model is busy, and as many requests wait as may."
        return ApiError(429, message, code="queue_full", Retry_After=str(_RETRY_SECONDS))
    if isinstance(error, PromptTooLong):
        return ApiError(400, str(error), "messages", "context_length_exceeded")
    if isinstance(error, UserError) and not isinstance(error, ApiError):
        return ApiError(400, str(error), "messages")
    return error if isinstance(error, ApiError) else None


class _Gate:
    """Refuses requests that a foreign web page or a person without the token may have sent.

    A page that rebinds its own name to this address has that name as Host. The address at which the
    request arrived is no name, so it is always allowed.
    """

    def __init__(self, app: ASGIApp, hosts: Sequence[str], token: str | None) -> None:
        self.app = app
        self.hosts = {host.lower() for host in (*_LOOPBACK_NAMES, *hosts)}
        self.token = token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                self._check(scope, Headers(scope=scope))
            except ApiError as error:
                response = await _respond_to_error(Request(scope), error)
                return await response(scope, receive, send)
        await self.app(scope, receive, send)

    def _check(self, scope: Scope, headers: Headers) -> None:
        host = headers.get("host", "").lower()
        arrived = _bracketed(scope["server"][0]) if scope.get("server") else None
        if re.sub(r":\d+$", "", host) not in self.hosts | {arrived}:
            raise ApiError(421, "This host name is not served here.", code="unknown_host")
        origin, site = headers.get("origin"), headers.get("sec-fetch-site", "none")
        if origin not in (None, f"{scope['scheme']}://{host}") or site not in ("none", "same-origin"):
            raise ApiError(403, "Requests of web pages of other origins are refused.", code="cross_origin")
        if self.token is None or scope["path"] == "/health":
            return
        given = headers.get("authorization", "").encode("latin-1")
        if not hmac.compare_digest(given, f"Bearer {self.token}".encode()):
            message = "Send the token of this server as `Authorization: Bearer TOKEN`."
            raise ApiError(401, message, code="invalid_api_key", WWW_Authenticate="Bearer")


def _bracketed(host: str) -> str:
    """A host as it stands in a URL."""
    return f"[{host}]" if ":" in host else host
