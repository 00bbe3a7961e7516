"""The reference of a run: which weights it is, and whether its log-probs are kept on disk."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from accelerate.utils import send_to_device
from torch import nn

from prefkit.config.errors import UserError
from prefkit.config.schema import ModelConfig, RunConfig
from prefkit.data.dataset import RunData
from prefkit.data.rows import Track
from prefkit.data.streaming import StreamedRows
from prefkit.model.adapter import find_adapter, freeze_initial, merge_adapters
from prefkit.model.architecture import batch_dependence
from prefkit.model.batches import prepare_for_batches
from prefkit.model.fingerprint import fingerprint
from prefkit.model.load import find_model, fit_vocabulary, load_causal_lm
from prefkit.model.partitioned import is_partitioned
from prefkit.model.policy import response_logps
from prefkit.model.ref_cache import CachedReference, LogpsStore, cache_root, fill
from prefkit.model.reference import AdapterOff, FrozenModel, InitialAdapter, Reference
from prefkit.model.tuning import set_one_dtype
from prefkit.objectives.logps import ResponseLogps
from prefkit.objectives.pairwise import LOSSES
from prefkit.train.policy import Policy, Say
from prefkit.train.strategy import Strategy, together

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase, TrainingArguments


def fingerprints(config: RunConfig) -> dict[str, str]:
    """sha256 of each model and adapter that the run starts from, by its name in the YAML."""
    found = {config.model.model_name_or_path: fingerprint(find_model(config.model))}
    if config.reference.ref_model:
        found[config.reference.ref_model] = fingerprint(find_model(_ref_model_config(config)))
    for path in (*config.model.adapter_name_or_path, *config.reference.ref_model_adapters):
        found[path] = fingerprint(find_adapter(path, config.model))
    return found


def needs_reference(config: RunConfig) -> bool:
    """Whether the loss of a run reads a reference."""
    method = config.method
    return method.stage in ("kto", "ppo") or (
        method.stage == "dpo" and LOSSES[method.pref_loss].needs_reference
    )


def wants_cache(config: RunConfig, args: TrainingArguments, model_config: Any, num_rows: int) -> bool:
    """Whether `num_rows` rows to train on are seen more than once, or the YAML says so.

    Raises `UserError` where it says so and log-probs cannot be kept.
    """
    if config.method.stage == "ppo":
        return False  # what is drawn is seen in its own rollout alone
    wanted = config.reference.ref_cache
    why_not = batch_dependence(model_config, config.data.cutoff_len)
    if why_not and wanted:
        raise UserError(f"ref_cache: {why_not}: remove it")
    if wanted is not None or why_not or not config.training.get("do_train"):
        return bool(wanted)
    if args.max_steps <= 0:
        return args.num_train_epochs > 1
    per_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    return args.max_steps * per_step > num_rows


@dataclass(frozen=True)
class ReferenceBuilder:
    """What the reference of a run is made from."""

    config: RunConfig
    args: TrainingArguments
    policy: Policy
    tokenizer: PreTrainedTokenizerBase
    data: RunData
    weights: dict[str, str]
    say: Say
    track: Track
    strategy: Strategy

    def build(self) -> Reference | None:
        """The reference; None where the loss has none. The policy must not have been trained yet."""
        if not needs_reference(self.config):
            self.say(f"Reference: none: {self.config.method.pref_loss} does not use one.")
            return None
        reference = self._with_cache() if self._wants_cache() else self._choose()
        self.say(f"Reference: {reference.describe()}.")
        return reference

    def _choose(self) -> Reference:
        """The reference without a cache."""
        config, model = self.config, self.policy.model
        if self._needs_model():
            return self._load_model()
        if config.tuning.finetuning_type != "lora":
            name = f"a frozen copy of {config.model.model_name_or_path}"
            return FrozenModel(self._copy_policy(), name, True, self._autocast)
        adapted: PeftModel = model  # type: ignore[assignment]
        goes_on = config.continued_adapter
        against_base = config.reference.ref_model or not config.training.get("do_train")
        if goes_on and not against_base:
            freeze_initial(adapted)
            return InitialAdapter(adapted, goes_on)
        if config.tuning.pissa_init and not against_base:
            return InitialAdapter(adapted, "the adapter that pissa_init made")
        return AdapterOff(adapted, config.merged_adapters, is_initial_policy=not goes_on)

    def _copy_policy(self) -> nn.Module:
        """The policy as it is before training; read once more where no process has it whole."""
        if any(map(is_partitioned, self.policy.model.parameters())):
            return self._read_model(self.config.model, (), "model_name_or_path")
        copied: nn.Module = copy.deepcopy(self.policy.model)
        return copied

    def _is_own_base(self) -> bool:
        """Whether `ref_model` is what the policy is with its adapter switched off."""
        reference, model = self.config.reference, self.config.model
        untouched = not self.config.merged_adapters and not self.config.tuning.pissa_init
        same = self.weights[reference.ref_model or ""] == self.weights[model.model_name_or_path]
        plain = not reference.ref_model_adapters and reference.ref_model_quantization_bit is None
        return same and plain and untouched and model.quantization_bit is None

    def _load_model(self) -> FrozenModel:
        """The model that `ref_model` names, its adapters merged. Raises `UserError` where it does not fit."""
        model_config = replace(_ref_model_config(self.config), batch_layout=self.policy.layout)
        model = self._read_model(model_config, self.config.reference.ref_model_adapters, "ref_model")
        return FrozenModel(model, self._model_name(), False, self._autocast)

    def _read_model(self, model_config: ModelConfig, adapters: Sequence[str], key: str) -> nn.Module:
        longest = self.config.longest_row
        model = load_causal_lm(model_config, longest)
        fit_vocabulary(model, self.tokenizer, model_config)
        model = merge_adapters(model, adapters, model_config)
        try:
            prepare_for_batches(model, model_config, longest, lambda text: None, self.policy.has_images)
        except UserError as error:
            raise UserError(f"{key}: {error}; write batch_layout: repeat") from error
        if self.strategy.one_dtype is not None:
            set_one_dtype(model, self.strategy.one_dtype)
        return model

    def _model_name(self) -> str:
        own = self.config.reference
        return " with ".join([str(own.ref_model), *own.ref_model_adapters])

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.strategy.one_dtype is None and (self.args.bf16 or self.args.fp16):
            return torch.autocast(self.args.device.type, self.policy.compute_dtype)
        return nullcontext()

    def _wants_cache(self) -> bool:
        if isinstance(self.data.train, StreamedRows):
            return False
        return wants_cache(self.config, self.args, self.policy.base.config, len(self.data.train))

    def _with_cache(self) -> CachedReference:
        store = LogpsStore(cache_root(self.config.model.cache_dir), self._facts(), self.say)
        PartialState().wait_for_everyone()  # all ranks have looked before any of them writes
        assert not isinstance(self.data.train, StreamedRows)
        examples = [*self.data.train, *self.data.held_out]
        missing = sum(example.key not in store for example in examples)
        found = f"Reference cache: {len(examples) - missing} of {len(examples)} rows found in {store.folder}"
        self.say(f"{found}." if not missing else f"{found}; {missing} are computed and kept there.")
        as_they_come = self.config.tuning.finetuning_type == "lora" and not self._needs_model()
        if as_they_come or not self.strategy.computes_early:
            inner = self._choose()
            name = f"{inner.describe()}; cached"
            return CachedReference(store, inner, name, inner.is_initial_policy, self._most)
        return self._computed_beforehand(store, examples)

    def _needs_model(self) -> bool:
        return bool(self.config.reference.ref_model) and not self._is_own_base()

    def _computed_beforehand(self, store: LogpsStore, examples: list[Any]) -> CachedReference:
        """All log-probs at once, by a model that is then let go, or by the policy while it is still that."""
        needs_model = self._needs_model()
        before = f"{self.config.model.model_name_or_path} as it was before training"
        name = self._model_name() if needs_model else before
        rank, size = self.args.process_index, self.args.world_size
        if any(example.key not in store for example in examples):
            compute = partial(self._logps_of, self._load_model()) if needs_model else self._initial_logps
            budget = self.args.per_device_train_batch_size * self.config.data.cutoff_len
            own = examples[rank::size] or examples[:1]
            fill(store, own, compute, self.policy.packer, budget, self.track, self._most)
        PartialState().wait_for_everyone()
        store.refresh()
        described = f"{name}, from the cache (no second model in memory)"
        return CachedReference(store, None, described, is_initial_policy=not needs_model)

    def _initial_logps(self, batch: dict[str, Any]) -> ResponseLogps:
        """Of the policy, which is not trained yet."""
        model: nn.Module = self.policy.model.to(self.args.device)  # type: ignore[arg-type]
        with torch.no_grad(), self._autocast(), self.strategy.computing(model):
            return response_logps(model, send_to_device(batch, self.args.device))

    def _logps_of(self, reference: FrozenModel, batch: dict[str, Any]) -> ResponseLogps:
        reference.model.to(self.args.device)
        with self.strategy.computing(reference.model):
            return reference.logps(reference.model, send_to_device(batch, self.args.device))

    def _most(self, number: int) -> int:
        return together(self.strategy, torch.max, number)

    def _facts(self) -> dict[str, Any]:
        """All that the log-probs of a row depend on, the row left out."""
        config = self.config
        names = (
            *("dtype", "rope_scaling", "flash_attn", "quantization_bit", "quantization_type"),
            *("finetuning_type", "create_new_adapter", "do_train"),
        )
        facts: dict[str, Any] = {name: config.value(name) for name in names}
        ref = config.reference
        paths: list[str] = [config.model.model_name_or_path, *config.model.adapter_name_or_path]
        num_merged = len(config.merged_adapters)
        if ref.ref_model:
            paths = [ref.ref_model, *ref.ref_model_adapters]
            num_merged = len(ref.ref_model_adapters)
        facts |= {
            "num_merged": num_merged,
            "weights": [self.weights[path] for path in paths],
            "ref_model_quantization_bit": ref.ref_model_quantization_bit,
            "compute_dtype": str(self.policy.compute_dtype),
            "layout": self.policy.layout,
            "vision": self.policy.packer.vision and self.policy.packer.vision.facts,
            "device": self.args.device.type,
        }
        if config.model.rope_scaling:
            facts["cutoff_len"] = config.data.cutoff_len
        if config.tuning.pissa_init:
            shape = ("pissa_iter", "lora_rank", "lora_alpha", "lora_target", "use_rslora", "seed")
            facts["pissa"] = {name: config.value(name) for name in shape}
        if config.model.resize_vocab or config.model.add_tokens or config.model.add_special_tokens:
            facts["new_rows"] = [config.value(name) for name in ("add_tokens", "add_special_tokens", "seed")]
        return facts


def _ref_model_config(config: RunConfig) -> ModelConfig:
    """The config of the model, for the reference instead."""
    return replace(
        config.model,
        model_name_or_path=config.reference.ref_model or "",
        model_revision="main",
        adapter_name_or_path=(),
        quantization_bit=config.reference.ref_model_quantization_bit,
        moe_aux_loss_coef=None,
    )
