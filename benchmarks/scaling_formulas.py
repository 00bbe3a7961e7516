"""Memory of a rank and traffic of a step as formulas.

docs/scaling.md explains them, and `scaling_check.py` measures what they say. Weights are counted as
numbers; `bf16: true`, Adam.
"""

from __future__ import annotations

from dataclasses import dataclass

ENGINES = ("ddp", "zero1", "zero2", "zero3", "fsdp")
SPLIT = ("zero3", "fsdp")
HALF, WHOLE = 2, 4  # bytes of bf16 and fp32


@dataclass(frozen=True)
class Shape:
    """A decoder like Llama's.

    >>> f"{LLAMA_70B.weights:,} {LLAMA_8B.weights:,} {LLAMA_8B.lora(8):,}"
    '70,553,706,496 8,030,261,248 20,971,520'
    """

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int
    head_dim: int = 128

    @property
    def _matrices(self) -> list[tuple[int, int]]:
        """(in, out) of each linear module of a layer."""
        h, i = self.hidden, self.intermediate
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return [(h, q), (h, kv), (h, kv), (q, h), (h, i), (h, i), (i, h)]

    @property
    def layer(self) -> int:
        """Weights of a layer."""
        return sum(a * b for a, b in self._matrices) + 2 * self.hidden

    @property
    def vocabulary_weights(self) -> int:
        """Weights of the embedding, and as many of the head."""
        return self.vocabulary * self.hidden

    @property
    def weights(self) -> int:
        """All weights; embedding and head are two."""
        return self.layers * self.layer + self.hidden + 2 * self.vocabulary_weights

    def lora(self, rank: int) -> int:
        """Weights of an adapter on all linear modules."""
        return self.layers * sum(rank * (a + b) for a, b in self._matrices)

    def flops(self, tokens: float, seen: float, backward: bool, full: bool, checkpointing: bool) -> float:
        """Floating point operations of a forward of so many tokens, which see `seen` tokens in all, and its
        backward: 2 for each weight that a token meets, and 4 h for each token that it sees, in each layer.
        The backward takes as much for the hidden states, and again for the weights if these are trained.
        """
        met = self.layers * self.layer + self.vocabulary_weights
        weights = 2.0 * met * tokens
        attention = 4.0 * self.layers * self.heads * self.head_dim * seen
        if not backward:
            return weights + attention
        passes = 1 + checkpointing + 1
        return (passes + full) * weights + (passes + 1) * attention


LLAMA_8B = Shape(32, 4096, 14336, 32, 8, 128256)
LLAMA_70B = Shape(80, 8192, 28672, 64, 8, 128256)
SHAPES = {"llama-8b": LLAMA_8B, "llama-70b": LLAMA_70B}


@dataclass(frozen=True)
class Run:
    """What is trained, and how it is spread. `reference` is `off` (the adapter off), `copy` (a second model)
    or `none` (a cache, or a loss without one)."""

    engine: str
    ranks: int
    frozen: int
    trained: int
    reference: str = "off"
    micro_steps: int = 1
    checkpointing: bool = False

    @property
    def weights(self) -> int:
        """Frozen and trained."""
        return self.frozen + self.trained

    @property
    def _parts(self) -> int:
        """Into how many parts weights are split."""
        return self.ranks if self.engine in SPLIT else 1

    def held(self) -> dict[str, float]:
        """Bytes of a rank between steps, by part."""
        trained_format = WHOLE if self.engine in ("ddp", "fsdp") else HALF
        weights = (HALF * self.frozen + trained_format * self.trained) / self._parts
        parts = {"weights": weights, "masters": 0.0, "moments": 2.0 * WHOLE * self.trained, "kept": 0.0}
        if self.engine != "ddp":
            parts["moments"] /= self.ranks
        if self.engine.startswith("zero"):
            parts["masters"] = WHOLE * self.trained / self.ranks
        if self.engine == "ddp" and self.ranks > 1:
            parts["kept"] = WHOLE * self.trained  # its buckets
        if self.engine == "zero3":
            parts["kept"] = HALF * self.trained / self.ranks  # a place for gradients
        parts["reference"] = weights if self.reference == "copy" else 0.0
        return parts

    def gradients(self) -> float:
        """Bytes of a rank at the fullest moment of a step beside what is held and activations."""
        t, n = self.trained, self.ranks
        return {
            # Among several micro-steps those of the ones before are there while autocast's copies are.
            "ddp": WHOLE * t + (HALF * t if self.micro_steps > 1 else 0),
            "zero1": HALF * t + WHOLE * t / n,
            "zero2": 2 * HALF * t / n + WHOLE * t / n,  # its part is there twice while it is put together
            "zero3": (HALF + WHOLE) * t / n,  # put together, then in fp32
            "fsdp": WHOLE * t / n,
        }[self.engine]

    def traffic(self) -> dict[str, float]:
        """Bytes that a rank of a ring sends in a step, by collective."""
        t, times = self.trained, self.micro_steps
        # In a micro-step: forward, with ZeRO-3 the forward again that spares activations, backward.
        gathered = HALF * (2 + (self.checkpointing and self.engine == "zero3")) * self.weights
        if self.reference != "none":
            gathered += HALF * (
                self.frozen if self.engine == "zero3" and self.reference == "off" else self.weights
            )
        sent = {
            "ddp": {"all-reduce": 2.0 * WHOLE * t},
            "zero1": {"all-reduce": 2.0 * HALF * t, "all-gather": HALF * t},
            "zero2": {"all-reduce": 2.0 * HALF * t * times, "all-gather": HALF * t},
            "zero3": {"all-gather": times * gathered, "reduce-scatter": HALF * t * times},
            "fsdp": {"all-gather": times * gathered, "reduce-scatter": WHOLE * t * times},
        }[self.engine]
        return {kind: number * (self.ranks - 1) / self.ranks for kind, number in sent.items()}
