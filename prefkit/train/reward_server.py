"""A server of scores as a judge, over HTTP.

A server of prefkit, which `/health` tells, is sent chat messages (`/v1/rewards`), images in them as data, and
applies the template of its own training. Any other is sent texts, prompt and response with the control tokens
of the policy, at the address that the YAML names: `{"model": "model", "messages": [...]}`. Its answer is
`{"scores": [...]}`.
"""

from __future__ import annotations

import email.utils
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import httpx2 as httpx

from prefkit import __version__
from prefkit.config.errors import UserError
from prefkit.config.schema import RewardConfig
from prefkit.data.conversation import as_chat
from prefkit.data.examples import StoredImage
from prefkit.data.images import data_uri, read_content
from prefkit.data.messages import PLACEHOLDER
from prefkit.data.readers import DataError
from prefkit.train.answered import Answered, JudgeFailed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKEN_VARIABLE = "REWARD_API_KEY"
_TOGETHER = 64  # responses of one request, and images
_IMAGE_BYTES = 10_000_000  # of images in one request, which become a third more
_MOST_BYTES = 16_000_000  # of an answer
_BUSY = (429, 502, 503, 504)
_FIRST_WAIT, _LONGEST_WAIT = 0.5, 30.0  # seconds before a request is sent again
_LONGEST_ASKED = 120.0  # seconds that a server may ask for by Retry-After; all tries stay below hang_timeout
_LOOPBACK = ("localhost", "127.0.0.1", "::1", "[::1]")
Say = Callable[[str], None]
Requests = list[tuple[dict[str, Any], list[int]]]  # the fields of each, and of which responses


class _Retryable(Exception):
    """A request that may succeed when it is sent again; `wait` is what the server asked for, in seconds."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


class Connection:
    """Requests to one server: with a time limit, and sent again where that may help.

    What may is a connection that failed, no answer within `timeout` seconds, and the statuses 429, 502, 503
    and 504: up to `retries` times, after half a second, then twice as long each time up to 30 seconds, or as
    long as `Retry-After` asks. Redirects are not followed, and proxies of the environment are not used for
    this machine. The token in REWARD_API_KEY goes along as `Authorization: Bearer`, to this server alone.
    """

    def __init__(self, url: str, timeout: float, retries: int, say: Say = lambda text: None) -> None:
        try:
            self.url = httpx.URL(url)
        except httpx.InvalidURL as error:
            raise UserError(f"reward_model: {url} is no address: {error}") from error
        self.name = f"{self.url.scheme}://{self.url.netloc.decode()}{self.url.path}"
        self.timeout, self.retries, self.say = timeout, retries, say
        self._token = os.environ.get(TOKEN_VARIABLE, "").strip()
        if not self._token.isascii() or not self._token.isprintable():
            raise UserError(f"{TOKEN_VARIABLE}: a token is plain letters, digits and signs")
        self._headers = {"User-Agent": f"prefkit/{__version__}"}
        self._headers |= {"Authorization": f"Bearer {self._token}"} if self._token else {}
        self._is_here = self.url.host in _LOOPBACK or self.url.host.startswith("127.")

    def send(self, method: str, url: httpx.URL, fields: dict[str, Any] | None = None) -> tuple[int, bytes]:
        """Status and body of the answer. Raises `JudgeFailed` when there is none within the retries."""
        reasons: list[str] = []
        for attempt in range(self.retries + 1):
            try:
                return self._send_once(method, url, fields)
            except _Retryable as error:
                reasons.append(str(error))
                wait = min(_FIRST_WAIT * 2**attempt, _LONGEST_WAIT) if error.wait is None else error.wait
                if wait > _LONGEST_ASKED:
                    reasons[-1] += f" and asks to come back in {wait:.0f} seconds"
                    break
                if attempt < self.retries:
                    again = f"asked again in {wait:g} seconds ({attempt + 1} of {self.retries})"
                    self.say(f"{self.name}: {error}; {again}.")
                    time.sleep(wait)
        raise JudgeFailed(
            f"reward_model: {self.name} gave no scores, asked {_times(len(reasons))}: {reasons[-1]}. "
            "reward_retries and reward_timeout say how often and how long is tried"
        )

    def _send_once(self, method: str, url: httpx.URL, fields: dict[str, Any] | None) -> tuple[int, bytes]:
        deadline = time.monotonic() + self.timeout
        try:
            with self._open() as client, client.stream(method, url, json=fields) as response:
                if response.status_code in _BUSY:
                    raise _Retryable(f"it answers with status {response.status_code}", _asked_wait(response))
                body = bytearray()
                for chunk in response.iter_bytes():
                    body += chunk
                    if len(body) > _MOST_BYTES:
                        raise JudgeFailed(
                            f"reward_model: {self.name} answers with more than {_MOST_BYTES} bytes"
                        )
                    if time.monotonic() > deadline:
                        raise httpx.ReadTimeout("the answer came too slowly")
                return response.status_code, bytes(body)
        except httpx.TimeoutException as error:
            raise _Retryable(f"it did not answer within {self.timeout:g} seconds") from error
        except (httpx.NetworkError, httpx.RemoteProtocolError) as error:
            raise _Retryable(f"the connection failed ({error})") from error
        except httpx.HTTPError as error:  # of a proxy or an encoding, say, which the same request meets again
            raise JudgeFailed(f"reward_model: {self.name}: {type(error).__name__}: {error}") from error

    def _open(self) -> httpx.Client:
        """A client for one request: a rollout takes longer than a server keeps a connection."""
        return httpx.Client(
            headers=self._headers, timeout=self.timeout, trust_env=not self._is_here, follow_redirects=False
        )

    def said(self, body: bytes) -> str:
        """The beginning of an answer, for a message, without the token that it may repeat."""
        text = " ".join(body[:1000].decode(errors="replace").split())
        text = text.replace(self._token, "***") if self._token else text
        return f": {text[:200]}" if text else ""


def _asked_wait(response: httpx.Response) -> float | None:
    """Seconds that `Retry-After` asks for, as a number or a date; None where it says nothing."""
    asked = response.headers.get("retry-after", "").strip()
    if asked.isdecimal():
        return float(asked)
    date = email.utils.parsedate_to_datetime(asked) if asked.endswith("GMT") else None
    return max(date.timestamp() - time.time(), 0.0) if date else None


def _times(number: int) -> str:
    return "once" if number == 1 else f"{number} times"


@dataclass
class ServerJudge:
    """A server of scores. `requests` makes fields of requests from responses, each with the indices of those;
    what is answered is read at `field`. No score ever stands in for one that was not had."""

    name: str
    connection: Connection
    url: httpx.URL
    field: str
    requests: Callable[[Sequence[Answered]], Requests]

    def score(self, answered: Sequence[Answered]) -> list[float]:
        """The server's score of each response. Raises `JudgeFailed`."""
        found = [math.nan] * len(answered)
        try:
            requests = self.requests(answered)
        except DataError as error:  # an image that has changed
            raise JudgeFailed(f"reward_model: {self.connection.name}: {error}") from error
        for fields, indices in requests:
            status, body = self.connection.send("POST", self.url, fields)
            for index, score in zip(indices, self._read(status, body, len(indices)), strict=True):
                found[index] = score
        return found

    def _read(self, status: int, body: bytes, number: int) -> list[float]:
        if status != 200:
            raise self._failed(f"answers with status {status}{_hint(status)}{self.connection.said(body)}")
        try:
            answer = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise self._failed(f"answers with no JSON{self.connection.said(body)}") from error
        scores = answer.get(self.field) if isinstance(answer, dict) else None
        if not isinstance(scores, list):
            raise self._failed(f'answers without a list "{self.field}"{self.connection.said(body)}')
        if len(scores) != number:
            raise self._failed(f"answers with {len(scores)} scores for {number} responses")
        for place, score in enumerate(scores):
            is_number = isinstance(score, int | float) and not isinstance(score, bool)
            if not is_number or not math.isfinite(score):
                raise self._failed(
                    f"answers with {score!r} as score {place + 1} of {number}, no finite number"
                )
        return [float(score) for score in scores]

    def _failed(self, what: str) -> JudgeFailed:
        return JudgeFailed(f"reward_model: {self.connection.name} {what}")


def _hint(status: int) -> str:
    if status in (401, 403):
        return f" (the token is read from the environment variable {TOKEN_VARIABLE})"
    return " (redirects are not followed: write the address it leads to)" if 300 <= status < 400 else ""


def open_server_judge(
    reward: RewardConfig, tokenizer: PreTrainedTokenizerBase, say: Say, has_images: bool = False
) -> ServerJudge:
    """The server that `reward_model` names; `tokenizer` is the policy's, `has_images` says whether prompts
    may have any.

    Raises `JudgeFailed` when it cannot be reached, and where it is of prefkit and does not see the images.
    """
    connection = Connection(str(reward.reward_model), reward.reward_timeout, reward.reward_retries, say)
    url = connection.url
    health = _read_health(connection)
    if health is not None:
        if has_images and not health.get("sees"):
            raise JudgeFailed(
                f"reward_model: the model behind {connection.name} does not see, and the rows have images"
            )
        say(f"Reward model: the prefkit server at {connection.name}; it gets chat messages.")
        chats = url.copy_with(path="/v1/rewards", query=None)
        return ServerJudge(connection.name, connection, chats, "rewards", _chats)

    say(f"Reward model: the server at {connection.name}; it gets texts in the policy's template.")
    if has_images:
        say("The images of prompts are not sent to it: of each it gets the tokens that stand for it.")
    return ServerJudge(connection.name, connection, url, "scores", partial(_texts, tokenizer))


def _read_health(connection: Connection) -> dict[str, Any] | None:
    """What a server of prefkit says of itself; None of any other."""
    status, body = connection.send("GET", connection.url.copy_with(path="/health", query=None))
    try:
        health = json.loads(body)
    except (ValueError, RecursionError):
        return None
    told = {"server": "prefkit", "serves": "rewards"}
    is_ours = status == 200 and isinstance(health, dict) and told.items() <= health.items()
    return health if is_ours else None


def _texts(tokenizer: PreTrainedTokenizerBase, answered: Sequence[Answered]) -> Requests:
    """Prompt and response as the policy has read and written them."""
    rows = [[*one.prompt_ids, *one.response_ids] for one in answered]
    texts = [tokenizer.decode(row, clean_up_tokenization_spaces=False) for row in rows]
    parts = _parts(range(len(texts)))
    return [({"model": "model", "messages": [texts[i] for i in part]}, part) for part in parts]


def _chats(answered: Sequence[Answered]) -> Requests:
    """Conversations with the same tools in one request. `unfinished` are those whose response was cut off,
    `truncate` lets the server cut what is too long for it."""
    by_tools: dict[str, list[int]] = {}
    for index, one in enumerate(answered):
        by_tools.setdefault(json.dumps(one.tools), []).append(index)
    found = []
    for tools, indices in by_tools.items():
        for part in _parts(indices, [_pictures(answered[i]) for i in indices]):
            chats = [_conversation(answered[i]) for i in part]
            fields: dict[str, Any] = {"messages": chats, "truncate": True}
            fields["unfinished"] = [place for place, i in enumerate(part) if not answered[i].ended]
            fields |= {"tools": json.loads(tools)} if tools != "[]" else {}
            found.append((fields, part))
    return found


def _pictures(one: Answered) -> list[StoredImage]:
    """The images of a prompt. Raises `JudgeFailed` where it has videos, which requests have no place for."""
    found = [image for image in one.images if isinstance(image, StoredImage)]
    if len(found) < len(one.images):
        raise JudgeFailed("reward_model: a server of rewards takes images, and no videos")
    return found


def _conversation(one: Answered) -> list[dict[str, Any]]:
    """A prompt and its response, images as parts where they stand."""
    images = iter(_pictures(one))
    messages = as_chat(one.prompt)
    for message in messages if one.images else ():
        texts = message["content"].split(PLACEHOLDER)
        parts: list[dict[str, Any]] = [{"type": "text", "text": texts[0]}] if texts[0] else []
        for text in texts[1:]:
            parts.append({"type": "image_url", "image_url": {"url": data_uri(next(images))}})
            parts += [{"type": "text", "text": text}] if text else []
        message["content"] = parts if len(texts) > 1 else texts[0]
    return [*messages, {"role": "assistant", "content": one.text}]


def _parts(indices: Sequence[int], images: Sequence[Sequence[StoredImage]] = ()) -> list[list[int]]:
    """What goes together in requests: so many responses at most, and so many images and bytes of these."""
    found: list[list[int]] = []
    number = size = 0
    for index, own in zip_longest(indices, images, fillvalue=()):
        assert isinstance(index, int)
        bytes_of = sum(len(read_content(image)) for image in own)
        number, size = number + len(own), size + bytes_of
        if not found or len(found[-1]) == _TOGETHER or number > _TOGETHER or size > _IMAGE_BYTES:
            found.append([])
            number, size = len(own), bytes_of
        found[-1].append(index)
    return found
