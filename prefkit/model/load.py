"""Read a model and its tokenizer from a folder or the hub."""

from __future__ import annotations

import importlib.util
import logging
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from prefkit.config.schema import ModelConfig
from prefkit.model.errors import ModelError
from prefkit.model.partitioned import shape_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

logger = logging.getLogger(__name__)


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """The tokenizer, with `add_tokens` and `add_special_tokens`: that of the last adapter, which may know
    tokens that the model does not, else of the model. Raises `ModelError` when there is none."""
    from transformers import AutoTokenizer

    own = [path for path in config.adapter_name_or_path if Path(path, "tokenizer_config.json").is_file()]
    tokenizer: PreTrainedTokenizerBase
    if own:
        tokenizer = AutoTokenizer.from_pretrained(own[-1], trust_remote_code=config.trust_remote_code)
    else:
        tokenizer = _from_pretrained(AutoTokenizer, config)
    tokenizer.add_tokens(list(config.add_tokens))
    tokenizer.add_tokens(list(config.add_special_tokens), special_tokens=True)
    return tokenizer


def load_model_config(config: ModelConfig) -> Any:
    """The config.json of the model, without its weights. Raises `ModelError` when it is not there."""
    from transformers import AutoConfig

    return _from_pretrained(AutoConfig, config)


def load_causal_lm(config: ModelConfig, max_length: int = 0) -> PreTrainedModel:
    """The model, which may see, in the dtype of its checkpoint unless `dtype` says otherwise, its own dropout
    off.

    Log-ratios of policy and reference are to differ by training alone, so nothing in the base model may
    be random. `max_length` is what `rope_scaling` stretches the model to.
    Raises `ModelError` when it is not there, has only pickled weights, or cannot be run as asked.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    sees = is_seeing(load_model_config(config))
    kind = AutoModelForImageTextToText if sees else AutoModelForCausalLM
    model, _ = load_pretrained(kind, config, max_length)
    if is_classifier(model.config):
        raise ModelError(
            f"{config.model_name_or_path} is a reward model, which gives scores and writes no text: name a "
            "language model, or write stage: rm to train it on"
        )
    return model


def is_seeing(model_config: Any) -> bool:
    """Whether a config.json describes a model that reads images beside text."""
    return getattr(model_config, "vision_config", None) is not None


def is_classifier(model_config: Any) -> bool:
    """Whether a config.json describes a model whose head gives scores, as a reward model's does."""
    names = model_config.architectures or ()
    return any(name.endswith("ForSequenceClassification") for name in names)


def load_pretrained(
    auto_class: Any, config: ModelConfig, max_length: int = 0, **more: Any
) -> tuple[PreTrainedModel, set[str]]:
    """The model as one of transformers' `auto_class`, `more` set in its config; and which weights its files
    lack. As `load_causal_lm` says."""
    from prefkit.model.attention import plain_implementation

    dtype = DTYPES.get(config.dtype, "auto")
    options: dict[str, Any] = {"dtype": dtype, "use_safetensors": True}
    if implementation := plain_implementation(config.flash_attn):
        options["attn_implementation"] = implementation
    if config.rope_scaling:
        options["config"] = stretch_positions(load_model_config(config), config, max_length)
        options["config"].update(more)
    else:
        options |= more
    if config.quantization_bit is not None:
        options["quantization_config"] = _quantization(config)
        options["device_map"] = {"": torch.accelerator.current_accelerator() or torch.device("cpu")}
    model, info = _from_pretrained(auto_class, config, output_loading_info=True, **options)
    if config.trust_remote_code and type(model).__module__.startswith("transformers_modules"):
        logger.warning("trust_remote_code: the model runs code of its own, %s", type(model).__module__)
    turn_off_dropout(model)
    if config.quantization_bit == 4:
        _keep_packing(model)
    return model, set(info["missing_keys"])


def _keep_packing(model: PreTrainedModel) -> None:
    """Keep 4-bit weights as they were loaded.

    On a CPU with bfloat16 instructions bitsandbytes packs them anew at the first forward without gradient
    and rounds their scales to bfloat16: the model that is evaluated would not be the one that is trained.
    Layers narrower than a block of weights fail there.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010


def stretch_positions(model_config: Any, config: ModelConfig, max_length: int) -> Any:
    """The model's config, its rotary angles scaled so that `max_length` positions fit.

    The factor is the smallest whole number that suffices. Where they fit already nothing changes, which is
    logged. Raises `ModelError` for a model without rotary angles, or with scaled ones.
    """
    text = model_config.get_text_config()  # of one that sees, the language model
    known = text.max_position_embeddings
    if max_length <= known:
        logger.warning(
            "rope_scaling: not used, cutoff_len %d fits the model's %d positions", max_length, known
        )
        return model_config
    rope = getattr(text, "rope_parameters", None)
    if not rope or "rope_theta" not in rope or rope.get("rope_type", "default") != "default":
        kind = (rope or {}).get("rope_type", "none of one kind")
        raise ModelError(f"rope_scaling: the model's rotary angles are {kind} already, and not scaled again")
    factor = float(math.ceil(max_length / known))
    scaled = {**rope, "rope_type": config.rope_scaling, "factor": factor}
    if config.rope_scaling != "linear":
        scaled["original_max_position_embeddings"] = known
    if config.rope_scaling == "llama3":
        scaled |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    text.rope_parameters = scaled
    text.max_position_embeddings = int(known * factor)
    logger.warning(
        "rope_scaling: %s by %g, from %d to %d positions", config.rope_scaling, factor, known, known * factor
    )
    return model_config


def _quantization(config: ModelConfig) -> Any:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError("quantization_bit: bitsandbytes is not installed: pip install 'prefkit[qlora]'")
    from transformers import BitsAndBytesConfig

    if config.quantization_bit == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=config.quantization_type,
        bnb_4bit_use_double_quant=config.double_quantization,
        bnb_4bit_compute_dtype=DTYPES.get(config.dtype, torch.bfloat16),
    )


def fit_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: ModelConfig) -> bool:
    """Give every token of the tokenizer a row in the model; says whether rows were added.

    New rows are drawn around the mean of the others. Raises `ModelError` when rows are missing and
    `resize_vocab` is off.
    """
    rows = num_rows(model)
    if len(tokenizer) <= rows:
        return False
    wanted = config.resize_vocab or config.add_tokens or config.add_special_tokens
    if not (wanted or config.adapter_name_or_path):  # an adapter brings the rows of its tokens
        raise ModelError(
            f"{config.model_name_or_path}: the tokenizer has {len(tokenizer)} tokens and the model {rows} "
            "rows: write resize_vocab: true"
        )
    model.resize_token_embeddings(len(tokenizer))
    return True


def num_rows(model: PreTrainedModel) -> int:
    """Rows of the embedding: token ids that the model takes."""
    return int(shape_of(cast(Tensor, model.get_input_embeddings().weight))[0])


def find_model(config: ModelConfig) -> Path:
    """The folder with the model's weights, fetched from the hub if it is not one here."""
    from huggingface_hub import snapshot_download

    if _looks_local(config.model_name_or_path):
        return Path(config.model_name_or_path).expanduser()
    try:
        wanted = ["*.json", "*.safetensors"]
        name, revision = config.model_name_or_path, config.model_revision
        return Path(
            snapshot_download(name, revision=revision, cache_dir=config.cache_dir, allow_patterns=wanted)
        )
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot read {config.model_name_or_path}: {error}") from error


def _looks_local(path: str) -> bool:
    return (
        path.startswith((".", "/", "~"))
        or Path(path).expanduser().exists()
        or not re.fullmatch(r"[\w.-]+/[\w.-]+", path)
    )


def model_source(config: ModelConfig) -> tuple[str | Path, dict[str, Any]]:
    """What transformers' `from_pretrained` takes for the model: a folder or id, and where and how to look.

    Raises `ModelError` for a folder without a model.
    """
    path = config.model_name_or_path
    folder = Path(path).expanduser()
    looks_local = _looks_local(path)
    if looks_local and not (folder / "config.json").is_file():
        what = "has no config.json" if folder.is_dir() else "does not exist"
        raise ModelError(f"model_name_or_path: the folder {path} {what}.")
    options = {
        "revision": config.model_revision,
        "cache_dir": config.cache_dir,
        "trust_remote_code": config.trust_remote_code,
    }
    return folder if looks_local else path, options


def _from_pretrained(auto_class: Any, config: ModelConfig, /, **kwargs: Any) -> Any:
    path = config.model_name_or_path
    source, options = model_source(config)
    try:
        return auto_class.from_pretrained(source, **options, **kwargs)
    except (OSError, ValueError, ImportError) as error:
        reason = str(error).strip().split("\n")[0]
        if "attn_implementation" in kwargs and "attention" in reason.lower():
            raise ModelError(f"flash_attn: {config.flash_attn} is not for this model: {reason}") from error
        where = "" if isinstance(source, Path) else " (no folder here, so looked for on the Hugging Face hub)"
        raise ModelError(f"model_name_or_path: cannot read {path}{where}: {reason}") from error


def turn_off_dropout(model: nn.Module) -> None:
    """Set whatever makes the model random to zero: dropout modules, the rates that attention layers keep,
    the noise of routers."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if ("dropout" in name or name == "jitter_noise") and isinstance(value, float):
                setattr(module, name, 0.0)
