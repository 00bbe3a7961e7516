"""What the servers have in common: who may ask, how a body is read, and what an error looks like.

A request goes through `Gate` (who asks), `read_body` and `read_fields` (what is asked). Errors have the form
of OpenAI's. Nothing of a request is logged.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import hmac
import ipaddress
import json
import re
import socket
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager, suppress
from typing import Any, TypeVar

from prefkit.config.errors import UserError
from prefkit.config.suggest import nearest

try:
    import uvicorn
    from fastapi import FastAPI, Request
    from fastapi.responses import JSONResponse, Response
    from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
    from starlette.datastructures import Headers
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect
    from starlette.types import ASGIApp, Receive, Scope, Send
except ImportError as missing:
    raise UserError("a server needs fastapi and uvicorn: pip install 'prefkit[serve]'") from missing

OUR_ERROR = "An error of the server; its log says more."
_BODY_SECONDS, _RETRY_SECONDS, _SHUTDOWN_SECONDS = 10, 5, 3
_LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")
Parsed = TypeVar("Parsed", bound=BaseModel)


class ApiError(UserError):
    """A request that is refused, with the HTTP status and what OpenAI's error body says."""

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None, **headers: str
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


class QueueFull(Exception):
    """As many requests wait as may."""


class Fields(BaseModel):
    """A JSON object of known fields; null is as good as absent."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, fields: Any) -> Any:
        if not isinstance(fields, dict):
            raise ValueError("must be an object")
        return {name: value for name, value in fields.items() if value is not None}


def make_base_app(
    lifespan: Callable[[FastAPI], AbstractAsyncContextManager[None]], hosts: Sequence[str], token: str | None
) -> FastAPI:
    """An application without routes, behind the gate; `hosts` are names besides loopback's that a request may
    have as Host."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False, lifespan=lifespan)
    app.add_middleware(Gate, hosts=hosts, token=token)
    gone = (ClientDisconnect, concurrent.futures.CancelledError)
    for kind in (HTTPException, UserError, QueueFull, *gone, Exception):
        app.add_exception_handler(kind, respond_to_error)
    return app


def run_app(app: FastAPI, what: str, host: str, port: int) -> None:
    """Serve until interrupted. Raises `UserError` when the address is not to be had."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, port), family=family)
    except OSError as error:
        raise UserError(f"cannot listen on {bracketed(host)}:{port}: {error.strerror or error}") from error
    address = f"http://{bracketed(host)}:{listener.getsockname()[1]}/v1"
    print(f"Serving {what} on {address}; Ctrl-C ends it.", flush=True)
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


async def read_body(request: Request, limit: int) -> bytes:
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


def read_fields(body: bytes) -> dict[str, Any]:
    """The JSON object in a body. Raises `ApiError` for anything else."""
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, "The body is not JSON.", code="invalid_json") from error
    if not isinstance(fields, dict):
        raise ApiError(400, "The body is not a JSON object.")
    return fields


def parse(form: type[Parsed], fields: dict[str, Any]) -> Parsed:
    """The fields in their form. Raises `ApiError` that names the first which is malformed or unknown."""
    try:
        return form.model_validate(fields)
    except ValidationError as error:
        raise _first_problem(error, list(form.model_fields)) from error


def check_size(messages: object, limit: int) -> None:
    """Raises `ApiError` for a list of more messages than `limit`."""
    if isinstance(messages, list) and len(messages) > limit:
        raise ApiError(400, f"There are {len(messages)} messages; {limit} are allowed.", "messages")


def _first_problem(error: ValidationError, known: list[str]) -> ApiError:
    problem = error.errors(include_url=False, include_input=False)[0]
    parts = [f"[{part}]" if isinstance(part, int) else f".{part}" for part in problem["loc"]]
    param = "".join(parts).lstrip(".")
    if problem["type"] == "extra_forbidden":
        near = nearest(param, known) if len(param) < 40 else None
        hint = f"; did you mean {near}?" if near else "."
        return ApiError(400, f"{param} is not a known field{hint}", param, "unknown_field")
    if problem["type"] == "value_error":
        return ApiError(400, f"{param} {problem['ctx']['error']}.", param)
    return ApiError(400, f"{param or 'The body'}: {problem['msg']}.", param or None)


def error_body(status: int, message: str, param: str | None = None, code: str | None = None) -> Any:
    """An error as OpenAI's clients read it."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    shown = {"message": _shown(message), "type": kind, "param": param and _shown(param)}
    return {"error": {**shown, "code": code}}


def _shown(text: str) -> str:
    """A text that may quote the request: short, and without halves of surrogate pairs."""
    text = text if len(text) <= 500 else text[:497] + "..."
    return text.encode(errors="replace").decode()


async def respond_to_error(request: Request, error: Exception) -> Response:
    """The response to whatever a request raised; 500 for what is our own error."""
    if isinstance(error, ClientDisconnect | concurrent.futures.CancelledError):
        return Response(status_code=499)  # nobody reads it
    if isinstance(error, HTTPException):
        return JSONResponse(error_body(error.status_code, error.detail), error.status_code, error.headers)
    refusal = _refusal(error)
    if refusal is None:
        return JSONResponse(error_body(500, OUR_ERROR), 500)
    body = error_body(refusal.status, str(refusal), refusal.param, refusal.code)
    return JSONResponse(body, refusal.status, refusal.headers)


def _refusal(error: Exception) -> ApiError | None:
    """What the client can mend, None where that is nothing."""
    if isinstance(error, QueueFull):
        message = "The model is busy, and as many requests wait as may."
        return ApiError(429, message, code="queue_full", Retry_After=str(_RETRY_SECONDS))
    if isinstance(error, UserError) and not isinstance(error, ApiError):
        return ApiError(400, str(error), "messages")
    return error if isinstance(error, ApiError) else None


class Gate:
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
                response = await respond_to_error(Request(scope), error)
                return await response(scope, receive, send)
        await self.app(scope, receive, send)

    def _check(self, scope: Scope, headers: Headers) -> None:
        host = headers.get("host", "").lower()
        arrived = bracketed(scope["server"][0]) if scope.get("server") else None
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


def bracketed(host: str) -> str:
    """A host as it stands in a URL."""
    return f"[{host}]" if ":" in host else host
