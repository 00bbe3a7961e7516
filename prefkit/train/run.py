"""A run from its config to its files: check, read, build, train, evaluate, record."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, cast

from accelerate import PartialState
from rich.console import Console
from transformers import set_seed

from prefkit.config.errors import UserError
from prefkit.config.schema import RunConfig
from prefkit.data.dataset import USES, RunData
from prefkit.data.encode import TokenizedExample
from prefkit.data.readers import DataError
from prefkit.data.streaming import StreamedRows
from prefkit.data.template import ChatTemplate, make_template
from prefkit.files import fsync_files, naming_disk_faults, replace_text
from prefkit.model.adapter import leave_out_head, save_as_plain_lora
from prefkit.model.generate import generate_responses
from prefkit.model.padding import set_pad_token
from prefkit.model.probe import make_probe, write_probe
from prefkit.model.reference import Reference
from prefkit.model.reward import HEAD_FACTS, VALUE_HEAD, write_value_head
from prefkit.model.reward_model import make_score_probe, write_score_probe
from prefkit.model.seeing_classifier import is_ours
from prefkit.model.vision import load_template
from prefkit.objectives.pairwise import LOSSES
from prefkit.runs.calibration import (
    CALIBRATION_FILE,
    SCORES_FILE,
    ScoredPair,
    write_calibration,
    write_scored_pairs,
)
from prefkit.runs.identity import check_same_run, identify
from prefkit.runs.plots import OVERVIEW, plot_curves
from prefkit.runs.record import write_data_report, write_model_card, write_record
from prefkit.runs.report import make_tracker, print_files, print_ledger
from prefkit.runs.samples import Sample, print_samples, write_samples
from prefkit.train.answers import SAMPLES_FILE, SAMPLES_PAGE
from prefkit.train.arguments import make_training_arguments
from prefkit.train.build import build_trainer, loss_name
from prefkit.train.callbacks import (
    evaluation_prefix,
)
from prefkit.train.checkpoint_files import find_newest_checkpoint
from prefkit.train.judges import check_judges, fingerprint_functions, fingerprint_reward_models
from prefkit.train.lock import FolderLock
from prefkit.train.out_of_memory import naming_memory_faults
from prefkit.train.output import OutputFolder, open_output_folder
from prefkit.train.place import command_that_goes_on, make_output_folder, output_path
from prefkit.train.policy import Policy, build_policy
from prefkit.train.ranks import load_data_once
from prefkit.train.references import ReferenceBuilder, fingerprints
from prefkit.train.rollout_count import count_in_updates, updates_per_step
from prefkit.train.signals import StopSignals
from prefkit.train.space import check_before_loading, check_before_training
from prefkit.train.spikes import SPIKE_FILE
from prefkit.train.strategy import Strategy, choose_strategy
from prefkit.train.trainer import PrefTrainer
from prefkit.train.watchdog import Watchdog, named_worker_deaths

if TYPE_CHECKING:
    from torch import nn
    from transformers import TrainingArguments

_SHOWN_SAMPLES = 3
_SHOWN_METRICS = {
    "rewards/accuracies": "reward accuracy",
    "rewards/auc": "AUC of the reward",
    "rewards/margins": "margin",
    "score": "mean score",
    "kl": "KL",
    "response_length": "length",
}
_PROBED = 256  # rows among which the shortest are taken for the probe
_ANSWERED, _ANSWER_TOKENS = 4, 32  # of prompts alone so many get an answer for the probe, of so many tokens


def train(config: RunConfig, console: Console) -> None:
    """Run a config. Raises `UserError` for whatever its owner can mend, and `Interrupted`."""
    newest = partial(find_newest_checkpoint, output_path(config))
    with naming_disk_faults(output_path(config), newest, command_that_goes_on(config)):
        args = make_training_arguments(config)
        console.quiet = args.process_index > 0
        with StopSignals(leads=not console.quiet) as signals, ExitStack() as held:
            with args.main_process_first(local=False):
                path = make_output_folder(config)
                if args.process_index == 0:
                    held.enter_context(FolderLock(path, console.print))
                folder = open_output_folder(config, console.print)
            PartialState().wait_for_everyone()  # before any rank writes to the folder that others look at
            if folder.finished:
                console.print(
                    f"The run in {path} is finished; overwrite_output_dir: true would start it afresh."
                )
            else:
                with naming_memory_faults(config, args):
                    _train(config, args, folder, signals, console)


def _train(
    config: RunConfig,
    args: TrainingArguments,
    folder: OutputFolder,
    signals: StopSignals,
    console: Console,
) -> None:
    check_before_loading(config, args, folder, console.print)
    if config.method.stage == "ppo":
        check_judges(config)
    set_seed(args.seed)
    template = load_template(config.model, config.data)
    tokenizer = template.tokenizer
    if config.method.stage == "rm":
        set_pad_token(tokenizer, template, config.model)
        template = make_template(tokenizer, config.data, template.vision)  # it knows a token that may be new
    tracker = make_tracker(console)
    data = load_data_once(config, args, template, console.print, tracker)
    _check_margins(config, data)
    if not isinstance(data.train, StreamedRows):
        print_ledger(console, data.ledgers)
    weights = fingerprints(config)
    functions: dict[str, str] = {}
    if config.method.stage == "ppo":
        weights |= fingerprint_reward_models(config)
        functions = fingerprint_functions(config)
    identity = identify(config, template, data, weights, args.world_size, functions)
    if folder.checkpoint is not None and (other := check_same_run(folder.checkpoint, identity)):
        console.print(f"It may end otherwise than a run in one go, since there changed: {', '.join(other)}.")
    if config.method.stage == "ppo" and not isinstance(data.train, StreamedRows):
        count_in_updates(config, args, len(data.train))
    strategy = choose_strategy(args)
    if args.world_size > 1 or strategy.masters is not None:
        console.print(f"Processes: {args.world_size}, {strategy.name}.")
    if strategy.splits_weights and data.has_images:
        raise UserError(f"{strategy.name} with images is not in this version: take ZeRO stage 2 or below")
    read = _in_one_dtype(config, strategy)
    policy = build_policy(read, args, template, console.print, strategy, data.has_images)
    reference: Reference | None = None
    if config.method.stage != "rm":
        builder = ReferenceBuilder(
            read, args, policy, tokenizer, data, weights, console.print, tracker, strategy
        )
        reference = builder.build()
    watchdog = Watchdog(config.output.hang_timeout, args.process_index)
    trainer = build_trainer(
        config, args, policy, reference, data, template, folder, signals, console, watchdog, strategy
    )
    trainer.identity = identity
    run = Run(config, folder, trainer, policy, reference, template, data, weights, console, watchdog)
    run.check_space()
    if run.leads:
        folder.clear()
    run.record(finished=False)
    with named_worker_deaths(), watchdog, _engine_of(trainer):
        if args.do_train:
            before = run.answers("before")
            run.train()
            run.sample(before)
        run.evaluate()
    run.record(finished=True)
    run.show_files()


def _in_one_dtype(config: RunConfig, strategy: Strategy) -> RunConfig:
    """The config with the number format in which the strategy wants weights to be read."""
    if strategy.one_dtype is None:
        return config
    name = str(strategy.one_dtype).removeprefix("torch.")
    return replace(config, model=replace(config.model, dtype=name))


@contextmanager
def _engine_of(trainer: PrefTrainer) -> Iterator[None]:
    """What draws responses is let go of in the end."""
    try:
        yield
    finally:
        if trainer.rollouts is not None:
            trainer.rollouts.answerer.engine.close()


def _check_margins(config: RunConfig, data: RunData) -> None:
    """Raises `DataError` when the data has margins that the loss would not read."""
    if not data.has_margins or config.method.stage in ("rm", "ppo"):
        return
    if config.method.stage == "kto":
        raise DataError(
            "judged responses have no margin: take `margin` out of `columns` in dataset_info.json"
        )
    if not LOSSES[config.method.pref_loss].takes_offset:
        takers = " or ".join(name for name, loss in LOSSES.items() if loss.takes_offset)
        raise DataError(
            f"pref_loss: {config.method.pref_loss} has no place for the margin of a pair: write pref_loss: "
            f"{takers}, or take `margin` out of `columns` in dataset_info.json"
        )


@dataclass(frozen=True)
class Run:
    """A run whose parts are built."""

    config: RunConfig
    folder: OutputFolder
    trainer: PrefTrainer
    policy: Policy
    reference: Reference | None
    template: ChatTemplate
    data: RunData
    weights: dict[str, str]
    console: Console
    watchdog: Watchdog

    @property
    def leads(self) -> bool:
        """Whether this process writes the files of the run."""
        return self.trainer.is_world_process_zero()

    @property
    def computes(self) -> bool:
        """Whether this process calls the model where one would do."""
        return self.leads or self.trainer.strategy.splits_weights

    @property
    def reference_name(self) -> str:
        """The reference in words."""
        return self.reference.describe() if self.reference else "none"

    def check_space(self) -> None:
        """Raises `DiskError` when what the run will write does not fit on the disk."""
        if self.trainer.args.do_train:
            num_rows = 0 if isinstance(self.data.train, StreamedRows) else len(self.data.train)
            stops_early = bool(self.config.method.early_stopping_steps)
            check_before_training(
                self.trainer.args, self.policy.model, num_rows, stops_early, self.folder, self.console.print
            )
        PartialState().wait_for_everyone()  # before the files that others have counted are removed

    def train(self) -> None:
        """Train, and save weights, tokenizer, state, results, probe and curves."""
        checkpoint = str(self.folder.checkpoint) if self.folder.checkpoint else None
        with self.trainer.signals.deferred():
            result = self.trainer.train(resume_from_checkpoint=checkpoint)
            self.trainer.check_finite()
            self.trainer.save_model()
            self.watchdog.beat()
            self.trainer.save_state()
        self.trainer.save_metrics("train", result.metrics)
        self._settle_stream()
        if self.leads and self.config.tuning.pissa_init:
            save_as_plain_lora(self.policy.model, self.folder.path)  # type: ignore[arg-type]
        if self.computes:
            self._describe()
        if not self.leads:
            return
        updates = updates_per_step(self.config)
        log = [line | {"step": line["step"] // updates} for line in self.trainer.state.log_history]
        if self.config.output.plot_loss and not plot_curves(log, self.folder.path):
            self.console.print("No curves: the log has fewer than two lines; set a smaller logging_steps.")

    def _describe(self) -> None:
        """Write by what the model is known again, and what it is."""
        folder, rows = self.folder.path, self.data.first(_PROBED)
        is_reward = self.config.method.stage == "rm"
        score_probe = make_score_probe(self.policy.model, rows, self.template) if is_reward else None
        probe = None if is_reward else make_probe(self.policy.model, self._with_answers(rows), self.template)
        if not self.leads:
            return
        if score_probe is not None:
            write_score_probe(score_probe, folder)
        if probe is not None:
            write_probe(probe, folder)
        facts = f"{loss_name(self.config)} loss on {', '.join(self.config.data.dataset)}"
        is_adapter = self.config.tuning.finetuning_type == "lora"
        base = self.config.model.model_name_or_path
        dtype = str(self.policy.base.dtype).removeprefix("torch.")
        if self._head_is_beside:
            self._put_head_beside()
        language = "CausalLM" if self.template.vision is None else "ImageTextToText"
        kind = language if not is_reward else "" if self._head_is_beside else "SequenceClassification"
        write_model_card(folder, base, facts, is_adapter, kind, dtype)

    @property
    def _head_is_beside(self) -> bool:
        """Whether the model's head is a file of its own: transformers has no class for a model with it."""
        return self.config.method.stage == "rm" and is_ours(self.policy.base)

    def _put_head_beside(self) -> None:
        """Write the head, and leave it out of the adapter, if there is one."""
        folder, base = self.folder.path, self.policy.base
        write_value_head(folder, cast("nn.Linear", base.score).weight, 0.0)
        if self.config.tuning.finetuning_type == "lora":
            leave_out_head(folder, str(base.name_or_path))

    def _with_answers(self, rows: list[TokenizedExample]) -> list[TokenizedExample]:
        """The rows as they are, or a few of them with greedy answers, where they are prompts alone."""
        if self.trainer.rollouts is None:
            return rows
        few = sorted(rows, key=lambda row: row.num_tokens)[:_ANSWERED]
        return self.trainer.rollouts.answerer.draw_greedy(self.trainer, few, _ANSWER_TOKENS).rows

    def _settle_stream(self) -> None:
        """Count the rows of a stream that were trained on, now that it is known."""
        if not isinstance(self.data.train, StreamedRows):
            return
        args = self.trainer.args
        per_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        settled = self.data.train.settle(self.trainer.state.global_step * per_step)
        self.data.ledgers[: len(settled)] = settled
        print_ledger(self.console, self.data.ledgers)

    def evaluate(self) -> None:
        """Metrics of what is held out (`do_eval`), and of each pair or judged response (`do_predict`)."""
        args = self.trainer.args
        if not (args.do_eval or args.do_predict):
            return
        if not self.data.held_out:
            raise DataError("do_eval/do_predict: every held-out row was rejected")
        if args.do_eval:
            what = {"pairs": "pairs", "prompts": "prompts"}.get(USES[self.config.method.stage], "responses")
            metrics = self._last_evaluation() or self.trainer.evaluate()
            self.trainer.save_metrics("eval", metrics)
            for name, rows in (self.data.held_out_parts or {"": self.data.held_out}).items():
                prefix = f"eval_{name}_" if name else "eval_"
                found = (
                    f"{word} {metrics[prefix + key]:.3f}"
                    for key, word in _SHOWN_METRICS.items()
                    if prefix + key in metrics
                )
                self.console.print(
                    f"Held out{name and f' ({name})'}: {', '.join(found)} ({len(rows)} {what})"
                )
        if args.do_predict:
            metrics, measured = self.trainer.predict_rows(self.data.held_out)
            self.trainer.save_metrics("predict", metrics)
            if not self.leads:
                return
            sources = [example.source for example in self.data.held_out]
            if self.config.method.stage == "rm":
                self._write_scores(sources, measured)
                return
            lines = (
                json.dumps({"source": s, **row}, ensure_ascii=False) + "\n"
                for s, row in zip(sources, measured, strict=True)
            )
            replace_text(self.folder.path / "predictions.jsonl", "".join(lines))

    def _write_scores(self, sources: list[str], measured: list[dict[str, float]]) -> None:
        """Write the scores of each held-out pair, and how well their differences tell who is right."""
        pairs = [
            ScoredPair(row["rewards/chosen"], row["rewards/rejected"], *lengths, source)
            for source, row, lengths in zip(sources, measured, self._lengths(), strict=True)
        ]
        write_scored_pairs(pairs, self.folder.path)
        write_calibration(pairs, self.folder.path)

    def _lengths(self) -> Iterator[tuple[int, int]]:
        """Tokens of chosen and rejected of each held-out pair."""
        for example in self.data.held_out:
            for pair in example.pairs:
                yield len(example.response_ids[pair.chosen]), len(example.response_ids[pair.rejected])

    def _last_evaluation(self) -> dict[str, float] | None:
        """The metrics of the evaluations that training ended with, if it did."""
        state = self.trainer.state
        last = [line for line in state.log_history if line["step"] == state.global_step]
        found = [line for line in last if evaluation_prefix(line) is not None]
        merged = {name: value for line in found for name, value in line.items() if name != "step"}
        return merged or None

    def answers(self, when: str) -> list[str]:
        """Greedy answers of the policy as it is now to `sample_prompts` held-out prompts."""
        number = self.config.output.sample_prompts
        if not number or not self.computes or self.config.method.stage == "rm":
            return []
        prompts = list(islice(self.data.held_out, number))
        self.console.print(f"Answering {len(prompts)} held-out prompts {when} training ...")
        length = self.config.output.sample_max_new_tokens
        with self.trainer.strategy.computing(self.policy.model):
            return generate_responses(self.policy.model, self.template, prompts, length, self.watchdog.beat)

    def sample(self, before: list[str]) -> None:
        """Answer the prompts again, and show both answers to each."""
        after = self.answers("after")
        number = len(after)
        rows = zip(self.data.held_out[:number], before, after, strict=True)
        samples = [Sample(row.source, row.question, old, new, row.picture_files) for row, old, new in rows]
        if samples and self.leads:
            write_samples(samples, self.folder.path)
            print_samples(self.console, samples[:_SHOWN_SAMPLES], len(samples))

    def record(self, finished: bool) -> None:
        """Write `prefkit.json`, `config.yaml` and `data_report.json`.

        The record is the first file of a run, and says that it is finished after all others are on the disk.
        """
        if not self.leads:
            return
        facts = {
            "finished": finished,
            "base_model": self.config.model.model_name_or_path,
            "adapters_below": list(self.config.merged_adapters),
            "fingerprints": self.weights,
            "stage": self.config.method.stage,
            **({"head": HEAD_FACTS} if self._head_is_beside else {}),
            "loss": loss_name(self.config),
            "finetuning_type": self.config.tuning.finetuning_type,
            "template": self.config.data.template or "the model's own",
            "enable_thinking": self.config.data.enable_thinking,
            "tool_format": self.config.data.tool_format,
            "reference": self.reference_name,
            "judge": self.trainer.rollouts.answerer.judge.name if self.trainer.rollouts else None,
            "batch_layout": self.policy.layout,
            "spread": self.trainer.strategy.name,
            "trained_on": list(self.config.data.dataset),
            "data": [ledger.to_dict() for ledger in self.data.ledgers],
            "pairs": {
                "trained": sum(ledger.pairs for ledger in self.data.ledgers),
                "held_out": sum(ledger.held_out_pairs for ledger in self.data.ledgers),
            },
        }
        if finished:
            write_data_report(self.folder.path, self.data.ledgers)
            fsync_files(self.folder.path)
        write_record(self.folder.path, self.config, facts)
        if not finished:
            write_data_report(self.folder.path, self.data.ledgers)

    def show_files(self) -> None:
        """Name the files of the run that are there."""
        if self.leads:
            verb = "score" if self.config.method.stage == "rm" else "chat"
            files = FILES | (HEAD_BESIDE if self._head_is_beside else {})
            known = {
                name: what.format(verb=verb)
                for name, what in files.items()
                if (self.folder.path / name).exists()
            }
            print_files(self.console, self.folder.path, known)


HEAD_BESIDE = {
    "adapter_model.safetensors": "the adapter; `prefkit score` reads this folder",
    VALUE_HEAD: "the head that gives the score",
    "model.safetensors": "the model; `prefkit score` reads this folder",
}
FILES = {
    "adapter_model.safetensors": "the adapter; `prefkit {verb}` and peft read this folder",
    VALUE_HEAD: "the value head of ppo, to go on training from",
    "model.safetensors": "the model; `prefkit {verb}` and transformers read this folder",
    OVERVIEW: "the course of the training at a glance",
    "training_loss.png": "loss curve",
    "training_eval_loss.png": "held-out loss curve",
    "training_reward.png": "curve of the mean score of drawn responses",
    "training_kl.png": "curve of their KL to the reference",
    "training_response_length.png": "curve of their length",
    "training_eval_reward.png": "curve of the held-out score",
    "training_rewards_accuracies.png": "reward accuracy curve",
    "training_rewards_chosen.png": "curve of the reward of chosen responses",
    "training_rewards_margins.png": "reward margin curve",
    "eval_results.json": "held-out metrics",
    "predictions.jsonl": "metrics of each held-out pair or response",
    SCORES_FILE: "scores of each held-out pair",
    CALIBRATION_FILE.replace(".json", ".png"): "calibration at a glance",
    CALIBRATION_FILE: "held-out accuracy by margin and by length, expected calibration error",
    SAMPLES_PAGE: "held-out prompts answered greedily, with their scores",
    SAMPLES_FILE: "the same at each evaluation",
    "samples.md": "held-out prompts answered before and after",
    "trainer_log.jsonl": "a line for each log step",
    SPIKE_FILE: "steps whose loss stood out, with their rows",
    "data_report.json": "what became of every row",
    "config.yaml": "the config as it ran; prefkit train takes it",
    "prefkit.json": "base model, data with hashes, versions",
}
