"""The real 135M model: both layouts agree, and training starts at the reference."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch

from prefkit.config import load_config
from prefkit.data.dataset import load_data
from prefkit.data.packing import pack
from prefkit.data.template import ChatTemplate
from prefkit.model.architecture import read_architecture
from prefkit.model.attention import use_shared_prompts
from prefkit.model.load import load_causal_lm, load_tokenizer
from prefkit.model.policy import attach_logps_forward, response_logps
from prefkit.runs.report import make_console
from prefkit.train.run import train

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "examples" / "demo_dpo.yaml"


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def test_layouts_agree() -> None:
    config = load_config(DEMO, ["max_samples=2", "cutoff_len=256"]).config
    template = ChatTemplate(load_tokenizer(config.model))
    data = load_data(config, template, 0, lambda text: None, lambda items, title: items)
    rows = list(data.train)  # type: ignore[arg-type]
    model = load_causal_lm(config.model)
    attach_logps_forward(model, read_architecture(model.config))
    with torch.no_grad():
        repeat = response_logps(model, pack(rows, "repeat").to_dict())
        use_shared_prompts(model)
        shared = response_logps(model, pack(rows, "shared").to_dict())
    torch.testing.assert_close(shared.token_logps, repeat.token_logps, atol=1e-4, rtol=0)
    torch.testing.assert_close(shared.logps, repeat.logps, atol=0, rtol=1e-5)
    # A language model gives plain English some -3 nats a token; a broken one -10.
    assert -4 < shared.mean_logps.mean() < -0.5


def test_training_starts_at_ln_2(tmp_path: Path) -> None:
    given = [f"output_dir={tmp_path}", "max_samples=1", "max_steps=1", "sample_prompts=0", "pref_ftx=0"]
    given += ["per_device_train_batch_size=1", "gradient_accumulation_steps=1", "cutoff_len=96"]
    config = load_config(DEMO, [*given, "do_eval=false", "eval_strategy=no"]).config
    train(config, make_console(io.StringIO()))
    state = json.loads((tmp_path / "trainer_state.json").read_text())
    assert state["log_history"][0]["loss"] == pytest.approx(0.693147, abs=1e-5)
