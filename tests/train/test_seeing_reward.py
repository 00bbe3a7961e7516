"""Reward models that see: trained, known again, scored with, exported, gone on with, judging."""

from __future__ import annotations

import io
import json
import shutil
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForImageTextToText, AutoModelForSequenceClassification

from prefkit.config import RunConfig, load_config
from prefkit.config.schema import TuningConfig
from prefkit.config.uses import SCORING
from prefkit.data.encode import TokenizedExample, encode_example
from prefkit.data.examples import Example, Message
from prefkit.data.formats import RowFormat, make_example
from prefkit.data.images import MediaSource
from prefkit.data.packing import Layout, Packer
from prefkit.data.template import ChatTemplate
from prefkit.model.adapter import HEAD_IN_FILE, add_lora, base_of
from prefkit.model.batches import prepare_for_batches
from prefkit.model.errors import ModelError
from prefkit.model.load import load_causal_lm
from prefkit.model.reward import VALUE_HEAD, scores_at
from prefkit.model.scorer import Scorer
from prefkit.model.vision import load_template
from prefkit.runs.report import make_console
from prefkit.runs.use import read_use_config
from prefkit.serve.load import load_scorer
from prefkit.serve.score import score_file
from prefkit.train.answered import Answered, Judge
from prefkit.train.judges import build_judge
from tests.model.test_adapter import randomise
from tests.seeing import KINDS, draw, make_seen_rows, save_seeing_model
from tests.serve.test_export import write as export
from tests.serve.test_export_reward import CODE
from tests.train.runs import losses, read, run, same, unfinish, weights
from tests.train.test_kills import rest_is_slow

WHOLE: dict[str, Any] = {"finetuning_type": "full", "learning_rate": 1e-3}
Train = Callable[..., Path]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder with rows of pairs, most of them with pictures."""
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "pairs.json").write_text(json.dumps(make_seen_rows(folder, 8)))
    entry = {"file_name": "pairs.json", "formatting": "sharegpt", "ranking": True}
    (folder / "dataset_info.json").write_text(json.dumps({"pairs": entry}))
    return folder


@pytest.fixture
def train(tmp_path: Path, data: Path) -> Train:
    """Trains upon a tiny model that sees; arguments are keys."""

    def trained(kind: str = "qwen3_vl", out: str = "out", **keys: Any) -> Path:
        base = tmp_path / kind
        if not base.exists():
            save_seeing_model(base, kind)
        config = {
            "model_name_or_path": str(base), "stage": "rm", "do_train": True, "dataset": "pairs",
            "dataset_dir": str(data), "output_dir": str(tmp_path / out), "per_device_train_batch_size": 2,
            "max_steps": 2, "logging_steps": 1, "learning_rate": 5e-3, "cutoff_len": 512, **keys,
        }  # fmt: skip
        file = tmp_path / f"{out}.yaml"
        file.write_text(json.dumps(config))
        run(file)
        return tmp_path / out

    return trained


def opened(folder: Path, *overrides: str) -> Scorer:
    return load_scorer(read_use_config(str(folder), overrides, SCORING).config)


def rows_of(data: Path, scorer: Scorer) -> list[TokenizedExample]:
    rows = json.loads((data / "pairs.json").read_text())
    examples = (
        make_example(row, RowFormat("sharegpt"), "pairs", f"f:{i}", MediaSource(data))
        for i, row in enumerate(rows)
    )
    return [encode_example(example, scorer.template, 512) for example in examples]


def flat(scores: Sequence[Sequence[float]]) -> list[float]:
    return [score for row in scores for score in row]


@torch.no_grad()
def alone(scorer: Scorer, example: TokenizedExample) -> list[float]:
    """Scores by the decoder's own forward, each response in a row of its own."""
    base = scorer.model.model  # type: ignore[union-attr]
    base = base.get_base_model() if hasattr(base, "get_base_model") else base
    vision = scorer.template.vision
    assert vision is not None
    found = []
    for ids in example.response_ids:
        row = [*example.prompt_ids, *ids]
        pixels = vision.read(example.images)[0] if example.images else {}
        inputs = {"input_ids": torch.tensor([row]), "pixels": (pixels,) if pixels else ()}
        if (places := vision.see(example.prompt_ids, example.images)).places is not None:
            end = places.end(len(example.prompt_ids))
            after = torch.arange(end, end + len(ids)).expand(3, -1)
            inputs["position_ids"] = torch.cat([places.positions(len(row)), after], 1)[:, None]
        found.append(float(scores_at(base, torch.tensor([len(row) - 1]), inputs)))  # type: ignore[arg-type]
    return found


@pytest.mark.parametrize(
    "kind",
    rest_is_slow(["qwen3_vl", "gemma3"], [kind for kind in KINDS[:5] if kind not in ("qwen3_vl", "gemma3")]),
)
def test_trained_known_again_and_scored(kind: str, train: Train, data: Path, tmp_path: Path) -> None:
    out = train(kind)
    scorer = opened(out)
    assert scorer.model.proof == 0
    rows = rows_of(data, scorer)
    assert sum(bool(row.images) for row in rows) == 6
    found = scorer.score(rows)
    one_by_one = opened(out, "batch_layout=repeat")
    assert one_by_one.model.layout == "repeat"  # type: ignore[union-attr]
    assert flat(found) == pytest.approx(flat([alone(one_by_one, row) for row in rows]), abs=1e-5)
    assert flat(found) == pytest.approx(flat(one_by_one.score(rows)), abs=1e-5)
    head = read(out / "prefkit.json").get("head")
    if kind == "gemma3":  # transformers has a class
        assert head is None and not (out / VALUE_HEAD).exists() and HEAD_IN_FILE in weights(out)
        return
    assert head["file"] == VALUE_HEAD and (out / VALUE_HEAD).is_file()
    assert read(out / "adapter_config.json")["task_type"] == "CAUSAL_LM"
    assert HEAD_IN_FILE not in weights(out)
    with pytest.raises(ValueError, match="Unrecognized configuration class"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path / kind)
    assert "plain transformers cannot load it" in (out / "README.md").read_text()


def test_the_picture_changes_the_score(train: Train, data: Path) -> None:
    scorer = opened(train(max_steps=1))
    seen = next(row for row in rows_of(data, scorer) if len(row.images) == 1)
    draw(data, "blank.png", (seen.images[0].width, seen.images[0].height), "white")
    blank = replace(seen, images=(MediaSource(data).store("blank.png", "it"),))
    (one, other) = scorer.score([seen, blank])
    assert max(abs(a - b) for a, b in zip(one, other, strict=True)) > 1e-3


@pytest.mark.parametrize(
    "keys", rest_is_slow([{}, WHOLE], [{"pissa_init": True}]), ids=["lora", "full", "pissa"]
)
def test_a_resumed_run_is_the_same_run(keys: dict[str, Any], train: Train, tmp_path: Path) -> None:
    given = {**keys, "max_steps": 4, "save_steps": 2}
    whole, out = tmp_path / "whole", tmp_path / "out"
    shutil.copytree(train(**given), whole)
    for name in ("adapter_model.safetensors", "model.safetensors", VALUE_HEAD):
        (out / name).unlink(missing_ok=True)
    unfinish(out)
    train(**given)
    assert same(whole, out) and losses(whole) == losses(out)
    one, other = (load_file(folder / VALUE_HEAD) for folder in (whole, out))
    assert all(torch.equal(one[name], other[name]) for name in one)
    final = opened(out).model
    if "pissa_init" not in keys:
        last = opened(out / "checkpoint-4").model
        assert last.score_rows([[9, 8]]) == final.score_rows([[9, 8]])  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("kind", "keys"),
    rest_is_slow(
        [("qwen3_vl", {}), ("qwen2_5_vl", WHOLE), ("gemma3", WHOLE)],
        [("qwen3_vl", WHOLE), ("llava_onevision", {})],
    ),
    ids=["lora", "files with other names", "transformers' own class", "full", "another"],
)
def test_exported_it_scores_the_same(
    kind: str, keys: dict[str, Any], train: Train, data: Path, tmp_path: Path
) -> None:
    out = train(kind, **keys)
    trained = opened(out)
    rows = rows_of(data, trained)
    own = flat(trained.score(rows))
    said = export(out, tmp_path / "exported")
    assert "score the same before and after" in said
    again = opened(tmp_path / "exported")
    assert again.model.proof == 0
    assert flat(again.score(rows_of(data, again))) == pytest.approx(own, abs=1e-5)
    if kind == "gemma3":
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "exported")
        return
    assert "is written as a language model, its head beside it" in said
    _, info = AutoModelForImageTextToText.from_pretrained(tmp_path / "exported", output_loading_info=True)
    assert not info["missing_keys"]
    decoder = AutoModel.from_pretrained(tmp_path / "exported").eval()
    head = load_file(tmp_path / "exported" / VALUE_HEAD)["v_head.summary.weight"][0]
    row = next(row for row in rows if not row.images)
    with torch.no_grad():
        ids = torch.tensor([[*row.prompt_ids, *row.response_ids[0]]])
        score = float(decoder(input_ids=ids).last_hidden_state[0, -1] @ head)
    assert score == pytest.approx(trained.score([row])[0][0], abs=1e-4)
    if not keys:
        export(out, tmp_path / "adapter", "export_value_head=lora")
        other = opened(tmp_path / "adapter")
        assert flat(other.score(rows)) == pytest.approx(own, abs=1e-5)


def test_the_cards_score(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Their code as it stands."""
    out = train()
    scorer = opened(out)
    turns = [{"role": "user", "content": "Is water wet?"}, {"role": "assistant", "content": "Yes."}]
    ids = scorer.template.tokenizer.apply_chat_template(turns, return_dict=True)["input_ids"]
    own = scorer.model.score_rows([ids])[0]  # type: ignore[union-attr]
    monkeypatch.chdir(tmp_path)
    for form in ("full", "lora"):
        export(out, tmp_path / form, f"export_value_head={form}")
        (lines,) = CODE.findall((tmp_path / form / "README.md").read_text())
        capsys.readouterr()
        exec(textwrap.dedent(lines).replace("path/to/this/folder", form), {})
        printed = capsys.readouterr().out.splitlines()[-1]
        assert float(printed.removeprefix("tensor([").removesuffix("])")) == pytest.approx(own, abs=1e-4)


def test_going_on(train: Train, data: Path, tmp_path: Path) -> None:
    one = train(out="one", max_steps=4, disable_shuffling=True)
    more = train(out="more", adapter_name_or_path=str(one), max_steps=1, disable_shuffling=True)
    upon = train(
        out="upon",
        adapter_name_or_path=str(one),
        create_new_adapter=True,
        max_steps=1,
        disable_shuffling=True,
    )
    assert losses(upon)[0] == pytest.approx(losses(more)[0], rel=1e-4)
    assert losses(more)[0] != losses(one)[0]
    assert opened(upon).model.proof == 0 and opened(more).model.proof == 0
    full = train(out="full", **WHOLE)
    adapted = train(out="adapted", model_name_or_path=str(full), max_steps=1)
    assert opened(adapted).model.proof == 0
    with pytest.raises(ModelError, match="is a reward model, which writes no text"):
        train(out="dpo", stage="dpo", adapter_name_or_path=str(one))
    with pytest.raises(ModelError, match="is a reward model, which gives scores and writes no text"):
        train(out="dpo", stage="dpo", model_name_or_path=str(full))


@pytest.mark.parametrize("keys", rest_is_slow([{}], [WHOLE]), ids=["lora", "full"])
def test_another_head_or_image_reader_is_refused(keys: dict[str, Any], train: Train, tmp_path: Path) -> None:
    out = train(**keys)
    head = load_file(out / VALUE_HEAD)
    save_file({name: it * 1.01 for name, it in head.items()}, out / VALUE_HEAD)
    with pytest.raises(ModelError, match=r"is not the reward model|has changed"):
        opened(out)
    save_file(head, out / VALUE_HEAD)
    opened(out)
    file = (out if keys else tmp_path / "qwen3_vl") / "model.safetensors"
    tensors = load_file(file)
    tensors["model.visual.blocks.1.mlp.linear_fc1.weight"] *= 1.1
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ModelError, match="is not the reward model that was trained"):
        opened(out)


def test_pixels_that_differ_leave_the_proof_to_text(
    train: Train, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = train(image_max_pixels=1024)
    assert opened(out).model.proof == 0
    assert opened(out, "image_max_pixels=2048").model.proof == 0 and not caplog.text
    processor = tmp_path / "qwen3_vl" / "preprocessor_config.json"
    limits = {"shortest_edge": 64, "longest_edge": 1024}
    processor.write_text(json.dumps(json.loads(processor.read_text()) | {"size": limits}))
    assert opened(out).model.proof == 0
    assert "images become other pixels here than in its training" in caplog.text


def score(folder: Path, rows: Path, output: Path, *overrides: str) -> list[dict[str, Any]]:
    console = make_console(io.StringIO())
    config = read_use_config(str(folder), overrides, SCORING).config
    score_file(config, str(rows), output, console)
    return [json.loads(line) for line in output.read_text().splitlines()]


def test_a_file_of_rows_with_images(train: Train, data: Path, tmp_path: Path) -> None:
    out = train()
    scorer = opened(out)
    own = flat(scorer.score(rows_of(data, scorer)))
    lines = score(out, data / "pairs.json", tmp_path / "scores.jsonl")
    assert [line[name] for line in lines for name in ("chosen", "rejected")] == pytest.approx(own, abs=1e-5)
    rows = json.loads((data / "pairs.json").read_text())
    rows[0]["images"] = ["missing.png"]
    rows[1]["images"] = rows[1]["images"][:1]
    rows[2]["images"] = ["/etc/passwd"]
    elsewhere = tmp_path / "rows.jsonl"
    elsewhere.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = score(out, elsewhere, tmp_path / "two.jsonl", f"media_dir={data}")
    assert "is missing" in found[0]["error"] and "1 image for 2" in found[1]["error"]
    assert "outside of" in found[2]["error"]
    names = ("chosen", "rejected")
    for one, other in zip(found[3:], lines[3:], strict=True):
        assert [one[name] for name in names] == pytest.approx([other[name] for name in names], abs=1e-5)
    # Half of the output, as a kill leaves it.
    half = (tmp_path / "two.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "two.jsonl").write_text("".join(half[:4]) + half[4][:9])
    about = read(tmp_path / "two.jsonl.about.json")
    (tmp_path / "two.jsonl.about.json").write_text(json.dumps(about | {"finished": False}))
    again = score(out, elsewhere, tmp_path / "two.jsonl", f"media_dir={data}")
    assert [line["row"] for line in again] == [line["row"] for line in found]
    for one, other in zip(again[3:], found[3:], strict=True):
        assert [one[name] for name in names] == pytest.approx([other[name] for name in names], abs=1e-5)


def test_an_answer_with_images_fits(train: Train, data: Path) -> None:
    scorer = replace(opened(train(max_steps=1)), max_length=60)
    image = MediaSource(data).store("0a.png", "it")
    ask = [Message("user", "a" * 40), Message("assistant", "b" * 20), Message("user", f"<image>{'c' * 30}")]
    vision = scorer.template.vision
    assert vision is not None
    for answer in ("yes", "y" * 100, "an <image> <|image_pad|>"):
        row = scorer.fit_answer(ask, Message("assistant", answer), images=[image])
        places = row.prompt_ids.count(vision.token_id)
        assert places and places == vision.read([image])[1][0].count(vision.written)
        assert row.num_tokens <= 60 and vision.token_id not in row.response_ids[0]
        assert scorer.score([row])
    with pytest.raises(Exception, match="leave no room in 10 tokens"):
        replace(scorer, max_length=10).fit_answer(ask, Message("assistant", "yes"), images=[image])


def test_packers_are_of_the_layout_that_the_model_can(train: Train) -> None:
    layouts: dict[str, Layout] = {"gemma3": "repeat", "qwen3_vl": "shared"}
    for kind, layout in layouts.items():
        model = opened(train(kind, kind + "-out", max_steps=1)).model
        assert isinstance(model.packer, Packer) and model.layout == layout  # type: ignore[union-attr]


def test_the_run_files(train: Train, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    out = train(**WHOLE)
    assert read(out / "config.json")["architectures"] == ["Qwen3VLForSequenceClassification"]
    assert (out / "processor_config.json").is_file() and (out / VALUE_HEAD).is_file()


# As judges of ppo

PPO = {"stage": "ppo", "max_new_tokens": 6, "max_steps": 1, "learning_rate": 1e-3}


def answered(data: Path, template: ChatTemplate) -> list[Answered]:
    """Two responses to each of three prompts, one of them without an image."""
    found = []
    for names, text in (
        (["0a.png"], "<image>What?"),
        (["0a.png", "1a.png"], "<image> or <image>?"),
        ([], "Hi"),
    ):
        images = tuple(MediaSource(data).store(name, "it") for name in names)
        prompt = (Message("user", text),)
        texts = template.image_texts(Example(prompt, (), "", images=images))
        ids, _ = template.encode(prompt, [], images=texts)
        for answer in ("Red.", "I do not know"):
            tokens = template.tokenizer.encode(answer, add_special_tokens=False)
            found.append(Answered(prompt, (), ids, [*tokens, 2], True, answer, images))
    return found


def judge_of(config: RunConfig) -> tuple[Judge, ChatTemplate, str]:
    """The judge upon a policy with an adapter of its own, the policy's template, and what was said."""
    said: list[str] = []
    policy = add_lora(load_causal_lm(config.model), TuningConfig())
    randomise(policy, seed=3)
    prepare_for_batches(base_of(policy), config.model, 512, said.append, has_images=True)
    template = load_template(config.model, config.data)
    return build_judge(config, policy, template, said.append, has_images=True), template, "\n".join(said)


@pytest.mark.parametrize(
    ("kind", "of"),
    rest_is_slow(
        [("qwen3_vl", "lora"), ("qwen3_vl", "other pixels"), ("gemma3", "full")],
        [("qwen3_vl", "full"), ("llava_onevision", "lora")],
    ),
)
def test_a_judge_sees(kind: str, of: str, train: Train, data: Path, tmp_path: Path) -> None:
    rater = train(kind, "rater", **({"image_max_pixels": 1024} if of == "other pixels" else {}))
    keys = {"reward_model": str(rater), "reward_model_type": "lora" if of == "lora" else "full"}
    judge, template, said = judge_of(load_config(config_of(tmp_path, kind, **PPO, **keys)).config)
    assert "its scores are those of its training" in said
    assert ("the tokens as they are drawn" in said) == (of != "other pixels")
    scorer, responses = opened(rater), answered(data, template)
    rows = [
        scorer.fit_answer(one.prompt, Message("assistant", one.text), one.tools, one.ended, one.images)
        for one in responses
    ]
    assert judge.score(responses) == pytest.approx(flat(scorer.score(rows)), abs=1e-5)


def config_of(tmp_path: Path, kind: str, **keys: Any) -> Path:
    """A YAML upon the same base, for `ppo`."""
    config = {
        "model_name_or_path": str(tmp_path / kind), "do_train": True, "dataset": "pairs",
        "dataset_dir": str(tmp_path / "data"), "output_dir": str(tmp_path / "policy"), "cutoff_len": 512,
        "per_device_train_batch_size": 2, "logging_steps": 1, **keys,
    }  # fmt: skip
    file = tmp_path / "ppo.yaml"
    file.write_text(json.dumps(config))
    return file


@pytest.mark.parametrize("of", rest_is_slow(["lora"], ["full"]))
def test_ppo_is_judged_by_what_sees(of: str, train: Train, tmp_path: Path) -> None:
    rater = train(out="rater")
    run(config_of(tmp_path, "qwen3_vl", **PPO, reward_model=str(rater), reward_model_type=of))
    (line,) = (it for it in read(tmp_path / "policy" / "trainer_state.json")["log_history"] if "loss" in it)
    assert line["ppo/score"] != 0
    assert not [name for name in weights(tmp_path / "policy") if "reward" in name]


def test_judges_that_do_not_see_and_policies_that_do_not(
    train: Train, tmp_path: Path, tiny_model: Path, data: Path
) -> None:
    texts = [row for row in json.loads((data / "pairs.json").read_text()) if not row["images"]]
    rater = train(out="rater")
    (data / "texts.json").write_text(json.dumps(texts))
    info = read(data / "dataset_info.json")
    info["texts"] = info["pairs"] | {"file_name": "texts.json"}
    (data / "dataset_info.json").write_text(json.dumps(info))
    text_only = {"model_name_or_path": str(tiny_model), "template": "chatml", "dataset": "texts"}
    blind = train(out="blind", **text_only)
    with pytest.raises(ModelError, match=r"reward_model: .*blind does not see, and the rows have images"):
        run(config_of(tmp_path, "qwen3_vl", **PPO, reward_model=str(blind), reward_model_type="full"))
    keys = {**PPO, **text_only, "reward_model": str(rater), "reward_model_type": "full"}
    run(config_of(tmp_path, "qwen3_vl", **keys))
    assert losses(tmp_path / "policy")


def test_a_function_gets_images(tmp_path: Path, data: Path) -> None:
    file = tmp_path / "judge.py"
    file.write_text("def score(prompts, responses, images):\n    return [len(it) for it in images]\n")
    save_seeing_model(tmp_path / "qwen3_vl")
    config = load_config(config_of(tmp_path, "qwen3_vl", **PPO, reward_function=f"{file}:score")).config
    judge, template, _ = judge_of(config)
    assert judge.score(answered(data, template)) == [1, 1, 2, 2, 0, 0]
