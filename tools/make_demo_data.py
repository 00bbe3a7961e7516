"""Make the demo sets of pairs, judged responses and instructions from the hand-written data/source/*.tsv.

Each line of a source of pairs is a question and the short answer to prefer. The rejected answer is the base
model's own, sampled and cut after a whole sentence. A question whose answer has no fit cut of 35..60
words is sampled again; after the last try, 25..70 words will do.

The judged sets take one answer of each pair: the chosen one of a random half, the rejected one of the others.
The instructions are as their sources have them: instruction, input, output.

    python tools/make_demo_data.py --model models/smollm2-135m-instruct
    python tools/make_demo_data.py --judged         # only the judged sets, from the pairs that are there
    python tools/make_demo_data.py --instructions   # only the instructions
"""

import argparse
import json
import random
import re
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

DATA = Path(__file__).parents[1] / "data"
SETS = ("dpo_en_demo", "dpo_en_demo_heldout")
JUDGED = {"dpo_en_demo": "kto_en_demo", "dpo_en_demo_heldout": "kto_en_demo_heldout"}
INSTRUCTIONS = ("alpaca_en_demo", "alpaca_en_demo_heldout")

# A stop after a single character belongs to a list number or an abbreviation.
SENTENCE_END = re.compile(r"(?<!\b\w)[.!?][\"')*]*(?=\s|$)")

# The assistant speaking of itself, words that do not belong in a demo, other scripts, seven words repeated.
UNFIT = re.compile(
    r"\b(?:AI|SmolLM|chatbot|assistant|language model|hugging face|sorry|genital\w*|sexual\w*|suicid\w*)\b"
    r"|[^\x00-\x7f]"
    r"|\b(\w+(?:\W+\w+){6})\b(?s:.*)\b\1\b",
    re.IGNORECASE,
)


def cut(answer: str, shortest: int, longest: int) -> str | None:
    """The longest fit run of two or more whole opening sentences with so many words."""
    ends = [match.end() for match in SENTENCE_END.finditer(answer)]
    for end in reversed(ends[1:]):
        run = answer[:end]
        if shortest <= len(run.split()) <= longest and not UNFIT.search(run):
            return run
    return None


@torch.inference_mode()
def sample(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, questions: list[str], batch_size: int
) -> list[str]:
    answers: list[str] = []
    for start in range(0, len(questions), batch_size):
        batch = questions[start : start + batch_size]
        chats = [[{"role": "user", "content": question}] for question in batch]
        inputs = tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        )
        output = model.generate(**inputs, do_sample=True, temperature=0.7, top_p=0.9, max_new_tokens=110)
        new_tokens = output[:, inputs["input_ids"].shape[1] :]
        answers += [text.strip() for text in tokenizer.batch_decode(new_tokens, skip_special_tokens=True)]
        print(f"  {len(answers)}/{len(questions)}", flush=True)
    return answers


def rejected_answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, questions: list[str], args: argparse.Namespace
) -> dict[str, str]:
    found: dict[str, str] = {}
    second_best: dict[str, str] = {}
    for attempt in range(args.tries):
        missing = [question for question in questions if question not in found]
        if not missing:
            break
        print(f"try {attempt + 1}: {len(missing)} questions", flush=True)
        torch.manual_seed(args.seed + attempt)
        answers = sample(model, tokenizer, missing, args.batch_size)
        for question, answer in zip(missing, answers, strict=True):
            if good := cut(answer, 35, 60):
                found[question] = good
            elif fair := cut(answer, 25, 70):
                second_best.setdefault(question, fair)
    rejected = second_best | found
    if without := [question for question in questions if question not in rejected]:
        raise SystemExit(f"No answer of 25 to 70 words after {args.tries} tries: {without}")
    return rejected


def judge(pairs: list[dict[str, Any]], seed: int) -> list[dict[str, Any]]:
    """One answer of each pair: half of them desirable, drawn by `seed`."""
    desirable = set(random.Random(seed).sample(range(len(pairs)), len(pairs) // 2))
    return [
        {
            "messages": [
                {"role": "user", "content": pair["conversations"][0]["value"]},
                {"role": "assistant", "content": pair["chosen" if i in desirable else "rejected"]["value"]},
            ],
            "label": i in desirable,
        }
        for i, pair in enumerate(pairs)
    ]


def read_source(name: str) -> list[list[str]]:
    lines = (DATA / "source" / f"{name}.tsv").read_text(encoding="utf-8").splitlines()
    return [line.split("\t") for line in lines]


def write(name: str, rows: list[dict[str, Any]]) -> None:
    text = json.dumps(rows, indent=1, ensure_ascii=False) + "\n"
    (DATA / f"{name}.json").write_text(text, encoding="utf-8")


def write_judged(seed: int) -> None:
    for pairs, judged in JUDGED.items():
        write(judged, judge(json.loads((DATA / f"{pairs}.json").read_text(encoding="utf-8")), seed))


def write_instructions() -> None:
    columns = ("instruction", "input", "output")
    for name in INSTRUCTIONS:
        write(name, [dict(zip(columns, row, strict=True)) for row in read_source(name)])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="models/smollm2-135m-instruct")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tries", type=int, default=12)
    parser.add_argument("--batch-size", type=int, default=38)
    parser.add_argument("--judged", action="store_true")
    parser.add_argument("--instructions", action="store_true")
    args = parser.parse_args()
    if args.judged:
        write_judged(args.seed)
    if args.instructions:
        write_instructions()
    if args.judged or args.instructions:
        return

    sources = {name: read_source(name) for name in SETS}
    tokenizer = AutoTokenizer.from_pretrained(args.model, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    questions = [question for rows in sources.values() for question, _ in rows]
    started = time.perf_counter()
    rejected = rejected_answers(model, tokenizer, questions, args)
    print(f"sampled in {time.perf_counter() - started:.0f} s")

    for name, rows in sources.items():
        pairs = [
            {
                "conversations": [{"from": "human", "value": question}],
                "chosen": {"from": "gpt", "value": answer},
                "rejected": {"from": "gpt", "value": rejected[question]},
            }
            for question, answer in rows
        ]
        write(name, pairs)
    write_judged(args.seed)
    write_instructions()


if __name__ == "__main__":
    main()
