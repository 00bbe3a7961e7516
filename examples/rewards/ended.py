"""A reward to add to that of a reward model: 0 for a response that ends in a full stop or its like, else -1.

A reward model is trained on whole answers. What it says of one that was cut off at max_new_tokens is chance,
and a policy may learn never to end.
"""


def score(prompts: list[list[dict[str, str]]], responses: list[str]) -> list[float]:
    """A number for each response. The prompts, lists of chat messages, do not count here."""
    return [0.0 if response.rstrip("\"')* \n").endswith((".", "!", "?")) else -1.0 for response in responses]
