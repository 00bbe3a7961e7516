"""The keys of a method: its stage, loss and reference, its reward model, and the numbers of PPO."""

from __future__ import annotations

from dataclasses import dataclass

from .key import REQUIRED, STAGES, key

_WITH_REFERENCE = ("dpo", "kto", "ppo")


@dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """The training method and the numbers of its loss."""

    stage: str = key(
        REQUIRED,
        "Training stage: on pairs with any pref_loss (dpo), on single judged responses (kto), a reward model "
        "(rm) or by reinforcement (ppo).",
        choices=STAGES,
        later=("sft", "pt"),
        example="dpo",
    )
    pref_loss: str = key(
        "sigmoid",
        "Loss on a pair of responses.",
        choices=("sigmoid", "hinge", "ipo", "orpo", "simpo", "kto_pair"),
        stages=("dpo",),
    )
    pref_beta: float = key(
        0.1,
        "Strength of the pull to the reference; scale of the reward in simpo, lambda in orpo.",
        above=0,
        stages=("dpo", "kto"),
    )
    pref_ftx: float = key(
        0.0,
        "Weight of the added negative log-likelihood per token of the chosen response.",
        minimum=0,
        stages=("dpo", "kto"),
    )
    dpo_label_smoothing: float = key(
        0.0,
        "Share of pairs taken to be labelled the wrong way round (cDPO); for sigmoid only.",
        minimum=0,
        below=0.5,
        reason="at 0.5 a label carries no signal",
        stages=("dpo",),
    )
    simpo_gamma: float = key(
        0.5, "Margin that simpo asks of the reward, in nats.", minimum=0, stages=("dpo",)
    )
    ld_alpha: float | None = key(
        None,
        "LD-DPO: weight of the tokens beyond the length of the shorter response; null leaves it out.",
        minimum=0,
        maximum=1,
        stages=("dpo",),
    )
    ld_alpha_reference: bool = key(
        True,
        "Weigh the reference's tokens by ld_alpha too; false is what LLaMA-Factory does.",
        stages=("dpo",),
        elsewhere="false",
    )
    rm_center_coefficient: float = key(
        0.0,
        "Weight of the squared sum of both scores of a pair, which holds the mean score near 0.",
        minimum=0,
        stages=("rm",),
    )
    early_stopping_steps: int | None = key(
        None,
        "Stop after this many evaluations in a row without a better metric_for_best_model (eval_loss "
        "where absent).",
        minimum=1,
    )
    ipo_average: bool = key(
        True, "Log-ratios of ipo are means per token; false takes their sums.", stages=("dpo",)
    )
    pref_bco_weight: float = key(
        0.0, "Weight of the binary classifier loss (BCO) mixed in.", minimum=0, stages=("dpo",)
    )
    kto_chosen_weight: float = key(1.0, "Weight of desirable responses in kto.", minimum=0, stages=("kto",))
    kto_rejected_weight: float = key(
        1.0, "Weight of undesirable responses in kto.", minimum=0, stages=("kto",)
    )


@dataclass(frozen=True, kw_only=True)
class ReferenceConfig:
    """What the policy is measured against."""

    ref_model: str | None = key(
        None,
        "Folder or Hugging Face id of the reference; null takes what training starts from.",
        stages=_WITH_REFERENCE,
    )
    ref_model_adapters: tuple[str, ...] = key(
        (), "Adapters merged into ref_model, in this order.", stages=_WITH_REFERENCE
    )
    ref_model_quantization_bit: int | None = key(
        None, "Bits of the weights of ref_model: 4 or 8.", minimum=4, maximum=8, stages=_WITH_REFERENCE
    )
    ref_cache: bool | None = key(
        None,
        "Keep the reference's log-probs on disk and read them again; null does so where rows are seen more "
        "than once.",
        stages=("dpo", "kto"),
    )


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """What judges the responses of ppo."""

    reward_model: str | None = key(
        None,
        "Folder of the reward model, its Hugging Face id, or the address of a server of scores, whose token "
        "is read from the environment variable REWARD_API_KEY.",
        stages=("ppo",),
    )
    reward_model_type: str = key(
        "lora",
        "What reward_model is: an adapter of the model that is trained (lora), a whole model beside it "
        "(full), or a server (api).",
        choices=("lora", "full", "api"),
        stages=("ppo",),
    )
    reward_model_adapters: tuple[str, ...] = key(
        (),
        "Adapters put upon a reward_model of type full, in this order; the last one brings the head for "
        "scores.",
        stages=("ppo",),
    )
    reward_function: str | None = key(
        None,
        "A Python function that scores responses, as path/to/file.py:name, beside reward_model or instead of "
        "it; given a list of prompts, each a list of chat messages, and a list of responses as texts, it "
        "returns a number for each.",
        stages=("ppo",),
    )
    reward_weights: tuple[float, ...] = key(
        (),
        "Weights of reward_model and reward_function, in this order, whose weighted scores are added; 1 each "
        "where absent.",
        stages=("ppo",),
    )
    reward_timeout: float = key(
        60.0, "Seconds in which a server of scores must have answered a request.", above=0, stages=("ppo",)
    )
    reward_retries: int = key(
        5,
        "How often a request to a server of scores is sent again when it was not reached, was too slow or "
        "busy.",
        minimum=0,
        stages=("ppo",),
    )
    reward_model_quantization_bit: int | None = key(
        None,
        "Bits of the weights of a reward_model of type full: 4 or 8.",
        minimum=4,
        maximum=8,
        stages=("ppo",),
    )


@dataclass(frozen=True, kw_only=True)
class PpoConfig:
    """The numbers of ppo. A rollout is one step: responses are drawn, judged and learnt from."""

    ppo_buffer_size: int = key(
        1,
        "Optimiser updates of one pass over a rollout; its prompts are those of so many updates.",
        minimum=1,
        stages=("ppo",),
    )
    ppo_epochs: int = key(4, "Passes over the responses of a rollout.", minimum=1, stages=("ppo",))
    ppo_group_size: int = key(1, "Responses drawn for each prompt.", minimum=1, stages=("ppo",))
    ppo_score_norm: bool = key(
        False, "Scale scores by their running mean and standard deviation.", stages=("ppo",)
    )
    ppo_missing_eos_penalty: float = key(
        0.0,
        "What the score of a response loses that was cut off at max_new_tokens: a reward model learns from "
        "whole answers, and what it says of others is chance.",
        minimum=0,
        stages=("ppo",),
    )
    ppo_target: float = key(
        6.0, "KL to the reference, in nats, that the weight of its penalty aims at.", above=0, stages=("ppo",)
    )
    ppo_init_kl: float = key(0.2, "Weight of the KL penalty at the start.", minimum=0, stages=("ppo",))
    ppo_kl_horizon: float = key(
        10_000.0,
        "Responses in which the weight of the KL penalty may change by a fifth.",
        above=0,
        stages=("ppo",),
    )
    ppo_whiten_rewards: bool = key(False, "Whiten rewards before advantages are taken.", stages=("ppo",))
    ppo_gamma: float = key(
        1.0, "Discount of a reward for each token until it comes.", above=0, maximum=1, stages=("ppo",)
    )
    ppo_lambda: float = key(
        0.95, "Lambda of the generalised advantage estimate.", minimum=0, maximum=1, stages=("ppo",)
    )
    ppo_clip: float = key(
        0.2, "How far the ratio to the drawing policy counts, to either side of 1.", above=0, stages=("ppo",)
    )
    ppo_value_clip: float = key(
        0.2, "How far a value counts from what it was at the drawing.", above=0, stages=("ppo",)
    )
    ppo_value_coefficient: float = key(0.1, "Weight of the value loss.", minimum=0, stages=("ppo",))
    ppo_ptx: float = key(
        0.0,
        "Weight of the negative log-likelihood, per token, of the answers in ppo_ptx_dataset, a batch of "
        "which goes along with each of responses.",
        minimum=0,
        stages=("ppo",),
    )
    ppo_ptx_dataset: tuple[str, ...] = key(
        (), "Data sets of prompts with answers for ppo_ptx, named like dataset.", stages=("ppo",)
    )
    rollout_engine: str = key(
        "transformers",
        "What draws the responses: the model that is trained, or a vLLM engine with its weights.",
        choices=("transformers", "vllm"),
        stages=("ppo",),
    )
