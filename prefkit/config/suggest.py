"""The nearest key to one that does not exist."""

from __future__ import annotations

from collections.abc import Sequence

# A value that people know by another name.
VALUE_SYNONYMS = {"dpo": "sigmoid"}
SYNONYMS = {
    "batch_size": "per_device_train_batch_size",
    "beta": "pref_beta",
    "epochs": "num_train_epochs",
    "eval_batch_size": "per_device_eval_batch_size",
    "gamma": "simpo_gamma",
    "label_smoothing": "dpo_label_smoothing",
    "lora_r": "lora_rank",
    "lora_target_modules": "lora_target",
    "loss_type": "pref_loss",
    "pref_gamma": "simpo_gamma",
    "lr": "learning_rate",
    "max_seq_length": "cutoff_len",
    "micro_batch_size": "per_device_train_batch_size",
    "model": "model_name_or_path",
    "model_name": "model_name_or_path",
    "num_epochs": "num_train_epochs",
    "target_modules": "lora_target",
    "train_batch_size": "per_device_train_batch_size",
}


def nearest(word: str, candidates: Sequence[str]) -> str | None:
    """The candidate with the fewest edits to `word`, the earlier one in a tie; None when none is near.

    Near is one edit for every three letters. Of two equally near, one that shares the first letter
    comes first: a slip seldom hits the start of a word.

    >>> nearest("pref_bta", ["pref_beta", "pref_ftx"])
    'pref_beta'
    """
    word = word.lower().replace("-", "_")
    for limit in range(max(1, len(word) // 3) + 1):
        near = [name for name in candidates if edit_distance(word, name.lower(), limit) <= limit]
        if near:
            return min(near, key=lambda name: name[:1].lower() != word[:1])
    return None


def edit_distance(a: str, b: str, limit: int) -> int:
    """Insertions, deletions, substitutions and swaps of neighbours that turn `a` into `b`.

    Optimal string alignment (Damerau-Levenshtein without edits inside a swap). More than `limit` edits
    come out as `limit + 1`.

    >>> edit_distance("lora_rnak", "lora_rank", 3), edit_distance("stage", "dataset", 3)
    (1, 4)
    """
    if abs(len(a) - len(b)) > limit:
        return limit + 1
    before: list[int] = []
    previous: list[int] = []
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        before, previous, row = previous, row, [i]
        for j, y in enumerate(b, start=1):
            cost = min(previous[j] + 1, row[j - 1] + 1, previous[j - 1] + (x != y))
            if i > 1 and j > 1 and x == b[j - 2] and y == a[i - 2]:
                cost = min(cost, before[j - 2] + 1)
            row.append(cost)
        if min(row) > limit:
            return limit + 1
    return min(row[-1], limit + 1)
