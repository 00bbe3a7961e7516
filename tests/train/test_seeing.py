"""Runs of every stage on a tiny model that sees, over rows with and without images."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from prefkit.config import load_config
from prefkit.config.errors import ConfigError, UserError
from prefkit.config.uses import TALKING
from prefkit.data.families import TemplateError
from prefkit.data.readers import DataError
from prefkit.model.errors import ModelError
from prefkit.objectives.pairwise import LOSSES
from prefkit.runs.use import read_use_config
from prefkit.serve.load import load_model
from tests.conftest import make_model, make_rows, make_tokenizer
from tests.seeing import COLOURS, draw, make_seen_rows, save_seeing_model
from tests.train.forks import forks, run_in_two
from tests.train.runs import losses, read, run, same, unfinish, weights
from tests.train.test_kills import rest_is_slow

REWARD = "def reward(prompts, responses):\n    return [-abs(len(text) - 6.0) for text in responses]\n"


@pytest.fixture(scope="module")
def seeing_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_seeing_model(tmp_path_factory.mktemp("seeing"))


@pytest.fixture
def write(tmp_path: Path, seeing_model: Path):
    """Writes a config over 12 pairs with pictures (or as many judged rows) and returns its path."""
    data = tmp_path / "data"
    data.mkdir()
    rows = make_seen_rows(data, 12)
    judged = [
        {
            "messages": [*row["conversations"], row["rejected" if i % 2 else "chosen"]],
            "label": not i % 2,
            "images": row["images"],
        }
        for i, row in enumerate(rows)
    ]
    (data / "pairs.json").write_text(json.dumps(rows))
    (data / "judged.json").write_text(json.dumps(judged))
    columns = {"messages": "conversations", "chosen": "chosen", "rejected": "rejected", "images": "images"}
    info: dict[str, Any] = {
        "pairs": {"file_name": "pairs.json", "formatting": "sharegpt", "ranking": True, "columns": columns},
        "judged": {
            "file_name": "judged.json",
            "formatting": "sharegpt",
            "columns": {"messages": "messages", "kto_tag": "label", "images": "images"},
        },
    }
    (data / "texts.json").write_text(json.dumps(make_rows(6)))
    info["texts"] = {"file_name": "texts.json", "ranking": True}
    (data / "dataset_info.json").write_text(json.dumps(info))
    (tmp_path / "reward.py").write_text(REWARD)

    def make(**changes: Any) -> Path:
        stage = changes.get("stage", "dpo")
        values = {
            "model_name_or_path": str(seeing_model),
            "stage": stage,
            "do_train": True,
            "dataset": {"kto": "judged", "ppo": "judged"}.get(stage, "pairs"),
            "dataset_dir": str(data),
            "template": "qwen3_vl_nothink",
            "output_dir": str(tmp_path / "out"),
            "overwrite_output_dir": True,
            "cache_dir": str(tmp_path / "cache"),
            "max_steps": 3,
            "per_device_train_batch_size": 2,
            "logging_steps": 1,
            "learning_rate": 0.01,
            "report_to": "none",
            **changes,
        }
        file = tmp_path / "config.json"
        file.write_text(json.dumps({name: value for name, value in values.items() if value is not None}))
        return file

    return make


PPO = {"stage": "ppo", "max_new_tokens": 8, "max_steps": 2}


def ppo(tmp_path: Path) -> dict[str, Any]:
    return {**PPO, "reward_function": f"{tmp_path / 'reward.py'}:reward"}


FEW = ("sigmoid", "orpo", "kto_pair")


@pytest.mark.parametrize("loss", rest_is_slow(FEW, [loss for loss in LOSSES if loss not in FEW]))
def test_every_loss_learns_from_pictures(write, tmp_path: Path, loss: str) -> None:
    said = run(write(pref_loss=loss, max_steps=6, num_train_epochs=None))
    assert "a prompt is computed once for its responses" in said
    found = losses(tmp_path / "out")
    assert found[-1] < found[0]


def test_kto_and_ppo_over_pictures(write, tmp_path: Path) -> None:
    run(write(stage="kto", max_steps=4))
    assert len(losses(tmp_path / "out")) == 4
    run(write(**ppo(tmp_path)))
    log = read(tmp_path / "out" / "trainer_state.json")["log_history"]
    assert all(abs(line["ppo/kl"]) < 100 for line in log if "ppo/kl" in line)
    assert any("ppo/score" in line for line in log)


@pytest.mark.parametrize("stage", ["dpo", "kto", "ppo"])
def test_a_resumed_run_is_the_same_to_the_bit(write, tmp_path: Path, stage: str) -> None:
    more = ppo(tmp_path) if stage == "ppo" else {"stage": stage, "max_steps": 4}
    keys = {**more, "save_steps": 1, "overwrite_output_dir": None, "lora_dropout": 0.1}
    run(write(**keys))
    whole = tmp_path / "whole"
    shutil.copytree(tmp_path / "out", whole)
    unfinish(tmp_path / "out")
    run(write(**keys))
    assert same(tmp_path / "out", whole)
    assert losses(tmp_path / "out") == losses(whole)


def test_a_run_is_not_gone_on_with_over_another_picture(write, tmp_path: Path) -> None:
    keys = {"save_steps": 1, "overwrite_output_dir": None}
    run(write(**keys))
    unfinish(tmp_path / "out")
    with Image.open(tmp_path / "data" / "0a.png") as before:
        size = before.size
    draw(tmp_path / "data", "0a.png", size, "yellow")
    with pytest.raises(UserError, match="images content: "):
        run(write(**keys))


def test_the_layouts_train_the_same(write, tmp_path: Path) -> None:
    found = {}
    for layout in ("shared", "repeat"):
        run(write(batch_layout=layout, max_steps=5))
        found[layout] = losses(tmp_path / "out")
    assert found["shared"] == pytest.approx(found["repeat"], abs=1e-4)
    assert found["shared"][-1] < 0.5


def test_workers_and_streams_read_the_same_images(write, tmp_path: Path) -> None:
    keys = {"disable_shuffling": True, "max_steps": 3}
    run(write(**keys))
    found = losses(tmp_path / "out")
    run(write(**keys, dataloader_num_workers=1))
    assert losses(tmp_path / "out") == found
    run(write(**keys, streaming=True))
    assert losses(tmp_path / "out") == found


def test_a_kept_reference_is_that_of_the_same_picture(write, tmp_path: Path) -> None:
    """The picture of a row is exchanged for another of the same size: nothing kept for it is used."""
    keys = {"ref_cache": True, "max_steps": 2, "per_device_train_batch_size": 6, "disable_shuffling": True}
    run(write(**keys))
    plain = losses(tmp_path / "out")
    assert "12 of 12 rows found" in run(write(**keys))
    assert losses(tmp_path / "out") == plain
    picture = tmp_path / "data" / "0a.png"
    with Image.open(picture) as before:
        size = before.size
    draw(picture.parent, picture.name, size, "yellow")
    said = run(write(**keys))
    assert "0a.png has changed" in said
    assert "11 of 12 rows found" in said
    assert losses(tmp_path / "out") != plain


def trained_names(write, **keys: Any) -> set[str]:
    """Names of weights that a run has changed."""
    config = write(**{"max_steps": 2, **keys})
    run(config)
    values = json.loads(config.read_text())
    out, base = Path(values["output_dir"]), weights(Path(values["model_name_or_path"]))
    return {
        name
        for name, tensor in weights(out).items()
        if name not in base or not torch.equal(tensor, base[name])
    }


def parts(names: set[str]) -> set[str]:
    """Which parts of a Qwen3-VL the names are of."""
    found = set()
    for name in names:
        is_projector = "visual.merger" in name or "visual.deepstack_merger" in name
        found.add("projector" if is_projector else "tower" if "visual." in name else "language")
    return found


ALL_FREE = {"freeze_vision_tower": False, "freeze_multi_modal_projector": False}


@pytest.mark.parametrize("finetuning_type", rest_is_slow(["lora"], ["full"]))
@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, {"language"}),
        ({"freeze_vision_tower": False}, {"language", "tower"}),
        ({"freeze_multi_modal_projector": False}, {"language", "projector"}),
        ({**ALL_FREE, "freeze_language_model": True}, {"tower", "projector"}),
    ],
    ids=["usual", "tower", "projector", "all but language"],
)
def test_frozen_parts_stay_as_they_are(write, finetuning_type: str, keys: Any, expected: set[str]) -> None:
    names = trained_names(write, finetuning_type=finetuning_type, **keys)
    assert parts(names) == expected


def test_targets_that_are_named_leave_frozen_towers_alone(write) -> None:
    names = trained_names(write, lora_target="q_proj,proj,qkv", freeze_vision_tower=True)
    assert parts(names) == {"language"}
    with pytest.raises(ModelError, match="lora_target: qkv, proj are frozen"):
        trained_names(write, lora_target="qkv,proj", freeze_vision_tower=True)


def test_freeze_trains_layers_of_the_language_model(write) -> None:
    assert parts(trained_names(write, finetuning_type="freeze", freeze_trainable_layers=1)) == {"language"}


def test_all_parts_frozen_is_refused(write, tiny_model: Path) -> None:
    with pytest.raises(ConfigError, match="freeze_language_model: nothing is left that is trained"):
        run(write(freeze_language_model=True))
    with pytest.raises(ModelError, match="does not see"):
        run(
            write(
                model_name_or_path=str(tiny_model),
                freeze_language_model=True,
                freeze_vision_tower=False,
                template="chatml",
                dataset=["texts"],
            )
        )


def test_a_saved_model_is_known_again_by_what_it_sees(write, tmp_path: Path, seeing_model: Path) -> None:
    run(write(template=None))
    out = tmp_path / "out"
    assert (out / "processor_config.json").is_file()
    config = read_use_config(str(out), [], TALKING).config
    assert load_model(config).proof == 0.0
    other = tmp_path / "other"
    shutil.copytree(seeing_model, other)
    from safetensors.torch import load_file, save_file

    changed = load_file(other / "model.safetensors")
    name = next(name for name in changed if "visual.blocks.0.attn.qkv.weight" in name)
    changed[name] = -changed[name]
    save_file(changed, other / "model.safetensors", {"format": "pt"})
    config = read_use_config(str(out), [f"model_name_or_path={other}"], TALKING).config
    with pytest.raises(ModelError, match="is not the model that was trained"):
        load_model(config)


def test_pixels_are_those_that_were_asked_for(write, tmp_path: Path) -> None:
    """Fewer pixels are fewer tokens, in what is kept and in what is trained."""
    lengths = []
    smaller = {"image_max_pixels": 784, "image_min_pixels": 400}
    for keys in ({}, smaller, {"image_min_pixels": 4096}):
        run(write(max_steps=1, **keys))
        lengths.append(load_rows(write(**keys)))
    assert lengths[1] < lengths[0] < lengths[2]


def load_rows(config: Path) -> int:
    """Tokens of the prompts of a config's rows."""
    from prefkit.data.dataset import load_data
    from prefkit.model.vision import load_template

    loaded = load_config(config).config
    data = load_data(
        loaded, load_template(loaded.model, loaded.data), 0, lambda text: None, lambda items, title: items
    )
    return sum(len(row.prompt_ids) for row in data.train)


def test_a_blind_model_and_a_blind_template_refuse_images(write, tmp_path: Path) -> None:
    blind = tmp_path / "blind"
    make_model().save_pretrained(blind)
    make_tokenizer().save_pretrained(blind)
    with pytest.raises(DataError, match=r"pairs.json:1: it has images, and .* does not see"):
        run(write(model_name_or_path=str(blind), template="chatml"))
    with pytest.raises(TemplateError, match=r"chatml does not write the images .* are qwen2_vl, qwen3_vl"):
        run(write(template="chatml"))
    kept = run(write(model_name_or_path=str(blind), template="chatml", on_bad_row="skip"))
    assert "images for a blind model" in kept


def test_pictures_elsewhere_are_found_by_media_dir(write, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for picture in (tmp_path / "data").glob("*.png"):
        picture.rename(elsewhere / picture.name)
    with pytest.raises(DataError, match=r"pairs\.json:1: column 'images', image 1: .*0a\.png is missing"):
        run(write(max_steps=1))
    run(write(max_steps=1, media_dir=str(elsewhere)))


def test_addresses_are_fetched_from_named_hosts_alone(
    write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = read(tmp_path / "data" / "pairs.json")
    picture = (tmp_path / "data" / "0a.png").read_bytes()
    rows[0]["images"] = ["https://pictures.example/0a.png"]
    (tmp_path / "data" / "pairs.json").write_text(json.dumps(rows))
    with pytest.raises(DataError, match=r"pairs\.json:1: .*media_hosts: \[pictures\.example\]"):
        run(write(max_steps=1))
    asked = []
    monkeypatch.setattr(
        "prefkit.data.fetching.fetch", lambda url, hosts: asked.append((url, hosts)) or picture
    )
    run(write(max_steps=1, media_hosts=["pictures.example"]))
    assert asked == [("https://pictures.example/0a.png", ("pictures.example",))]


def test_positions_are_stretched_in_the_language_model(write, tmp_path: Path) -> None:
    said = run(write(rope_scaling="linear", cutoff_len=4096, max_steps=1))
    assert "a prompt is computed once for its responses" in said
    assert len(losses(tmp_path / "out")) == 1


def test_images_of_a_row_that_does_not_fit_reject_it(write) -> None:
    said = run(write(cutoff_len=60, max_steps=1))
    assert "no room for the images of the prompt" in said


def test_a_model_learns_what_only_the_pictures_tell(write, tmp_path: Path) -> None:
    """Held-out pictures of other sizes and places; shown blank ones, the model cannot tell."""
    generator = random.Random(0)
    rows = []
    for i in range(150):
        right, wrong = generator.sample(("red", "green", "blue", "black"), 2)
        size = (generator.randrange(24, 40, 4), generator.randrange(24, 40, 4))
        draw(tmp_path / "data", f"c{i}.png", size, right)
        turns = [{"from": "human", "value": "<image>Which?"}]
        answers = {"chosen": right, "rejected": wrong}
        said = {name: {"from": "gpt", "value": f"{word:6}"} for name, word in answers.items()}
        rows.append({"conversations": turns, **said, "images": [f"c{i}.png"]})
    for name, part in (("pairs", rows[:120]), ("held_out", rows[120:])):
        (tmp_path / "data" / f"{name}.json").write_text(json.dumps(part))
    Image.new("RGB", (32, 32), "white").save(tmp_path / "data" / "blank.png")
    blank = [{**row, "images": ["blank.png"]} for row in rows[120:]]
    (tmp_path / "data" / "blank.json").write_text(json.dumps(blank))
    info = read(tmp_path / "data" / "dataset_info.json")
    info |= {name: {**info["pairs"], "file_name": f"{name}.json"} for name in ("held_out", "blank")}
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(info))
    run(
        write(
            **{"finetuning_type": "full", "max_steps": 90, "per_device_train_batch_size": 8},
            **{**ALL_FREE, "learning_rate": 0.003, "do_eval": True, "logging_steps": 30},
            **{"eval_dataset": ["held_out", "blank"], "eval_on_each_dataset": True},
        )
    )
    found = read(tmp_path / "out" / "eval_results.json")
    assert found["eval_held_out_rewards/accuracies"] > 0.9
    assert found["eval_blank_rewards/accuracies"] < 0.75


@pytest.mark.parametrize(
    ("key", "value"),
    rest_is_slow(
        [("video_fps", 1.0), ("video_max_pixels", 784)],
        [("video_maxlen", 2), ("video_min_pixels", 4096)],
    ),
)
def test_videos_are_taken_as_the_keys_say(write, tmp_path: Path, key: str, value: float) -> None:
    frames = [draw(tmp_path / "data", f"f{i}.png", (40, 32), colour) for i, colour in enumerate(COLOURS)]
    row = {"instruction": "<video>What?", "chosen": "Yes.", "rejected": "No no.", "videos": [frames]}
    rows = [{**row, "instruction": f"<video>What, {i}?"} for i in range(4)]
    (tmp_path / "data" / "clips.json").write_text(json.dumps(rows))
    keys = {"dataset": [str(tmp_path / "data" / "clips.json")], "max_steps": 2}
    run(write(**keys))
    plain, usual = losses(tmp_path / "out"), load_rows(write(**keys))
    run(write(**keys, **{key: value}))
    assert losses(tmp_path / "out") != plain
    tokens = load_rows(write(**keys, **{key: value}))
    fewer = key in ("video_maxlen", "video_max_pixels")
    assert tokens < usual if fewer else tokens > usual if key == "video_min_pixels" else tokens == usual


def test_samples_show_their_pictures(write, tmp_path: Path) -> None:
    run(write(val_size=3, sample_prompts=3, sample_max_new_tokens=4, max_steps=1, disable_shuffling=True))
    page = (tmp_path / "out" / "samples.md").read_text()
    shown = [line for line in page.splitlines() if line.startswith("![")]
    assert shown and all((tmp_path / "data" / line[2:].partition("]")[0]).is_file() for line in shown)


def test_training_goes_on_with_images_of_another_size(write, tmp_path: Path) -> None:
    """The picture of the probe does not follow the keys."""
    sizes = {"image_max_pixels": 784, "image_min_pixels": 400}
    run(write(**sizes, max_steps=1))
    first = tmp_path / "first"
    (tmp_path / "out").rename(first)
    run(write(adapter_name_or_path=[str(first)], max_steps=1))
    assert len(losses(tmp_path / "out")) == 1


@forks
def test_two_processes_are_one_with_twice_the_batch(write, tmp_path: Path) -> None:
    """Rows with and without pictures on the ranks, the image reader not frozen."""
    keys = {"finetuning_type": "full", **ALL_FREE, "max_steps": 3, "disable_shuffling": True}
    run(write(**keys, per_device_train_batch_size=2))
    expected = losses(tmp_path / "out")
    run_in_two(tmp_path, "train", write(**keys, per_device_train_batch_size=1))
    assert losses(tmp_path / "out") == pytest.approx(expected, abs=1e-5)
