"""An HTTP server for the scores of a reward model.

`/v1/rewards` takes chat messages, to which the template of the training is applied. `/v1/score/evaluation`
is LLaMA-Factory's protocol: texts that the template was applied to already. What waits when the model is
free goes through it together; nothing of a request is logged.
"""

from __future__ import annotations

import asyncio
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager, contextmanager, suppress
from queue import Empty, SimpleQueue
from typing import Any

from prefkit import __version__
from prefkit.config.errors import UserError
from prefkit.data.encode import TokenizedExample
from prefkit.data.examples import Message, StoredImage
from prefkit.data.messages import TAGS, Degenerate, RowError, read_messages, read_text, read_tools
from prefkit.model.scorer import RowTooLong, Scorer
from prefkit.serve.http import (
    ApiError,
    Fields,
    QueueFull,
    bracketed,
    check_address,
    check_size,
    make_base_app,
    parse,
    read_body,
    read_fields,
    run_app,
)
from prefkit.serve.images import check_images, read_images

# After `http`, which says how to install them.
from fastapi import FastAPI, Request  # isort: skip
from fastapi.responses import JSONResponse, Response  # isort: skip
from pydantic import Field  # isort: skip
from starlette.requests import ClientDisconnect  # isort: skip

Encode = Callable[[], list[TokenizedExample]]
_TOGETHER = 256  # rows of several requests that go through the model at once


class _Texts(Fields):
    messages: list[str] = Field(min_length=1)
    model: str | None = None
    max_length: int | None = Field(None, ge=1)


class _Conversations(Fields):
    messages: list[Any] = Field(min_length=1)
    model: str | None = None
    tools: list[Any] | None = None
    truncate: bool = False  # cut what is too long, instead of refusing it
    unfinished: tuple[int, ...] = Field((), strict=False)  # whose answer was cut off: its turn has no end


def serve(
    scorer: Scorer,
    host: str = "127.0.0.1",
    port: int = 8000,
    token: str | None = None,
    media_hosts: Sequence[str] = (),
) -> None:
    """Serve until interrupted; images of requests may be fetched from `media_hosts`.

    Raises `UserError` where others could reach it without a token, and when the address is not to be had.
    """
    check_address(host, token)
    app = make_app(scorer, token=token, hosts=[bracketed(host)], media_hosts=media_hosts)
    run_app(app, f"the scores of {scorer.name}", host, port)


def make_app(
    scorer: Scorer,
    *,
    token: str | None = None,
    hosts: Sequence[str] = (),
    media_hosts: Sequence[str] = (),
    max_body: int = 16_000_000,
    max_rows: int = 1024,
    max_waiting: int = 4096,
) -> FastAPI:
    """The application: a request has at most `max_rows` rows, and `max_waiting` rows of all wait; `hosts` are
    names besides loopback's that a request may have as Host, `media_hosts` those that images may be fetched
    from."""
    queue = ScoreQueue(scorer, max_waiting)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(queue.close)

    app = make_base_app(lifespan, hosts, token)
    started = int(time.time())
    facts = {"server": "prefkit", "version": __version__, "serves": "rewards", "model": scorer.name}

    @app.get("/health")
    async def health() -> Response:
        sees = scorer.template.vision is not None
        return JSONResponse({"status": "ok", **facts, "max_length": scorer.max_length, "sees": sees})

    @app.get("/v1/models")
    async def list_models() -> Response:
        model = {"id": scorer.name, "object": "model", "created": started, "owned_by": "prefkit"}
        return JSONResponse({"object": "list", "data": [model]})

    @app.post("/v1/score/evaluation")
    async def score_texts(request: Request) -> Response:
        fields = read_fields(await read_body(request, max_body))
        check_size(fields.get("messages"), max_rows)
        asked = parse(_Texts, fields)
        scores = await queue.score(request, len(asked.messages), lambda: _encode_texts(scorer, asked))
        head = {"id": f"scoreval-{uuid.uuid4().hex}", "object": "score.evaluation", "model": scorer.name}
        return JSONResponse({**head, "scores": scores})

    @app.post("/v1/rewards")
    async def score_conversations(request: Request) -> Response:
        fields = read_fields(await read_body(request, max_body))
        check_size(fields.get("messages"), max_rows)
        asked = parse(_Conversations, fields)
        conversations = _conversations(asked)
        tools = _read_tools(asked.tools)
        check_images((messages for _, messages in conversations), scorer.template.vision is not None)
        images = await asyncio.to_thread(_read_images, conversations, media_hosts)
        scores = await queue.score(
            request,
            len(conversations),
            lambda: _encode_conversations(scorer, conversations, images, tools, asked),
        )
        head = {"id": f"reward-{uuid.uuid4().hex}", "object": "reward", "model": scorer.name}
        return JSONResponse({**head, "rewards": scores})

    return app


def _encode_texts(scorer: Scorer, asked: _Texts) -> list[TokenizedExample]:
    found = []
    for number, text in enumerate(asked.messages):
        with _naming(f"messages[{number}]"):
            found.append(scorer.encode_text(read_text(text, "it"), asked.max_length))
    return found


def _conversations(asked: _Conversations) -> list[tuple[str, list[Message]]]:
    """Each conversation with its place in the request: `messages` is one, or a list of them."""
    is_one = isinstance(asked.messages[0], dict)
    found = []
    for place, turns in [("messages", asked.messages)] if is_one else _numbered(asked.messages):
        with _naming(place):
            messages = read_messages(turns, TAGS["openai"], "the conversation")
        if messages[-1].role != "assistant":
            raise ApiError(400, f"{place} ends without a message by the assistant to score.", place)
        if len(messages) == 1:
            raise ApiError(400, f"{place} has no message before the assistant's.", place)
        found.append((place, messages))
    if asked.unfinished and not 0 <= min(asked.unfinished) <= max(asked.unfinished) < len(found):
        raise ApiError(400, f"unfinished names none of the {len(found)} conversations.", "unfinished")
    return found


def _read_images(
    conversations: list[tuple[str, list[Message]]], hosts: Sequence[str]
) -> list[tuple[StoredImage, ...]]:
    """The images of each conversation."""
    found = []
    for place, messages in conversations:
        with _naming(place):
            found.append(read_images(messages, hosts))
    return found


def _numbered(conversations: list[Any]) -> list[tuple[str, Any]]:
    return [(f"messages[{number}]", turns) for number, turns in enumerate(conversations)]


def _read_tools(tools: list[Any] | None) -> tuple[Any, ...]:
    with _naming("tools"):
        return read_tools(tools, "it")


def _encode_conversations(
    scorer: Scorer,
    conversations: list[tuple[str, list[Message]]],
    images: list[tuple[StoredImage, ...]],
    tools: tuple[Any, ...],
    asked: _Conversations,
) -> list[TokenizedExample]:
    encode = scorer.fit_answer if asked.truncate else scorer.encode_answer
    found = []
    for number, (place, messages) in enumerate(conversations):
        has_ended = number not in asked.unfinished
        with _naming(place):
            found.append(encode(messages[:-1], messages[-1], tools, has_ended, images[number]))
    return found


@contextmanager
def _naming(place: str) -> Iterator[None]:
    """Let what is wrong with a part of the request leave as an `ApiError` that names the part."""
    try:
        yield
    except RowTooLong as error:
        raise ApiError(400, f"{place}: {error}.", place, "context_length_exceeded") from error
    except (RowError, Degenerate, UserError) as error:
        raise ApiError(400, f"{place}: {error}.", place) from error


class ScoreQueue:
    """Scores requests together: those that wait when the model is free go through it at once.

    At most `max_rows` rows wait. Encoding waits for its turn too: a tokenizer is not to be used by two
    threads.
    """

    def __init__(self, scorer: Scorer, max_rows: int) -> None:
        self._scorer = scorer
        self._max_rows = max_rows
        self._rows = 0
        self._waiting: SimpleQueue[tuple[Encode, Future[list[float]]] | None] = SimpleQueue()
        self._worker = threading.Thread(target=self._work, name="scores", daemon=True)
        self._worker.start()

    async def score(self, request: Request, num_rows: int, encode: Encode) -> list[float]:
        """The scores of the rows that `encode` gives, one response each.

        Raises `QueueFull`, what `encode` raises, and `ClientDisconnect` when nobody waits for them any more.
        """
        if self._rows and self._rows + num_rows > self._max_rows:
            raise QueueFull
        self._rows += num_rows
        future: Future[list[float]] = Future()
        self._waiting.put((encode, future))
        scores = asyncio.wrap_future(future)
        gone = asyncio.create_task(_until_gone(request))
        try:
            await asyncio.wait((scores, gone), return_when=asyncio.FIRST_COMPLETED)
            if scores.done():
                return scores.result()
            raise ClientDisconnect
        finally:
            self._rows -= num_rows
            scores.cancel()  # it leaves the queue, if it waits there
            gone.cancel()

    def _work(self) -> None:
        is_open = True
        while is_open:
            jobs = [self._waiting.get()]
            rows: list[TokenizedExample] = []
            taken: list[tuple[Future[list[float]], int]] = []
            while jobs:
                job = jobs.pop()
                if job is None:
                    is_open = False
                    break
                encode, future = job
                if future.set_running_or_notify_cancel():
                    self._take(encode, future, rows, taken)
                if len(rows) < _TOGETHER:
                    with suppress(Empty):
                        jobs.append(self._waiting.get_nowait())
            self._answer(rows, taken)

    def _take(
        self,
        encode: Encode,
        future: Future[list[float]],
        rows: list[TokenizedExample],
        taken: list[tuple[Future[list[float]], int]],
    ) -> None:
        try:
            more = encode()
        except Exception as error:  # noqa: BLE001 - it is the request's, whose handler raises it
            future.set_exception(error)
            return
        rows += more
        taken.append((future, len(more)))

    def _answer(self, rows: list[TokenizedExample], taken: list[tuple[Future[list[float]], int]]) -> None:
        try:
            scores = [score for (score,) in self._scorer.score(rows)]
        except Exception as error:  # noqa: BLE001 - as above
            for future, _ in taken:
                future.set_exception(error)
            return
        for future, number in taken:
            future.set_result(scores[:number])
            scores = scores[number:]

    def close(self) -> None:
        """Finish what waits, and end."""
        self._waiting.put(None)
        self._worker.join()


async def _until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
