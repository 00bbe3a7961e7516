"""What an exported model says of itself: `prefkit.json` for machines, a model card for people."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from prefkit import __version__
from prefkit.config.schema import UseConfig
from prefkit.model.reward import VALUE_HEAD
from prefkit.runs.record import RECORD_FILE, library_versions, read_record
from prefkit.runs.use import usage_of

_OF_THE_RUN = ("stage", "loss", "finetuning_type", "reference", "trained_on", "data", "pairs")
_CONVERSATION = """[
        {"role": "user", "content": "Is water wet?"},
        {"role": "assistant", "content": "Yes."},
    ]"""
GENERATING = """from transformers import AutoModelForCausalLM, AutoTokenizer
    model = AutoModelForCausalLM.from_pretrained("path/to/this/folder", dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
    messages = [{"role": "user", "content": "Hello"}]
    inputs = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = model.generate(**inputs, max_new_tokens=200)[0, inputs["input_ids"].shape[1] :]
    print(tokenizer.decode(answer, skip_special_tokens=True))"""
SEEING = """from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor
    model = AutoModelForImageTextToText.from_pretrained("path/to/this/folder", dtype="auto")
    # The processor of a model that also reads videos needs torchvision. Neither knows image_max_pixels: scale
    # larger pictures down as the training did.
    processor = AutoProcessor.from_pretrained("path/to/this/folder")
    picture = {"type": "image", "image": Image.open("picture.png")}
    messages = [{"role": "user", "content": [picture, {"type": "text", "text": "What is this?"}]}]
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    answer = model.generate(**inputs, max_new_tokens=200)[0, inputs["input_ids"].shape[1] :]
    print(processor.decode(answer, skip_special_tokens=True))"""
SCORING = f"""import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    model = AutoModelForSequenceClassification.from_pretrained("path/to/this/folder", dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
    conversation = {_CONVERSATION}
    inputs = tokenizer.apply_chat_template(
        [conversation], padding=True, return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        scores = model(inputs["input_ids"], inputs["attention_mask"]).logits[:, 0]
    print(scores)"""
_HEAD_IN_TORCH = f"""tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
    head = load_file("path/to/this/folder/{VALUE_HEAD}")
    conversation = {_CONVERSATION}
    inputs = tokenizer.apply_chat_template(conversation, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        hidden = model(inputs["input_ids"]).last_hidden_state[:, -1].float()
        scores = hidden @ head["v_head.summary.weight"][0] + head["v_head.summary.bias"]
    print(scores)"""
SCORING_BY_VALUE_HEAD = {
    "full": f"""import torch
    from safetensors.torch import load_file
    from transformers import AutoModel, AutoTokenizer
    model = AutoModel.from_pretrained("path/to/this/folder", dtype="auto")
    {_HEAD_IN_TORCH}""",
    "lora": f"""import torch
    from peft import AutoPeftModelForCausalLM
    from safetensors.torch import load_file
    from transformers import AutoTokenizer
    model = AutoPeftModelForCausalLM.from_pretrained("path/to/this/folder", dtype="auto")
    model = model.base_model.model.base_model
    {_HEAD_IN_TORCH}""",
}
SCORING_BY_SEEING_ADAPTER = f"""import torch
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import AutoModelForImageTextToText, AutoTokenizer
    base = AutoModelForImageTextToText.from_pretrained("path/to/the/base", dtype="auto")
    model = PeftModel.from_pretrained(base, "path/to/this/folder").base_model.model.base_model
    {_HEAD_IN_TORCH}"""


def make_record(config: UseConfig, proof: dict[str, Any]) -> dict[str, Any]:
    """Facts of the model that is exported; `proof` says how it was compared."""
    model = config.model
    run = read_record(Path(model.trained_last)) or {}
    return {
        "base_model": model.model_name_or_path,
        "adapters": list(model.adapter_name_or_path),
        "usage": usage_of(config),
        "proof": proof,
        "run": {name: run[name] for name in _OF_THE_RUN if name in run},
        "versions": library_versions(),
    }


def write_facts(
    folder: Path, config: UseConfig, record: dict[str, Any], code: str, more: dict[str, str]
) -> None:
    """Write the record and the card, with `more` rows for its table and how the model is called."""
    (folder / RECORD_FILE).write_text(
        json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    run, usage = record["run"], config.data
    data = f"{', '.join(run.get('trained_on', []))} ({run.get('pairs', {}).get('trained')} pairs)"
    facts = {
        "base model": record["base_model"],
        "adapters": ", ".join(record["adapters"]) or "none",
        "training": f"{run['loss']} loss on {data}" if "loss" in run else "not recorded",
        "reference": run.get("reference", "not recorded"),
        "chat template": usage.template or "the model's own",
        "thinking": {True: "on", False: "off", None: "as the response has it"}[usage.enable_thinking],
        "system message": usage.default_system or "none added",
        **more,
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    library = "peft" if (folder / "adapter_config.json").is_file() else "transformers"
    (folder / "README.md").write_text(
        f"""---
base_model: {json.dumps(record["base_model"])}
library_name: {library}
---

Exported by prefkit {__version__}; `{RECORD_FILE}` has the facts for machines.

| | |
|---|---|
{table}

    {code}
""",
        encoding="utf-8",
    )
