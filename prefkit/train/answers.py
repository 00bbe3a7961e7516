"""How good greedy answers to held-out prompts are: the evaluation of PPO."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate.utils import gather_object

from prefkit.data.encode import TokenizedExample
from prefkit.files import naming, replace_text
from prefkit.train.answering import Answerer

if TYPE_CHECKING:
    from prefkit.train.trainer import PrefTrainer

SAMPLES_FILE, SAMPLES_PAGE = "eval_samples.jsonl", "eval_samples.md"
_SHOWN = 20


@dataclass(frozen=True)
class JudgedAnswer:
    """A greedy answer to the prompt `source`: score, summed log-ratio to the reference, tokens."""

    source: str
    prompt: str
    answer: str
    score: float
    kl: float
    tokens: int
    ended: bool


def answer_and_judge(
    trainer: PrefTrainer, answerer: Answerer, rows: Sequence[TokenizedExample]
) -> list[JudgedAnswer]:
    """An answer to each of the rows, in order; the ranks share the work. Raises `JudgeFailed`."""
    args = trainer.args
    size, rank, world = args.per_device_eval_batch_size, args.process_index, args.world_size
    # Every rank makes the same number of batches, the last of them perhaps once more.
    rounds = -(-len(rows) // (size * world))
    own: list[tuple[int, JudgedAnswer]] = []
    for number in range(rounds):
        first = (number * world + rank) * size
        places = [min(place, len(rows) - 1) for place in range(first, first + size)]
        places = list(dict.fromkeys(places))
        own += zip(places, _answer(trainer, answerer, [rows[place] for place in places]), strict=True)
    found = dict(gather_object(own)) if world > 1 else dict(own)
    return [found[place] for place in sorted(found)]


def _answer(
    trainer: PrefTrainer, answerer: Answerer, rows: Sequence[TokenizedExample]
) -> Iterator[JudgedAnswer]:
    drawn = answerer.draw_greedy(trainer, rows)
    scores = answerer.score(trainer, drawn)
    batch = answerer.policy.packer(drawn.rows)
    kls = answerer.measure(trainer, batch).kls.tolist()
    for row, (score,), kl, (end,) in zip(drawn.rows, scores, kls, drawn.ended, strict=True):
        ids = row.response_ids[0]
        text = answerer.text_of(ids).strip()
        yield JudgedAnswer(row.source, row.question, text, score, kl, len(ids), end)


def means_of(answers: Sequence[JudgedAnswer]) -> dict[str, float]:
    """The mean score with its standard error, KL, length, and share of answers that ended."""
    scores = torch.tensor([answer.score for answer in answers], dtype=torch.float64)
    number = len(answers)
    return {
        "score": scores.mean().item(),
        "score_stderr": (scores.std() / number**0.5).item() if number > 1 else 0.0,
        "kl": sum(answer.kl for answer in answers) / number,
        "response_length": sum(answer.tokens for answer in answers) / number,
        "eos_rate": sum(answer.ended for answer in answers) / number,
    }


def write_answers(answers: Sequence[JudgedAnswer], step: int, folder: Path, data_set: str = "") -> None:
    """Add the answers at a step to `eval_samples.jsonl`, and write the newest as `eval_samples.md`.

    Lines of this step and of later ones, which a run that was stopped may have left, go.
    """
    mark = f"_{data_set}" if data_set else ""
    file = folder / SAMPLES_FILE.replace("_", f"{mark}_", 1)
    kept = ""
    if file.is_file():
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
            if line.endswith("\n") and json.loads(line)["step"] < step:
                kept += line
    with naming(file):
        lines = (json.dumps({"step": step, **asdict(answer)}, ensure_ascii=False) for answer in answers)
        replace_text(file, kept + "".join(f"{line}\n" for line in lines))
    rows = [
        f"# Greedy answers to held-out prompts at step {step}\n",
        "| prompt | answer | score | KL | tokens |",
        "|---|---|---|---|---|",
    ]
    for answer in answers[:_SHOWN]:
        cells = (
            _cell(answer.prompt),
            _cell(answer.answer),
            f"{answer.score:.3f}",
            f"{answer.kl:.2f}",
            str(answer.tokens),
        )
        rows.append(f"| {' | '.join(cells)} |")
    replace_text(folder / SAMPLES_PAGE.replace("_", f"{mark}_", 1), "\n".join(rows) + "\n")


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
