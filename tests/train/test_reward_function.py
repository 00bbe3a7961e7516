"""A Python function as a judge: what it is given, and each way in which it can fail."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from prefkit.config.errors import UserError
from prefkit.data.examples import Message, ToolCall
from prefkit.train.answered import JudgeFailed
from prefkit.train.reward_function import FunctionJudge, fingerprint_function
from tests.train.judged import make_answered

Write = Callable[[str], str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a file with a function `score`; the reference to it."""

    def save(text: str) -> str:
        (tmp_path / "my rewards.py").write_text(text)
        return f"{tmp_path / 'my rewards.py'}:score"

    return save


def test_what_the_function_is_given(write: Write) -> None:
    judge = FunctionJudge(
        write(
            "seen = []\n"
            "def score(prompts, responses):\n    seen.append((prompts, responses))\n    return [1, 2.5]"
        )
    )
    call = Message("assistant", "", (ToolCall("f", {"a": 1}),))
    prompt = [Message("system", "S"), Message("user", "Q"), call, Message("tool", "R")]
    assert judge.score(make_answered(texts=("a", "b"), prompt=prompt)) == [1.0, 2.5]
    ((prompts, responses),) = sys.modules[judge.function.__module__].seen
    assert responses == ["a", "b"]
    assert prompts == [[
        {"role": "system", "content": "S"},
        {"role": "user", "content": "Q"},
        {"role": "assistant", "content": "",
         "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}]},
        {"role": "tool", "content": "R"},
    ]] * 2  # fmt: skip


@pytest.mark.parametrize(
    "returned",
    [
        *("[1, 0.5]", "(1, 0.5)", "numpy.array([1, 0.5])", "torch.tensor([1, 0.5])", "iter([1, 0.5])"),
        *("[torch.tensor(1.0), numpy.float32(0.5)]", "[True, 0.5]", "map(float, ['1', '0.5'])"),
    ],
)
def test_what_a_function_may_return(returned: str, write: Write) -> None:
    judge = FunctionJudge(write(f"import numpy, torch\ndef score(prompts, responses): return {returned}"))
    assert judge.score(make_answered(texts=("a", "b"))) == [1.0, 0.5]


def test_a_function_may_use_a_dataclass_and_an_object(write: Write) -> None:
    text = """
from __future__ import annotations
from dataclasses import dataclass

@dataclass
class Length:
    weight: float

    def __call__(self, prompts, responses):
        return [self.weight * len(response) for response in responses]

score = Length(2)
"""
    assert FunctionJudge(write(text)).score(make_answered(texts=("a", "bc"))) == [2.0, 4.0]


FAILING = {
    "raise": (
        "raise KeyError('x')",
        r"KeyError: 'x' \(my rewards\.py:2\); it was given 2 prompts and as many responses",
    ),
    "other arguments": ("", "TypeError: score"),
    "too few": ("return [1]", "returned 1 numbers for 2 responses"),
    "too many": ("return [1, 2, 3]", "returned 3 numbers for 2 responses"),
    "one number": ("return 1.0", "TypeError: 'float' object is not iterable"),
    "a tensor of one": (
        "import torch; return torch.tensor(1.0)",
        "TypeError: 'float' object is not iterable",
    ),
    "nothing": ("return None", "it returned None, and a list of 2 numbers is wanted"),
    "none": ("return [1, None]", r'returned "None", no number, for response 2 of 2: "bad one"'),
    "text": ("return [1, '0.5']", r'returned "0.5", no number, for response 2 of 2: "bad one"'),
    "several": ("return [[1], [2]]", r'returned "\[1\]", no number, for response 1 of 2: "a"'),
    "nan": ("return [1, float('nan')]", r"returned nan, which is not finite, for response 2 of 2"),
    "infinity": ("return [-1e999, 1]", r"returned -inf, which is not finite, for response 1 of 2"),
}


@pytest.mark.parametrize("what", FAILING)
def test_what_fails_names_function_and_response(what: str, write: Write) -> None:
    body, message = FAILING[what]
    signature = "def score(prompts):" if not body else "def score(prompts, responses):"
    reference = write(f"{signature}\n    {body or 'return []'}")
    with pytest.raises(JudgeFailed, match=message) as caught:
        FunctionJudge(reference).score(make_answered(texts=("a", "bad\none")))
    assert str(caught.value).startswith(f"reward_function {reference}")
    assert caught.value.of_one_rank


def test_the_line_is_the_last_one_in_the_file(write: Write) -> None:
    text = "import json\ndef read(text):\n    return json.loads(text)\n"
    text += "def score(p, r):\n    return [read(t) for t in r]"
    with pytest.raises(JudgeFailed, match=r"JSONDecodeError: .*\(my rewards\.py:3\); it was"):
        FunctionJudge(write(text)).score(make_answered(texts=("{",)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def other(p, r): pass\nclass A: pass\n_b = 1", r"score is not there in .*, which has other, A$"),
        ("", "score is not there in .*, which has none$"),
        ("score = 5", "score is no function in"),
        ("def score(p, r)\n    pass", r"does not load: SyntaxError: .*\(my rewards\.py:1\)$"),
        ("import math\nmath.nothing", r"does not load: AttributeError: .*\(my rewards\.py:2\)$"),
        ("import not_a_module_at_all", r"does not load: ModuleNotFoundError: .*\(my rewards\.py:1\)$"),
    ],
)
def test_a_file_without_the_function(text: str, message: str, write: Write) -> None:
    with pytest.raises(UserError, match=message):
        FunctionJudge(write(text))


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"reward_function: .*r\.py:score: the file .*r\.py does not exist"):
        FunctionJudge(f"{tmp_path / 'r.py'}:score")
    with pytest.raises(UserError, match=r"r\.py cannot be read: No such file"):
        fingerprint_function(tmp_path / "r.py")


def test_a_relative_path_and_a_changed_file(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write("def score(p, r): return [0.0] * len(r)")
    before = fingerprint_function(tmp_path / "my rewards.py")
    monkeypatch.chdir(tmp_path)
    assert FunctionJudge("my rewards.py:score").score(make_answered(texts=("a",))) == [0.0]
    assert fingerprint_function(Path("my rewards.py")) == before
    write("def score(p, r): return [1.0] * len(r)")
    assert fingerprint_function(Path("my rewards.py")) != before
