"""A model ready to talk, how its answers are drawn, and an answer as it is generated."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from accelerate.utils import send_to_device
from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

from prefkit.config.errors import UserError
from prefkit.config.schema import GenerationConfig
from prefkit.data.encode import TokenizedExample
from prefkit.data.examples import Example, Message, StoredImage
from prefkit.data.messages import Degenerate, RowError
from prefkit.data.packing import see
from prefkit.data.template import ChatTemplate
from prefkit.model.generate import GREEDY, stop_ids
from prefkit.model.vision import generation_inputs

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

# Below this a temperature only overflows: the likeliest token has all the probability anyway.
_GREEDY_TEMPERATURE = 1e-5


@dataclass(frozen=True)
class Assistant:
    """A model ready to talk: eval mode, weights loaded, with the template it was trained with.

    `name` is what the API calls it; `compares` says whether there is an untuned model under an adapter to
    compare with.
    """

    model: PreTrainedModel | PeftModel
    template: ChatTemplate
    name: str
    compares: bool

    def untuned(self) -> AbstractContextManager[None]:
        """Inside, the base model answers. Raises `UserError` where there is no adapter to switch off."""
        if not self.compares:
            raise UserError(f"{self.name} has no adapter to switch off, so there is nothing to compare with.")
        return cast("PeftModel", self.model).disable_adapter()


@dataclass(frozen=True)
class Sampling:
    """How an answer is drawn: the keys of `GenerationConfig`, with its defaults.

    `seed` makes an answer repeatable: each answer then starts from it.
    """

    do_sample: bool = GenerationConfig.do_sample
    temperature: float = GenerationConfig.temperature
    top_p: float = GenerationConfig.top_p
    top_k: int = GenerationConfig.top_k
    repetition_penalty: float = GenerationConfig.repetition_penalty
    max_new_tokens: int = GenerationConfig.max_new_tokens
    seed: int | None = None

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always taken.

        >>> Sampling().greedy, Sampling(temperature=0).greedy, Sampling(do_sample=False).greedy
        (False, True, True)
        """
        return not self.do_sample or self.temperature < _GREEDY_TEMPERATURE

    def describe(self) -> str:
        """In words, for the person at the terminal."""
        how = "greedy" if self.greedy else f"temperature {self.temperature:g}, top_p {self.top_p:g}"
        return f"{how}, up to {self.max_new_tokens} tokens an answer"


class PromptTooLong(UserError):
    """A conversation that leaves the model no position to answer at."""


def respond(
    assistant: Assistant,
    messages: Sequence[Message],
    sampling: Sampling,
    stop: threading.Event | None = None,
    stop_strings: Sequence[str] = (),
    images: Sequence[StoredImage] = (),
) -> Answer:
    """The assistant's answer to a conversation, to iterate over as it is generated; `images` are one for each
    `<image>` in its messages.

    It ends early when `stop` is set, within a token, or before the first of `stop_strings` in its text.
    Raises `UserError` when the template refuses the conversation or the model does not see, `PromptTooLong`
    when the model has no position left for an answer.
    """
    prompt_ids = _encode(assistant, messages, images)
    longest = getattr(assistant.model.config.get_text_config(), "max_position_embeddings", None)
    if longest and len(prompt_ids) >= longest:
        raise PromptTooLong(
            f"The conversation has {len(prompt_ids)} tokens; {assistant.name} takes {longest}, "
            "its answer included."
        )
    room = min(sampling.max_new_tokens, longest - len(prompt_ids)) if longest else sampling.max_new_tokens
    prompt = TokenizedExample(prompt_ids, [], (), "", images=tuple(images))
    return Answer(assistant, prompt, sampling, room, stop or threading.Event(), stop_strings)


class Answer(Iterator[str]):
    """The pieces of an answer's text, generated in another thread; some pieces are empty.

    After the last piece, `reason` says why it ended: "length" at the limit of tokens, else "stop".
    An error of the generating thread is raised where the next piece is asked for.
    """

    def __init__(
        self,
        assistant: Assistant,
        prompt: TokenizedExample,
        sampling: Sampling,
        max_new_tokens: int,
        stop: threading.Event,
        stop_strings: Sequence[str],
    ) -> None:
        self.prompt_tokens = len(prompt.prompt_ids)
        self.completion_tokens = 0
        self.reason: Literal["stop", "length"] | None = None
        self._model: Any = assistant.model
        self._tokenizer = assistant.template.tokenizer
        self._prompt, self._vision = prompt, assistant.template.vision
        self._sampling = sampling
        self._max_new_tokens = max_new_tokens
        self._stop_ids = stop_ids(assistant.model, assistant.template)
        self._stop, self._enough = stop, threading.Event()
        self._pieces = self._stream(stop_strings)

    def __next__(self) -> str:
        return next(self._pieces)

    def _stream(self, stop_strings: Sequence[str]) -> Iterator[str]:
        streamer = TextIteratorStreamer(
            self._tokenizer, skip_prompt=True, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        with ThreadPoolExecutor(1, "generate") as worker:
            generated = worker.submit(self._generate, streamer)
            # The streamer ends by itself only where generation does not fail.
            generated.add_done_callback(lambda _: streamer.on_finalized_text("", stream_end=True))
            try:
                yield from before_stop(streamer, stop_strings, self._enough)
            except BaseException:  # whoever read has left: nobody wants the rest
                self._enough.set()
                raise
            response_ids = generated.result()
        self.completion_tokens = len(response_ids)
        halted = self._stop.is_set() or self._enough.is_set()
        self.reason = "stop" if halted or response_ids[-1] in self._stop_ids else "length"

    def _generate(self, streamer: TextIteratorStreamer) -> list[int]:
        """The token ids of the answer, the one that ended it included."""
        ids = torch.tensor([self._prompt.prompt_ids], device=self._model.device)
        pixels = send_to_device(see(self._prompt, self._vision).pixels, self._model.device)
        device, seed = self._model.device, self._sampling.seed
        # What a seed does to the generators must not reach the next answer.
        accelerators = [] if device.type == "cpu" else [device]
        with torch.random.fork_rng(accelerators, enabled=seed is not None, device_type=device.type):
            if seed is not None:
                torch.manual_seed(seed)
            output = self._model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                **generation_inputs(self._model.config, [pixels], ids),
                streamer=streamer,
                stopping_criteria=StoppingCriteriaList([_Halt(self._stop, self._enough)]),
                max_new_tokens=self._max_new_tokens,
                eos_token_id=self._stop_ids,
                pad_token_id=self._tokenizer.pad_token_id,
                **_generation_keys(self._sampling),
            )
        response_ids: list[int] = output[0, ids.shape[1] :].tolist()
        return response_ids


class _Halt(StoppingCriteria):
    """Ends generation at the next token once an event is set."""

    def __init__(self, *events: threading.Event) -> None:
        self.events = events

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        halted = any(event.is_set() for event in self.events)
        return torch.full((len(input_ids),), halted, device=input_ids.device)


def _generation_keys(sampling: Sampling) -> dict[str, Any]:
    keys: dict[str, Any] = {"repetition_penalty": sampling.repetition_penalty}
    if sampling.greedy:
        return keys | GREEDY
    drawn = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}
    return {**keys, **drawn, "do_sample": True}


def _encode(assistant: Assistant, messages: Sequence[Message], images: Sequence[StoredImage]) -> list[int]:
    """Token ids of the conversation, opened for the assistant."""
    try:
        for message in messages:
            message.content.encode()  # the tokenizer's own error for half a surrogate pair says nothing
        texts = assistant.template.image_texts(Example(tuple(messages), (), "", images=tuple(images)))
        return assistant.template.encode(messages, [], images=texts)[0]
    except UnicodeEncodeError as error:
        raise UserError("A message has half a surrogate pair, which is no text.") from error
    except (Degenerate, RowError) as error:
        raise UserError(f"The conversation cannot be encoded: {error}.") from error


def before_stop(pieces: Iterator[str], stop_strings: Sequence[str], found: threading.Event) -> Iterator[str]:
    """The text up to the first stop string; no part of one is let through before it is known not to be one.

    Sets `found` at a stop string and reads on to the end, which its maker then reaches soon.

    >>> found = threading.Event()
    >>> list(before_stop(iter(["a", "b#", "x#", "#c"]), ["##"], found)), found.is_set()
    (['a', 'b', '#x', ''], True)
    """
    held = ""
    for piece in pieces:
        held += piece
        places = [place for stop in stop_strings if (place := held.find(stop)) >= 0]
        if places:
            found.set()
            yield held[: min(places)]
            for _ in pieces:
                pass
            return
        free = len(held) - _open_end(held, stop_strings)
        yield held[:free]
        held = held[free:]
    if held:
        yield held


def _open_end(text: str, stop_strings: Sequence[str]) -> int:
    """How many characters at the end of a text may be the start of a stop string."""
    return max(
        (n for stop in stop_strings for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0
    )
