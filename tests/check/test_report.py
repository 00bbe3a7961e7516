"""The report and its JSON, from a folder without weights, for every block of the specification."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from transformers import AutoConfig

from prefkit.check.report import print_report, token_text
from prefkit.check.run import Report, check
from prefkit.check.tokens import Piece, Pieces, render
from prefkit.config import load_config
from prefkit.config.errors import UserError
from prefkit.data.encode import TokenizedExample
from prefkit.data.examples import Pair
from tests.conftest import make_tokenizer
from tests.seeing import draw
from tests.spec.test_spec import ROOT, RUN, write
from tests.train.forks import call, forks

Write = Callable[..., Path]


def report_of(file: Path, *overrides: str, budget: int | None = None) -> Report:
    return check(load_config(file, overrides), budget, lambda text: None)


def printed(report: Report, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width, soft_wrap=True, highlight=False, markup=False)
    print_report(console, report)
    return str(console.file.getvalue())  # type: ignore[attr-defined]


def test_the_report_at_80_columns(write_config: Write, bare_model: Path) -> None:
    text = printed(report_of(write_config(model_name_or_path=str(bare_model)), budget=10**12))
    assert max(map(len, text.splitlines())) <= 80
    for part in (
        *("Config as understood", "pref_beta", "Strength of the pull", "(default)", "Rows", "Duplicates"),
        *("Lengths of pairs", "cutoff_len 128", "truncated", "Chosen is longer in", "Example 2 of 2"),
        *("<|im_start|>", "not scored", "chosen, ", "rejected, ", "Training to come", "2 updates in all"),
        *("first loss: 0.6931", "Peak memory", "total", "Fits into 1000.00 GB"),
    ):
        assert part in text, part


@forks
def test_json_is_one_object_and_nothing_else(write_config: Write, bare_model: Path) -> None:
    file = write_config(model_name_or_path=str(bare_model), lora_dropout=0.1)
    done = call("check", file, "--json", "--memory", "1TB")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found.keys() == {
        *("config", "warnings", "ledger", "data", "held_out", "duplicates", "images", "examples"),
        *("layout", "weights", "training", "first_loss", "memory"),
    }
    assert found["config"]["pref_beta"] == {
        "value": 0.1,
        "default": True,
        "meaning": found["config"]["pref_beta"]["meaning"],
    }
    assert found["config"]["lora_dropout"]["default"] is False
    assert found["warnings"] and "lora_dropout" in done.stderr
    assert found["ledger"][0]["rows"] == found["data"][0]["examples"] == 12
    assert sum(found["data"][0]["lengths"]["chosen"]["histogram"]) == 12
    assert [part["kind"] for part in found["examples"][0]["parts"]] == ["prompt", "chosen", "rejected"]
    memory = found["memory"]
    assert sum(memory["parts"].values()) == memory["total"] and memory["fits"] is True
    assert memory["budget"] == 10**12 and memory["advice"] is None


@forks
def test_exit_codes(write_config: Write, bare_model: Path, dataset_dir: Path) -> None:
    bare = f"model_name_or_path={bare_model}"
    done = call("check", write_config(per_device_train_batch_size=1), bare, "--memory", "1MB")
    assert done.returncode == 3 and "Does not fit into 1 MB" in done.stdout, done.stderr
    assert "take a smaller model" in done.stdout
    assert call("check", write_config(), bare, "--memory", "much").returncode == 1
    wrong = call("check", write_config(pref_bta=1), bare)
    assert wrong.returncode == 2 and "did you mean pref_beta" in wrong.stderr and not wrong.stdout
    (dataset_dir / "pairs.json").write_text('[{"instruction": "Q", "chosen": "a"}]')
    broken = call("check", write_config(), bare)
    assert broken.returncode == 1 and "pairs.json:1" in broken.stderr and "Traceback" not in broken.stderr


def test_config_errors_come_before_torch(write_config: Write) -> None:
    code = f"import sys; sys.argv = ['prefkit', 'check', {str(write_config(pref_bta=1))!r}]\n"
    code += "from prefkit.cli import main\ntry: main()\n"
    code += "finally: assert not {'torch', 'transformers', 'rich.console'} & sys.modules.keys()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr


@pytest.mark.parametrize("name", RUN)
def test_blocks_of_the_specification(
    name: str, tmp_path: Path, bare_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    given = (f"model_name_or_path={bare_model}", f"output_dir={tmp_path / 'out'}")
    report = report_of(write(name, tmp_path), *given)
    text = printed(report)
    assert max(map(len, text.splitlines())) <= 80
    assert report.summaries[0].examples == 340
    assert (report.first_loss.value is None) == (name in ("orpo.yaml", "simpo.yaml"))
    assert not (tmp_path / "out").exists()


def test_a_reward_model_is_checked_too(write_config: Write, bare_model: Path) -> None:
    report = report_of(write_config(stage="rm", model_name_or_path=str(bare_model)))
    assert report.first_loss.value == 0.6931 and report.outlook.reference_passes == 0
    assert report.memory.estimate.parts["logits"] == 0 and not report.memory.leaves_out
    pairs = report_of(write_config(model_name_or_path=str(bare_model)))
    assert report.num_weights[0] == pairs.num_weights[0] + 32  # the head
    assert "pref_beta" not in {setting.key for setting in report.settings}


KTO = [{"instruction": f"Q{i}", "output": "yes", "kto_tag": i % 5 == 0} for i in range(20)]
PPO = [{"instruction": f"Q{i}", "input": "", "output": ""} for i in range(4)]


def register(dataset_dir: Path, name: str, rows: list[Any]) -> str:
    (dataset_dir / f"{name}.json").write_text(json.dumps(rows))
    (dataset_dir / "dataset_info.json").write_text(json.dumps({name: {"file_name": f"{name}.json"}}))
    return name


def test_kto_is_checked_too(write_config: Write, bare_model: Path, dataset_dir: Path) -> None:
    keys = {"dataset": register(dataset_dir, "judged", KTO), "model_name_or_path": str(bare_model)}
    report = report_of(write_config(stage="kto", **keys))
    assert "Balanced by kto_chosen_weight: 4 and kto_rejected_weight: 1." in printed(report)
    assert report.first_loss.value == 0.5 and not report.memory.leaves_out


def test_ppo_is_checked_too(write_config: Write, bare_model: Path, dataset_dir: Path) -> None:
    keys = {"dataset": register(dataset_dir, "prompts", PPO), "model_name_or_path": str(bare_model)}
    report = report_of(write_config(stage="ppo", reward_model="rm", max_new_tokens=50, **keys))
    assert report.memory.batch_tokens > 2 * 50, "a response of the length that generation gives it"
    text = " ".join(printed(report).split())
    assert "Not in it: what the drawing keeps, and a reward model" in text
    assert "2 rollouts in all (a step each)" in text and "learnt from in 4 updates" in text
    assert report.outlook.updates == 8
    assert "reward_model: rm is no folder here" in text


def test_a_stream_is_looked_at(write_config: Write, bare_model: Path) -> None:
    report = report_of(write_config(model_name_or_path=str(bare_model), streaming=True, buffer_size=2))
    text = printed(report)
    assert "The first 4 rows of the stream" in text and "a stream without end, 2 rows to an update" in text
    assert report.ledgers[0].is_balanced and report.outlook.policy_passes == 4


def test_bias_and_duplicates_are_warned_of(write_config: Write, bare_model: Path, dataset_dir: Path) -> None:
    rows = [{"instruction": f"Q{i % 20}", "chosen": "long " * 5, "rejected": "no"} for i in range(40)]
    (dataset_dir / "pairs.json").write_text(json.dumps(rows))
    text = printed(report_of(write_config(model_name_or_path=str(bare_model), val_size=0.5)))
    flat = re.sub(r"\s+", " ", text)
    assert "mostly the longer one" in flat and "ld_alpha" in flat
    assert "evaluation on prompts that were trained on" in flat


def test_tokens_are_shown_as_they_are() -> None:
    tokenizer = make_tokenizer()
    ids: list[int] = tokenizer.encode("<|im_start|>a b\n")
    prompt, chosen, rejected = render(
        TokenizedExample(ids, [[2], ids * 3], (Pair(0, 1),), "f:1"), Pieces(tokenizer), shown=6
    )
    assert prompt.texts == ("<|im_start|>", "a", "·", "b", "↵") and prompt.control == (0,)
    assert chosen.texts == ("<|im_end|>",) and chosen.kind == "chosen"
    assert (rejected.omitted, rejected.split, rejected.num_tokens, len(rejected.texts)) == (9, 3, 15, 6)
    shown: Any = token_text(rejected)
    assert shown.plain == "<|im_start|>|a|· ... 9 more ... ·|b|↵"
    styles = {str(span.style) for span in shown.spans}
    assert {"red", "red reverse"} <= styles and "dim" in {str(s.style) for s in token_text(prompt).spans}


def test_a_character_of_several_tokens_is_one_piece_and_an_image_too() -> None:
    tokenizer = make_tokenizer()
    image = tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert isinstance(image, int)
    pieces = Pieces(tokenizer, {image})
    assert pieces.of(tokenizer.encode("é日a")) == [Piece("é", 2), Piece("日", 3), Piece("a")]
    torn = tokenizer.encode("日")[:2]
    found = pieces.of([*torn, image, image, image, 2])
    assert [(piece.text, piece.num_tokens) for piece in found[-2:]] == [
        ("<|im_start|>", 3),
        ("<|im_end|>", 1),
    ]
    assert found[-2].is_image and not found[-1].is_image and found[-1].is_control
    assert {piece.text for piece in found[:-2]} == {"\ufffd"} and sum(it.num_tokens for it in found) == 6


@pytest.mark.parametrize("stage", ["dpo", "kto", "rm", "ppo"])
def test_rows_with_images_are_checked(write_seeing: Write, stage: str) -> None:
    more = {"reward_model": "rm", "max_new_tokens": 20} if stage == "ppo" else {}
    report = report_of(write_seeing(stage=stage, image_min_pixels=1, **more))
    text = printed(report)
    assert max(map(len, text.splitlines())) <= 80
    flat = " ".join(text.split())
    # A token for 8 x 8 pixels; the pictures are 32 x 24, 40 x 32 and 24 x 24, 48 x 24, and so on.
    tokens = 12 + (20 + 9) + 18 + 15 + (24 + 9) + 12
    assert report.to_dict()["images"] == {
        "images": 8,
        "videos": 0,
        "rows": 6,
        "tokens": tokens,
        "mean_tokens": 14.9,
    }
    assert "To be seen: 8 images in 6 rows, counted as 15 tokens each on average." in flat
    assert report.examples[0][1][0].texts.count("<|image_pad|> x 12") == 1 and "<|image_pad|>|<|" not in flat
    assert "what the frozen image reader itself takes (what is seen is counted as the tokens" in flat
    lengths = report.summaries[0].lengths["prompt"]
    assert lengths.largest > 29 and report.memory.batch_tokens > lengths.largest


def test_parts_that_learn_of_a_model_that_sees(write_seeing: Write) -> None:
    whole = report_of(write_seeing(finetuning_type="full"))
    more = report_of(write_seeing(finetuning_type="full", freeze_vision_tower=False))
    assert more.num_weights[0] > whole.num_weights[0] and more.num_weights[1] == whole.num_weights[1]
    assert "image reader, a part of which is trained, itself takes" in " ".join(printed(more).split())


def test_a_model_without_the_head_that_is_wanted_is_an_error(write_config: Write, bare_model: Path) -> None:
    AutoConfig.for_model("t5").save_pretrained(bare_model)
    with pytest.raises(UserError, match="transformers has no t5 with a head for text"):
        report_of(write_config(model_name_or_path=str(bare_model)))


def test_the_same_question_about_another_picture_is_no_duplicate(write_seeing: Write, tmp_path: Path) -> None:
    pair = {"chosen": {"from": "gpt", "value": "It is."}, "rejected": {"from": "gpt", "value": "No."}}
    asked = {"conversations": [{"from": "human", "value": "<image>Is it red?"}], **pair}
    folder = tmp_path / "seen"
    rows = [{**asked, "images": [draw(folder, f"{it}.png", colour=it)]} for it in ("red", "blue", "red")]
    found = report_of(write_seeing(rows)).duplicates
    assert (found.prompts, found.rows) == (1, 1)
