"""Reference log-probs on disk: the same bits again, or computed again."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from prefkit.data.encode import TokenizedExample
from prefkit.data.examples import Pair
from prefkit.data.packing import Layout, Packer, pack
from prefkit.model.errors import ModelError
from prefkit.model.policy import response_logps
from prefkit.model.ref_cache import CachedReference, LogpsStore, cache_root, fill
from prefkit.objectives.logps import ResponseLogps, sum_by_response
from tests.model.test_policy import EXAMPLES, make_policy

FACTS = {"weights": ["abc"], "dtype": "float32"}
KEYS = [example.key for example in EXAMPLES]


class Said(list[str]):
    """What a store told its user."""

    __call__ = list.append


class Counted:
    """A reference that notes the rows it is asked for, and gives each token minus its id."""

    is_initial_policy = True

    def __init__(self) -> None:
        self.asked: list[tuple[str, ...]] = []

    def describe(self) -> str:
        return "counted"

    def logps(self, model: nn.Module | None, batch: dict[str, Any]) -> ResponseLogps:
        self.asked.append(batch["rows"])
        return sum_by_response(-batch["target"].float(), batch["owner"], batch["num_responses"])


@pytest.fixture
def said() -> Said:
    return Said()


@pytest.fixture
def open_store(tmp_path: Path, said: Said) -> Callable[..., LogpsStore]:
    def run(**changes: Any) -> LogpsStore:
        return LogpsStore(tmp_path / "cache", {**FACTS, **changes}, said)

    return run


@pytest.fixture
def filled(open_store) -> list[Path]:
    """Two files of rows: KEYS[0] with KEYS[1], and KEYS[2]."""
    store = open_store()
    files: list[Path] = []
    for part in (KEYS[:2], KEYS[2:]):
        for key in part:
            store.put(key, values(key))
        store.flush()
        files += [file for file in row_files(store) if file not in files]
    return files


def row_files(store: LogpsStore) -> list[Path]:
    return sorted(store.folder.glob("*.safetensors"))


def values(key: str) -> Tensor:
    """Log-probs of a row, other ones and another number of them for each."""
    number = KEYS.index(key)
    return -torch.rand(number + 2, generator=torch.Generator().manual_seed(number))


def batch_of(*numbers: int, layout: Layout = "shared") -> dict[str, Any]:
    return pack([EXAMPLES[number] for number in numbers], layout).to_dict()


def untracked(items: Sequence[Any], title: str) -> Iterator[Any]:
    return iter(items)


def test_rows_come_back_as_the_same_bits(open_store, filled: list[Path], said: Said) -> None:
    store = open_store()
    for key in KEYS:
        assert key in store and store.get(key).dtype == torch.float32
        assert torch.equal(store.get(key).view(torch.int32), values(key).view(torch.int32))
    assert said == []


def test_extreme_numbers_come_back_as_the_same_bits(open_store) -> None:
    extreme = torch.tensor([-0.0, -1e-45, -3e38])
    store = open_store()
    store.put(KEYS[0], extreme)
    store.flush()
    assert torch.equal(open_store().get(KEYS[0]).view(torch.int32), extreme.view(torch.int32))


def test_what_is_put_is_a_copy_in_fp32_without_gradient(open_store) -> None:
    store, given = open_store(), torch.tensor([-1.0, -2.0], requires_grad=True)
    store.put(KEYS[0], given)
    given.data[:] = 0
    assert store.get(KEYS[0]).tolist() == [-1.0, -2.0] and not store.get(KEYS[0]).requires_grad
    store.put(KEYS[1], torch.tensor([-0.5], dtype=torch.bfloat16))
    assert store.get(KEYS[1]).dtype == torch.float32


def test_nothing_is_written_before_flush_and_nothing_twice(open_store) -> None:
    store = open_store()
    store.put(KEYS[0], values(KEYS[0]))
    assert row_files(store) == [] and KEYS[0] not in open_store()
    store.flush()
    (file,) = row_files(store)
    written = file.stat().st_mtime_ns
    store.flush()
    assert row_files(store) == [file] and file.stat().st_mtime_ns == written


def test_a_folder_says_what_its_rows_depend_on(open_store) -> None:
    folder = open_store().folder
    assert json.loads((folder / "facts.json").read_text()) == FACTS
    assert open_store().folder == folder


@pytest.mark.parametrize("changes", [{"weights": ["abd"]}, {"dtype": "bfloat16"}, {"layout": "repeat"}])
def test_other_facts_are_another_folder(open_store, filled: list[Path], changes: dict) -> None:
    store = open_store(**changes)
    assert store.folder not in [file.parent for file in filled]
    assert not any(key in store for key in KEYS)


def test_the_order_of_facts_does_not_count(open_store, tmp_path: Path, said: Said) -> None:
    other = LogpsStore(tmp_path / "cache", dict(reversed(FACTS.items())), said)
    assert other.folder == open_store().folder


def flip(file: Path) -> None:
    """Change one bit of the last log-prob."""
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-3])


def empty(file: Path) -> None:
    file.write_bytes(b"")


def rehash(file: Path) -> None:
    save_file(load_file(file), file, {"sha256": "0" * 64})


def forget_hash(file: Path) -> None:
    save_file(load_file(file), file)


def lack_a_tensor(file: Path) -> None:
    tensors = load_file(file)
    del tensors["ends"]
    save_file(tensors, file, {"sha256": "0" * 64})


@pytest.mark.parametrize("damage", [flip, truncate, empty, rehash, forget_hash, lack_a_tensor])
def test_a_damaged_file_is_told_removed_and_computed_again(
    open_store, filled: list[Path], said: Said, damage: Callable[[Path], None]
) -> None:
    damaged, whole = filled
    damage(damaged)
    store = open_store()
    (message,) = said
    assert message.startswith(f"Reference cache: {damaged} is damaged (")
    assert message.endswith("its rows are computed again.")
    assert not damaged.exists() and whole.exists()
    assert [key in store for key in KEYS] == [False, False, True]
    assert torch.equal(store.get(KEYS[2]), values(KEYS[2]))

    inner = Counted()
    CachedReference(store, inner, "", True).logps(nn.Identity(), batch_of(0, 1))
    store.flush()
    again = open_store()
    assert all(key in again for key in KEYS) and len(said) == 1
    assert inner.asked == [("f:1", "f:2")]


def test_every_flipped_bit_of_a_file_is_noticed(open_store, filled: list[Path], said: Said) -> None:
    """But those of the header that change no tensor."""
    file = filled[1]
    content = file.read_bytes()
    for place in range(len(content)):
        file.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
        store = open_store()
        assert (not file.exists() and said) or torch.equal(store.get(KEYS[2]), values(KEYS[2]))
        said.clear()


def test_files_that_another_process_writes_are_left_alone(open_store, filled: list[Path], said: Said) -> None:
    scratch = filled[0].with_name(f".{filled[0].name}.1")
    scratch.write_bytes(b"half")
    open_store()
    assert scratch.exists() and said == []


def test_refresh_sees_what_another_process_wrote(open_store) -> None:
    one, other = open_store(), open_store()
    one.put(KEYS[0], values(KEYS[0]))
    one.flush()
    assert KEYS[0] not in other
    other.refresh()
    assert torch.equal(other.get(KEYS[0]), values(KEYS[0]))


def test_two_writers_leave_the_rows_of_both(open_store, said: Said) -> None:
    one, other = open_store(), open_store()
    for store, keys in ((one, KEYS[:2]), (other, KEYS[1:])):
        for key in keys:
            store.put(key, values(key))
    one.flush()
    other.flush()
    assert len(row_files(one)) == 2
    again = open_store()
    assert all(torch.equal(again.get(key), values(key)) for key in KEYS)
    assert said == []


def test_two_writers_of_the_same_rows_leave_one_file(open_store) -> None:
    for store in (open_store(), open_store()):
        for key in (KEYS[1], KEYS[0]):
            store.put(key, values(key))
        store.flush()
    assert len(row_files(store)) == 1
    assert list(store.folder.glob(".*")) == []


def test_the_cache_is_below_cache_dir_or_where_the_users_caches_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cache_root("/models") == Path("/models/prefkit-reference")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_root(None) == tmp_path / "prefkit" / "reference"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_root(None) == tmp_path / ".cache" / "prefkit" / "reference"
    assert cache_root("~/models") == tmp_path / "models" / "prefkit-reference"


BASE = TokenizedExample([3, 9, 20], [[5, 6, 7], [8, 9]], (Pair(0, 1),), "f:1")


@pytest.mark.parametrize(
    "changes",
    [
        {"prompt_ids": [3, 9, 21]},
        {"prompt_ids": [3, 9]},
        {"response_ids": [[5, 6, 7], [8, 10]]},
        {"response_ids": [[5, 6, 8], [8, 9]]},
        {"response_ids": [[5, 6, 7, 7], [8, 9]]},
        {"response_ids": [[8, 9], [5, 6, 7]]},
        {"response_ids": [[5, 6], [7, 8, 9]]},  # the same tokens, cut elsewhere
        {"prompt_ids": [3, 9, 20, 5], "response_ids": [[6, 7], [8, 9]]},
    ],
)
def test_another_token_is_another_key(changes: dict) -> None:
    assert replace(BASE, **changes).key != BASE.key


def test_a_key_is_a_hash_of_the_tokens_alone() -> None:
    assert re.fullmatch("[0-9a-f]{64}", BASE.key)
    assert replace(BASE, source="g:9", pairs=[(1, 0)], truncated=True).key == BASE.key


def test_a_row_is_asked_of_the_reference_once(open_store) -> None:
    inner, store = Counted(), open_store()
    cached = CachedReference(store, inner, "", True)
    first = cached.logps(nn.Identity(), batch_of(0, 1))
    second = cached.logps(nn.Identity(), batch_of(0, 1))
    swapped = cached.logps(nn.Identity(), batch_of(1, 0))
    assert inner.asked == [("f:1", "f:2")]
    assert first.logps.tolist() == second.logps.tolist() == [-18, -17, -12, -112]
    assert swapped.logps.tolist() == [-12, -112, -18, -17] and swapped.lengths.tolist() == [1, 7, 3, 2]
    assert torch.equal(first.token_logps, second.token_logps)


def test_stored_values_are_given_back_and_not_computed(open_store) -> None:
    store = open_store()
    store.put(KEYS[0], torch.tensor([-1.0, -2.0, -3.0, -4.0, -5.0]))
    found = CachedReference(store, None, "", True).logps(nn.Identity(), batch_of(0))
    assert found.token_logps.tolist() == [-1, -2, -3, -4, -5]
    assert (found.logps.tolist(), found.lengths.tolist()) == ([-6, -9], [3, 2])


def test_a_batch_with_one_new_row_keeps_what_is_stored(open_store) -> None:
    """The batch is computed as a whole; a stored row stays the one that other epochs saw."""
    inner, store = Counted(), open_store()
    store.put(KEYS[0], torch.full((5,), -1.0))
    CachedReference(store, inner, "", True).logps(nn.Identity(), batch_of(0, 2))
    assert inner.asked == [("f:1", "f:3")]
    assert store.get(KEYS[0]).tolist() == [-1] * 5
    assert store.get(KEYS[2]).tolist() == [-50, -51, -52, -53, -54]


def test_a_row_that_nothing_can_compute_is_named(open_store, filled: list[Path]) -> None:
    filled[1].unlink()
    store = open_store()
    with pytest.raises(RuntimeError, match=r"^the reference cache has no log-probs of f:3$"):
        CachedReference(store, None, "", True).logps(nn.Identity(), batch_of(0, 2))


def test_a_cached_reference_says_what_it_was_told() -> None:
    cached = CachedReference(None, None, "base, cached", False)  # type: ignore[arg-type]
    assert (cached.describe(), cached.is_initial_policy) == ("base, cached", False)


FOURTH = TokenizedExample([60, 61], [[62, 63, 64, 65], [66, 67, 68, 69, 70]], (Pair(0, 1),), "f:4")


@pytest.mark.parametrize(
    ("max_tokens", "batches"),
    [
        (1, [("f:2",), ("f:1",), ("f:4",), ("f:3",)]),  # at least one row, shortest first
        (18, [("f:2",), ("f:1",), ("f:4",), ("f:3",)]),
        (19, [("f:2", "f:1"), ("f:4",), ("f:3",)]),
        (23, [("f:2", "f:1"), ("f:4",), ("f:3",)]),
        (24, [("f:2", "f:1"), ("f:4", "f:3")]),
        (30, [("f:2", "f:1", "f:4"), ("f:3",)]),
        (43, [("f:2", "f:1", "f:4", "f:3")]),
    ],
)
def test_fill_keeps_to_its_budget_of_tokens(open_store, max_tokens: int, batches: list) -> None:
    examples = [*EXAMPLES, FOURTH]
    assert [example.num_tokens for example in examples] == [10, 9, 13, 11]
    inner, store = Counted(), open_store()
    fill(store, examples, partial(inner.logps, None), Packer("shared"), max_tokens, untracked)
    assert inner.asked == batches
    assert all(example.key in open_store() for example in examples)


def test_fill_computes_only_what_the_store_lacks(open_store, filled: list[Path]) -> None:
    filled[1].unlink()
    inner, store = Counted(), open_store()
    compute = partial(inner.logps, None)
    fill(store, EXAMPLES, compute, Packer("shared"), 99, untracked)
    fill(store, EXAMPLES, compute, Packer("shared"), 99, untracked)
    assert inner.asked == [("f:3",)]
    assert torch.equal(store.get(KEYS[0]), values(KEYS[0]))
    assert len(row_files(store)) == 2


def test_fill_shows_its_batches(open_store) -> None:
    shown = []

    def track(items: Sequence[Any], title: str) -> Iterator[Any]:
        shown.append((len(items), title))
        return iter(items)

    fill(open_store(), EXAMPLES, partial(Counted().logps, None), Packer("shared"), 19, track)
    assert shown == [(2, "reference log-probs")]


@pytest.mark.parametrize("layout", ["shared", "repeat"])
def test_filled_values_are_those_of_the_model(open_store, layout: Layout) -> None:
    model = make_policy("llama", {}, layout).eval()

    @torch.no_grad()
    def compute(batch: dict[str, Any]) -> ResponseLogps:
        return response_logps(model, batch)

    fill(open_store(), EXAMPLES, compute, Packer(layout), 19, untracked)
    cached = CachedReference(open_store(), None, "", True)
    for numbers in ((0,), (1,), (2,), (2, 0, 1)):
        batch = batch_of(*numbers, layout=layout)
        direct, found = compute(batch), cached.logps(model, batch)
        assert torch.allclose(found.token_logps, direct.token_logps, rtol=0, atol=1e-5)
        assert torch.allclose(found.logps, direct.logps, rtol=1e-5, atol=0)
        assert torch.equal(found.owner, direct.owner) and torch.equal(found.lengths, direct.lengths)


def test_log_probs_that_are_not_finite_are_not_kept(tmp_path: Path) -> None:
    store = LogpsStore(tmp_path, {}, print)
    with pytest.raises(ModelError, match="not finite"):
        store.put("00" * 32, torch.tensor([-1.0, float("nan")]))
    assert "00" * 32 not in store


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match=r"cannot be written to .*set cache_dir, or ref_cache: false"):
        LogpsStore(tmp_path / "file", {}, print)
