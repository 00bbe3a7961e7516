"""A model made ready for packed batches, in the layout that it can take."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from prefkit.config.errors import UserError
from prefkit.config.schema import ModelConfig
from prefkit.data.packing import Layout
from prefkit.model.architecture import read_architecture
from prefkit.model.attention import use_shared_prompts
from prefkit.model.policy import attach_logps_forward, has_router_loss
from prefkit.model.reward import attach_scores_forward, is_reward_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Say = Callable[[str], None]


def prepare_for_batches(
    base: PreTrainedModel, config: ModelConfig, cutoff_len: int, say: Say, has_images: bool = False
) -> Layout:
    """Make a model take packed batches, of which some may have images; the layout that they have.

    Raises `UserError` where it cannot as the config wants it.
    """
    architecture = read_architecture(base.config)
    layout = architecture.choose_layout(config.batch_layout, cutoff_len, has_images)
    if layout == "shared":
        use_shared_prompts(base, config.flash_attn)
    why = architecture.find_obstacle(cutoff_len, has_images) or "as batch_layout says"
    told = "a prompt is computed once for its responses" if layout == "shared" else f"not shared: {why}"
    say(f"Batches: {layout} layout ({told}).")
    if is_reward_model(base):
        attach_scores_forward(base)
        return layout
    if architecture.logits is None:
        say(f"The head of {architecture.name} is not known: all logits are held in memory.")
    if config.moe_aux_loss_coef and not has_router_loss(base):
        raise UserError(f"moe_aux_loss_coef: {architecture.name} has no load-balancing loss: remove the key")
    attach_logps_forward(base, architecture, router_loss=bool(config.moe_aux_loss_coef))
    return layout
