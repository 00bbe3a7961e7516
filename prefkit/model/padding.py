"""The padding token of a reward model: one that no sequence can end in.

transformers reads the score of a row at its last token that is not `pad_token_id`. Where that id is also the
end token, as in many models, it reads another place than the last token of the text.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from prefkit.config.schema import ModelConfig
from prefkit.data.template import ChatTemplate
from prefkit.model.errors import ModelError
from prefkit.model.load import load_model_config

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ADDED = "<|reward_pad|>"
_MEANT_FOR_IT = re.compile("pad|reserved|unused|extra", re.IGNORECASE)


def set_pad_token(tokenizer: PreTrainedTokenizerBase, template: ChatTemplate, config: ModelConfig) -> None:
    """Give the tokenizer of a model a padding token that no row can contain; see `choose_pad_token`.

    A template made before does not know the token if it is new.
    """
    num_rows = load_model_config(config).get_text_config().vocab_size
    grows = bool(config.resize_vocab or config.add_tokens or config.add_special_tokens)
    pad = choose_pad_token(tokenizer, template, max(num_rows, len(tokenizer)), grows)
    tokenizer.add_special_tokens({"pad_token": pad})


def choose_pad_token(
    tokenizer: PreTrainedTokenizerBase, template: ChatTemplate, num_rows: int, grows: bool = False
) -> str:
    """The tokenizer's own padding token, if no row can contain it; else another control token of which that
    holds; else a new one, `ADDED`, where the embedding has a row to spare among its `num_rows`, or `grows`.

    An embedding is not enlarged for it otherwise: an adapter would have to carry all of it. Raises
    `ModelError` where there is no such token.
    """
    free = {
        str(token): number
        for number, token in tokenizer.added_tokens_decoder.items()
        if token.special and not template.may_write(str(token))
    }
    if tokenizer.pad_token in free:
        return str(tokenizer.pad_token)
    if free:
        return max(free, key=lambda token: (bool(_MEANT_FOR_IT.search(token)), free[token]))
    if len(tokenizer) < num_rows or grows:
        return ADDED
    raise ModelError(
        f"{tokenizer.name_or_path} has no token that could pad the rows of a reward model: its template may "
        f"write every control token, and the embedding has no row to spare. Write add_special_tokens: {ADDED}"
    )
