"""The format of rows that no `dataset_info.json` describes, told from one of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prefkit.data.formats import RowFormat
from prefkit.data.messages import TAGS
from prefkit.data.readers import DataError


def recognise(row: object, file: object) -> RowFormat:
    """How a row like this one is read.

    Raises `DataError` when it looks like none of the known formats.
    """
    if not isinstance(row, Mapping):
        raise DataError(f"{file}: its first row is no object with named columns")
    for column in ("conversations", "messages"):
        if isinstance(row.get(column), list):
            return _of_messages(row, column)
    if "instruction" in row:
        return RowFormat("alpaca")
    texts = [row.get(name) for name in ("chosen", "rejected")]
    if "prompt" not in row and all(isinstance(text, str) and "\n\nAssistant:" in text for text in texts):
        return RowFormat("hh")
    if "prompt" in row or all(isinstance(text, list) for text in texts):
        tags = _other_tags([row.get("prompt"), *texts])
        return RowFormat("trl", _renamed(row), tags)
    if list(row) == ["text"]:
        return RowFormat("alpaca", {"prompt": "text"})
    (*_, last) = row or ("",)
    if len(row) == 1 and any(mark in last for mark in ";\t|"):
        raise DataError(f"{file}: the columns of a CSV file are separated by commas, not as in {last!r}")
    raise DataError(
        f"{file}: the columns {', '.join(map(repr, row))} are those of no format that is known; describe "
        "them in dataset_info.json, with `formatting` and `columns`"
    )


def _of_messages(row: Mapping[str, Any], column: str) -> RowFormat:
    first = row[column][0] if row[column] else None
    is_sharegpt = isinstance(first, Mapping) and "from" in first
    usual = "conversations" if is_sharegpt else "messages"
    columns = {"messages": column} if column != usual else {}
    if isinstance(row.get("label"), bool) and "kto_tag" not in row:
        columns["kto_tag"] = "label"
    columns |= {name: name for name in ("system", "tools") if columns and name in row}
    return RowFormat("sharegpt" if is_sharegpt else "openai", columns)


def _renamed(row: Mapping[str, Any]) -> dict[str, str]:
    """Columns of prompts and responses that have another name than TRL's. To name some is to name all that
    are optional."""
    found = {}
    if "kto_tag" in row and "label" not in row:
        found["kto_tag"] = "kto_tag"
    if "response" in row and "completion" not in row:
        found["response"] = "response"
    return found | {name: name for name in ("system", "tools") if found and name in row}


def _other_tags(columns: list[Any]) -> dict[str, str]:
    """The tags of sharegpt, where messages in TRL's columns are written so."""
    for value in columns:
        if isinstance(value, list) and value and isinstance(value[0], Mapping) and "from" in value[0]:
            return TAGS["sharegpt"]
    return {}
