"""Draw tokens from logits, each response by random numbers of its own."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from prefkit.config.schema import GenerationConfig

# Below this a temperature only overflows: the likeliest token has all the probability anyway.
_GREEDY_TEMPERATURE = 1e-5
# Likeliest tokens among which `top_p` is first looked for, and how much further at a time.
_NUCLEUS, _FURTHER = 128, 8


def random_numbers(seed: int, rollout: int, prompt: int, response: int, count: int) -> np.ndarray:
    """`count` numbers in (0, 1), float64, that follow from the four given ones alone.

    They are what Philox (a counter, https://doi.org/10.1145/2063384.2063405) gives for a key that numpy's
    `SeedSequence` makes of them: the top 32 bits of each number, so that none is 0 or 1 and no product with
    one rounds to the other factor. Fewer numbers are the first of more.

    >>> random_numbers(0, 0, 3, 1, 2).tolist() == random_numbers(0, 0, 3, 1, 5)[:2].tolist()
    True
    """
    key = np.random.SeedSequence((seed, rollout, prompt, response))
    bits = np.random.Philox(key).random_raw(count) >> np.uint64(32)
    return (bits.astype(np.float64) + 0.5) * 2.0**-32


def is_greedy(generation: GenerationConfig) -> bool:
    """Whether the likeliest token is always taken."""
    return not generation.do_sample or generation.temperature < _GREEDY_TEMPERATURE


def draw_tokens(logits: Tensor, uniform: Tensor, generation: GenerationConfig) -> Tensor:
    """One token for each row of `logits` (R, V), by its number in `uniform` (R,), fp64 in (0, 1). (R,)

    As in transformers: logits / temperature, then the `top_k` likeliest tokens, then of those the likeliest
    whose probability sums up to `top_p`. The token is the first, by id, at which the summed probability
    passes the number: a small change of the logits then changes no draw but those next to a boundary,
    whichever of two nearly equal tokens is the likelier. Raises `FloatingPointError` for logits that are NaN,
    or of which none is finite.
    """
    logits = logits.float()
    if is_greedy(generation):
        best, tokens = logits.max(1)
        _check(best)
        return tokens
    probabilities, ids = _candidates(logits, generation)
    summed = probabilities.cumsum(1, dtype=torch.float64)
    total = summed[:, -1:]
    _check(total)
    places = torch.searchsorted(summed, uniform[:, None].to(total.device) * total, right=True)
    return (places if ids is None else ids.gather(1, places))[:, 0]


def _check(numbers: Tensor) -> None:
    if not numbers.isfinite().all():
        raise FloatingPointError("the logits of the model are not finite, so that no token can be drawn")


def _candidates(logits: Tensor, generation: GenerationConfig) -> tuple[Tensor, Tensor | None]:
    """Probabilities, up to a factor, of the tokens to draw from, (R, C), and their ids in ascending order;
    None where they are the whole vocabulary."""
    if 0 < generation.top_k < logits.shape[1]:
        values, ids = logits.topk(generation.top_k)
        probabilities = (values / generation.temperature).softmax(1)
    elif generation.top_p < 1:
        probabilities, ids = _likeliest(logits / generation.temperature, generation.top_p)
    else:
        return (logits / generation.temperature).softmax(1), None
    if generation.top_p < 1:
        before = probabilities.cumsum(1) - probabilities
        probabilities = probabilities * (before < generation.top_p)
    ids, order = ids.sort(1)
    return probabilities.gather(1, order), ids


def _likeliest(logits: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Probabilities of so many of the likeliest tokens that they sum up to `share`, falling, with ids.

    To find a few in order is much cheaper than to sort the vocabulary.
    """
    normaliser = logits.logsumexp(1, keepdim=True)
    size = min(_NUCLEUS, logits.shape[1])
    while True:
        values, ids = logits.topk(size)
        probabilities = (values - normaliser).exp()
        if size == logits.shape[1] or not (probabilities.sum(1) < share).any():
            return probabilities, ids
        size = min(size * _FURTHER, logits.shape[1])


def penalise_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Logits (R, V) in fp32 where those of the tokens `seen` (R, L) are made smaller: divided by `penalty` if
    positive, else multiplied, as in https://arxiv.org/abs/1909.05858, section 4.1, and in transformers."""
    logits = logits.float()
    found = logits.gather(1, seen)
    return logits.scatter(1, seen, torch.where(found < 0, found * penalty, found / penalty))
