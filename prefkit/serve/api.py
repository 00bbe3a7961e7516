"""An HTTP API in the form of OpenAI's chat completions, for one model.

A request goes through `http.Gate` (who asks), `parse_request` (what is asked) and the `AnswerQueue` (when it
is answered). Nothing of a conversation is logged.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, nullcontext
from typing import Any

from prefkit.data.messages import RowError
from prefkit.serve.assistant import Answer, Assistant, PromptTooLong, Sampling, respond
from prefkit.serve.http import (
    OUR_ERROR,
    ApiError,
    bracketed,
    check_address,
    error_body,
    make_base_app,
    read_body,
    respond_to_error,
    run_app,
)
from prefkit.serve.images import check_images, read_images
from prefkit.serve.respond import AnswerQueue, ChatRequest, Job, parse_request

# After `http`, which says how to install them.
from fastapi import FastAPI, Request  # isort: skip
from fastapi.responses import JSONResponse, Response, StreamingResponse  # isort: skip

logger = logging.getLogger(__name__)
_BODY, _BODY_WITH_IMAGES = 1_000_000, 16_000_000  # most bytes of a request


def serve(
    assistant: Assistant,
    sampling: Sampling,
    host: str = "127.0.0.1",
    port: int = 8000,
    token: str | None = None,
    hosts: Sequence[str] = (),
    media_hosts: Sequence[str] = (),
) -> None:
    """Serve until interrupted. `hosts` are further names under which clients reach this machine; images of
    requests may be fetched from `media_hosts`.

    Raises `UserError` where others could reach it without a token, and when the address is not to be had.
    """
    check_address(host, token)
    names = [bracketed(host), *hosts]
    app = make_app(assistant, sampling, token=token, hosts=names, media_hosts=media_hosts)
    run_app(app, " and ".join(_model_names(assistant)), host, port)


def make_app(
    assistant: Assistant,
    sampling: Sampling,
    *,
    token: str | None = None,
    hosts: Sequence[str] = (),
    media_hosts: Sequence[str] = (),
    max_body: int | None = None,
    max_messages: int = 256,
    max_waiting: int = 8,
) -> FastAPI:
    """The application: `sampling` is what holds where a request says nothing, its `max_new_tokens` the most
    that a request may ask for; `hosts` are names besides loopback's that a request may have as Host,
    `media_hosts` those that images may be fetched from."""
    sees = assistant.template.vision is not None
    most_bytes = max_body or (_BODY_WITH_IMAGES if sees else _BODY)
    queue = AnswerQueue(max_waiting)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(queue.close)

    app = make_base_app(lifespan, hosts, token)
    app.add_exception_handler(PromptTooLong, _refuse_length)
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
        body = await read_body(request, most_bytes)
        asked = parse_request(body, models, sampling, max_messages)
        check_images([asked.messages], sees)
        try:
            images = await asyncio.to_thread(read_images, asked.messages, media_hosts)
        except RowError as error:
            raise ApiError(400, f"messages: {error}.", "messages") from error
        job = queue.submit(
            lambda stop: respond(assistant, asked.messages, asked.sampling, stop, asked.stop, images),
            nullcontext if asked.model == assistant.name else assistant.untuned,
        )
        return await _respond(request, asked, job)

    return app


async def _refuse_length(request: Request, error: Exception) -> Response:
    too_long = ApiError(400, str(error), "messages", "context_length_exceeded")
    return await respond_to_error(request, too_long)


def _model_names(assistant: Assistant) -> list[str]:
    return [assistant.name, *([f"{assistant.name}:base"] if assistant.compares else [])]


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
        yield _event(error_body(500, OUR_ERROR))
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
