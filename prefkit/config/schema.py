"""RunConfig: every YAML key with its default, its range and one sentence on what it does."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from .errors import is_secret
from .interpolate import escape
from .key import REQUIRED, Key, key, own_keys
from .methods import MethodConfig, PpoConfig, ReferenceConfig, RewardConfig
from .training import training_keys

# What an evaluation measures, without the prefix `eval_`; the last ones with the losses that have such a
# part only. A test compares them with the losses.
PART_METRICS = {"sft_loss": ("orpo",), "odds_ratio_loss": ("orpo",)}
REWARD_METRICS = (
    "loss",
    *("rewards/accuracies", "rewards/margins", "rewards/chosen", "rewards/rejected"),
)
METRICS = (
    *REWARD_METRICS,
    *("logps/chosen", "logps/rejected", *PART_METRICS),
)
# What one of judged responses measures.
KTO_METRICS = (
    *("loss", "rewards/auc", "rewards/margins", "rewards/chosen", "rewards/rejected", "kl"),
    *("logps/chosen", "logps/rejected", "count/chosen", "count/rejected"),
)
# What an evaluation of ppo measures, of answers.
PPO_METRICS = ("score", "kl", "response_length", "eos_rate")


_WRITING = ("dpo", "kto", "ppo")  # stages whose model writes text


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which model is trained and how it is run."""

    model_name_or_path: str = key(
        REQUIRED, "Folder or Hugging Face id of the model to train.", example="Qwen/Qwen3-8B"
    )
    model_revision: str = key("main", "Branch, tag or commit of the model on the Hub.")
    cache_dir: str | None = key(
        None, "Folder for downloaded models and the reference cache; null takes those of the user."
    )
    trust_remote_code: bool = key(False, "Run Python code that comes with the model.")
    dtype: str = key(
        "auto",
        "Number format the weights are loaded in; auto is that of the checkpoint.",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    adapter_name_or_path: tuple[str, ...] = key(
        (),
        "Adapters to start from, one upon the other: all but the last are merged into the model, and the "
        "last is trained on.",
    )
    add_tokens: tuple[str, ...] = key((), "Tokens added to the tokenizer, and rows for them to the model.")
    add_special_tokens: tuple[str, ...] = key(
        (), "Control tokens added to the tokenizer, and rows for them to the model."
    )
    resize_vocab: bool = key(
        False, "Give each token of the tokenizer that the model lacks a row of its own, which is trained."
    )
    rope_scaling: str | None = key(
        None,
        "How a model is stretched where cutoff_len exceeds its positions.",
        choices=("linear", "yarn", "llama3"),
        later=("dynamic", "longrope"),
    )
    flash_attn: str = key(
        "auto",
        "Attention kernel: sdpa is that of torch, disabled plain mathematics, fa2 the package flash-attn.",
        choices=("auto", "disabled", "sdpa", "fa2"),
        later=("fa3",),
    )
    moe_aux_loss_coef: float | None = key(
        None, "Weight of the load-balancing loss of a mixture of experts; null leaves it out.", minimum=0
    )
    quantization_bit: int | None = key(
        None,
        "Bits of the frozen weights under the adapter (QLoRA, by bitsandbytes): 4 or 8.",
        minimum=4,
        maximum=8,
    )
    quantization_type: str = key("nf4", "Number format of 4-bit weights.", choices=("nf4", "fp4"))
    double_quantization: bool = key(True, "Quantise the constants of 4-bit weights too.")
    disable_gradient_checkpointing: bool | None = key(
        None,
        "Keep all activations in memory; null does so on a CPU and recomputes them on an accelerator.",
        elsewhere="false",
    )
    batch_layout: str = key(
        "auto",
        "How responses share a prompt: shared computes it once, repeat once for each response, auto "
        "shares where the model can.",
        choices=("auto", "shared", "repeat"),
    )

    @property
    def trained_last(self) -> str:
        """The last adapter, or the model where there is none."""
        return (self.model_name_or_path, *self.adapter_name_or_path)[-1]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which preference pairs are read and how they become tokens."""

    template: str | None = key(None, "Name of the chat template; null takes the one of the tokenizer.")
    dataset: tuple[str, ...] = key(
        (), "Data sets to train on: names in dataset_info.json, or files and folders."
    )
    eval_dataset: tuple[str, ...] = key((), "Data sets to evaluate on, named in the same way.")
    eval_on_each_dataset: bool = key(False, "Evaluate on each eval_dataset by itself.")
    dataset_dir: str = key(
        "data",
        "Folder with dataset_info.json and its files; ONLINE reads data sets of the Hub by their id, "
        "REMOTE:ID the dataset_info.json of one.",
    )
    media_dir: str | None = key(
        None, "Folder that the paths of images start from and stay in; null takes that of the data set."
    )
    media_hosts: tuple[str, ...] = key(
        (),
        "Hosts from which images named by https:// may be fetched; without any, no address is.",
        elsewhere="any",
    )
    image_max_pixels: int = key(
        589824, "Images of more pixels are scaled down before the model's own processor.", minimum=784
    )
    image_min_pixels: int = key(
        1024, "Images of fewer pixels are scaled up before the model's own processor.", minimum=1
    )
    video_max_pixels: int = key(65536, "The same of each frame of a video.", minimum=784)
    video_min_pixels: int = key(256, "The same of each frame of a video.", minimum=1)
    video_fps: float = key(2.0, "Frames that a list of frames has for a second.", above=0)
    video_maxlen: int = key(128, "Most frames taken of a video, evenly.", minimum=1)
    cutoff_len: int = key(2048, "Most tokens of a prompt with one response; more is cut.", minimum=8)
    truncation: str = key(
        "prefkit",
        "What is cut: prefkit keeps the end of a prompt and most of a response; llamafactory cuts the ends "
        "of both in proportion.",
        choices=("prefkit", "llamafactory"),
        elsewhere="llamafactory",
    )
    max_samples: int | None = key(None, "Most rows read of each data set, from its start.", minimum=1)
    mix_strategy: str = key(
        "concat",
        "How data sets are mixed: one after the other (concat), or in turn until one is used up "
        "(interleave_under), until all are, some repeated (interleave_over), or each row once "
        "(interleave_once).",
        choices=("concat", "interleave_under", "interleave_over", "interleave_once"),
    )
    interleave_probs: tuple[float, ...] = key(
        (),
        "Probability of drawing from each data set when they are mixed in turn; absent: strictly in turn.",
        above=0,
        maximum=1,
    )
    streaming: bool = key(
        False, "Read and encode rows while training, instead of all beforehand; needs max_steps."
    )
    buffer_size: int = key(16384, "Rows among which streaming shuffles.", minimum=1)
    on_bad_row: str | None = key(
        None,
        "Whether a row that cannot be used stops the run or is skipped and counted; null stops at malformed "
        "rows and skips those that can teach nothing.",
        choices=("stop", "skip"),
        elsewhere="skip, without a count",
    )
    duplicate_prompts: str = key(
        "keep",
        "Whether rows whose prompt was seen before in the same data set are kept or skipped and counted.",
        choices=("keep", "skip"),
    )
    ranked_responses: str = key(
        "group",
        "How a list of ranked responses is trained on: as one example, its prompt computed once (group), or "
        "as an example for each pair (pairs).",
        choices=("group", "pairs"),
        stages=("dpo", "rm"),
    )
    tokenized_path: str | None = key(
        None, "Folder in which encoded rows are kept and found again; null takes one in the user's cache."
    )
    overwrite_cache: bool = key(False, "Encode all rows again, whatever was kept.")
    preprocessing_num_workers: int | None = key(
        None, "Processes that encode rows; null takes one.", minimum=1
    )
    val_size: float = key(
        0.0, "Rows held out of dataset for evaluation: a fraction below 1, or a count above 1.", minimum=0
    )
    default_system: str | None = key(
        None,
        "System message of rows without one, ${...} read as it is; null takes the template's.",
        verbatim=True,
    )
    tool_format: str | None = key(
        None,
        "How functions are described and called in a named template; null takes the template's own way.",
        choices=(
            *("default", "qwen", "llama3", "mistral", "glm4", "glm4_moe", "qwen3_5", "seed_oss", "ling"),
            *("minimax1", "minimax2", "lfm2"),
        ),
        later=("gemma4",),
    )
    enable_thinking: bool | None = key(
        True,
        "Where a response has no thoughts, their empty block is scored (true), put into the prompt "
        "(null), or put there after thoughts are removed (false).",
    )
    preserve_thinking: bool = key(False, "Keep the thoughts of earlier turns in the prompt.")
    disable_shuffling: bool = key(False, "Train on the rows in the order of the files.")


@dataclass(frozen=True, kw_only=True)
class TuningConfig:
    """Which weights are trained."""

    finetuning_type: str = key(
        "lora",
        "What is trained: an adapter (lora), some layers, the others frozen (freeze), or all weights (full).",
        choices=("lora", "freeze", "full"),
        later=("oft",),
    )
    create_new_adapter: bool = key(
        False, "Merge every adapter of adapter_name_or_path and train a new one on top."
    )
    lora_rank: int = key(8, "Rank of the adapter's matrices.", minimum=1)
    lora_alpha: int = key(None, "Scale of the adapter times its rank; null takes twice the rank.", minimum=1)
    lora_dropout: float = key(0.0, "Dropout before the adapter while training.", minimum=0, below=1)
    lora_target: tuple[str, ...] = key(
        ("all",), "Names of the linear modules that get an adapter; all takes every one but the head."
    )
    additional_target: tuple[str, ...] = key((), "Names of modules trained in full beside the adapter.")
    use_rslora: bool = key(False, "Scale the adapter by alpha over the root of the rank.")
    use_dora: bool = key(False, "Train direction and magnitude of the weights apart (DoRA).")
    pissa_init: bool = key(
        False, "Start the adapter from the principal components of the weights (PiSSA), saved as plain LoRA."
    )
    pissa_iter: int = key(
        16, "Iterations of the fast decomposition for pissa_init; -1 decomposes exactly.", minimum=-1
    )
    loraplus_lr_ratio: float | None = key(
        None, "Learning rate of the adapter's B over that of its A (LoRA+).", above=0
    )
    loraplus_lr_embedding: float = key(1e-6, "Learning rate of adapters on embeddings in LoRA+.", above=0)
    freeze_trainable_layers: int = key(
        2, "Layers that freeze trains, counted from the last; a negative number counts from the first."
    )
    freeze_trainable_modules: tuple[str, ...] = key(
        ("all",), "Names of the modules of those layers that freeze trains; all takes every one."
    )
    freeze_extra_modules: tuple[str, ...] = key(
        (), "Names of modules outside the layers that freeze trains too, such as lm_head."
    )
    freeze_vision_tower: bool = key(True, "Leave the layers that read images as they are.")
    freeze_multi_modal_projector: bool = key(
        True, "Leave the layers between image reader and language model as they are."
    )
    freeze_language_model: bool = key(False, "Leave the language model of one that sees as it is.")
    pure_bf16: bool = key(False, "Hold and train every weight in bfloat16, without float32 copies.")

    def __post_init__(self) -> None:
        """Resolve `lora_alpha`."""
        if self.lora_alpha is None:
            object.__setattr__(self, "lora_alpha", 2 * self.lora_rank)


@dataclass(frozen=True, kw_only=True)
class OutputConfig:
    """What a run leaves behind beside the weights, and when it is taken to hang."""

    overwrite_output_dir: bool = key(False, "Start over in an output_dir that holds an earlier run.")
    plot_loss: bool = key(False, "Draw the curves of loss and reward accuracy.")
    sample_prompts: int = key(
        0, "Held-out prompts answered before and after training.", minimum=0, stages=_WRITING
    )
    sample_max_new_tokens: int = key(256, "Most tokens of each such answer.", minimum=1, stages=_WRITING)
    hang_timeout: int = key(
        1800,
        "Seconds without progress after which a process of the run writes the stacks of its threads and data "
        "workers and ends with exit code 70 (0: never); a step, an evaluation batch or a save that takes "
        "longer counts as a hang.",
        minimum=0,
        elsewhere="0",
    )


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """What `prefkit export` writes."""

    export_dir: str | None = key(None, "Folder for the exported model, adapters merged into it.")
    export_size: int = key(5, "Most gigabytes of one file of weights.", minimum=1)
    export_device: str = key(
        "cpu", "Where adapters are merged; auto takes an accelerator.", choices=("cpu", "auto")
    )
    export_value_head: str | None = key(
        None,
        "Write a reward model as LLaMA-Factory reads it by this reward_model_type: a merged language model "
        "(full), or the adapter alone (lora), with value_head.safetensors beside it.",
        choices=("full", "lora"),
    )


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """How `prefkit chat` and `prefkit api` answer, and how ppo draws the responses it learns from."""

    do_sample: bool = key(
        True, "Draw tokens at random; false always takes the most likely one.", stages=("ppo",)
    )
    temperature: float = key(
        0.95, "Divides the logits before drawing; 0 does not draw.", minimum=0, stages=("ppo",)
    )
    top_p: float = key(
        0.7,
        "Draw from the most likely tokens of this total probability.",
        above=0,
        maximum=1,
        stages=("ppo",),
    )
    top_k: int = key(50, "Draw from this many most likely tokens; 0 from all.", minimum=0, stages=("ppo",))
    repetition_penalty: float = key(
        1.0, "Divides the logits of tokens already there.", above=0, stages=("ppo",)
    )
    max_new_tokens: int = key(1024, "Most tokens of one answer.", minimum=1, stages=("ppo",))


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One run: our keys by owner, and the keys of transformers.TrainingArguments that were given."""

    model: ModelConfig
    data: DataConfig
    method: MethodConfig
    reference: ReferenceConfig
    tuning: TuningConfig
    reward: RewardConfig
    ppo: PpoConfig
    generation: GenerationConfig
    output: OutputConfig
    training: dict[str, Any]

    @property
    def continued_adapter(self) -> str | None:
        """The adapter that is trained on; None where a new one is, or none."""
        adapters = self.model.adapter_name_or_path
        return adapters[-1] if adapters and not self.tuning.create_new_adapter else None

    @property
    def merged_adapters(self) -> tuple[str, ...]:
        """Adapters that are part of the model under the trained adapter."""
        adapters = self.model.adapter_name_or_path
        return adapters[:-1] if self.continued_adapter else adapters

    @property
    def longest_row(self) -> int:
        """The most tokens of a prompt with a response: of ppo, `cutoff_len` is that of the prompt."""
        drawn = self.generation.max_new_tokens if self.method.stage == "ppo" else 0
        return self.data.cutoff_len + drawn

    def value(self, name: str) -> Any:
        """The value that holds for a YAML key, given or default; KeyError where there is no such key."""
        found = KEYS[name]
        if found.group == "training":
            return self.training.get(name, found.default)
        return getattr(getattr(self, found.group), name)

    def to_yaml_dict(self) -> dict[str, Any]:
        """The resolved config as flat YAML keys, without secrets; loading them gives an equal config.

        `${` in a text stands for itself, written `$${`.
        """
        own = {name: self.value(name) for name in keys_of(RunConfig) if KEYS[name].group != "training"}
        values = own | self.training
        return {
            name: value if KEYS[name].verbatim else escape(value)
            for name, value in values.items()
            if not is_secret(name)
        }


@dataclass(frozen=True, kw_only=True)
class UseConfig:
    """A model to export or to talk to."""

    model: ModelConfig
    data: DataConfig
    export: ExportConfig
    generation: GenerationConfig


GROUPS: dict[str, type] = {
    "model": ModelConfig,
    "data": DataConfig,
    "method": MethodConfig,
    "reference": ReferenceConfig,
    "tuning": TuningConfig,
    "reward": RewardConfig,
    "ppo": PpoConfig,
    "generation": GenerationConfig,
    "output": OutputConfig,
    "export": ExportConfig,
}

KEYS: dict[str, Key] = {
    **{name: k for group, owner in GROUPS.items() for name, k in own_keys(group, owner).items()},
    **training_keys(),
}


def keys_of(config: type) -> list[str]:
    """Names of the keys that a `RunConfig` or a `UseConfig` holds."""
    groups = {field.name for field in dataclasses.fields(config)}
    return [name for name, key in KEYS.items() if key.group in groups]
