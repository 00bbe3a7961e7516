"""What a demo run changed: how many answers show the preference, before training and after; of ppo, the
scores too.

The measure, fixed by the data and not by the run: an answer is short when it has at most 30 words and
ends by itself, with a full stop or its like. The chosen answers of the demo set have 8 to 22.

    python tools/demo_report.py [saves/demo_dpo | saves/demo_ppo]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from textwrap import shorten
from typing import Any

MAX_WORDS = 30
SHOWN, WIDTH = 4, 160


def is_short(answer: str) -> bool:
    """Whether an answer shows the preference.

    >>> is_short("Saturn has the most visible rings."), is_short("It has, as"), is_short("Yes. " * 40)
    (True, False, False)
    """
    return answer.rstrip().endswith((".", "!", "?")) and len(answer.split()) <= MAX_WORDS


def read_lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def count_short(samples_file: Path) -> tuple[int, int, int]:
    """(short before, short after, all) of the answers in a run's `samples.jsonl`."""
    samples = read_lines(samples_file)
    before, after = (sum(is_short(sample[key]) for sample in samples) for key in ("before", "after"))
    return before, after, len(samples)


def evaluations(samples_file: Path) -> dict[int, list[dict[str, Any]]]:
    """The judged answers in the `eval_samples.jsonl` of a run of ppo, by step."""
    found: dict[int, list[dict[str, Any]]] = {}
    for line in read_lines(samples_file):
        found.setdefault(line["step"], []).append(line)
    return dict(sorted(found.items()))


def mean(answers: list[dict[str, Any]], key: str) -> float:
    return sum(answer[key] for answer in answers) / len(answers)


def print_counts(before: int, after: int, total: int) -> None:
    print(f"Short answers (at most {MAX_WORDS} words) to {total} held-out prompts:")
    for name, number in (("before", before), ("after", after)):
        print(f"  {name:7}{number:3}  {'#' * number}{'.' * (total - number)}")


def print_ppo(folder: Path) -> None:
    """Some answers before and after, how many are short, and the mean score and KL of each evaluation."""
    found = evaluations(folder / "eval_samples.jsonl")
    first, last = (found[step] for step in (min(found), max(found)))
    for old, new in list(zip(first, last, strict=True))[:SHOWN]:
        print(shorten(old["prompt"], WIDTH, placeholder=" ..."))
        for name, answer in (("before", old), ("after", new)):
            print(f"  {name:7}{answer['score']:6.2f}  {shorten(answer['answer'], WIDTH, placeholder=' ...')}")
    print_counts(*(sum(is_short(answer["answer"]) for answer in side) for side in (first, last)), len(first))
    print("Mean score of these greedy answers, and their KL to the reference in nats:")
    for step, answers in found.items():
        print(f"  step {step:<3} score {mean(answers, 'score'):6.2f}  KL {mean(answers, 'kl'):5.2f}")
    print(f"All answers: {folder / 'eval_samples.jsonl'}, the last also in {folder / 'eval_samples.md'}")
    print(f"Curves: {folder / 'training_reward.png'}, {folder / 'training_eval_reward.png'}")


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "saves/demo_dpo")
    if (folder / "eval_samples.jsonl").is_file():
        print_ppo(folder)
    else:
        print_counts(*count_short(folder / "samples.jsonl"))
    print(f"Talk to it:  .venv/bin/prefkit chat {folder} temperature=0  (/compare: before and after)")


if __name__ == "__main__":
    main()
