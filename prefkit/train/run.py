"""A run from its config to its files: check, read, build, train, evaluate, record."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from rich.console import Console
from rich.progress import track
from transformers import PrinterCallback, set_seed

from prefkit.config.schema import RunConfig
from prefkit.data.dataset import Pairs, load_pairs
from prefkit.data.packing import Layout
from prefkit.data.sources import DataError
from prefkit.data.template import ChatTemplate
from prefkit.model.adapter import add_lora, base_of
from prefkit.model.architecture import read_architecture
from prefkit.model.attention import use_shared_prompts
from prefkit.model.generate import generate_responses
from prefkit.model.load import load_causal_lm, load_tokenizer
from prefkit.model.policy import attach_logps_forward
from prefkit.model.reference import AdapterOff
from prefkit.objectives.pairwise import LOSSES
from prefkit.runs.plots import plot_curves
from prefkit.runs.record import write_model_card, write_record
from prefkit.runs.report import print_files, print_ledger
from prefkit.runs.samples import Sample, print_samples, write_samples
from prefkit.train.arguments import make_training_arguments
from prefkit.train.callbacks import LogFile, ProgressBar
from prefkit.train.output import OutputFolder, open_output_folder
from prefkit.train.stages import DpoStage
from prefkit.train.trainer import PrefTrainer

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import TrainingArguments

_SHOWN_SAMPLES = 3


def train(config: RunConfig, console: Console) -> None:
    """Run a config. Raises `UserError` for whatever its owner can mend."""
    args = make_training_arguments(config)
    console.quiet = args.process_index > 0
    with args.main_process_first(local=False):
        folder = open_output_folder(config, console.print)
    PartialState().wait_for_everyone()  # before any rank writes to the folder that others look at
    if folder.finished:
        console.print(
            f"The run in {folder.path} is finished; overwrite_output_dir: true would start it afresh."
        )
        return
    set_seed(args.seed)
    tokenizer = load_tokenizer(config.model)
    template = ChatTemplate(
        tokenizer,
        config.data.template,
        default_system=config.data.default_system,
        enable_thinking=config.data.enable_thinking,
        preserve_thinking=config.data.preserve_thinking,
    )
    template.install()
    pairs = load_pairs(config.data, template, args.seed, _tracker(console))
    print_ledger(console, pairs.ledgers, len(pairs.train), len(pairs.held_out))
    model, layout = _build_model(config, args, console)
    trainer = _build_trainer(config, args, model, layout, pairs, template, folder, console)
    run = Run(config, folder, trainer, model, template, pairs, console)
    if run.leads:
        folder.clear()
    run.record(layout, finished=False)
    run.train()
    run.evaluate()
    run.sample()
    run.record(layout, finished=True)
    run.show_files()


def _tracker(console: Console) -> Any:
    def tracked(items: Sequence[Any], title: str) -> Any:
        return track(items, title, console=console, transient=True, disable=not console.is_terminal)

    return tracked


def _build_model(config: RunConfig, args: TrainingArguments, console: Console) -> tuple[PeftModel, Layout]:
    """The policy, ready for packed batches, and the layout that it takes."""
    base = load_causal_lm(config.model)
    architecture = read_architecture(base.config)
    layout = architecture.choose_layout(config.model.batch_layout)
    if layout == "shared":
        use_shared_prompts(base)
    why = architecture.sharing_obstacle or "as batch_layout says"
    told = "a prompt is computed once for its responses" if layout == "shared" else f"not shared: {why}"
    console.print(f"Batches: {layout} layout ({told}).")
    if architecture.logits is None:
        console.print(f"The head of {architecture.name} is not known: all logits are held in memory.")
    policy = add_lora(base, config.adapter)
    attach_logps_forward(base, architecture)
    trainable = sum(weights.numel() for weights in policy.parameters() if weights.requires_grad)
    total = sum(weights.numel() for weights in policy.parameters())
    console.print(
        f"Training {trainable:,} of {total:,} weights ({', '.join(sorted(_dtypes(policy)))}; "
        f"forward in {_compute_dtype(policy, args)}).".replace("torch.", ""),
    )
    return policy, layout


def _dtypes(model: torch.nn.Module) -> set[str]:
    return {
        f"{'trained' if weights.requires_grad else 'frozen'} in {weights.dtype}"
        for weights in model.parameters()
    }


def _compute_dtype(model: PeftModel, args: TrainingArguments) -> torch.dtype:
    """The dtype of the forward: that of mixed precision, else of the base weights."""
    if args.bf16 or args.fp16:
        return torch.bfloat16 if args.bf16 else torch.float16
    return base_of(model).dtype


def _build_trainer(
    config: RunConfig,
    args: TrainingArguments,
    model: PeftModel,
    layout: Layout,
    pairs: Pairs,
    template: ChatTemplate,
    folder: OutputFolder,
    console: Console,
) -> PrefTrainer:
    reference = AdapterOff(model) if LOSSES[config.method.pref_loss].needs_reference else None
    told = reference.describe() if reference else f"none: {config.method.pref_loss} does not use one"
    console.print(f"Reference: {told}.")
    stage = DpoStage(config.method, reference, _compute_dtype(model, args))
    starts_here = folder.checkpoint is None
    stage.expects_identity = reference is not None and reference.is_initial_policy and starts_here
    bar = ProgressBar(console)
    trainer = PrefTrainer(model, args, stage, layout, pairs.train, pairs.held_out, template.tokenizer)
    bar.trainer = trainer
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(LogFile())
    trainer.add_callback(bar)
    return trainer


@dataclass(frozen=True)
class Run:
    """A run whose parts are built."""

    config: RunConfig
    folder: OutputFolder
    trainer: PrefTrainer
    model: PeftModel
    template: ChatTemplate
    pairs: Pairs
    console: Console

    @property
    def leads(self) -> bool:
        return self.trainer.is_world_process_zero()

    def train(self) -> None:
        """Train, and save adapter, tokenizer, state, results and curves."""
        result = self.trainer.train(
            resume_from_checkpoint=str(self.folder.checkpoint) if self.folder.checkpoint else None
        )
        self.trainer.save_model()
        self.trainer.save_state()
        self.trainer.save_metrics("train", result.metrics)
        if not self.leads:
            return
        facts = f"{self.config.method.pref_loss} loss on {', '.join(self.config.data.dataset)}"
        write_model_card(self.folder.path, self.config.model.model_name_or_path, facts)
        log = self.trainer.state.log_history
        if self.config.output.plot_loss and not plot_curves(log, self.folder.path):
            self.console.print("No curves: the log has fewer than two lines; set a smaller logging_steps.")

    def evaluate(self) -> None:
        """Metrics of the held-out pairs (`do_eval`), and of each of them (`do_predict`)."""
        args = self.trainer.args
        if not (args.do_eval or args.do_predict):
            return
        if not self.pairs.held_out:
            raise DataError("do_eval/do_predict: every held-out row was rejected")
        if args.do_eval:
            metrics = self._last_evaluation() or self.trainer.evaluate()
            self.trainer.save_metrics("eval", metrics)
            accuracy, margin = metrics["eval_rewards/accuracies"], metrics["eval_rewards/margins"]
            self.console.print(
                f"Held out: reward accuracy {accuracy:.3f}, margin {margin:.3f} "
                f"({len(self.pairs.held_out)} pairs)",
            )
        if args.do_predict:
            metrics, rows = self.trainer.predict_pairs(self.pairs.held_out)
            self.trainer.save_metrics("predict", metrics)
            sources = (example.source for example in self.pairs.held_out)
            lines = (json.dumps({"source": s, **row}) + "\n" for s, row in zip(sources, rows, strict=True))
            if self.leads:
                (self.folder.path / "predictions.jsonl").write_text("".join(lines), encoding="utf-8")

    def _last_evaluation(self) -> dict[str, float] | None:
        """The metrics of an evaluation that training ended with, if it did."""
        state = self.trainer.state
        last = next((line for line in reversed(state.log_history) if "eval_loss" in line), None)
        if last is None or last["step"] != state.global_step:
            return None
        return {name: value for name, value in last.items() if name != "step"}

    def sample(self) -> None:
        """Answers of reference and tuned model to `sample_prompts` held-out prompts."""
        number = self.config.output.sample_prompts
        if not number or not self.leads:
            return
        self.console.print(f"Answering {min(number, len(self.pairs.held_out))} held-out prompts ...")
        examples = self.pairs.held_out[:number]
        prompts = [example.prompt_ids for example in examples]
        length = self.config.output.sample_max_new_tokens
        with self.model.disable_adapter():
            before = generate_responses(self.model, self.template, prompts, length)
        after = generate_responses(self.model, self.template, prompts, length)
        sources = [example.source for example in examples]
        rows = zip(sources, self.pairs.held_out_questions[:number], before, after, strict=True)
        samples = [Sample(*row) for row in rows]
        write_samples(samples, self.folder.path)
        print_samples(self.console, samples[:_SHOWN_SAMPLES], len(samples))

    def record(self, layout: Layout, finished: bool) -> None:
        """Write `config.yaml` and `prefkit.json`."""
        if not self.leads:
            return
        facts = {
            "finished": finished,
            "base_model": self.config.model.model_name_or_path,
            "stage": self.config.method.stage,
            "loss": self.config.method.pref_loss,
            "template": self.config.data.template or "the model's own",
            "enable_thinking": self.config.data.enable_thinking,
            "batch_layout": layout,
            "data": [ledger.to_dict() for ledger in self.pairs.ledgers],
            "pairs": {"trained": len(self.pairs.train), "held_out": len(self.pairs.held_out)},
        }
        write_record(self.folder.path, self.config, facts)

    def show_files(self) -> None:
        """Name the files of the run that are there."""
        if self.leads:
            known = {name: what for name, what in FILES.items() if (self.folder.path / name).exists()}
            print_files(self.console, self.folder.path, known)


FILES = {
    "adapter_model.safetensors": "the adapter; peft.PeftModel.from_pretrained reads this folder",
    "training_curves.png": "loss, reward accuracy and margin at a glance",
    "training_loss.png": "loss curve",
    "training_eval_loss.png": "held-out loss curve",
    "training_rewards_accuracies.png": "reward accuracy curve",
    "training_rewards_margins.png": "reward margin curve",
    "eval_results.json": "held-out metrics",
    "predictions.jsonl": "metrics of each held-out pair",
    "samples.md": "held-out prompts answered before and after",
    "trainer_log.jsonl": "a line for each log step",
    "config.yaml": "the config as it ran; prefkit train takes it",
    "prefkit.json": "base model, data with hashes, versions",
}
