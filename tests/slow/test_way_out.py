"""From an adapter on the real model to a model that plain transformers reads, with the same answers."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from prefkit.config import load_config
from prefkit.config.uses import EXPORT
from prefkit.data.examples import Message
from prefkit.runs.report import make_console
from prefkit.runs.use import read_use_config
from prefkit.serve.assistant import Sampling, respond
from prefkit.serve.export import export
from prefkit.serve.load import load_assistant
from prefkit.train.run import train

ROOT = Path(__file__).parent.parent.parent
QUESTIONS = (
    "Why do leaves fall in autumn?",
    "What is the capital of Italy?",
    "How does a bicycle stay upright?",
)

pytestmark = pytest.mark.slow


def test_the_exported_model_answers_as_the_adapter_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    torch.set_num_threads(2)
    keys = [f"output_dir={tmp_path / 'run'}", "max_steps=8", "sample_prompts=0", "eval_strategy=no"]
    config = load_config(ROOT / "examples" / "demo_dpo.yaml", [*keys, "do_eval=false"]).config
    train(config, make_console(io.StringIO()))
    said: list[str] = []
    use = read_use_config(str(tmp_path / "run"), [f"export_dir={tmp_path / 'model'}"], EXPORT).config
    export(use, said.append)
    assert "probe rows agree" in said[-2]

    assistant = load_assistant(use)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    changed = 0
    for question in QUESTIONS:
        greedy = Sampling(do_sample=False, max_new_tokens=40)
        ours = "".join(respond(assistant, [Message("user", question)], greedy))
        with assistant.untuned():
            changed += ours != "".join(respond(assistant, [Message("user", question)], greedy))
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
        output = model.generate(**inputs, max_new_tokens=40, do_sample=False)
        theirs = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert ours.strip() == theirs.strip()
    assert changed > 0
