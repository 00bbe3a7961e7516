"""The figures of the plans in docs/scaling.md: memory of a rank, traffic and time of a step on 8 x 8 H100.

From the formulas of scaling_formulas.py and the cost model of scaling_sim.py; nothing was run on a GPU.

    python benchmarks/scaling_plan.py
"""

from __future__ import annotations

from dataclasses import dataclass

from scaling_formulas import HALF, LLAMA_8B, LLAMA_70B, WHOLE, Run, Shape
from scaling_sim import Cluster

RANKS = 64
CHUNK = 1024  # tokens whose logits are there at a time


@dataclass(frozen=True)
class Plan:
    """A run on all ranks. `tokens` are those of a micro-batch on a rank, prompts once; in PPO a step is an
    update, with its part of the forwards of the rollout but without the drawing."""

    name: str
    shape: Shape
    engine: str
    lora_rank: int
    reference: str
    tokens: int
    micro_steps: int
    forwards: int  # without gradient, for each micro-step
    more: float = 0.0  # bytes of a rank for other models

    @property
    def run(self) -> Run:
        """Its weights, and how they are spread."""
        whole = self.shape.weights
        frozen, trained = (whole, self.shape.lora(self.lora_rank)) if self.lora_rank else (0, whole)
        return Run(self.engine, RANKS, frozen, trained, self.reference, self.micro_steps, True)

    def passing(self) -> dict[str, float]:
        """Bytes of a rank within a step: what is kept of each layer for the backward, the layer that is
        computed anew, the logits of a chunk thrice in fp32, and weights that are whole for a moment."""
        shape = self.shape
        a_layer = self.tokens * HALF * (10 * shape.hidden + 4 * shape.intermediate)
        whole_format = HALF * 3 if not self.lora_rank else HALF
        layers = 2 * HALF * shape.layer + shape.vocabulary_weights * whole_format
        return {
            "gradients": self.run.gradients(),
            "activations": HALF * self.tokens * shape.layers * shape.hidden + a_layer,
            "logits": 3.0 * WHOLE * CHUNK * shape.vocabulary,
            "whole weights": layers if self.engine in ("zero3", "fsdp") else 0.0,
        }

    def seconds(self, cluster: Cluster) -> tuple[float, float]:
        """(computing, sending) of a step, tokens alone."""
        policy = self.shape.flops(self.tokens, 0, True, not self.lora_rank, True)
        others = self.forwards * self.shape.flops(self.tokens, 0, False, False, False)
        computing = self.micro_steps * (policy + others) / (cluster.peak * cluster.use)
        return computing, sum(self.run.traffic().values()) / cluster.bandwidth(RANKS)


BUCKET = 5e8 * HALF  # of ZeRO stage 2, in examples/deepspeed/ds_z2_config.json
PLANS = (
    Plan("70B DPO, LoRA, ZeRO-3", LLAMA_70B, "zero3", 16, "off", 4096, 1, 1),
    Plan("70B DPO, LoRA, FSDP2", LLAMA_70B, "fsdp", 16, "off", 4096, 1, 1),
    Plan("70B DPO, full, ZeRO-3, reference cached", LLAMA_70B, "zero3", 0, "none", 4096, 1, 0),
    Plan("70B DPO, full, ZeRO-3, second model", LLAMA_70B, "zero3", 0, "copy", 4096, 1, 1),
    Plan("70B DPO, full, FSDP2", LLAMA_70B, "fsdp", 0, "copy", 4096, 1, 1),
    Plan("8B PPO, LoRA, DDP", LLAMA_8B, "ddp", 16, "off", 9216, 2, 3, LLAMA_8B.lora(16) * HALF),
    Plan("8B PPO, full, ZeRO-2", LLAMA_8B, "zero2", 0, "copy", 9216, 2, 3, LLAMA_8B.weights * HALF + BUCKET),
)


def main() -> None:
    """Print each plan."""
    cluster = Cluster()
    for plan in PLANS:
        parts = plan.run.held() | {"other models": plan.more} | plan.passing()
        print(f"\n{plan.name}: {sum(parts.values()) / 1e9:.1f} GB")
        print("  GB: " + ", ".join(f"{name} {size / 1e9:.2f}" for name, size in parts.items() if size))
        sent = ", ".join(f"{kind} {size / 1e9:.1f}" for kind, size in plan.run.traffic().items())
        computing, sending = plan.seconds(cluster)
        print(f"  sent, GB: {sent}")
        print(f"  seconds: computing {computing:.2f}, sending {sending:.2f}", end="; ")
        print(f"of both {cluster.together(computing, sending):.2f}")


if __name__ == "__main__":
    main()
