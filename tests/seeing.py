"""Tiny random models that see, their processors, and pictures and rows for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image, ImageDraw
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedTokenizerFast

from tests.conftest import SMALL, make_tokenizer

QWEN_TOKENS = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
GEMMA_TOKENS = [
    "<start_of_turn>",
    "<end_of_turn>",
    "<start_of_image>",
    "<end_of_image>",
    "<image_soft_token>",
]
SMOL_TOKENS = ["<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"]
SMOL_TOKENS += [f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)]
TEXT = {**SMALL, "vocab_size": 288, "max_position_embeddings": 2048}
SIGLIP = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "patch_size": 4,
    "image_size": 16,
}
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
# A turn's images where they stand, as the models' own templates do.
PARTS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}"
    "{% if p.type == 'image' %}IMAGE"
    "{% elif p.type == 'video' %}VIDEO{% else %}{{ p.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _tokenizer(extra: list[str], image: str, **named: str) -> PreTrainedTokenizerFast:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(extra, special_tokens=True)
    video = image.replace("image", "video")
    tokenizer.chat_template = PARTS.replace("IMAGE", image).replace("VIDEO", video)
    for name, token in named.items():
        tokenizer.init_kwargs[name] = token
        setattr(tokenizer, name, token)
        setattr(tokenizer, f"{name}_id", tokenizer.convert_tokens_to_ids(token))
    tokenizer.init_kwargs["extra_special_tokens"] = named or {}
    return tokenizer


def _qwen3_vl(tokenizer: PreTrainedTokenizerFast) -> tuple[dict[str, Any], Any, dict[str, Any]]:
    ids = tokenizer.convert_tokens_to_ids
    vision = {
        **{"depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "patch_size": 4},
        **{"out_hidden_size": 32, "num_position_embeddings": 64, "deepstack_visual_indexes": [0]},
    }
    config = {
        "text_config": {**TEXT, "rope_parameters": {**MROPE, "mrope_interleaved": True}},
        "vision_config": vision,
        "image_token_id": ids("<|image_pad|>"),
        "video_token_id": ids("<|video_pad|>"),
        "vision_start_token_id": ids("<|vision_start|>"),
        "vision_end_token_id": ids("<|vision_end|>"),
    }
    images = transformers.Qwen2VLImageProcessorPil(
        patch_size=4, min_pixels=64, max_pixels=4096, size={"shortest_edge": 64, "longest_edge": 4096}
    )
    return config, images, {"processor_class": "Qwen3VLProcessor"}


def _qwen2_5_vl(tokenizer: PreTrainedTokenizerFast) -> tuple[dict[str, Any], Any, dict[str, Any]]:
    config, images, facts = _qwen3_vl(tokenizer)
    config["vision_config"] = {
        **{"depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "patch_size": 4},
        **{"out_hidden_size": 32, "window_size": 16, "fullatt_block_indexes": [1]},
    }
    config["text_config"] = {**TEXT, "rope_parameters": MROPE}
    return config, images, facts | {"processor_class": "Qwen2_5_VLProcessor"}


def _qwen2_vl(tokenizer: PreTrainedTokenizerFast) -> tuple[dict[str, Any], Any, dict[str, Any]]:
    config, images, facts = _qwen2_5_vl(tokenizer)
    config["vision_config"] = {
        **{"depth": 2, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4},
    }
    return config, images, facts | {"processor_class": "Qwen2VLProcessor"}


def _qwen3_vl_moe(tokenizer: PreTrainedTokenizerFast) -> tuple[dict[str, Any], Any, dict[str, Any]]:
    config, images, facts = _qwen3_vl(tokenizer)
    config["text_config"] |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    return config, images, facts


def _llava_onevision(tokenizer: PreTrainedTokenizerFast) -> tuple[dict[str, Any], Any, dict[str, Any]]:
    pinpoints = [[16, 16], [16, 32], [32, 16], [32, 32]]
    config = {
        "text_config": {**TEXT, "model_type": "qwen2"},
        "vision_config": {**SIGLIP, "model_type": "siglip_vision_model", "vision_use_head": False},
        "image_token_id": tokenizer.convert_tokens_to_ids("<image>"),
        "video_token_id": tokenizer.convert_tokens_to_ids("<video>"),
        "image_grid_pinpoints": pinpoints,
    }
    images = transformers.LlavaOnevisionImageProcessorPil(
        size={"height": 16, "width": 16}, image_grid_pinpoints=pinpoints
    )
    facts = {"num_image_tokens": 16, "vision_feature_select_strategy": "full"}
    return config, images, facts | {"processor_class": "LlavaOnevisionProcessor"}


def _gemma3(tokenizer: PreTrainedTokenizerFast) -> tuple[dict[str, Any], Any, dict[str, Any]]:
    config = {
        "text_config": {
            **TEXT,
            "sliding_window": 512,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        "vision_config": {**SIGLIP, "model_type": "siglip_vision_model", "vision_use_head": False},
        "mm_tokens_per_image": 4,
        "image_token_index": tokenizer.convert_tokens_to_ids("<image_soft_token>"),
        "image_token_id": tokenizer.convert_tokens_to_ids("<image_soft_token>"),
        "boi_token_index": tokenizer.convert_tokens_to_ids("<start_of_image>"),
        "eoi_token_index": tokenizer.convert_tokens_to_ids("<end_of_image>"),
    }
    images = transformers.Gemma3ImageProcessorPil(size={"height": 16, "width": 16})
    return config, images, {"image_seq_length": 4, "processor_class": "Gemma3Processor"}


def _smolvlm(tokenizer: PreTrainedTokenizerFast) -> tuple[dict[str, Any], Any, dict[str, Any]]:
    config = {
        "text_config": {**TEXT, "model_type": "llama"},
        "vision_config": {**SIGLIP, "num_channels": 3},
        "image_token_id": tokenizer.convert_tokens_to_ids("<image>"),
        "scale_factor": 2,
    }
    images = transformers.SmolVLMImageProcessorPil(
        size={"longest_edge": 32}, max_image_size={"longest_edge": 16}
    )
    return config, images, {"image_seq_len": 4, "processor_class": "SmolVLMProcessor"}


def _idefics3(tokenizer: PreTrainedTokenizerFast) -> tuple[dict[str, Any], Any, dict[str, Any]]:
    config, _, facts = _smolvlm(tokenizer)
    images = transformers.Idefics3ImageProcessorPil(
        size={"longest_edge": 32}, max_image_size={"longest_edge": 16}
    )
    return config, images, facts | {"processor_class": "Idefics3Processor"}


_QWEN_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
_GEMMA = {
    "boi_token": "<start_of_image>",
    "eoi_token": "<end_of_image>",
    "image_token": "<image_soft_token>",
}
_MAKERS: dict[str, Any] = {
    "qwen3_vl": (_qwen3_vl, QWEN_TOKENS, _QWEN_IMAGE, {}),
    "qwen2_5_vl": (_qwen2_5_vl, QWEN_TOKENS, _QWEN_IMAGE, {}),
    "llava_onevision": (_llava_onevision, ["<image>", "<video>"], "<image>\n", {}),
    "gemma3": (_gemma3, GEMMA_TOKENS, "<start_of_image>", _GEMMA),
    "smolvlm": (_smolvlm, SMOL_TOKENS, "<image>", {}),
    "qwen2_vl": (_qwen2_vl, QWEN_TOKENS, _QWEN_IMAGE, {}),
    "qwen3_vl_moe": (_qwen3_vl_moe, QWEN_TOKENS, _QWEN_IMAGE, {}),
    "idefics3": (_idefics3, SMOL_TOKENS, "<image>", {}),
}
KINDS = tuple(_MAKERS)


def save_seeing_model(
    folder: Path,
    kind: str = "qwen3_vl",
    text: dict[str, Any] | None = None,
    vision: dict[str, Any] | None = None,
) -> Path:
    """Write a tiny random model that sees, with tokenizer and processor, the same each time; `text` and
    `vision` change its sizes."""
    make, extra, image, named = _MAKERS[kind]
    tokenizer = _tokenizer(extra, image, **named)
    described, images, facts = make(tokenizer)
    for part, changes in (("text_config", text), ("vision_config", vision)):
        described[part] = {**described[part], **(changes or {})}
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **described, tie_word_embeddings=False)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for weights in model.parameters():  # so that an image changes what follows it
            if weights.ndim > 1:
                weights.normal_(0, 0.2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    images.save_pretrained(folder)
    (folder / "processor_config.json").write_text(json.dumps(facts))
    return folder


def draw(folder: Path, name: str, size: tuple[int, int] = (48, 32), colour: str = "red") -> str:
    """Write a picture of a disc; its name."""
    picture = Image.new("RGB", size, "white")
    ImageDraw.Draw(picture).ellipse([4, 4, size[0] // 2, size[1] - 4], fill=colour)
    picture.save(folder / name)
    return name


COLOURS = ("red", "green", "blue", "black", "orange", "purple")


def make_seen_rows(folder: Path, number: int) -> list[dict[str, Any]]:
    """Pairs with pictures in sharegpt's form: one, two in a turn, one in an earlier turn, or none."""
    rows = []
    for i in range(number):
        colour = COLOURS[i % len(COLOURS)]
        first = draw(folder, f"{i}a.png", (32 + 8 * (i % 3), 24 + 8 * (i % 2)), colour)
        second = draw(folder, f"{i}b.png", (24, 24), COLOURS[(i + 1) % len(COLOURS)])
        turns, images = [("human", f"<image>What is it, {i}?")], [first]
        if i % 4 == 1:
            turns, images = [("human", f"<image> and <image>: which, {i}?")], [first, second]
        elif i % 4 == 2:
            turns = [("human", "Look: <image>"), ("gpt", "Yes."), ("human", "Which colour?")]
        elif i % 4 == 3:
            turns, images = [("human", f"Say {i}")], []
        rows.append({
            "conversations": [{"from": who, "value": text} for who, text in turns],
            "chosen": {"from": "gpt", "value": f"It is {colour}."},
            "rejected": {"from": "gpt", "value": "I do not know" + "!" * (i % 3)},
            "images": images,
        })  # fmt: skip
    return rows
