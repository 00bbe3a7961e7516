"""What a rehearsed step holds at most is what the real step holds, by torch's own allocator."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.peak import PeakMemory
from prefkit.check.models import build_models
from prefkit.check.rehearsal import Block, fullest_moment, without_numbers
from prefkit.config import load_config
from prefkit.data.encode import TokenizedExample
from prefkit.data.examples import Label, Pair
from prefkit.data.packing import pack
from prefkit.model.adapter import base_of
from prefkit.model.attention import segment_attention
from prefkit.model.policy import response_logps
from prefkit.model.vision import load_template
from prefkit.train.arguments import make_training_arguments
from prefkit.train.policy import build_policy, choose_policy_logps
from prefkit.train.strategy import Replicated
from tests.conftest import make_model, make_tokenizer
from tests.train.test_kills import rest_is_slow

WIDE = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32, "num_hidden_layers": 4}

KTO = {"stage": "kto", "dataset": "judged"}
LABELS: tuple[Label, Label] = ("desirable", "partner")


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model wide enough for its activations to be seen."""
    folder = tmp_path_factory.mktemp("wide")
    make_model(**WIDE).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def make_batch(layout: Any) -> dict[str, Any]:
    """Two pairs, which stage kto takes for judged responses and their partners. Their lengths differ, since
    a mask of padding that masks nothing is left out in numbers only."""
    ids = [7 + i % 250 for i in range(700)]
    rows = [
        TokenizedExample(ids[:prompt], [ids[:one], ids[:other]], (Pair(0, 1),), "f:1", labels=LABELS)
        for prompt, one, other in ((200, 250, 150), (100, 120, 180))
    ]
    return pack(rows, layout).to_dict()


def measure(config: Any, args: Any) -> int:
    """Bytes that the forward of policy and reference and the backward hold at most."""
    template = load_template(config.model, config.data)
    policy = build_policy(config, args, template, lambda text: None, Replicated(args))
    model: Any = policy.model
    model.train()
    if args.activation_checkpointing:
        base_of(model).activation_checkpointing_enable({"use_reentrant": False})
    batch = make_batch(policy.layout)
    policy_logps = choose_policy_logps(config, policy.base.config)

    def precision() -> Any:
        return torch.autocast("cpu", torch.bfloat16) if args.bf16 else nullcontext()

    def step() -> None:
        with precision():
            logps = policy_logps(model, batch).logps
        if config.tuning.finetuning_type == "lora":
            with torch.no_grad(), precision(), model.disable_adapter():
                other = response_logps(model, batch).logps
            logps = logps - other
        logps.sum().backward()

    step()
    model.zero_grad()
    with PeakMemory() as memory:
        step()
    return memory.peak


@pytest.mark.parametrize(
    "keys",
    rest_is_slow(
        [
            {},
            {"batch_layout": "repeat"},
            {"bf16": True},
            {"disable_gradient_checkpointing": False},
            {"finetuning_type": "full", "ref_cache": True},
            KTO,
        ],
        [
            {"bf16": True, "dtype": "bfloat16"},
            {"finetuning_type": "full", "ref_cache": True, "bf16": True},
            {"finetuning_type": "freeze", "ref_cache": True},
            {**KTO, "batch_layout": "repeat"},
            {**KTO, "disable_gradient_checkpointing": False},
        ],
    ),
    ids=lambda keys: " ".join(map(str, keys.values())) or "lora",
)
def test_the_peak_is_that_of_the_real_step(
    keys: dict[str, Any], wide_model: Path, write_config: Callable[..., Path]
) -> None:
    config = load_config(write_config(model_name_or_path=str(wide_model), cutoff_len=512, **keys)).config
    args = make_training_arguments(config)
    models = build_models(config, args, 264, 10)
    rehearsed = models.rehearsal.run(lambda: make_batch(models.layout), 2**25)
    assert rehearsed.total == pytest.approx(measure(config, args), rel=0.06)


def test_gradients_of_the_micro_batch_before_are_there(
    wide_model: Path, write_config: Callable[..., Path]
) -> None:
    found = []
    for steps in (1, 2):
        file = write_config(
            model_name_or_path=str(wide_model),
            finetuning_type="full",
            ref_cache=True,
            gradient_accumulation_steps=steps,
        )
        config = load_config(file).config
        models = build_models(config, make_training_arguments(config), 264, 10)
        found.append(models.rehearsal.run(lambda: make_batch("shared"), 2**25).gradients)
        trained = models.num_weights[0]
    assert found[0] < found[1] == 4 * trained


def test_masks_do_not_cross_the_border() -> None:
    """They are kept between calls: one without numbers would break the next real step."""
    segments = ((0, 2, ((2, 4), (4, 6))),)
    with without_numbers():
        states = torch.randn(1, 2, 6, 8)
        segment_attention(states, states, states, segments, None)
    states = torch.ones(1, 2, 6, 8)
    assert torch.equal(segment_attention(states, states, states, segments, None), states)


def test_the_fullest_moment() -> None:
    first, second, third = Block(1, 10, False), Block(2, 20, True), Block(3, 25, False)
    changes = [(first, 1), (second, 1), (first, -1), (third, 1), (second, -1), (third, -1)]
    moment = fullest_moment(changes, {3}, limit=20)
    assert (moment.gradients, moment.logits, moment.activations, moment.small) == (25, 20, 0, 20)
    assert moment.total == 45
