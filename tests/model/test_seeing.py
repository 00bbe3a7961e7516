"""Models that see: what packed batches give is what the model itself gives, whatever the layout."""

from __future__ import annotations

import pickle
import re
import shutil
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import pytest
import torch
from PIL import Image
from torch import Tensor

from prefkit.config.schema import DataConfig, GenerationConfig, ModelConfig
from prefkit.data.encode import TokenizedExample, encode_example
from prefkit.data.examples import Clip
from prefkit.data.formats import RowFormat, make_example
from prefkit.data.images import MediaSource, scale
from prefkit.data.packing import Layout, pack, see
from prefkit.data.picking import pick
from prefkit.data.splitting import split
from prefkit.data.template import ChatTemplate
from prefkit.model.attention import plain_attention
from prefkit.model.batches import prepare_for_batches
from prefkit.model.load import load_causal_lm
from prefkit.model.policy import response_logps
from prefkit.model.rollout import Stream, sample_responses
from prefkit.model.vision import generation_inputs, load_template
from tests.seeing import COLOURS, KINDS, draw, make_seen_rows, save_seeing_model

ALPACA = RowFormat("alpaca")
SHARING = tuple(kind for kind in KINDS if kind != "gemma3")


@cache
def seen(kind: str) -> tuple[Path, ChatTemplate, list[TokenizedExample]]:
    """The folder of a model, its template, and rows with one image, two, one in an earlier turn, and none."""
    folder = save_seeing_model(Path(mkdtemp()), kind)
    template = load_template(ModelConfig(model_name_or_path=str(folder)), DataConfig())
    rows = make_seen_rows(folder, 4)
    examples = [
        make_example(row, RowFormat("sharegpt"), "pairs", f"f:{i}", MediaSource(folder))
        for i, row in enumerate(rows, 1)
    ]
    return folder, template, [encode_example(example, template, 1024) for example in examples]


def load(kind: str, layout: str) -> tuple[torch.nn.Module, Layout]:
    config = ModelConfig(model_name_or_path=str(seen(kind)[0]), batch_layout=layout)
    model = load_causal_lm(config)
    found = prepare_for_batches(model, config, 1024, lambda text: None, has_images=True)
    return model, found


@cache
def with_clips(kind: str) -> list[TokenizedExample]:
    """Rows with a video, and with one between images."""
    folder, template, _ = seen(kind)
    frames = [draw(folder, f"frame{i}.png", (40, 32), colour) for i, colour in enumerate(COLOURS[:5])]
    rows = [
        {"instruction": "<video>What happens?", "videos": [frames[:4]]},
        {"instruction": "<image> or <video> or <image>?", "images": frames[:2], "videos": [frames[2:]]},
    ]
    examples = [
        make_example(
            {**row, "chosen": "Yes.", "rejected": "No no."}, ALPACA, "pairs", "f:1", MediaSource(folder)
        )
        for row in rows
    ]
    return [encode_example(example, template, 1024) for example in examples]


def own_logps(kind: str, rows: list[TokenizedExample] | None = None) -> list[Tensor]:
    """Of each response, the log-probs by the model's own forward, its processor's inputs computed anew."""
    folder, template, examples = seen(kind)
    examples = rows or examples
    model = load_causal_lm(ModelConfig(model_name_or_path=str(folder)))
    vision = template.vision
    assert vision is not None
    found = []
    for example in examples:
        pixels = vision.read(example.images)[0] if example.images else {}
        for ids in example.response_ids:
            row = torch.tensor([[*example.prompt_ids, *ids]])
            kinds = (row == vision.token_id).int()
            if vision.reads_clips:
                kinds += 2 * (row == vision.config.video_token_id).int()
            name = "token_type_ids" if kind == "gemma3" else "mm_token_type_ids"
            given = {name: kinds} if kind == "gemma3" or "qwen" in kind else {}
            with torch.no_grad():
                logits = model(input_ids=row, **pixels, **given).logits[0].float()
            start = len(example.prompt_ids)
            logps = logits[start - 1 : -1].log_softmax(-1)
            found.append(logps.gather(1, torch.tensor(ids)[:, None])[:, 0])
    return found


@pytest.mark.parametrize("layout", ["shared", "repeat"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_gives_what_the_model_gives_for_each_row(kind: str, layout: Layout) -> None:
    if layout == "shared" and kind not in SHARING:
        pytest.skip("its images attend both ways")
    _, template, examples = seen(kind)
    model, found = load(kind, layout)
    assert found == layout
    with torch.no_grad():
        packed = response_logps(model, pack(examples, layout, template.vision).to_dict())
    expected = torch.cat(own_logps(kind))
    assert (packed.token_logps - expected).abs().max() < 1e-4
    assert expected.std() > 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_the_picture_matters(kind: str) -> None:
    """So that the tests here would notice a picture that is left out."""
    _, template, examples = seen(kind)
    model, layout = load(kind, "auto")
    other = next(example for example in examples if example.images)
    batch = pack([other], layout, template.vision).to_dict()
    blank = [{**it, "pixel_values": -it["pixel_values"]} for it in batch["pixels"]]
    with torch.no_grad():
        apart = response_logps(model, batch).logps - response_logps(model, batch | {"pixels": blank}).logps
    assert apart.abs().min() > 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_models_whose_images_attend_both_ways_repeat_the_prompt(kind: str) -> None:
    _, layout = load(kind, "auto")
    assert layout == ("shared" if kind in SHARING else "repeat")


@pytest.mark.parametrize("kind", SHARING)
def test_gradients_do_not_depend_on_the_layout(kind: str) -> None:
    _, template, examples = seen(kind)
    gradients = []
    for layout in ("shared", "repeat"):
        model, _ = load(kind, layout)
        response_logps(model, pack(examples, layout, template.vision).to_dict()).logps.sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    shared, repeated = gradients
    assert shared.keys() == repeated.keys()
    # Some of the image reader too, since nothing is frozen here.
    assert sum("vis" in name for name in shared) > 4
    for name in shared:
        scale = repeated[name].abs().max().clamp(min=1e-3)
        assert (shared[name] - repeated[name]).abs().max() / scale < 1e-3, name


@pytest.mark.parametrize("layout", ["shared", "repeat"])
@pytest.mark.parametrize("kind", ["qwen3_vl", "smolvlm"])
def test_parts_of_a_batch_keep_their_images(kind: str, layout: Layout) -> None:
    _, template, examples = seen(kind)
    model, _ = load(kind, layout)
    batch = pack(examples, layout, template.vision).to_dict()
    with torch.no_grad():
        whole = response_logps(model, batch).logps
        halves = torch.cat([response_logps(model, part).logps for part in split(batch, 2)])
        chosen = response_logps(model, pick(batch, [0, 2, 5])).logps
    torch.testing.assert_close(halves, whole, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(chosen, whole[[0, 2, 5]], atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("layout", ["shared", "repeat"])
@pytest.mark.parametrize("kind", ["qwen3_vl", "qwen2_5_vl"])
def test_videos_of_frames_give_what_the_model_gives(kind: str, layout: Layout) -> None:
    _, template, examples = seen(kind)
    rows = [*with_clips(kind), examples[0]]
    model, _ = load(kind, layout)
    with torch.no_grad():
        packed = response_logps(model, pack(rows, layout, template.vision).to_dict())
    expected = torch.cat(own_logps(kind, rows))
    assert (packed.token_logps - expected).abs().max() < 1e-4


def test_the_frames_of_a_video_are_written_with_their_times() -> None:
    _, template, _ = seen("qwen3_vl")
    text = template.tokenizer.decode(with_clips("qwen3_vl")[0].prompt_ids)
    pads = re.sub(r"(<\|video_pad\|>)+", "PADS", text)
    frame = "<|vision_start|>PADS<|vision_end|>"
    assert f"user\n<0.2 seconds>{frame}<1.2 seconds>{frame}What happens?" in pads
    other = seen("qwen2_5_vl")[1].tokenizer.decode(with_clips("qwen2_5_vl")[0].prompt_ids)
    assert re.sub(r"(<\|video_pad\|>)+", "PADS", other).count(frame) == 1


def test_a_video_has_the_patches_of_its_frames_in_time() -> None:
    """Of two frames, each place in time has its own; a still picture has the same twice."""
    _, template, _ = seen("qwen3_vl")
    vision = template.vision
    assert vision is not None
    clip = with_clips("qwen3_vl")[0].images[0]
    assert isinstance(clip, Clip)
    pixels, _ = vision.read([Clip(clip.frames[:2])])
    stills = [vision.read([frame])[0]["pixel_values"] for frame in clip.frames[:2]]
    depth = vision.processor.image_processor.temporal_patch_size
    patches = pixels["pixel_values_videos"].unflatten(1, (3, depth, -1))
    for place, still in enumerate(stills):
        assert torch.equal(patches[:, :, place], still.unflatten(1, (3, depth, -1))[:, :, place])
    assert pixels["video_grid_thw"][0, 0] == 1


def test_the_images_of_a_shared_batch_are_seen_once() -> None:
    _, template, examples = seen("qwen3_vl")
    times = {}
    for layout in ("shared", "repeat"):
        model, _ = load("qwen3_vl", layout)
        patches = []
        model.model.visual.register_forward_hook(lambda module, given, out: patches.append(len(given[0])))  # noqa: B023
        with torch.no_grad():
            response_logps(model, pack(examples, layout, template.vision).to_dict())
        times[layout] = sum(patches)
    assert times["repeat"] == 2 * times["shared"] > 0


def test_a_template_that_sees_travels_to_another_process() -> None:
    _, template, examples = seen("qwen3_vl")
    copied = pickle.loads(pickle.dumps(template))  # noqa: S301
    one, other = (it.vision.read(examples[1].images) for it in (template, copied))
    assert one[1] == other[1]
    assert torch.equal(one[0]["pixel_values"], other[0]["pixel_values"])


def test_positions_after_images_go_on_from_the_largest() -> None:
    """M-RoPE by hand: a picture of 2 x 3 tokens after two of text, then text again."""
    _, template, _ = seen("qwen3_vl")
    vision = template.vision
    assert vision is not None
    ids = [1, 2, *[vision.token_id] * 6, 3]
    places = vision.places(ids, {"image_grid_thw": torch.tensor([[1, 4, 6]])})
    assert places is not None
    assert places.tolist() == [
        [0, 1, 2, 2, 2, 2, 2, 2, 5],
        [0, 1, 2, 2, 2, 3, 3, 3, 5],
        [0, 1, 2, 3, 4, 2, 3, 4, 5],
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_drawing_sees_each_image_once_and_gives_what_generate_gives(kind: str) -> None:
    _, template, examples = seen(kind)
    model, _ = load(kind, "auto")
    views = [see(example, template.vision) for example in examples]
    found = sample_responses(
        model,  # type: ignore[arg-type]
        [example.prompt_ids for example in examples],
        numbers=range(len(examples)),
        num_responses=2,
        generation=GenerationConfig(do_sample=False, max_new_tokens=6),
        stop_ids=[],
        stream=Stream(0, 0),
        seen=views,
    )
    for example, it, sampled in zip(examples, views, found, strict=True):
        ids = torch.tensor([example.prompt_ids])
        images = generation_inputs(model.config, [it.pixels], ids)  # type: ignore[arg-type]
        with plain_attention(model):  # type: ignore[arg-type]
            whole = model.generate(  # type: ignore[operator]
                input_ids=ids, **images, max_new_tokens=6, do_sample=False, eos_token_id=None
            )
        expected = whole[0, ids.shape[1] :].tolist()
        assert sampled.response_ids == [expected, expected]


@pytest.mark.parametrize("name", ["qwen3_vl_nothink", "qwen3_vl", None])
def test_a_saved_template_takes_parts_as_processors_hand_them_over(name: str | None, tmp_path: Path) -> None:
    """What is saved gives by transformers' own processor the tokens that were trained."""
    folder, _, _ = seen("qwen3_vl")
    data = DataConfig(template=name, enable_thinking=False)
    template = load_template(ModelConfig(model_name_or_path=str(folder)), data)
    template.saved.save_pretrained(tmp_path)
    shutil.copy(folder / "config.json", tmp_path)
    row = make_seen_rows(folder, 3)[2]
    example = make_example(row, RowFormat("sharegpt"), "prompts", "f:1", MediaSource(folder))
    ids = encode_example(example, template, 1024).prompt_ids
    again = load_template(ModelConfig(model_name_or_path=str(tmp_path)), DataConfig(enable_thinking=False))
    processor = again.saved
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "Look: "}, {"type": "image"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "Yes."}]},
        {"role": "user", "content": [{"type": "text", "text": "Which colour?"}]},
    ]
    text = again.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    with Image.open(folder / row["images"][0]) as picture:
        found = processor(
            images=[picture.convert("RGB").resize(scale(*picture.size, 1024, 589824))], text=[text]
        )
    assert found["input_ids"][0] == ids
    assert encode_example(example, again, 1024).prompt_ids == ids
