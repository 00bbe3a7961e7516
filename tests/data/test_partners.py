"""Partners: responses to other prompts, the same whatever the batches, and for each seed their own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prefkit.config import load_config
from prefkit.data.dataset import RunData, load_data
from prefkit.data.encode import TokenizedExample
from prefkit.data.partners import draw_partners, stream_partners, without_partner
from prefkit.data.readers import DataError
from prefkit.data.template import ChatTemplate

Load = Callable[..., RunData]


@pytest.fixture
def load(tokenizer, write_config) -> Load:
    def read(seed: int = 0, **keys: Any) -> RunData:
        given = {"stage": "kto", "dataset": "judged", **keys}
        config = load_config(write_config(**given), []).config
        return load_data(config, ChatTemplate(tokenizer), seed, lambda text: None, lambda rows, title: rows)

    return read


def judged(prompt: int, answer: int, label: Any = "desirable") -> TokenizedExample:
    return TokenizedExample([prompt], [[answer]], (), f"f:{answer}", labels=(label,))


def test_each_of_another_prompt_is_drawn_as_often() -> None:
    prompts = np.array([4, 9, 4, 7, 4])
    drawn = Counter[tuple[int, int]]()
    for seed in range(3000):
        drawn.update(enumerate(draw_partners(prompts, seed).tolist()))
    allowed = {(i, j) for i in range(5) for j in range(5) if prompts[i] != prompts[j]}
    assert drawn.keys() == allowed
    for (i, _), count in drawn.items():
        assert count / 3000 == pytest.approx(1 / sum(prompts != prompts[i]), abs=0.05)


def test_partners_come_with_the_rows_and_never_share_their_prompt(load: Load) -> None:
    data = load(eval_dataset="judged_held_out", do_eval=True)
    for rows in (data.train, data.held_out):
        plain = [without_partner(row) for row in rows]  # type: ignore[union-attr]
        prompts: dict[tuple[int, ...], set[tuple[int, ...]]] = {}
        for row in plain:
            prompts.setdefault(tuple(row.response_ids[0]), set()).add(tuple(row.prompt_ids))
        for row in rows:  # type: ignore[union-attr]
            assert row.labels[1] == "partner" and len(row.response_ids) == 2
            assert prompts[tuple(row.response_ids[1])] - {tuple(row.prompt_ids)}
    assert len(data.train) == 12 and len(data.held_out) == 4  # type: ignore[arg-type]


def test_they_are_those_of_the_seed(load: Load) -> None:
    def partners(seed: int) -> list[list[int]]:
        return [row.response_ids[1] for row in load(seed).train]  # type: ignore[union-attr]

    assert partners(1) == partners(1) != partners(2)


def test_rows_held_out_of_the_training_rows_have_partners_among_themselves(load: Load) -> None:
    data = load(val_size=6, do_eval=True)
    for rows in (data.train, data.held_out):
        own = {tuple(row.response_ids[0]) for row in rows}  # type: ignore[union-attr]
        assert all(tuple(row.response_ids[1]) in own for row in rows)  # type: ignore[union-attr]


def test_a_slice_and_the_rows_of_a_file_keep_their_partners(load: Load) -> None:
    data = load(
        dataset="judged", eval_dataset="judged,judged_held_out", do_eval=True, eval_on_each_dataset=True
    )
    rows = list(data.held_out)
    assert list(data.held_out[3:5]) == rows[3:5]
    assert [row for part in data.held_out_parts.values() for row in part] == rows


def test_a_partner_is_cut_to_fit_beside_the_prompt(load: Load) -> None:
    data = load(cutoff_len=48)
    lengths = [len(row.prompt_ids) + len(ids) for row in data.train for ids in row.response_ids[1:]]  # type: ignore[union-attr]
    assert max(lengths) == 48


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ('{"instruction": "Q", "output": "A%d", "kto_tag": %s}', "have one prompt only"),
        ('{"instruction": "Q%d", "output": "A", "kto_tag": true}', "are all desirable"),
    ],
)
@pytest.mark.parametrize("streaming", [True, False])
def test_one_prompt_or_one_label_is_an_error(
    rows: str, message: str, streaming: bool, load: Load, dataset_dir: Path
) -> None:
    values = [(i, "true" if i else "false")[: rows.count("%")] for i in range(3)]
    (dataset_dir / "judged.json").write_text(f"[{', '.join(rows % value for value in values)}]")
    with pytest.raises(DataError, match=f"rows.*{message}"):
        list(load(streaming=streaming, max_steps=2).train)  # type: ignore[arg-type]


def test_a_stream_takes_the_nearest_earlier_row_with_another_prompt() -> None:
    """The first rows have none, and take the first row with another prompt."""
    rows = [judged(1, 10), judged(1, 11), judged(2, 12, "undesirable"), judged(2, 13), judged(1, 14)]
    found = list(stream_partners(iter([(0, row) for row in rows]), 8))
    assert [(row.response_ids[0][0], row.response_ids[1][0]) for _, row in found] == [
        *((10, 12), (11, 12), (12, 11)),
        *((13, 11), (14, 13)),
    ]


def test_a_stream_has_partners_whatever_its_shuffling(load: Load) -> None:
    def partners(**keys: Any) -> dict[str, list[int]]:
        stream = iter(load(streaming=True, max_steps=2, **keys).train)
        return {row.source: row.response_ids[1] for row, _ in zip(stream, range(12), strict=False)}

    found = partners(buffer_size=4)
    assert len(found) == 12 and found == partners(disable_shuffling=True)
