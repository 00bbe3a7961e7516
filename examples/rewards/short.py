"""A reward for examples/ppo_function.yaml: one short sentence.

The best that a response can get is 1: a single sentence of up to 12 words that ends in a full stop or its
like. Each word above 12 costs a twelfth, up to 2; each sentence more costs a half, up to 1; an end that is
missing costs 1, and a response of fewer than 3 words gets -3, as does an empty one.
"""

WORDS = 12
ENDS = (".", "!", "?")


def score(prompts: list[list[dict[str, str]]], responses: list[str]) -> list[float]:
    """A number for each response. The prompts, lists of chat messages, do not count here."""
    return [_score(response.split()) for response in responses]


def _score(words: list[str]) -> float:
    if len(words) < 3:
        return -3.0
    ends = sum(word.rstrip("\"')*").endswith(ENDS) for word in words)
    finished = words[-1].rstrip("\"')*").endswith(ENDS)
    sentences = ends if finished else ends + 1
    too_long = min(max(len(words) - WORDS, 0) / WORDS, 2.0)
    return 1.0 - too_long - min((sentences - 1) / 2, 1.0) - (0.0 if finished else 1.0)
