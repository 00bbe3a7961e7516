"""Ask a trained adapter and its base model one question, with plain transformers and peft.

python tools/ask.py saves/demo_dpo "Why do leaves fall in autumn?"
"""

from __future__ import annotations

import sys
import warnings

import transformers
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer


def main() -> None:
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    folder, question = sys.argv[1:]
    warnings.simplefilter("ignore", FutureWarning)
    transformers.utils.logging.disable_progress_bar()
    model = AutoPeftModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": question}]
    inputs = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )

    def answer() -> str:
        output = model.generate(**inputs, max_new_tokens=150, do_sample=False)
        text = tokenizer.decode(output[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)
        return str(text).strip()

    with model.disable_adapter():
        print(f"before: {answer()}\n")
    print(f"after:  {answer()}")


if __name__ == "__main__":
    main()
