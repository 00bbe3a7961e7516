"""The models of a run on torch's meta device: shapes and number formats, no weights read."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException

from prefkit.check.rehearsal import Rehearsal, without_numbers
from prefkit.config.schema import ModelConfig, RunConfig, TuningConfig
from prefkit.data.packing import Layout
from prefkit.model.adapter import base_of, find_adapter, read_adapter_config
from prefkit.model.attention import plain_implementation
from prefkit.model.batches import prepare_for_batches
from prefkit.model.errors import ModelError
from prefkit.model.load import DTYPES, is_seeing, load_model_config, num_rows, turn_off_dropout
from prefkit.model.reward import HEAD
from prefkit.model.seeing_classifier import choose_classifier
from prefkit.model.tuning import prepare_for_training
from prefkit.model.value import add_value_head
from prefkit.train.policy import choose_policy_logps
from prefkit.train.references import needs_reference, wants_cache

if TYPE_CHECKING:
    from transformers import TrainingArguments

# Bits a weight of the constants of 4-bit weights, double quantised or not: https://arxiv.org/abs/2305.14314,
# section 3. Those of 8-bit weights, one for a row, do not count.
_CONSTANTS = {True: 0.127, False: 0.5}
_INSIDE_ADAPTER = ("lora_", "modules_to_save")


@dataclass(frozen=True)
class Models:
    """What a step runs on, and the bytes that are there before it: weights, adapter, reference, optimiser."""

    rehearsal: Rehearsal
    layout: Layout
    sizes: dict[str, int]
    config: Any  # of the model
    needs_reference: bool  # whether the loss does, from a cache or not

    @property
    def num_weights(self) -> tuple[int, int]:
        """(trained, all) weights of the policy."""
        counts = [(it.numel(), it.requires_grad) for it in self.rehearsal.policy.parameters()]
        return sum(n for n, trained in counts if trained), sum(n for n, _ in counts)


def build_models(
    config: RunConfig, args: TrainingArguments, vocabulary: int, num_train: int, has_images: bool = False
) -> Models:
    """The models of a run whose tokenizer has `vocabulary` tokens and which trains on `num_train` rows, of
    which some may have images.

    An adapter that is gone on with is read for its shapes; merged ones change no size. Raises `ModelError`
    for a model or adapter that is not there or does not fit.
    """
    mixed = args.bf16 or args.fp16
    with torch.device("meta"), _quiet():
        base, resized = _build_base(config.model, vocabulary, scores=config.method.stage == "rm")
        tuning = _tuning_of(config)
        fresh = replace(config.model, adapter_name_or_path=())
        policy = prepare_for_training(base, fresh, tuning, resized, mixed)
        if config.method.stage == "ppo":
            add_value_head(policy)
        if not args.do_train:
            policy.requires_grad_(False)
        layout = prepare_for_batches(
            base_of(policy), config.model, config.longest_row, lambda text: None, has_images
        )
        second, copies_adapter = _second_model(config, args, policy, layout, num_train, vocabulary)
    needs = needs_reference(config)
    is_adapter = tuning.finetuning_type == "lora"
    sizes = _weight_bytes(policy, config.model)
    reference = 0 if second is None else sum(_weight_bytes(second, _reference_model(config)).values())
    sizes["reference"] = reference + (sizes["adapter"] if copies_adapter else 0)
    sizes["optimiser"] = optimiser_bytes(args, policy) if args.do_train else 0
    rehearsal = Rehearsal(
        policy,
        choose_policy_logps(config, base.config),
        second,
        reads_reference=needs and (is_adapter or second is not None),
        dtype=(torch.bfloat16 if args.bf16 else torch.float16) if mixed else None,
        checkpointing=bool(args.activation_checkpointing),
        accumulates=args.gradient_accumulation_steps > 1,
        learns=bool(args.do_train),
    )
    return Models(rehearsal, layout, sizes, base.config, needs)


def _build_base(config: ModelConfig, vocabulary: int, scores: bool = False) -> tuple[Any, bool]:
    """The model as its config describes it, with a head for words or for `scores`, and whether rows were
    added for tokens."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    described = load_model_config(config)
    stored = described.get_text_config().dtype or described.dtype or torch.float32
    options: dict[str, Any] = {"dtype": DTYPES.get(config.dtype, stored)}
    if implementation := plain_implementation(config.flash_attn):
        options["attn_implementation"] = implementation
    auto_class: Any = AutoModelForImageTextToText if is_seeing(described) else AutoModelForCausalLM
    if scores:
        auto_class, described.num_labels = choose_classifier(described), 1
    try:
        model = auto_class.from_config(described, trust_remote_code=config.trust_remote_code, **options)
    except ValueError as error:
        head = "a head for scores" if scores else "a head for text"
        raise ModelError(
            f"{config.model_name_or_path}: transformers has no {described.model_type} with {head}"
        ) from error
    turn_off_dropout(model)
    resized = vocabulary > num_rows(model)
    if resized:
        model.resize_token_embeddings(vocabulary, mean_resizing=False)
    return model, resized


def _tuning_of(config: RunConfig) -> TuningConfig:
    """How the adapter looks that is trained: that of the YAML, or the one that is gone on with.

    Its start does not matter for sizes.
    """
    tuning = replace(config.tuning, pissa_init=False)
    if tuning.finetuning_type != "lora" or config.continued_adapter is None:
        return tuning
    lora = read_adapter_config(find_adapter(config.continued_adapter, config.model))
    targets = lora.target_modules
    return replace(
        tuning,
        lora_rank=lora.r,
        lora_target=("all",) if isinstance(targets, str) or not targets else tuple(sorted(targets)),
        additional_target=tuple(name for name in lora.modules_to_save or () if name != HEAD),
        use_dora=lora.use_dora,
    )


def _second_model(
    config: RunConfig,
    args: TrainingArguments,
    policy: nn.Module,
    layout: Layout,
    num_train: int,
    vocabulary: int,
) -> tuple[nn.Module | None, bool]:
    """(the reference where it is a model of its own, whether it is a copy of the adapter instead)."""
    if not needs_reference(config):
        return None, False
    cached = wants_cache(config, args, base_of(policy).config, num_train)
    other = config.reference.ref_model
    if other and not _is_base(config):
        if cached:
            return None, False
        own = replace(_reference_model(config), batch_layout=layout)
        model, _ = _build_base(own, vocabulary)
        prepare_for_batches(model, own, config.data.cutoff_len, lambda text: None)
        return model.requires_grad_(False), False
    if config.tuning.finetuning_type != "lora":
        return (None if cached else copy.deepcopy(policy).requires_grad_(False)), False
    goes_on = config.continued_adapter and args.do_train
    return None, bool((goes_on or config.tuning.pissa_init) and not other)


def _is_base(config: RunConfig) -> bool:
    """Whether `ref_model` is by its name the model under the adapter."""
    reference, model = config.reference, config.model
    plain = not reference.ref_model_adapters and reference.ref_model_quantization_bit is None
    untouched = not config.merged_adapters and not config.tuning.pissa_init and model.quantization_bit is None
    is_adapter = config.tuning.finetuning_type == "lora"
    return is_adapter and plain and untouched and reference.ref_model == model.model_name_or_path


def _reference_model(config: RunConfig) -> ModelConfig:
    other = config.reference.ref_model
    if not other:
        return config.model
    bits = config.reference.ref_model_quantization_bit
    return replace(
        config.model, model_name_or_path=other, adapter_name_or_path=(), quantization_bit=bits,
        moe_aux_loss_coef=None,
    )  # fmt: skip


def _weight_bytes(model: nn.Module, config: ModelConfig) -> dict[str, int]:
    """Bytes of the weights and of the adapter.

    Quantised are the linear layers but the head; the largest of them is unpacked for use, one at a time.
    """
    base = base_of(model)
    quantized: set[int] = set()
    if config.quantization_bit is not None:
        head = base.get_output_embeddings() or getattr(base, HEAD)
        quantized = {
            id(module.weight)
            for name, module in base.named_modules()
            if isinstance(module, nn.Linear) and module is not head and not _is_adapter(name)
        }
    bits = float(config.quantization_bit or 0)
    bits += _CONSTANTS[config.double_quantization] if bits == 4 else 0
    sizes = {"weights": 0, "adapter": 0}
    unpacked = 0
    for name, weights in model.named_parameters():
        size = weights.numel() * weights.element_size()
        if id(weights) in quantized:
            unpacked = max(unpacked, size)
            size = int(weights.numel() * bits / 8)
        sizes["adapter" if _is_adapter(name) else "weights"] += size
    sizes["weights"] += unpacked + sum(it.numel() * it.element_size() for it in model.buffers())
    return sizes


def _is_adapter(name: str) -> bool:
    return any(part in name for part in _INSIDE_ADAPTER)


def optimiser_bytes(args: TrainingArguments, policy: nn.Module) -> int:
    """Bytes that the optimiser keeps, counted after an update without numbers.

    An optimiser that looks at numbers cannot be run so; it is taken to keep what Adam keeps, two for each.
    """
    from transformers import Trainer

    model = copy.deepcopy(policy)
    with without_numbers(model), _quiet():
        trained = [weights for weights in model.parameters() if weights.requires_grad]
        for weights in trained:
            weights.grad = torch.empty_like(weights)
        try:
            make, options = Trainer.get_optimizer_cls_and_kwargs(args, model)  # type: ignore[arg-type]
            optimiser = make(trained, **options)
            optimiser.step()
        except (DataDependentOutputException, ImportError, NotImplementedError, RuntimeError):
            return 2 * _bytes(trained)
        return _bytes(it for state in optimiser.state.values() for it in state.values())


def _bytes(values: Iterable[Any]) -> int:
    return sum(it.numel() * it.element_size() for it in values if isinstance(it, Tensor))


@contextmanager
def _quiet() -> Iterator[None]:
    """What a build logs is for the run."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
