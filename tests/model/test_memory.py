"""Peak memory of a step does not grow with the vocabulary."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from prefkit.data.encode import TokenizedExample
from prefkit.data.packing import pack
from tests.model.test_policy import loss_of, make_policy, response_logps


class PeakMemory(TorchDispatchMode):
    """Bytes of all tensors that operations in the block made and that lived at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {
            x.untyped_storage()._cdata for x in tree_iter((args, kwargs)) if isinstance(x, torch.Tensor)
        }
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in before and key not in self.live:
                    self.live[key] = storage.nbytes()
                    weakref.finalize(storage, self.live.pop, key, None)
        self.peak = max(self.peak, sum(self.live.values()))
        return result


def peak_of_a_step(vocabulary: int, targets: list[str]) -> int:
    torch.manual_seed(0)
    policy = make_policy("llama", {"vocab_size": vocabulary, "hidden_size": 64}, "shared", targets)
    ids = torch.randint(7, 264, (3, 1200)).tolist()
    batch = pack([TokenizedExample(ids[0][:100], [ids[1], ids[2]], [(0, 1)], "f:1")], "shared").to_dict()
    with PeakMemory() as memory:
        loss_of(response_logps(policy, batch).logps).backward()
    adapter = sum(p.numel() * 4 for p in policy.parameters() if p.requires_grad)
    return memory.peak - 2 * adapter  # a LoRA on the head has weights and gradients as long as the vocabulary


def test_peak_at_152k_is_that_at_8k() -> None:
    for targets in (["q_proj", "v_proj"], ["q_proj", "lm_head"]):
        small, large = (peak_of_a_step(vocabulary, targets) for vocabulary in (8_000, 152_000))
        assert small > 40e6  # the chunk of logits is seen
        assert abs(large - small) < 0.1 * small, (targets, small, large)
