"""Answer prompts with the model: greedy, batched."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from accelerate.utils import send_to_device

from prefkit.data.encode import TokenizedExample
from prefkit.data.packing import see
from prefkit.data.template import ChatTemplate
from prefkit.model.adapter import base_of
from prefkit.model.attention import plain_attention
from prefkit.model.vision import generation_inputs

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

# Keys of `generate` that always take the likeliest token; the others would only be warned of.
GREEDY: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}


@torch.no_grad()
def generate_responses(
    model: PreTrainedModel | PeftModel,
    template: ChatTemplate,
    prompts: Sequence[TokenizedExample],
    max_new_tokens: int,
    after_batch: Callable[[], None] = lambda: None,
    batch_size: int = 8,
) -> list[str]:
    """The greedy response to the prompt of each row, as text without control tokens; `after_batch` is called
    once for each `batch_size` of them."""
    tokenizer = template.tokenizer
    base = base_of(model)
    was_training = model.training
    model.eval()
    responses: list[str] = []
    with plain_attention(base):
        for start in range(0, len(prompts), batch_size):
            batch = prompts[start : start + batch_size]
            length = max(len(prompt.prompt_ids) for prompt in batch)
            # Left padding, so that every prompt ends where its response starts.
            ids = torch.zeros(len(batch), length, dtype=torch.long)
            mask = torch.zeros(len(batch), length, dtype=torch.long)
            for row, prompt in enumerate(batch):
                ids[row, length - len(prompt.prompt_ids) :] = torch.tensor(prompt.prompt_ids)
                mask[row, length - len(prompt.prompt_ids) :] = 1
            pixels = [see(prompt, template.vision).pixels for prompt in batch]
            inputs = {"input_ids": ids, "attention_mask": mask, **generation_inputs(base.config, pixels, ids)}
            output = cast("Any", model).generate(
                **send_to_device(inputs, base.device),
                max_new_tokens=max_new_tokens,
                **GREEDY,
                eos_token_id=stop_ids(model, template),
                pad_token_id=tokenizer.pad_token_id,
            )
            responses += tokenizer.batch_decode(output[:, length:], skip_special_tokens=True)
            after_batch()
    model.train(was_training)
    return [response.strip() for response in responses]


def stop_ids(model: PreTrainedModel | PeftModel, template: ChatTemplate) -> list[int]:
    """Tokens that end a response: the template's, the tokenizer's and the model's own."""
    own = base_of(model).generation_config.eos_token_id
    ids = {template.tokenizer.eos_token_id, *template.stop_ids, *(own if isinstance(own, list) else [own])}
    return sorted(i for i in ids if i is not None)
