"""Rewards as a user writes them, for `reward_function`."""

from __future__ import annotations

from typing import Any


def plain(prompts: list[list[dict[str, Any]]], responses: list[str]) -> list[float]:
    """How many characters of ASCII: about half of what random bytes have."""
    return [float(sum(it.isascii() for it in text)) for text in responses]


def same(prompts: list[list[dict[str, Any]]], responses: list[str]) -> list[float]:
    """The same of all."""
    return [1.0] * len(responses)
