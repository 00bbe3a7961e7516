"""A reward model on the real model: it tells held-out pairs, and the other way round with flipped labels.

About four minutes of one thread.
"""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from prefkit.config import load_config
from prefkit.config.uses import EXPORT
from prefkit.runs.report import make_console
from prefkit.runs.use import read_use_config
from prefkit.serve.export import export
from prefkit.train.run import train
from tests.slow.test_demo import ROOT, swap
from tests.train.runs import load_reward_model

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    torch.set_num_threads(1)


def held_out_accuracy(folder: Path, *overrides: str) -> float:
    """After the training of the example."""
    given = [f"output_dir={folder}", "plot_loss=false", *overrides]
    config = load_config(ROOT / "examples" / "reward.yaml", given).config
    train(config, make_console(io.StringIO()))
    assert load_reward_model(folder).proof == pytest.approx(0, abs=1e-5)
    accuracy: float = json.loads((folder / "eval_results.json").read_text())["eval_rewards/accuracies"]
    return accuracy


# Knows nothing of prefkit: scores of templated texts, one a line of JSON, in batches of 4.
PLAIN = """
import json, sys, torch
from peft import AutoPeftModelForSequenceClassification
from transformers import AutoTokenizer
folder, texts = sys.argv[1], json.load(sys.stdin)
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoPeftModelForSequenceClassification.from_pretrained(
    folder, num_labels=1, pad_token_id=tokenizer.pad_token_id, dtype=torch.float32
).eval()
scores = []
for start in range(0, len(texts), 4):
    batch = tokenizer(texts[start:start + 4], padding=True, padding_side="right", add_special_tokens=False,
                      return_tensors="pt")
    with torch.no_grad():
        scores += model(**{k: batch[k] for k in ("input_ids", "attention_mask")}).logits[:, 0].tolist()
assert not any(name.startswith("prefkit") for name in sys.modules)
print(json.dumps(scores))
"""


def check_the_server(folder: Path) -> None:
    """`prefkit serve` and plain transformers with peft, each a process of its own, give the same scores."""
    rows = json.loads((ROOT / "data" / "dpo_en_demo_heldout.json").read_text())[:6]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    chats = [
        [{"role": "user", "content": row["conversations"][-1]["value"]},
         {"role": "assistant", "content": row[side]["value"]}]
        for row in rows for side in ("chosen", "rejected")
    ]  # fmt: skip
    texts = [tokenizer.apply_chat_template(chat, tokenize=False) for chat in chats]
    alone = [sys.executable, "-c", PLAIN, str(folder)]
    printed = subprocess.run(
        alone, input=json.dumps(texts), capture_output=True, text=True, check=True
    ).stdout
    expected = json.loads(printed.splitlines()[-1])
    command = [sys.executable, "-m", "prefkit", "serve", str(folder), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            line = next(line for line in server.stdout if "Serving" in line)
            address = line.split(" on ")[1].split(";")[0]
            served = httpx.post(f"{address}/score/evaluation", json={"messages": texts}, timeout=120)
            templated = httpx.post(f"{address}/rewards", json={"messages": chats}, timeout=120)
        finally:
            server.terminate()
    assert served.json()["scores"] == pytest.approx(expected, abs=1e-5)
    assert templated.json()["rewards"] == pytest.approx(expected, abs=1e-5)


def check_export(run: Path, folder: Path) -> None:
    """Plain transformers gives the scores of each held-out pair that the run wrote."""
    export(read_use_config(str(run), [f"export_dir={folder}"], EXPORT).config, lambda text: None)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    pairs = json.loads((ROOT / "data" / "dpo_en_demo_heldout.json").read_text())
    lines = [json.loads(line) for line in (run / "generated_predictions.jsonl").read_text().splitlines()]
    for pair, line in zip(pairs, lines, strict=True):
        question = {"role": "user", "content": pair["conversations"][0]["value"]}
        answers = [{"role": "assistant", "content": pair[it]["value"]} for it in ("chosen", "rejected")]
        turns = [[question, answer] for answer in answers]
        inputs = tokenizer.apply_chat_template(turns, padding=True, return_tensors="pt", return_dict=True)
        with torch.no_grad():
            scores = model(inputs["input_ids"], inputs["attention_mask"]).logits[:, 0].tolist()
        assert scores == pytest.approx([line["chosen"], line["rejected"]], abs=1e-4)


def test_held_out_accuracy_and_that_of_flipped_labels(tmp_path: Path) -> None:
    assert held_out_accuracy(tmp_path / "reward") >= 0.9
    check_the_server(tmp_path / "reward")
    check_export(tmp_path / "reward", tmp_path / "model")
    data = swap(tmp_path / "data")
    flipped = ["do_predict=false", f"dataset_dir={data}"]
    assert held_out_accuracy(tmp_path / "flipped", *flipped) <= 0.2
