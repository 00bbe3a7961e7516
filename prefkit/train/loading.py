"""What the Trainer's loops read: rows by their shares, packed into batches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info
from transformers.trainer_utils import seed_worker

from prefkit.data.encode import TokenizedExample
from prefkit.data.lengths import lengths_of_rows
from prefkit.data.packing import FILLER, Layout, Packer
from prefkit.data.streaming import StreamedRows
from prefkit.data.view import RowView
from prefkit.train.dealing import Dealer, DealtBatches, Share, costs_of
from prefkit.train.signals import ignore_in_worker

if TYPE_CHECKING:
    from transformers import TrainingArguments

# What a batch has besides: of each example its number among the rows, and of the first batch of a step the
# `Work` of the step, where several ranks share it.
NUMBERS, WORK = "numbers", "work"


@dataclass(frozen=True)
class Shared:
    """The rows of a share."""

    rows: list[TokenizedExample]
    share: Share


class SharedRows(Dataset[TokenizedExample]):
    """Rows that a loader asks for by the share."""

    def __init__(self, rows: RowView) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, share: Share) -> Shared:
        """The rows of a share."""
        return Shared([self.rows[number] for number in share.rows], share)


class SharedStream(IterableDataset[Shared]):
    """The shares of a stream, which each rank reads as a whole, and so does each data worker."""

    def __init__(self, rows: StreamedRows, dealer: Dealer, layout: Layout, width: int) -> None:
        self.rows, self.dealer = rows, dealer
        self.layout, self.width = layout, width

    def __iter__(self) -> Iterator[Shared]:
        worker = get_worker_info()
        first, every = (0, 1) if worker is None else (worker.id, worker.num_workers)
        return islice(self._shares(), first, None, every)

    def _shares(self) -> Iterator[Shared]:
        rows = iter(self.rows)
        while step := list(islice(rows, self.dealer.rows_per_step)):
            costs = costs_of(lengths_of_rows(step), self.layout, self.width)
            for share in self.dealer.shares(costs.tolist()):
                yield Shared([step[place] for place in share.rows], share)


class Collator:
    """Packs the rows of a share into a batch in the form that the Trainer takes."""

    def __init__(self, packer: Packer) -> None:
        self.packer = packer
        self._is_ready_worker = False

    def __call__(self, shared: Shared) -> dict[str, Any]:
        """A packed batch."""
        if not self._is_ready_worker and get_worker_info() is not None:
            ignore_in_worker()
            self._is_ready_worker = True
        share = shared.share
        batch = {**self.packer(shared.rows), NUMBERS: tuple(share.rows)}
        if share.work is not None:
            batch[WORK] = share.work
        return batch if share.learns else {**batch, FILLER: True}


class SharesLoader(DataLoader[Any]):
    """A loader that tells its batch sampler which epoch is next."""

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch is next; the Trainer does, also after a resume."""
        sampler: Any = self.batch_sampler
        if sampler is not None:
            sampler.set_epoch(epoch)


def rows_in_order(tables: Any, numbers: Any) -> Tensor:
    """Tables (n, K) of what all ranks say of held-out rows with their numbers (n,): each row once, in order.
    A number below 0 marks what is of no row."""
    of_rows = torch.as_tensor(numbers)
    return torch.as_tensor(tables)[of_rows.argsort()[(of_rows < 0).sum() :]]


@dataclass(frozen=True)
class Loaders:
    """Makes the loaders of a run. `width` is the hidden size of its model; `joins_ranks` says that its loss
    takes something from all rows of a micro-step."""

    args: TrainingArguments
    packer: Packer
    width: int
    joins_ranks: bool

    def for_training(self, rows: RowView | StreamedRows) -> SharesLoader:
        """This rank's micro-batches of an epoch, or of a stream."""
        args = self.args
        accumulation = args.gradient_accumulation_steps
        dealer = self._dealer(args.train_batch_size)
        dealer = replace(dealer, accumulation=accumulation, together=1 if self.joins_ranks else accumulation)
        options = self._options(args.dataloader_persistent_workers) | {
            "worker_init_fn": partial(
                seed_worker, num_workers=args.dataloader_num_workers, rank=args.process_index
            )
        }
        if isinstance(rows, StreamedRows):
            stream = SharedStream(rows, dealer, self.packer.layout, self.width)
            return SharesLoader(stream, batch_size=None, **options)
        seed = args.seed if args.data_seed is None else args.data_seed
        is_shuffled = args.train_sampling_strategy != "sequential"
        return self._of_rows(rows, dealer, seed if is_shuffled else None, options, args.dataloader_drop_last)

    def for_held_out(self, rows: RowView) -> SharesLoader:
        """This rank's batches of held-out rows, each row on one rank once."""
        return self._of_rows(rows, self._dealer(self.args.eval_batch_size), None, self._options(False))

    def _dealer(self, size: int) -> Dealer:
        return Dealer(self.args.world_size, self.args.process_index, size)

    def _of_rows(
        self,
        rows: RowView,
        dealer: Dealer,
        seed: int | None,
        options: dict[str, Any],
        drop_last: bool = False,
    ) -> SharesLoader:
        costs = costs_of(rows.lengths(), self.packer.layout, self.width)
        batches: Any = DealtBatches(dealer, costs, seed, drop_last)
        return SharesLoader(SharedRows(rows), batch_sampler=batches, **options)

    def _options(self, keeps_workers: bool) -> dict[str, Any]:
        args = self.args
        return {
            "collate_fn": Collator(self.packer),
            "num_workers": args.dataloader_num_workers,
            "pin_memory": args.dataloader_pin_memory,
            "persistent_workers": keeps_workers,
            "multiprocessing_context": args.dataloader_multiprocessing_context,
            "prefetch_factor": args.dataloader_prefetch_factor,
            "in_order": args.dataloader_in_order,
        }
