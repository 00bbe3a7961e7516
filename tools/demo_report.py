"""How many answers of a demo run show the preference, before training and after; of ppo, the scores too.

The measure, fixed by the data and not by the run: an answer is short when it has at most 30 words and
ends by itself, with a full stop or its like. The chosen answers of the demo set have 8 to 22.

    python tools/demo_report.py [saves/demo_dpo | saves/demo_ppo]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

MAX_WORDS = 30


def is_short(answer: str) -> bool:
    """Whether an answer shows the preference.

    >>> is_short("Saturn has the most visible rings."), is_short("It has, as"), is_short("Yes. " * 40)
    (True, False, False)
    """
    return answer.rstrip().endswith((".", "!", "?")) and len(answer.split()) <= MAX_WORDS


def count_short(samples_file: Path) -> tuple[int, int, int]:
    """(short before, short after, all) of the answers in a run's `samples.jsonl`."""
    samples = [json.loads(line) for line in samples_file.read_text(encoding="utf-8").splitlines()]
    before, after = (sum(is_short(sample[key]) for sample in samples) for key in ("before", "after"))
    return before, after, len(samples)


def held_out_scores(log_file: Path) -> list[tuple[int, float, float]]:
    """(step, mean score, KL) of each evaluation in a run's `trainer_log.jsonl`; only ppo has a score."""
    lines = [json.loads(line) for line in log_file.read_text(encoding="utf-8").splitlines()]
    return [
        (line["current_steps"], line["eval_score"], line["eval_kl"]) for line in lines if "eval_score" in line
    ]


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "saves/demo_dpo")
    before, after, total = count_short(folder / "samples.jsonl")
    print(f"Short answers (at most {MAX_WORDS} words) to {total} held-out prompts:")
    for name, number in (("before", before), ("after", after)):
        print(f"  {name:7}{number:3}  {'#' * number}{'.' * (total - number)}")
    if scores := held_out_scores(folder / "trainer_log.jsonl"):
        print("Mean score of greedy answers to the held-out prompts, and their KL to the reference in nats:")
        for step, score, kl in scores:
            print(f"  step {step:<3} score {score:6.2f}  KL {kl:5.2f}")
        print(f"Drawn in {folder / 'training_reward.png'} and {folder / 'training_eval_reward.png'}")
    print(f"All answers: {folder / 'samples.md'}")
    print(f"Talk to it:  .venv/bin/prefkit chat {folder} temperature=0  (/compare: before and after)")


if __name__ == "__main__":
    main()
