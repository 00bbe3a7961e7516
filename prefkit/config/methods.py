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
        "(rm) or by reinforcement (ppo); this version only checks ppo.",
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
    """What judges the responses of ppo; this version reads it in `prefkit check` alone."""

    reward_model: str | None = key(
        None,
        "Folder of the reward model, its Hugging Face id, or the address of a server of scores.",
        stages=("ppo",),
    )
    reward_model_type: str = key(
        "lora",
        "What reward_model is: an adapter of the model that is trained (lora), a whole model (full), or a "
        "server (api).",
        choices=("lora", "full", "api"),
        stages=("ppo",),
    )
    reward_model_adapters: tuple[str, ...] = key(
        (), "Adapters merged into reward_model, in this order.", stages=("ppo",)
    )
    reward_model_quantization_bit: int | None = key(
        None, "Bits of the weights of reward_model: 4 or 8.", minimum=4, maximum=8, stages=("ppo",)
    )


@dataclass(frozen=True, kw_only=True)
class PpoConfig:
    """The numbers of ppo; this version reads them in `prefkit check` alone."""

    ppo_buffer_size: int = key(
        1,
        "Batches of an optimiser step for which responses are drawn before ppo learns from them.",
        minimum=1,
        stages=("ppo",),
    )
    ppo_epochs: int = key(4, "Times that ppo goes over the drawn responses.", minimum=1, stages=("ppo",))
    ppo_score_norm: bool = key(
        False, "Scale scores by their running mean and standard deviation.", stages=("ppo",)
    )
    ppo_target: float = key(
        6.0, "KL to the reference, in nats, that the weight of its penalty aims at.", above=0, stages=("ppo",)
    )
    ppo_whiten_rewards: bool = key(False, "Whiten rewards before advantages are taken.", stages=("ppo",))
