"""The one Trainer subclass: a stage computes, transformers does the rest."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from transformers import EvalPrediction, PreTrainedTokenizerBase, Trainer, TrainingArguments

from prefkit.config.schema import TuningConfig
from prefkit.data.dataset import RunData
from prefkit.data.packing import FILLER, Packer, rows_of_losses
from prefkit.data.view import RowView
from prefkit.files import replace_text
from prefkit.objectives.metrics import by_label, held_out_metrics, means
from prefkit.train.answered import JudgeFailed
from prefkit.train.answers import answer_and_judge, means_of, write_answers
from prefkit.train.checkpoint import PickleFreeCheckpoints
from prefkit.train.guard import NotFinite, Seen, StepGuard, check_finite, not_finite
from prefkit.train.loading import NUMBERS, WORK, Collator, Loaders, SharesLoader, rows_in_order
from prefkit.train.out_of_memory import OutOfMemory, Pieces, is_out_of_memory
from prefkit.train.rollouts import RolloutSource
from prefkit.train.signals import Interrupted, StopSignals
from prefkit.train.spikes import SPIKE_FILE, Spike
from prefkit.train.stages import Stage, StageOutput
from prefkit.train.strategy import Strategy


class PrefTrainer(PickleFreeCheckpoints, Trainer):
    """Trains a stage on packed batches.

    The loss of an optimiser step is the mean over all its examples, on every rank and in every
    micro-batch, however unequal these are.
    """

    # compute_loss divides by the examples of the whole step, so the Trainer must not divide again.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        stage: Stage,
        tuning: TuningConfig,
        packer: Packer,
        data: RunData,
        tokenizer: PreTrainedTokenizerBase,
        pieces: Pieces,
        signals: StopSignals,
        strategy: Strategy,
        rollouts: RolloutSource | None = None,
    ) -> None:
        super().__init__(
            model=model,
            args=args,
            data_collator=cast("Any", Collator(packer)),
            train_dataset=data.train if args.do_train else None,
            eval_dataset=data.held_out_parts or (data.held_out if len(data.held_out) else None),
            processing_class=tokenizer,
            compute_metrics=self._held_out_metrics,
        )
        self.strategy = strategy
        strategy.use(self.accelerator, model)
        self.stage = stage
        self.tuning = tuning
        width = cast("Any", model).config.get_text_config().hidden_size
        self.loaders = Loaders(args, packer, width, stage.joins_ranks)
        stage.gather = self.accelerator.gather
        self.signals = signals
        self.rollouts = rollouts
        if rollouts is not None:
            rollouts.trainer = self
        # The loss of ppo is a difference, whose sign may change: none stands out.
        report = self._report_spike if rollouts is None else None
        self.guard = StepGuard(stage.name, self.accelerator.gather, report)
        self.latest: dict[str, float] = {}  # metrics of the newest optimiser step, for the progress bar
        self._step_sums: dict[str, Tensor] = {}
        self._window_sums: dict[str, Tensor] = {}
        self._step_largest: dict[str, Tensor] = {}
        self._window_largest: dict[str, Tensor] = {}
        self._metric_names: list[str] = []  # of what is averaged over a step
        self._columns: list[str] = []  # of what an evaluation says of each row
        self.training_pieces = pieces
        self.evaluation_pieces = replace(pieces, learns=False)
        self._step_inputs: list[dict[str, Any]] = []

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train. Raises `OutOfMemory` also where memory runs out between the batches, and `JudgeFailed` when
        responses could not be judged, after a checkpoint was saved."""
        try:
            return super().train(*args, **kwargs)
        except JudgeFailed as error:
            if saved := self._save_between_rollouts():
                raise type(error)(
                    f"{str(error).rstrip('.')}.\n{saved} is saved: the same command goes on from there."
                ) from error
            raise
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise OutOfMemory(
                f"Step {self.state.global_step + 1}: out of memory outside of the batches, as in the update "
                f"of the weights. {self.training_pieces.advise()}"
            ) from error

    def stop_if_asked(self) -> None:
        """Between two rollouts: save a checkpoint and raise `Interrupted` when a signal came to any rank."""
        received = torch.tensor([self.signals.received], device=self.args.device)
        self.signals.agreed = int(self.accelerator.gather(received).max())
        if self.signals.agreed:
            raise Interrupted(self.signals.agreed, self._save_between_rollouts())

    def _save_between_rollouts(self) -> str:
        """Save a checkpoint unless it is there; its path, or nothing before the first rollout."""
        step = self.state.global_step
        checkpoint = Path(str(self.args.output_dir)) / f"checkpoint-{step}"
        if step and not checkpoint.is_dir():
            self._save_checkpoint(cast("nn.Module", self.model), None)
        return str(checkpoint) if step else ""

    def get_train_dataloader(self) -> Any:
        """The rows to train on, or what is drawn in rollouts, of which each is an epoch."""
        if self.rollouts is not None:
            return self.rollouts
        return self.loaders.for_training(cast("Any", self.train_dataset))

    def get_eval_dataloader(self, eval_dataset: Any = None) -> SharesLoader:
        """Held-out rows: those of the name, those given, or all."""
        known: Any = self.eval_dataset
        rows = known[eval_dataset] if isinstance(eval_dataset, str) else eval_dataset
        return self.loaders.for_held_out(known if rows is None else rows)

    def get_test_dataloader(self, test_dataset: Any) -> SharesLoader:
        """Rows of which each gets its own line."""
        return self.loaders.for_held_out(test_dataset)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The Trainer's own, or that of LoRA+, whose B learns faster than its A
        (https://arxiv.org/abs/2402.12354)."""
        if self.tuning.loraplus_lr_ratio is None or self.optimizer is not None:
            return super().create_optimizer(model)
        from peft.optimizers import create_loraplus_optimizer

        policy: Any = self.model
        optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, policy)
        self.optimizer = create_loraplus_optimizer(
            policy,
            optimizer_class,
            **options,
            loraplus_lr_ratio=self.tuning.loraplus_lr_ratio,
            loraplus_lr_embedding=self.tuning.loraplus_lr_embedding,
            loraplus_weight_decay=self.args.weight_decay,
        )
        return self.optimizer

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Add the gradients of a micro-batch, in as many pieces as memory wants; its share in the loss.

        A backward that fails has added a part of its gradients: all of the optimiser step is then done again.
        Gradients are the same but for rounding; dropout draws anew.
        """
        if (work := inputs.get(WORK)) is not None:
            sums = work.imbalances()
            _add_sums(
                self._window_sums, {name: torch.tensor(it, device=self.args.device) for name, it in sums}
            )
        self._step_inputs.append(inputs)
        todo = [inputs]

        def attempt() -> Tensor:
            return [self._add_gradients(model, batch, num_items_in_batch) for batch in todo][-1]

        def undo() -> None:
            model.zero_grad()
            self._step_sums, self._step_largest = {}, {}
            self.stage.forget_step()
            self.guard.forget()
            todo[:] = self._step_inputs

        loss = self.training_pieces.fit(attempt, undo, f"Step {self.state.global_step + 1}")
        if self.accelerator.sync_gradients:
            self._end_step()
        return loss

    def _add_gradients(
        self, model: nn.Module, batch: dict[str, Any], num_items_in_batch: Tensor | int | None
    ) -> Tensor:
        # The Trainer does so for each piece, too late for their statistics after an evaluation.
        model.train()
        cast("Any", self.optimizer).train()
        loss = torch.zeros((), device=self.args.device)
        for piece in self._pieces(self.training_pieces, model, batch):
            loss += super().training_step(model, piece, num_items_in_batch)
        return loss

    def _pieces(self, limit: Pieces, model: nn.Module, batch: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The pieces of a batch, each with the statistics of the whole if there are several."""
        pieces = limit.cut(self._prepare_inputs(batch))
        if len(pieces) > 1:
            with torch.no_grad(), self.compute_loss_context_manager():
                statistics = self.stage.statistics(model, limit.each(pieces))
            pieces = [{**piece, "statistics": statistics} for piece in pieces]
        return limit.each(pieces)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """This micro-batch's share in the mean loss of the optimiser step; of a filler it is 0."""
        output = self.stage.compute(model, inputs)
        # DDP and its kin average gradients over ranks, so each rank's sum is scaled up again.
        assert num_items_in_batch is not None
        loss = output.losses.sum() / num_items_in_batch * self.accelerator.num_processes
        if FILLER in inputs:
            loss, output = 0.0 * loss, output.of_no_rows()
        self._record(inputs, output)
        return (loss, output) if return_outputs else loss

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[None, Tensor, Tensor]:
        """Loss and metrics of each pair or judged response, (B, K), and its number among the held-out, (B,).

        Those of an incomplete batch are followed by rows numbered -1: ranks have equally many to gather.

        Raises `NotFinite`.
        """

        def attempt() -> Tensor:
            return torch.cat(
                [self._table(model, it) for it in self._pieces(self.evaluation_pieces, model, inputs)]
            )

        when = f"Evaluation at step {self.state.global_step}"
        table = self.evaluation_pieces.fit(attempt, lambda: None, when)
        number = 0 if FILLER in inputs else len(table)
        numbers = torch.full((self.args.eval_batch_size,), -1, device=table.device)
        numbers[:number] = torch.tensor(inputs[NUMBERS][:number], device=table.device)
        found = table.new_zeros(len(numbers), table.shape[1])
        found[:number] = table[:number]
        return None, found, numbers

    def _table(self, model: nn.Module, piece: dict[str, Any]) -> Tensor:
        with torch.no_grad(), self.compute_loss_context_manager():
            output = self.stage.compute(model, piece)
        values = {"loss": output.losses, **output.metrics}
        self._columns = list(values)
        table = torch.stack([value.float() for value in values.values()], 1)
        if not table.isfinite().all():
            found = "; ".join(not_finite(_seen(piece, output)))
            raise NotFinite(f"{self.stage.name}, evaluation: a number is not finite: {found}")
        return table

    def _held_out_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        columns = rows_in_order(prediction.predictions, prediction.label_ids).unbind(1)
        return held_out_metrics(dict(zip(self._columns, columns, strict=True)))

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Metrics of the held-out rows; of a policy that is trained by rollouts, those of its answers."""
        if self.rollouts is None:
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        given: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        parts: dict[str, Any] = given if isinstance(given, dict) else {"": given}
        metrics: dict[str, float] = {}
        for name, rows in parts.items():
            prefix = f"{metric_key_prefix}_{name}_" if name else f"{metric_key_prefix}_"
            answers = answer_and_judge(self, self.rollouts.answerer, rows)
            found = {f"{prefix}{key}": value for key, value in means_of(answers).items()}
            if self.is_world_process_zero():
                write_answers(answers, self.rollouts.number, Path(str(self.args.output_dir)), name)
            self.log(dict(found))
            metrics |= found
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def predict_rows(self, examples: RowView) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Means over all examples, named `predict_...`, and the values of each example, in order; of a policy
        that is trained by rollouts, of its answers."""
        if self.rollouts is not None:
            answers = answer_and_judge(self, self.rollouts.answerer, examples)
            found = {f"predict_{name}": value for name, value in means_of(answers).items()}
            return found, [asdict(answer) for answer in answers]
        output = self.predict(cast("Any", examples), metric_key_prefix="predict")
        table = rows_in_order(output.predictions, output.label_ids).tolist()
        rows = [dict(zip(self._columns, row, strict=True)) for row in table]
        return output.metrics or {}, rows

    def save_metrics(self, split: str, metrics: dict[str, float], combined: bool = True) -> None:
        """Write `SPLIT_results.json` and, `combined`, add to `all_results.json`, each as a whole: the
        Trainer's own leaves half a file when it is killed, which the next start could not read."""
        if not self.is_world_process_zero():
            return
        folder = Path(str(self.args.output_dir))
        known = {f"{split}_results.json": metrics}
        if combined:
            file = folder / "all_results.json"
            before = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
            known[file.name] = before | metrics
        for name, values in known.items():
            replace_text(folder / name, json.dumps(values, indent=4, sort_keys=True))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the means, over examples and ranks, of the metrics since the last line of the log."""
        if "loss" in logs and self._window_sums:
            found = means(self._sums_of_ranks(self._window_sums))
            logs.update({name: value for name, value in found.items() if name != "loss"})
            self._window_sums = {}
        if "loss" in logs and self._window_largest:
            names, values = zip(*self._window_largest.items(), strict=True)
            largest = self.accelerator.gather(torch.stack(values)[None]).amax(0)
            logs.update(zip(names, largest.tolist(), strict=True))
            self._window_largest = {}
        if "loss" in logs and self.rollouts is not None:
            logs.update(self.rollouts.numbers())
        super().log(logs, start_time)

    def extra_state(self) -> dict[str, Any]:
        """The stage's state, the losses that others are compared with, and into how many pieces batches are
        cut."""
        return {
            "stage": self.stage.state(),
            "losses": self.guard.state(),
            "pieces": [self.training_pieces.number, self.evaluation_pieces.number],
            **({} if self.rollouts is None else {"rollouts": self.rollouts.state()}),
        }

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Take back what `extra_state` gave."""
        self.stage.load_state(state["stage"])
        self.guard.load_state(state["losses"])
        self.training_pieces.number, self.evaluation_pieces.number = state["pieces"]
        if self.rollouts is not None:
            self.rollouts.load_state(state["rollouts"])

    def own_state(self) -> dict[str, Any]:
        """What the next line of the log will average."""
        parts = {"window": self._window_sums, "largest": self._window_largest}
        return {part: {name: value.tolist() for name, value in its.items()} for part, its in parts.items()}

    def load_own_state(self, state: dict[str, Any]) -> None:
        """Take back what `own_state` gave."""
        self._window_sums, self._window_largest = (
            {name: torch.tensor(value, device=self.args.device) for name, value in state[part].items()}
            for part in ("window", "largest")
        )

    def load_own_states(self, states: list[dict[str, Any]]) -> None:
        """Take back the sums of other processes: the first process has them all."""
        merged: dict[str, dict[str, Any]] = {"window": {}, "largest": {}}
        for state in states:
            for name, value in state["window"].items():
                before = merged["window"].get(name, [0.0, 0.0])
                merged["window"][name] = [a + b for a, b in zip(before, value, strict=True)]
            for name, value in state["largest"].items():
                merged["largest"][name] = max(value, merged["largest"].get(name, value))
        if not self.is_world_process_zero():
            merged["window"] = {name: [0.0, 0.0] for name in merged["window"]}
        self.load_own_state(merged)

    def _record(self, inputs: dict[str, Any], output: StageOutput) -> None:
        """Add metrics to the sums and counts of the step."""
        self.guard.see(_seen(inputs, output))
        metrics = by_label({"loss": output.losses.detach(), **output.metrics})
        self._metric_names = list(metrics)
        _add(self._step_sums, metrics | output.reference)
        _keep_largest(self._step_largest, output.largest)

    def _end_step(self) -> None:
        """All gradients of an optimiser step are there: its metrics join those of the log window."""
        numbers = torch.stack(list(self._step_sums.values())).tolist()
        self._step_numbers = dict(zip(self._step_sums, numbers, strict=True))
        self.latest = means(self._step_numbers)
        _add_sums(self._window_sums, {name: self._step_sums[name] for name in self._metric_names})
        _keep_largest(self._window_largest, self._step_largest)
        self._step_sums, self._step_largest = {}, {}
        self._step_inputs = []
        self.stage.end_step()
        if self.rollouts is not None:
            self.rollouts.end_update()
            self.latest |= self.rollouts.latest

    def _sums_of_ranks(self, sums: dict[str, Tensor]) -> dict[str, tuple[float, float]]:
        """(sum, count) by name, of all ranks."""
        totals = self.accelerator.reduce(torch.stack(list(sums.values())), "sum")
        return dict(zip(sums, map(tuple, totals.tolist()), strict=True))

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> Tensor:
        """Pairs, or judged responses, in the whole optimiser step: all its micro-batches, on all ranks."""
        count = torch.tensor(sum(len(rows_of_losses(batch)) for batch in batch_samples), device=device)
        total: Tensor = self.accelerator.reduce(count, "sum")
        return total

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        """Count the tokens that are read, those of fillers not; a shared row has no padding."""
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        number = 0 if FILLER in inputs else len(ids)
        mask = torch.ones_like(ids) if mask is None else mask
        super()._track_num_input_tokens({"input_ids": ids[:number], "attention_mask": mask[:number]})

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Move a batch to the device; dtypes stay, which the Trainer's own does not promise."""
        config: Any = self.args.accelerator_config
        moved: dict[str, Any] = send_to_device(inputs, self.args.device, non_blocking=config.non_blocking)
        return moved

    def _get_grad_norm(self, model: nn.Module, grad_norm: float | None = None) -> float | Tensor:
        """The gradient norm. The Trainer's last call before each update: here the guard has its say.

        Raises `NotFinite`.
        """
        norm: float | Tensor = super()._get_grad_norm(model, grad_norm=grad_norm)
        step = self.guard.end_step(
            self.state.global_step + 1,
            self._step_numbers,
            float(norm),
            model,
            signal=self.signals.received,
            scaled=self.accelerator.scaler is not None or self.args.fp16,
        )
        self.signals.agreed = step.signal
        return norm

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save, unless a weight or a moment of the optimiser is not finite. Raises `NotFinite`."""
        self.check_finite()
        super()._save_checkpoint(model, trial)

    def check_finite(self) -> None:
        """Raises `NotFinite` when a trained weight or a tensor of the optimiser is not finite."""
        what = f"{self.stage.name}, step {self.state.global_step}"
        model, own_part = cast("nn.Module", self.model), self.strategy.own_part
        trained: dict[Any, str] = {p: name for name, p in model.named_parameters() if p.requires_grad}
        states = self.optimizer.state.items() if self.optimizer else ()
        tensors = [(name, own_part(p)) for p, name in trained.items()]
        tensors += [
            (f"{key} of {trained.get(parameter, 'a weight')}", own_part(value))
            for parameter, state in states
            for key, value in state.items()
            if isinstance(value, Tensor)
        ]
        check_finite(what, tensors, lambda flag: self.accelerator.gather(flag.to(self.args.device)))

    def _report_spike(self, spike: Spike) -> None:
        if self.is_world_process_zero():
            self.training_pieces.say(str(spike))
            with (Path(str(self.args.output_dir)) / SPIKE_FILE).open("a", encoding="utf-8") as file:
                file.write(spike.to_json())


def _seen(inputs: dict[str, Any], output: StageOutput) -> Seen:
    """The numbers of a micro-batch: log-probs, then what is computed from them."""
    logps = {name: value for name, value in output.metrics.items() if name.startswith("logps/")}
    return Seen(inputs, {**output.reference, **logps, **output.metrics, "loss": output.losses.detach()})


def _add(sums: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    """Add (sum, count) of each vector to `sums`."""
    pairs = {
        name: torch.stack([vector.sum(), vector.new_tensor(len(vector))]) for name, vector in values.items()
    }
    _add_sums(sums, pairs)


def _keep_largest(known: dict[str, Tensor], more: dict[str, Tensor]) -> None:
    """Put the larger of two numbers of a name into `known`."""
    for name, value in more.items():
        known[name] = torch.maximum(known[name], value) if name in known else value


def _add_sums(sums: dict[str, Tensor], more: dict[str, Tensor]) -> None:
    """Add to each sum the one of its name."""
    for name, value in more.items():
        sums[name] = sums[name] + value if name in sums else value
