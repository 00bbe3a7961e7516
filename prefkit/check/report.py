"""The findings of `prefkit check` for the terminal, as wide as it is."""

from __future__ import annotations

import json
from typing import IO

from rich.console import Console
from rich.table import Table
from rich.text import Text

from prefkit.check.advice import Advice
from prefkit.check.data import DataSummary, Images, Lengths
from prefkit.check.outlook import Outlook
from prefkit.check.run import Memory, Report
from prefkit.check.settings import show_value
from prefkit.check.tokens import Part
from prefkit.runs.report import count_of, print_ledger

_BLOCKS = " ▁▂▃▄▅▆▇█"
_COLOURS = {
    "prompt": "dim", "chosen": "green", "desirable": "green", "rejected": "red", "undesirable": "red",
    "ranked": "cyan", "response": "cyan",
}  # fmt: skip
_PARTS = {
    "weights": "weights of the model",
    "adapter": "adapter",
    "reference": "reference beside the policy",
    "optimiser": "optimiser state",
    "gradients": "gradients at the peak",
    "activations": "activations and temporaries",
    "logits": "logits",
    "process": "libraries beyond their imports",
    "kept": "freed, kept by the C library",
}


def print_report(console: Console, report: Report) -> None:
    """All sections, one after the other."""
    _print_settings(console, report)
    _heading(console, "Data")
    print_ledger(console, report.ledgers)
    if report.outlook.is_stream:
        console.print(f"The first {report.outlook.rows:,} rows of the stream were looked at.")
    for summary in report.summaries:
        _print_summary(console, summary)
    _print_duplicates(console, report)
    _print_images(console, report.images)
    for number, (source, parts) in enumerate(report.examples, 1):
        _heading(console, f"Example {number} of {len(report.examples)}: {source}")
        _print_example(console, parts)
    _print_outlook(console, report)
    _print_memory(console, report.memory)


def write_json(report: Report, file: IO[str]) -> None:
    """The findings as one JSON object."""
    json.dump(report.to_dict(), file, indent=2, ensure_ascii=False, default=str)
    file.write("\n")


def _heading(console: Console, text: str) -> None:
    console.print()
    console.print(Text(text, style="bold", overflow="fold"), soft_wrap=False)


def _warn(console: Console, text: str) -> None:
    console.print(Text(f"  warning: {text}", style="yellow"), soft_wrap=False)


def _print_settings(console: Console, report: Report) -> None:
    console.print(Text("Config as understood", style="bold"))
    table = Table.grid(padding=(0, 2))
    table.add_column(overflow="fold", max_width=30)
    table.add_column(ratio=1, overflow="fold")
    for setting in report.settings:
        table.add_row(Text(setting.key, style="dim" if setting.is_default else "bold"), Text.assemble(
            (show_value(setting.value), "dim" if setting.is_default else "cyan"),
            (" (default)" if setting.is_default else "", "dim"),
            "\n",
            (setting.meaning, "dim"),
        ))  # fmt: skip
    console.print(table, soft_wrap=False)
    for text in report.warnings:
        _warn(console, text)


def _print_summary(console: Console, summary: DataSummary) -> None:
    _heading(console, f"Lengths of {summary.name}, in tokens")
    if not summary.examples:
        console.print("  no examples")
        return
    table = Table.grid(padding=(0, 1))
    table.add_column()
    table.add_column()
    for _ in range(4):
        table.add_column(justify="right")
    ends_at_cutoff = summary.limit == summary.cutoff_len
    end = f"{'cutoff_len ' if ends_at_cutoff else ''}{summary.limit:,}"
    table.add_row("", f"0{end:>40}", "median", "mean", "95 %", "max")
    for kind, lengths in summary.lengths.items():
        bars = Text(histogram(lengths), style=_COLOURS.get(kind, "blue"))
        if ends_at_cutoff:
            bars.append("│", style="yellow")
        numbers = (lengths.median, lengths.mean, lengths.p95, lengths.largest)
        table.add_row(kind, bars, *(f"{number:,.0f}" for number in numbers))
    console.print(table, soft_wrap=False)
    share = summary.truncated / summary.examples
    console.print(
        f"  {summary.truncated:,} of {summary.examples:,} examples truncated ({share:.1%}), cutoff_len "
        f"{summary.cutoff_len:,}.",
        soft_wrap=False,
    )
    _print_bias(console, summary)
    _print_balance(console, summary)


def histogram(lengths: Lengths) -> str:
    """A line of blocks, the highest bin full; no bin with something in it is blank.

    >>> histogram(Lengths(1, 1, 1, 1, 4, (0, 1, 100, 50)))
    ' ▁█▄'
    """
    highest = max(lengths.histogram)
    top = len(_BLOCKS) - 1
    return "".join(_BLOCKS[max(count * top // highest, 1) if count else 0] for count in lengths.histogram)


def _print_bias(console: Console, summary: DataSummary) -> None:
    bias = summary.bias
    if bias is None:
        return
    console.print(
        f"  Chosen is longer in {bias.longer:.0%} of {bias.pairs:,} pairs, by {bias.difference:+,.1f} tokens "
        "on average (ties count half).",
        soft_wrap=False,
    )
    if bias.is_strong:
        which = "longer" if bias.longer > 0.5 else "shorter"
        _warn(
            console,
            f"chosen is mostly the {which} one, and the model will learn that as well. ld_alpha: 0.5 weighs "
            "tokens beyond the shorter response less; pref_loss: simpo and ipo compare means per token.",
        )


def _print_balance(console: Console, summary: DataSummary) -> None:
    balance = summary.balance
    if balance is None:
        return
    desirable, undesirable = balance.weights
    console.print(f"  {balance.desirable:,} desirable and {balance.undesirable:,} undesirable responses.")
    if not (balance.desirable and balance.undesirable):
        _warn(console, "all responses are of one class: KTO needs both.")
    elif (desirable, undesirable) == (1.0, 1.0):
        console.print("  Balanced: kto_chosen_weight and kto_rejected_weight can stay 1.")
    else:
        console.print(
            f"  Balanced by kto_chosen_weight: {desirable:g} and kto_rejected_weight: {undesirable:g}.",
            soft_wrap=False,
        )


def _print_duplicates(console: Console, report: Report) -> None:
    found = report.duplicates
    console.print()
    console.print(
        f"Duplicates: {found.prompts:,} rows repeat a prompt, {found.rows:,} of them the whole row; "
        f"{found.leaked:,} held-out prompts are trained on.",
        soft_wrap=False,
    )
    if found.leaked:
        _warn(console, "evaluation on prompts that were trained on looks better than it is.")
    if found.rows:
        _warn(console, "a row that is there twice counts twice.")


def _print_images(console: Console, images: Images | None) -> None:
    if images is None:
        return
    kinds = [count_of(number, kind) for number, kind in ((images.images, "image"), (images.videos, "video"))]
    number = " and ".join(kind for kind in kinds if not kind.startswith("0 "))
    console.print(
        f"To be seen: {number} in {count_of(images.rows, 'row')}, counted as {images.mean:,.0f} tokens "
        "each on average.",
        soft_wrap=False,
    )


def _print_example(console: Console, parts: list[Part]) -> None:
    for part in parts:
        scored = "not scored" if part.kind == "prompt" else "scored"
        console.print(Text(f"{part.kind}, {part.num_tokens:,} tokens, {scored}", style="italic"))
        console.print(token_text(part), soft_wrap=False)


def token_text(part: Part) -> Text:
    """The tokens with bars between them; control tokens stand out."""
    colour = _COLOURS.get(part.kind, "cyan")
    text = Text(overflow="fold")
    for index, token in enumerate(part.texts):
        if index == part.split and part.omitted:
            text.append(f" ... {part.omitted:,} more ... ", style="italic yellow")
        elif index:
            text.append("|", style="bright_black")
        is_control = index in part.control
        text.append(token, style=f"{colour} reverse" if is_control else colour)
    return text


def _print_outlook(console: Console, report: Report) -> None:
    ahead = report.outlook
    _heading(console, "Training to come")
    trained, total = report.num_weights
    reference = f"{ahead.reference_passes:,} forward passes of the reference"
    reference += ", kept in the cache" if ahead.reference_from_cache else ""
    lines = [
        f"{trained:,} of {total:,} weights are trained; batches in the {report.layout} layout",
        *_rows_to_come(ahead),
        f"{ahead.tokens_per_epoch:,} tokens {'in these rows' if ahead.is_stream else 'an epoch'}"
        + (", a prompt counted once" if report.layout == "shared" else ", padding left out"),
        f"{ahead.policy_passes:,} forward and backward passes of the policy",
        reference,
    ]
    first = report.first_loss
    value = f"{first.value:.4f}" if first.value is not None else "not known beforehand"
    lines.append(f"first loss: {value} ({first.why})")
    for line in lines:
        console.print(f"  {line}", soft_wrap=False)


def _rows_to_come(ahead: Outlook) -> list[str]:
    if ahead.is_stream:
        return [f"a stream without end, {ahead.batch:,} rows to an update: {ahead.updates:,} updates in all"]
    if (one := ahead.rollouts) is not None:
        return [
            f"{ahead.rows:,} prompts, {one.prompts:,} to a rollout: {one.per_pass:,} rollouts an epoch",
            f"{one.number:,} rollouts in all (a step each), {ahead.epochs:g} epochs",
            f"in each, {one.responses:,} responses are drawn, {one.most_tokens:,} tokens at most, and learnt "
            f"from in {count_of(one.updates, 'update')}",
        ]
    return [
        f"{ahead.rows:,} rows, {ahead.batch:,} to an update: {ahead.updates_per_epoch:,} updates an epoch",
        f"{ahead.updates:,} updates in all, {ahead.epochs:g} epochs",
    ]


def _print_memory(console: Console, memory: Memory) -> None:
    estimate = memory.estimate
    _heading(console, f"Peak memory, estimated, on {memory.device}")
    table = Table.grid(padding=(0, 1))
    table.add_column()
    table.add_column(justify="right")
    table.add_column()
    largest = max(estimate.parts.values())
    for part, size in estimate.parts.items():
        if size:
            table.add_row(f"  {_PARTS[part]}", show_bytes(size), "█" * max(round(30 * size / largest), 1))
    table.add_row(Text("  total", style="bold"), Text(show_bytes(estimate.total), style="bold"), "")
    console.print(table, soft_wrap=False)
    console.print(
        f"  for the largest micro-batch: {memory.batch_rows:,} examples, {memory.batch_tokens:,} tokens; "
        "the libraries' own imports come on top.",
        soft_wrap=False,
    )
    if memory.leaves_out:
        console.print(f"  Not in it: {memory.leaves_out}.", soft_wrap=False)
    if memory.budget is None:
        return
    if memory.fits:
        console.print(Text(f"  Fits into {show_bytes(memory.budget)}.", style="green"))
    else:
        console.print(Text(f"  Does not fit into {show_bytes(memory.budget)}.", style="bold red"))
        _print_advice(console, memory.advice)


def _print_advice(console: Console, advice: Advice | None) -> None:
    if advice is None:
        console.print("  No change of the config that is known here makes it fit: take a smaller model.")
        return
    console.print(f"  The cheapest change that fits, with {show_bytes(advice.total)}:")
    for key, value in advice.keys.items():
        console.print(Text(f"    {key}: {show_value(value)}", style="cyan"))
    console.print(f"  ({advice.cost})", soft_wrap=False)


def show_bytes(size: float) -> str:
    """Bytes in a unit that gives three figures or so.

    >>> show_bytes(1_234_000_000), show_bytes(56_700_000)
    ('1.23 GB', '57 MB')
    """
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:,.0f} MB"
