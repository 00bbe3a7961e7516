"""Responses drawn by vLLM, for `rollout_engine: vllm`, from the weights that the policy has at the time.

The engine runs in a process of its own, as vLLM has it by default: its seeding and its threads leave the
training alone. It reads the base from the folder that the YAML names. Before each draw it is given what was
trained: with LoRA the adapter, under an id and a name that were never used, so that neither an adapter nor a
prompt's states of older weights are found again; otherwise all weights, after which vLLM forgets its states.
Both go through a folder in `TMPDIR`, which is deleted at once; /dev/shm is a good one where it has the room.

Each response is a request with a seed of its own, which follows from (seed, rollout, prompt, response), so
that it depends neither on what else is drawn nor on the rank that draws it, up to what last digits of logits
do to draws at a boundary. The tokens are others than those of `sample_responses`: the random numbers are used
in another way.

With several processes each has an engine for its prompts, on its own device and not told of the others; they
do not wait for each other. On a GPU the engine sleeps between draws: its weights lie in main memory and its
states are dropped, so that training has the device.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from accelerate import PartialState
from peft import PeftModel

from prefkit.config.errors import UserError
from prefkit.config.schema import GenerationConfig, RunConfig
from prefkit.data.vision import Seen
from prefkit.model.adapter import TRAINED
from prefkit.model.rollout import Sampled, Stream, find_limits
from prefkit.model.sampling import is_greedy
from prefkit.train.policy import Policy, Say

if TYPE_CHECKING:
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

# Share of a GPU for weights and states. vLLM takes all of it at the start, when the policy may be there and
# gradients, optimiser and activations are still to come; asleep it leaves most of it.
_MEMORY = 0.3
# Ranks that vLLM has room for: the least that is enough is taken.
_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_INSTEAD = "write rollout_engine: transformers"


class _Weights(Protocol):
    """How an engine comes by the newest weights."""

    def load(self) -> LoRARequest | None:
        """Give the engine the weights; what its requests have to name, if anything."""


class VllmEngine:
    """A vLLM engine that draws with the weights of a policy. There is one in a process.

    `max_length` is the most tokens of a prompt with its response; `sleeps` says whether the device is left
    to training between draws.
    """

    def __init__(self, llm: LLM, policy: Policy, max_length: int, sleeps: bool) -> None:
        self._llm, self._base = llm, policy.base
        self._max_length, self._sleeps = max_length, sleeps
        adapted = isinstance(policy.model, PeftModel)
        self._weights: _Weights = _Adapter(llm, policy.model) if adapted else _AllWeights(llm, policy)
        if sleeps:
            llm.sleep(level=1)

    def draw(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        numbers: Sequence[int],
        num_responses: int,
        generation: GenerationConfig,
        stop_ids: Sequence[int],
        stream: Stream,
        seen: Sequence[Seen] = (),
    ) -> list[Sampled]:
        """`num_responses` responses to each prompt, as `sample_responses` has it, from the newest weights.

        Raises `ModelError` for a prompt that leaves no position for a response, and `UserError` for one that
        the engine has no room for.
        """
        if any(it.pixels for it in seen):
            raise UserError(f"rollout_engine: vllm draws for prompts of text alone here: {_INSTEAD}")
        limits = find_limits(self._base, prompts, generation.max_new_tokens)
        longest = max(len(prompt) + limit for prompt, limit in zip(prompts, limits, strict=True))
        if longest > self._max_length:
            raise UserError(
                f"rollout_engine: vllm has room for {self._max_length} tokens, and a prompt with its "
                f"response may have {longest}: write a larger cutoff_len"
            )
        requests, parameters = [], []
        for prompt, number, limit in zip(prompts, numbers, limits, strict=True):
            for response in range(num_responses):
                seed = request_seed(stream, number, response)
                requests.append({"prompt_token_ids": list(prompt)})
                parameters.append(_sampling_params(generation, limit, stop_ids, seed))
        with self._awake():
            adapter = self._weights.load()
            outputs = self._llm.generate(requests, parameters, use_tqdm=False, lora_request=adapter)
        ids = [_tokens_of(output) for output in outputs]
        ended = [row[-1] in stop_ids for row in ids]
        groups = [slice(i, i + num_responses) for i in range(0, len(ids), num_responses)]
        return [Sampled(ids[group], ended[group]) for group in groups]

    def close(self) -> None:
        """End the engine's process, and free what it holds."""
        self._llm.llm_engine.engine_core.shutdown()

    @contextmanager
    def _awake(self) -> Iterator[None]:
        """The engine with its memory within the block."""
        if not self._sleeps:
            yield
            return
        torch.cuda.empty_cache()  # the engine is another process, to which kept blocks are taken ones
        self._llm.wake_up()
        try:
            yield
        finally:
            self._llm.sleep(level=1)


def open_vllm_engine(config: RunConfig, policy: Policy, say: Say) -> VllmEngine:
    """An engine for the model of a run, on the device of this process.

    Raises `UserError` where vllm is not installed, cannot run the model, or cannot have what is trained.
    """
    # Lines of vLLM would tear the progress bar, and a training sends nobody a report.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    try:
        import vllm
    except ImportError as missing:
        if missing.name != "vllm":
            raise UserError(f"rollout_engine: vllm cannot be imported: {missing}; {_INSTEAD}") from missing
        raise UserError(
            "rollout_engine: vllm is not installed: pip install vllm, then pip install 'transformers>=5.23', "
            f"which it may have replaced by an older one; or {_INSTEAD}"
        ) from missing
    lora_options, device = _lora_options(policy), PartialState().device
    _check_head(policy, device)
    try:
        _sampling_params(config.generation, config.generation.max_new_tokens, (), 0)
    except ValueError as error:
        raise UserError(f"rollout_engine: vllm does not draw so: {error}; {_INSTEAD}") from error
    name, max_length = config.model.model_name_or_path, _longest(config, policy)
    say(f"Rollouts: vLLM {vllm.__version__}, {max_length} tokens at most, on {device}.")
    try:
        with _seeing_only(device):
            llm = vllm.LLM(
                name,
                revision=config.model.model_revision,
                tokenizer_revision=config.model.model_revision,
                trust_remote_code=config.model.trust_remote_code,
                download_dir=config.model.cache_dir,
                dtype=str(policy.compute_dtype).removeprefix("torch."),
                max_model_len=max_length,
                gpu_memory_utilization=_MEMORY,
                enable_prefix_caching=True,
                enable_sleep_mode=device.type == "cuda",
                enforce_eager=device.type == "cpu",  # to compile takes longer there than it saves
                **lora_options,
            )
    except (ValueError, RuntimeError, OSError) as error:
        raise UserError(f"rollout_engine: vllm does not open {name}: {error}; {_INSTEAD}") from error
    return VllmEngine(llm, policy, max_length, sleeps=device.type == "cuda")


def request_seed(stream: Stream, number: int, response: int) -> int:
    """Seed of one request, in [0, 2^63): numpy's `SeedSequence` of seed, rollout, prompt and response.

    >>> request_seed(Stream(42, 0), 3, 1) == request_seed(Stream(42, 0), 3, 1)
    True
    """
    sequence = np.random.SeedSequence((stream.seed, stream.rollout, number, response))
    return int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1))


class _Adapter:
    """The trained adapter upon the base, alone: not the frozen ones that may stand beside it."""

    def __init__(self, llm: LLM, model: Any) -> None:
        self._llm, self._model, self._number = llm, model, 0

    def load(self) -> LoRARequest:
        """Replace the adapter; its id is the number of the draw, from 1."""
        from vllm.lora.request import LoRARequest

        engine = self._llm.llm_engine
        if self._number:
            engine.remove_lora(self._number)
        self._number += 1
        with TemporaryDirectory(prefix="prefkit-vllm-") as folder:
            self._model.save_pretrained(folder, selected_adapters=[TRAINED], save_embedding_layers=False)
            request = LoRARequest(f"rollout-{self._number}", self._number, folder)
            if not engine.add_lora(request):
                raise RuntimeError(f"vLLM did not load the adapter of draw {self._number}")
        return request


class _AllWeights:
    """All weights of the model, the value head left out."""

    def __init__(self, llm: LLM, policy: Policy) -> None:
        self._llm, self._policy = llm, policy

    def load(self) -> None:
        """Replace the weights, and have the states of the older ones forgotten."""
        with TemporaryDirectory(prefix="prefkit-vllm-") as folder:
            self._policy.base.save_pretrained(folder)
            self._llm.collective_rpc("reload_weights", kwargs={"weights_path": folder})
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("vLLM did not forget the states of older weights")


def _sampling_params(
    generation: GenerationConfig, max_tokens: int, stop_ids: Sequence[int], seed: int
) -> SamplingParams:
    """How one response is drawn. It ends at `stop_ids` alone, not at what the model's files say beside."""
    from vllm import SamplingParams

    greedy = is_greedy(generation)
    return SamplingParams(
        temperature=0.0 if greedy else generation.temperature,
        top_p=1.0 if greedy else generation.top_p,
        top_k=0 if greedy else generation.top_k,
        repetition_penalty=generation.repetition_penalty,
        seed=seed,
        max_tokens=max_tokens,
        stop_token_ids=list(stop_ids),
        ignore_eos=True,
        detokenize=False,
    )


def _tokens_of(output: Any) -> list[int]:
    """The tokens of the one response to a request."""
    (completion,) = output.outputs
    if completion.finish_reason not in ("stop", "length") or not completion.token_ids:
        raise RuntimeError(f"vLLM gave up on a response: {completion.finish_reason}")
    return list(completion.token_ids)


def _lora_options(policy: Policy) -> dict[str, Any]:
    """Arguments of `LLM` for the adapter that is trained. Raises `UserError` for one that it cannot have."""
    if any(hasattr(weights, "ds_id") for weights in policy.model.parameters()):
        raise UserError(f"rollout_engine: vllm needs whole weights, and ZeRO-3 shards them: {_INSTEAD}")
    if not isinstance(policy.model, PeftModel):
        return {}
    lora: Any = policy.model.peft_config[TRAINED]
    others = ("modules_to_save", "use_dora", "lora_bias", "trainable_token_indices", "layer_replication")
    unknown = [name for name in others if getattr(lora, name, None)]
    if lora.bias != "none":
        unknown.append("bias")
    rank = max([lora.r, *(lora.rank_pattern or {}).values()])
    if unknown:
        raise UserError(
            f"rollout_engine: vllm takes plain LoRA alone, and this has {', '.join(unknown)}: {_INSTEAD}"
        )
    if rank > _RANKS[-1]:
        raise UserError(
            f"rollout_engine: vllm takes adapters up to rank {_RANKS[-1]}, and this has {rank}: {_INSTEAD}"
        )
    room = next(it for it in _RANKS if it >= rank)
    return {"enable_lora": True, "max_loras": 1, "max_cpu_loras": 1, "max_lora_rank": room}


def _check_head(policy: Policy, device: torch.device) -> None:
    """Raises `UserError` where vLLM would go on with the head of the start: on a CPU it packs a copy of the
    weights for the head, and makes it anew only if they come under the head's own name."""
    tied = policy.base.config.get_text_config().tie_word_embeddings
    weights: Any = policy.base.get_input_embeddings().weight
    if device.type == "cpu" and tied and weights.requires_grad:
        raise UserError(
            "rollout_engine: on a CPU vllm does not take new weights of a head tied to the embedding: "
            f"{_INSTEAD}, or finetuning_type: lora"
        )


def _longest(config: RunConfig, policy: Policy) -> int:
    """The most tokens of a prompt with its response: vLLM keeps room for the states of one such, at least."""
    answer = max(config.generation.max_new_tokens, config.output.sample_max_new_tokens)
    positions = getattr(policy.base.config.get_text_config(), "max_position_embeddings", None)
    longest = config.data.cutoff_len + answer
    return longest if positions is None else min(longest, positions)


@contextmanager
def _seeing_only(device: torch.device) -> Iterator[None]:
    """Let processes that are started within the block see this GPU alone: vLLM takes the first it sees."""
    if device.type != "cuda":
        yield
        return
    name = "CUDA_VISIBLE_DEVICES"
    before = os.environ.get(name)
    index = device.index or 0
    os.environ[name] = before.split(",")[index] if before else str(index)
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
