"""A request of the API, from its body to its turn at the model."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from prefkit.data.examples import Message
from prefkit.data.messages import PLACEHOLDER
from prefkit.serve.assistant import Answer, Sampling
from prefkit.serve.http import ApiError, Fields, QueueFull, check_size, parse, read_fields

MakeAnswer = Callable[[threading.Event], Answer]

# Fields of OpenAI's that are not implemented, each with the values that ask for nothing.
_NOT_IMPLEMENTED: dict[str, tuple[object, ...]] = {
    "audio": (),
    "frequency_penalty": (0,),
    "function_call": ("none",),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "modalities": (["text"],),
    "n": (1,),
    "prediction": (),
    "presence_penalty": (0,),
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
    "store": (False,),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "verbosity": (),
    "web_search_options": (),
}
# Fields that do not change the answer.
_IGNORED = {
    *("metadata", "parallel_tool_calls", "prompt_cache_key", "safety_identifier", "service_tier", "user"),
}
_ROLES: dict[str, Literal["system", "user", "assistant"]] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
}


class _Turn(Fields):
    role: Literal["system", "developer", "user", "assistant"]
    content: str

    @field_validator("content", mode="before")
    @classmethod
    def _join_parts(cls, content: Any) -> Any:
        if not isinstance(content, list):
            return content
        for part in content:
            kind = part.get("type") if isinstance(part, dict) else None
            value = part.get(kind) if kind in ("text", "image_url") else None
            of_kind = isinstance(value, str) if kind == "text" else _is_image(value)
            if not of_kind or part.keys() != {"type", kind}:
                raise ValueError(
                    'may have no other parts than {"type": "text", "text": "..."} and '
                    '{"type": "image_url", "image_url": {"url": "data:image/png;base64,..."}}'
                )
        return "".join(part["text"] if part["type"] == "text" else PLACEHOLDER for part in content)


def _is_image(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("url"), str) and value.keys() <= {"url", "detail"}


def _images_of(turn: Any) -> tuple[dict[str, str], ...]:
    """The images that a message has as parts, which were checked."""
    content = turn["content"]
    parts = content if isinstance(content, list) else []
    return tuple({"url": part["image_url"]["url"]} for part in parts if part["type"] == "image_url")


class _StreamOptions(Fields):
    include_usage: bool = False


class _Body(Fields):
    messages: list[_Turn] = Field(min_length=1)
    model: str | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: list[Annotated[str, Field(min_length=1)]] = Field([], max_length=4)
    stream: bool = False
    stream_options: _StreamOptions | None = None

    @field_validator("stop", mode="before")
    @classmethod
    def _make_list(cls, stop: Any) -> Any:
        return [stop] if isinstance(stop, str) else stop


@dataclass(frozen=True)
class ChatRequest:
    """What a request for a chat completion asks; `model` is one of the names served."""

    model: str
    messages: tuple[Message, ...]
    sampling: Sampling
    stop: tuple[str, ...]
    stream: bool
    include_usage: bool


def parse_request(body: bytes, models: Collection[str], served: Sampling, max_messages: int) -> ChatRequest:
    """The request in a body, with what is `served` where it says nothing; the first model is the default.

    Raises `ApiError` that names the first field which is malformed, unknown, or not implemented.
    """
    fields = read_fields(body)
    check_size(fields.get("messages"), max_messages)
    asked = parse(_Body, _implemented(fields))
    if asked.model is not None and asked.model not in models:
        message = f"No model {asked.model!r} is served here, only {', '.join(models)}."
        raise ApiError(404, message, "model", "model_not_found")
    if asked.stream_options and not asked.stream:
        raise ApiError(400, "stream_options has no effect without stream.", "stream_options")
    return ChatRequest(
        model=asked.model or next(iter(models)),
        messages=tuple(
            Message(_ROLES[turn.role], turn.content, media=_images_of(written))
            for turn, written in zip(asked.messages, fields["messages"], strict=True)
        ),
        sampling=_sampling(asked, served),
        stop=tuple(asked.stop),
        stream=asked.stream,
        include_usage=bool(asked.stream_options and asked.stream_options.include_usage),
    )


def _implemented(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields without those that have no effect. Raises `ApiError` for one that cannot have its own."""
    for name, value in fields.items():
        neutral = _NOT_IMPLEMENTED.get(name)
        if neutral is not None and value is not None and value not in neutral:
            instead = f" or set it to {json.dumps(neutral[0])}" if neutral else ""
            message = f"{name} is not implemented here: leave it out{instead}."
            raise ApiError(400, message, name, "unsupported_field")
    without_effect = _NOT_IMPLEMENTED.keys() | _IGNORED
    return {name: value for name, value in fields.items() if name not in without_effect}


def _sampling(asked: _Body, served: Sampling) -> Sampling:
    """How to draw the answer. Raises `ApiError` for more tokens than are served."""
    if asked.max_tokens is not None and asked.max_completion_tokens is not None:
        raise ApiError(400, "max_tokens is the old name of max_completion_tokens: send one.", "max_tokens")
    wanted = asked.max_tokens or asked.max_completion_tokens or served.max_new_tokens
    if wanted > served.max_new_tokens:
        name = "max_tokens" if asked.max_tokens else "max_completion_tokens"
        raise ApiError(400, f"{name} is {wanted}; at most {served.max_new_tokens} are served.", name)
    given = {
        name: value
        for name in ("temperature", "top_p", "seed")
        if (value := getattr(asked, name)) is not None
    }
    draws = served.do_sample or "temperature" in given or "top_p" in given
    return replace(served, **given, do_sample=draws, max_new_tokens=wanted)


class AnswerQueue:
    """Answers one request after another, in the order they came; at most `max_waiting` wait.

    Its methods are called in one event loop. Encoding waits for its turn too: a tokenizer is not to be
    used by two threads.
    """

    def __init__(self, max_waiting: int) -> None:
        self._max_waiting = max_waiting
        self._worker = ThreadPoolExecutor(1, "answer")
        self._jobs: set[Job] = set()

    def submit(self, make_answer: MakeAnswer, around: Callable[[], AbstractContextManager[None]]) -> Job:
        """Have an answer made, within `around`, when those before are done. Raises `QueueFull`."""
        if len(self._jobs) > self._max_waiting:
            raise QueueFull
        job = Job(self._worker, make_answer, around, self._jobs.discard)
        self._jobs.add(job)
        return job

    def close(self) -> None:
        """Cancel what is under way and wait until it has stopped."""
        for job in list(self._jobs):
            job.cancel()
        self._worker.shutdown()


class Job:
    """One answer on its way through the queue: `await begun()`, then iterate over the text.

    The text waits here for whoever reads it, so that a slow reader does not keep the model.
    """

    def __init__(
        self,
        worker: ThreadPoolExecutor,
        make_answer: MakeAnswer,
        around: Callable[[], AbstractContextManager[None]],
        done: Callable[[Job], None],
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._news: asyncio.Queue[Answer | str | None] = asyncio.Queue()
        self._stop = threading.Event()
        self._future: Future[None] = worker.submit(self._run, make_answer, around)
        self._future.add_done_callback(lambda _: self._loop.call_soon_threadsafe(self._end, done))

    def _run(self, make_answer: MakeAnswer, around: Callable[[], AbstractContextManager[None]]) -> None:
        with around():
            answer = make_answer(self._stop)
            self._tell(answer)
            for piece in answer:
                self._tell(piece)

    def _tell(self, news: Answer | str) -> None:
        self._loop.call_soon_threadsafe(self._news.put_nowait, news)

    def _end(self, done: Callable[[Job], None]) -> None:
        done(self)
        self._news.put_nowait(None)

    async def begun(self) -> Answer:
        """Wait for the turn; the answer that is now generated.

        Raises what `respond` raises, and `concurrent.futures.CancelledError` after `cancel`.
        """
        answer = await self._news.get()
        if isinstance(answer, Answer):
            return answer
        self._future.result()
        raise AssertionError("a job that succeeds has told its answer")

    async def __aiter__(self) -> AsyncIterator[str]:
        while (piece := await self._news.get()) is not None:
            assert isinstance(piece, str)
            if piece:
                yield piece
        self._future.result()

    def watch(self, receive: Callable[[], Awaitable[Any]]) -> None:
        """Cancel as soon as ASGI's `receive` says that the client is gone, which is also what it says
        once the response is complete."""
        self._watcher = asyncio.create_task(self._cancel_when_gone(receive))

    async def _cancel_when_gone(self, receive: Callable[[], Awaitable[Any]]) -> None:
        try:
            while (await receive())["type"] != "http.disconnect":
                pass
        finally:
            self.cancel()

    def cancel(self) -> None:
        """Give up the place in the queue, or stop at the next token."""
        self._stop.set()
        self._future.cancel()
