"""The vLLM engine against a vllm of our own, which takes what the real one (0.32) takes and nothing else."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from prefkit.config.errors import UserError
from prefkit.config.load import load_config
from prefkit.config.schema import GenerationConfig, RunConfig
from prefkit.data.packing import Packer
from prefkit.model.errors import ModelError
from prefkit.model.rollout import Sampled, Stream
from prefkit.model.value import add_value_head
from prefkit.train import vllm_engine
from prefkit.train.policy import Policy
from prefkit.train.vllm_engine import VllmEngine, open_vllm_engine, request_seed
from tests.conftest import make_model

STOP = 2


@dataclass
class SamplingParams:
    """Those of the real one that may be given here; its checks of them are copied."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int | None = None
    max_tokens: int | None = 16
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    detokenize: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= 2:
            raise ValueError(f"temperature must be in [0, 2], got {self.temperature}.")
        if not 0 < self.top_p <= 1 or self.top_k < -1 or self.repetition_penalty <= 0:
            raise ValueError("top_p, top_k or repetition_penalty out of range")
        if self.max_tokens is None or self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {self.max_tokens}.")
        if self.seed is not None and not -(2**63) <= self.seed < 2**63:
            raise ValueError("seed is no 64-bit number")


@dataclass
class LoRARequest:
    lora_name: str
    lora_int_id: int
    lora_path: str = ""
    base_model_name: str | None = None
    load_inplace: bool = False
    is_3d_lora_weight: bool = False

    def __post_init__(self) -> None:
        assert self.lora_int_id >= 1 and self.lora_path


@dataclass
class EngineCore:
    is_open: bool = True

    def shutdown(self, timeout: float | None = None) -> None:
        self.is_open = False


@dataclass
class LLMEngine:
    """Holds adapters by id, each read from its folder when it is added."""

    max_loras: int
    engine_core: EngineCore = field(default_factory=EngineCore)
    loras: dict[int, dict[str, torch.Tensor]] = field(default_factory=dict)
    configs: dict[int, dict[str, Any]] = field(default_factory=dict)

    def add_lora(self, lora_request: LoRARequest) -> bool:
        assert lora_request.lora_int_id not in self.configs, "an id that was used before"
        assert len(self.loras) < self.max_loras, "no room"
        folder = Path(lora_request.lora_path)
        self.loras[lora_request.lora_int_id] = load_file(folder / "adapter_model.safetensors")
        self.configs[lora_request.lora_int_id] = json.loads((folder / "adapter_config.json").read_text())
        return True

    def remove_lora(self, lora_id: int) -> bool:
        return self.loras.pop(lora_id, None) is not None


class LLM:
    """Answers with tokens that follow from the seed of a request: `script` says what comes."""

    def __init__(
        self,
        model: str,
        *,
        trust_remote_code: bool = False,
        dtype: str = "auto",
        revision: str | None = None,
        tokenizer_revision: str | None = None,
        gpu_memory_utilization: float = 0.92,
        enforce_eager: bool = False,
        max_model_len: int | None = None,
        download_dir: str | None = None,
        enable_prefix_caching: bool | None = None,
        enable_sleep_mode: bool = False,
        enable_lora: bool = False,
        max_loras: int = 1,
        max_lora_rank: int = 16,
        max_cpu_loras: int | None = None,
    ) -> None:
        assert max_lora_rank in (1, 8, 16, 32, 64, 128, 256, 320, 512)
        if "refused" in model:
            raise ValueError("Model architectures are not supported")
        self.options = {name: value for name, value in locals().items() if name != "self"}
        self.llm_engine = LLMEngine(max_loras if enable_lora else 0)
        self.asked: list[tuple[list[int], SamplingParams]] = []
        self.events: list[str] = []
        self.script: list[int] = []
        self.weights: dict[str, torch.Tensor] = {}
        self.finish_reason: str | None = None
        self.is_awake = True

    def generate(
        self,
        prompts: list[dict[str, list[int]]],
        sampling_params: list[SamplingParams],
        *,
        use_tqdm: bool = True,
        lora_request: LoRARequest | None = None,
    ) -> list[Any]:
        assert self.is_awake and not use_tqdm and len(prompts) == len(sampling_params)
        assert [lora_request.lora_int_id if lora_request else None] == (list(self.llm_engine.loras) or [None])
        self.events.append("generate")
        return [
            self._answer(it["prompt_token_ids"], by) for it, by in zip(prompts, sampling_params, strict=True)
        ]

    def _answer(self, prompt: list[int], by: SamplingParams) -> Any:
        assert by.seed is not None and by.max_tokens is not None
        assert len(prompt) + by.max_tokens <= self.options["max_model_len"]
        self.asked.append((prompt, by))
        drawn = self.script or [10 + by.seed % 200, 10 + by.seed // 200 % 200, STOP, 99]
        stops = [i for i, token in enumerate(drawn) if token in (by.stop_token_ids or ())]
        length = min(stops[0] + 1 if stops else len(drawn), by.max_tokens)
        ended = bool(stops) and stops[0] < by.max_tokens
        reason = self.finish_reason or ("stop" if ended else "length")
        return SimpleNamespace(outputs=[SimpleNamespace(token_ids=drawn[:length], finish_reason=reason)])

    def collective_rpc(
        self, method: str, timeout: float | None = None, args: tuple = (), kwargs: dict | None = None
    ) -> list[None]:
        assert method == "reload_weights" and not args and set(kwargs or {}) == {"weights_path"}
        assert self.is_awake
        self.weights = load_file(Path((kwargs or {})["weights_path"], "model.safetensors"))
        self.events.append("reload")
        return [None]

    def reset_prefix_cache(self, reset_running_requests: bool = False, reset_connector: bool = False) -> bool:
        self.events.append("reset")
        return True

    def sleep(self, level: int = 1, mode: str = "abort") -> None:
        assert level == 1 and self.options["enable_sleep_mode"]
        self.is_awake = False
        self.events.append("sleep")

    def wake_up(self, tags: list[str] | None = None) -> bool:
        self.is_awake = True
        self.events.append("wake")
        return True


@pytest.fixture(autouse=True)
def vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the vllm of this file where the real one would be."""
    package, lora, request = ModuleType("vllm"), ModuleType("vllm.lora"), ModuleType("vllm.lora.request")
    vars(package).update(LLM=LLM, SamplingParams=SamplingParams, __version__="0")
    vars(request).update(LoRARequest=LoRARequest)
    for module in (package, lora, request):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    for name in ("VLLM_LOGGING_LEVEL", "VLLM_NO_USAGE_STATS"):
        monkeypatch.setenv(name, "0")


def make_config(tmp_path: Path, **changes: Any) -> RunConfig:
    values = {
        "model_name_or_path": "some/model",
        "stage": "ppo",
        "do_train": True,
        "rollout_engine": "vllm",
        "reward_function": "r.py:score",
        "dataset": "some",
        "output_dir": str(tmp_path / "out"),
        "finetuning_type": "lora",
        "cutoff_len": 100,
        "max_new_tokens": 20,
        "sample_max_new_tokens": 30,
        **changes,
    }
    (tmp_path / "run.yaml").write_text(json.dumps(values), encoding="utf-8")
    return load_config(tmp_path / "run.yaml").config


def make_policy(**lora: Any) -> Policy:
    """A tiny policy with a value head, with an adapter where `lora` says of which kind."""
    model = make_model()
    if lora:
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], **lora))
    add_value_head(model)
    return Policy(model, Packer("shared"), torch.bfloat16)


def open_engine(tmp_path: Path, policy: Policy | None = None, **changes: Any) -> tuple[VllmEngine, LLM]:
    engine = open_vllm_engine(make_config(tmp_path, **changes), policy or make_policy(r=12), [].append)
    llm: Any = engine._llm
    return engine, llm


def draw(engine: VllmEngine, prompts: list[list[int]], **changes: Any) -> list[Sampled]:
    wanted: dict[str, Any] = {
        "numbers": list(range(len(prompts))),
        "num_responses": 2,
        "generation": GenerationConfig(max_new_tokens=20),
        "stop_ids": [STOP],
        "stream": Stream(42, 0),
    }
    return engine.draw(prompts, **{**wanted, **changes})


def test_opens_the_model_of_the_run_with_room_for_its_rows(tmp_path: Path) -> None:
    _, llm = open_engine(tmp_path, trust_remote_code=True, model_revision="v2")
    assert llm.options["model"] == "some/model"
    assert llm.options["trust_remote_code"] is True
    assert (llm.options["revision"], llm.options["tokenizer_revision"]) == ("v2", "v2")
    assert llm.options["dtype"] == "bfloat16"
    assert llm.options["max_model_len"] == 130  # cutoff_len and the longest answer, which is a sample's
    assert (llm.options["enable_lora"], llm.options["max_loras"]) == (True, 1)
    assert llm.options["max_lora_rank"] == 16  # the least of vLLM's that has room for 12


def test_opens_with_no_more_than_the_positions_of_the_model(tmp_path: Path) -> None:
    _, llm = open_engine(tmp_path, cutoff_len=500)
    assert llm.options["max_model_len"] == 512


def test_responses_are_grouped_by_prompt_in_order(tmp_path: Path) -> None:
    engine, llm = open_engine(tmp_path)
    sampled = draw(engine, [[5, 6], [7, 8, 9]])
    assert [prompt for prompt, _ in llm.asked] == [[5, 6], [5, 6], [7, 8, 9], [7, 8, 9]]
    seeds = [request_seed(Stream(42, 0), number, response) for number in (0, 1) for response in (0, 1)]
    assert [by.seed for _, by in llm.asked] == seeds
    drawn = [[10 + seed % 200, 10 + seed // 200 % 200, STOP] for seed in seeds]
    assert [it.response_ids for it in sampled] == [drawn[:2], drawn[2:]]


def test_a_seed_follows_from_seed_rollout_prompt_and_response_alone(tmp_path: Path) -> None:
    engine, _ = open_engine(tmp_path)
    whole = draw(engine, [[5, 6], [7, 8, 9]], numbers=[4, 7])
    assert draw(engine, [[7, 8, 9]], numbers=[7]) == whole[1:]
    other = [
        request_seed(Stream(*stream), n, r) for *stream, n, r in ((1, 2, 3, 4), (2, 1, 3, 4), (1, 2, 4, 3))
    ]
    assert len(set(other)) == 3
    assert all(0 <= seed < 2**63 for seed in other)


def test_a_response_keeps_the_token_that_ended_it(tmp_path: Path) -> None:
    engine, llm = open_engine(tmp_path)
    for script, most, ids, ended in (
        ([11, 12, STOP, 13], 20, [11, 12, STOP], True),
        ([11, 12, STOP, 13], 3, [11, 12, STOP], True),  # it ended with the last token that it might have
        ([11, 12, STOP, 13], 2, [11, 12], False),
        ([STOP], 20, [STOP], True),
        ([3], 20, [3], True),
    ):
        llm.script = script
        generation = GenerationConfig(max_new_tokens=most)
        found = draw(engine, [[5]], generation=generation, num_responses=1, stop_ids=[STOP, 3])
        assert found == [Sampled([ids], [ended])]


def test_only_the_given_tokens_end_a_response(tmp_path: Path) -> None:
    engine, llm = open_engine(tmp_path)
    draw(engine, [[5]])
    assert all(by.ignore_eos and by.stop_token_ids == [STOP] for _, by in llm.asked)


@pytest.mark.parametrize(
    ("generation", "drawn_by"),
    [
        (
            GenerationConfig(temperature=0.5, top_p=0.9, top_k=0, repetition_penalty=1.2),
            {"temperature": 0.5, "top_p": 0.9, "top_k": 0, "repetition_penalty": 1.2},
        ),
        (GenerationConfig(top_k=7), {"temperature": 0.95, "top_p": 0.7, "top_k": 7}),
        (GenerationConfig(do_sample=False), {"temperature": 0.0, "top_p": 1.0, "top_k": 0}),
        (GenerationConfig(temperature=1e-6), {"temperature": 0.0, "top_p": 1.0, "top_k": 0}),
    ],
)
def test_generation_keys(generation: GenerationConfig, drawn_by: dict[str, Any], tmp_path: Path) -> None:
    engine, llm = open_engine(tmp_path)
    draw(engine, [[5]], generation=replace(generation, max_new_tokens=9))
    for name, value in {**drawn_by, "max_tokens": 9}.items():
        assert getattr(llm.asked[0][1], name) == value


def test_a_response_is_cut_off_at_the_last_position(tmp_path: Path) -> None:
    engine, llm = open_engine(tmp_path, cutoff_len=512)
    draw(engine, [[5] * 505, [5]], num_responses=1)
    assert [by.max_tokens for _, by in llm.asked] == [7, 20]
    with pytest.raises(ModelError, match="512 tokens"):
        draw(engine, [[5] * 512])


def test_a_prompt_that_there_is_no_room_for(tmp_path: Path) -> None:
    engine, llm = open_engine(tmp_path)
    with pytest.raises(UserError, match=r"room for 130 tokens.* may have 131.*larger cutoff_len"):
        draw(engine, [[5] * 111])
    assert not llm.asked


def test_each_draw_has_the_newest_adapter_and_no_other(tmp_path: Path) -> None:
    policy = make_policy(r=12, lora_alpha=3, use_rslora=True)
    model: Any = policy.model
    model.add_adapter("initial", model.peft_config["default"])
    engine, llm = open_engine(tmp_path, policy)
    weights = dict(model.named_parameters())
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.default.weight"
    for number in (1, 2, 3):
        weights[name].data.fill_(number)
        draw(engine, [[5]])
        (adapter,) = llm.llm_engine.loras.items()
        assert adapter[0] == number
        assert torch.equal(adapter[1][name.replace(".default", "")], weights[name])
        assert all(".lora_" in each for each in adapter[1])  # neither the value head nor the other adapter
        saved = llm.llm_engine.configs[number]
        assert (saved["r"], saved["lora_alpha"], saved["use_rslora"]) == (12, 3, True)
    assert "reload" not in llm.events


def test_each_draw_has_the_newest_weights(tmp_path: Path) -> None:
    policy = make_policy()
    engine, llm = open_engine(tmp_path, policy, finetuning_type="full")
    assert not llm.options["enable_lora"]
    for number in (1.0, 2.0):
        policy.base.get_input_embeddings().weight.data.fill_(number)
        draw(engine, [[5]])
        assert (llm.weights["model.embed_tokens.weight"] == number).all()
        assert not [name for name in llm.weights if "value_head" in name]
    assert llm.events == ["reload", "reset", "generate"] * 2


def test_states_of_older_weights_that_stay_are_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, llm = open_engine(tmp_path, make_policy(), finetuning_type="full")
    monkeypatch.setattr(llm, "reset_prefix_cache", lambda: False)
    with pytest.raises(RuntimeError, match="older weights"):
        draw(engine, [[5]])


@pytest.mark.parametrize("reason", ["abort", "error"])
def test_a_response_that_vllm_gave_up_on(reason: str, tmp_path: Path) -> None:
    engine, llm = open_engine(tmp_path)
    llm.finish_reason = reason
    with pytest.raises(RuntimeError, match=f"gave up on a response: {reason}"):
        draw(engine, [[5]])


def test_on_a_gpu_it_sleeps_between_draws_on_its_own_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    class Watched(LLM):
        def __init__(self, *args: Any, **keys: Any) -> None:
            seen.append(vllm_engine.os.environ["CUDA_VISIBLE_DEVICES"])
            super().__init__(*args, **keys)

    monkeypatch.setattr(sys.modules["vllm"], "LLM", Watched)
    monkeypatch.setattr(vllm_engine, "PartialState", lambda: SimpleNamespace(device=torch.device("cuda", 1)))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    engine, llm = open_engine(tmp_path)
    assert seen == ["6"] and vllm_engine.os.environ["CUDA_VISIBLE_DEVICES"] == "4,6"
    assert llm.options["enable_sleep_mode"] and not llm.options["enforce_eager"]
    draw(engine, [[5]])
    assert llm.events == ["sleep", "wake", "generate", "sleep"]
    llm.finish_reason = "abort"
    with pytest.raises(RuntimeError):
        draw(engine, [[5]])
    assert not llm.is_awake


def test_on_a_cpu_it_stays_awake(tmp_path: Path) -> None:
    _, llm = open_engine(tmp_path)
    assert not llm.options["enable_sleep_mode"] and llm.options["enforce_eager"]
    assert llm.events == []


def test_closes(tmp_path: Path) -> None:
    engine, llm = open_engine(tmp_path)
    engine.close()
    assert not llm.llm_engine.engine_core.is_open


def test_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(UserError, match=r"vllm is not installed: pip install vllm"):
        open_engine(tmp_path)


@pytest.mark.parametrize(
    ("lora", "named"),
    [
        ({"r": 600}, "up to rank 512, and this has 600"),
        ({"r": 8, "modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"r": 8, "use_dora": True}, "use_dora"),
        ({"r": 8, "bias": "all"}, "bias"),
        ({"r": 8, "rank_pattern": {"q_proj": 513}}, "this has 513"),
    ],
)
def test_adapters_that_vllm_does_not_take(lora: dict[str, Any], named: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"{named}.*write rollout_engine: transformers"):
        open_engine(tmp_path, make_policy(**lora))


def test_sharded_weights_are_refused(tmp_path: Path) -> None:
    policy = make_policy(r=8)
    next(iter(policy.model.parameters())).ds_id = 0  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="ZeRO-3"):
        open_engine(tmp_path, policy)


def test_a_tied_head_that_is_trained_needs_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = Policy(make_model(tie_word_embeddings=True), Packer("shared"), torch.bfloat16)
    with pytest.raises(UserError, match="tied to the embedding"):
        open_engine(tmp_path, policy, finetuning_type="full")
    embedding: Any = policy.base.get_input_embeddings()
    embedding.weight.requires_grad_(False)
    open_engine(tmp_path, policy, finetuning_type="full")
    embedding.weight.requires_grad_(True)
    monkeypatch.setattr(vllm_engine, "PartialState", lambda: SimpleNamespace(device=torch.device("cuda", 0)))
    open_engine(tmp_path, policy, finetuning_type="full")


def test_what_vllm_refuses_is_told_before_training(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"temperature must be in \[0, 2\], got 2.5"):
        open_engine(tmp_path, temperature=2.5)
    with pytest.raises(UserError, match="does not open refused: Model architectures are not supported"):
        open_engine(tmp_path, model_name_or_path="refused")
