"""`prefkit score`: a line for each row, whatever becomes of it, and no row twice."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from prefkit.config.errors import UserError
from prefkit.config.uses import SCORING
from prefkit.data.encode import encode_example
from prefkit.data.examples import Example, Message, Response
from prefkit.data.readers import DataError
from prefkit.files import DiskError
from prefkit.model.scorer import Scorer
from prefkit.runs.report import make_console
from prefkit.runs.use import read_use_config
from prefkit.serve import score
from prefkit.serve.score import score_file
from tests.serve.conftest import alone
from tests.train.forks import Fork, command, forks

Score = Callable[..., list[dict[str, Any]]]
WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]


@pytest.fixture
def run(reward_folder: Path, tmp_path: Path) -> Score:
    """Scores rows that are written to a file; the lines of the output."""

    def scored(rows: list[Any], output: str = "scores.jsonl", **keys: Any) -> list[dict[str, Any]]:
        file = tmp_path / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" if not isinstance(row, str) else row for row in rows))
        overrides = [f"{key}={value}" for key, value in {"cutoff_len": 256, **keys}.items()]
        config = read_use_config(str(reward_folder), overrides, SCORING).config
        score_file(config, str(file), tmp_path / output, make_console())
        return read(tmp_path / output)

    return scored


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def rows(number: int) -> list[dict[str, Any]]:
    return [
        {"prompt": f"Say {WORDS[i % 10]}", "response": " ".join(WORDS[: i % 7 + 1])} for i in range(number)
    ]


def test_rows_of_every_form_have_the_score_of_their_text(run: Score, scorer: Scorer) -> None:
    question, good, bad = "Say one", "one", "two three"
    messages = [{"role": "user", "content": question}]
    expected = {text: expected_score(scorer, question, text) for text in (good, bad)}
    forms: dict[str, dict[str, Any]] = {
        "prompt and response": {"prompt": question, "response": good},
        "completion": {"prompt": messages, "completion": good},
        "alpaca": {"instruction": question, "output": good},
        "messages": {"messages": [*messages, {"role": "assistant", "content": good}]},
        "sharegpt": {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": good}]},
    }
    for form, row in forms.items():
        (line,) = run([row], output=f"{form}.jsonl")
        assert line["score"] == pytest.approx(expected[good], abs=1e-5), form
    (pair,) = run([{"prompt": question, "chosen": good, "rejected": bad}], output="pair.jsonl")
    assert (pair["chosen"], pair["rejected"]) == pytest.approx((expected[good], expected[bad]), abs=1e-5)
    (equal,) = run([{"prompt": question, "chosen": good, "rejected": good}], output="equal.jsonl")
    assert equal["chosen"] == pytest.approx(equal["rejected"], abs=1e-6)
    (listed,) = run([{"instruction": question, "responses": [bad, good, bad]}])
    assert listed["scores"] == pytest.approx([expected[bad], expected[good], expected[bad]], abs=1e-5)


def expected_score(scorer: Scorer, question: str, answer: str) -> float:
    prompt, (response,) = scorer.template.encode([Message("user", question)], [Message("assistant", answer)])
    return alone(scorer, scorer.template.tokenizer.decode([*prompt, *response]))


def test_every_row_has_its_line(run: Score, capsys: pytest.CaptureFixture[str]) -> None:
    good = {"prompt": "Say one", "response": "one"}
    lines = run(
        [good, "not JSON\n", {"prompt": "Say two", "response": " "}, {"prompt": 3, "response": "x"}, good]
    )
    assert [Path(line["row"]).name for line in lines] == [f"rows.jsonl:{n}" for n in range(1, 6)]
    assert ["score" in line for line in lines] == [True, False, False, False, True]
    assert [line["error"].split(":")[0] for line in lines if "error" in line] == [
        "not valid JSON",
        "empty response",
        "column 'prompt' is a text, not the number 3",
    ]
    said = capsys.readouterr().out
    assert "5 rows, 2 scores" in said and "No score for 3 rows" in said


def test_long_rows_are_cut_as_in_training(run: Score, scorer: Scorer) -> None:
    answer = " ".join(WORDS * 20)
    (line,) = run([{"prompt": "Say one", "response": answer}], cutoff_len=128)
    assert line["truncated"] is True
    example = Example((Message("user", "Say one"),), (Response(answer, "scored"),), "x")
    cut = encode_example(example, scorer.template, 128)
    assert line["score"] == pytest.approx(scorer.score([cut])[0][0], abs=1e-6)


def test_a_score_does_not_depend_on_its_neighbours(run: Score, scorer: Scorer) -> None:
    lines = run(rows(150))
    assert len(lines) == 150
    for i in (0, 37, 149):
        row = rows(150)[i]
        assert lines[i]["score"] == pytest.approx(
            expected_score(scorer, row["prompt"], row["response"]), abs=1e-5
        )


def test_it_goes_on_behind_the_last_whole_line(
    run: Score, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(rows(150))
    text = (tmp_path / "scores.jsonl").read_text()
    assert run(rows(150)) == whole and "is finished: 150 rows" in capsys.readouterr().out
    about = json.loads((tmp_path / "scores.jsonl.about.json").read_text())
    (tmp_path / "scores.jsonl.about.json").write_text(json.dumps({**about, "finished": False}))
    lines = text.splitlines(keepends=True)
    (tmp_path / "scores.jsonl").write_text("".join(lines[:70]) + lines[70][:9])
    scored: list[int] = []
    original = score._lines_of
    monkeypatch.setattr(score, "_lines_of", lambda *args: scored.append(len(args[0])) or original(*args))
    again = run(rows(150))
    assert sum(scored) == 80 and "70 of 150 rows are in" in capsys.readouterr().out
    assert [line["row"] for line in again] == [line["row"] for line in whole]
    assert [line["score"] for line in again] == pytest.approx([line["score"] for line in whole], abs=1e-5)


def test_what_is_another_scoring_is_refused(run: Score, tmp_path: Path) -> None:
    run(rows(3))
    before = (tmp_path / "scores.jsonl").read_text()
    with pytest.raises(UserError, match=r"made from something else \(content differ"):
        run(rows(4))
    with pytest.raises(UserError, match=r"made from something else \(cutoff_len differ"):
        run(rows(3), cutoff_len=128)
    assert (tmp_path / "scores.jsonl").read_text() == before
    (tmp_path / "scores.jsonl.about.json").unlink()
    with pytest.raises(UserError, match="is there already, and not from a scoring"):
        run(rows(3))
    assert (tmp_path / "scores.jsonl").read_text() == before


def test_data_that_cannot_be_scored(run: Score, reward_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no rows"):
        run([])
    assert not (tmp_path / "scores.jsonl").exists()
    config = read_use_config(str(reward_folder), [], SCORING).config
    (tmp_path / "mine.jsonl").write_text(json.dumps(rows(1)[0]))
    with pytest.raises(UserError, match="is the file that is scored"):
        score_file(config, str(tmp_path / "mine.jsonl"), tmp_path / "mine.jsonl", make_console())
    with pytest.raises(DataError, match="no file is named so"):
        score_file(config, str(tmp_path / "absent.jsonl"), tmp_path / "out.jsonl", make_console())


def test_a_full_disk_leaves_whole_lines(run: Score, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = score._Lines.add

    def add(self: Any, lines: list[dict[str, Any]]) -> None:
        original(self, lines)
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(score._Lines, "add", add)
        with pytest.raises(DiskError, match=r"No space left on device.*goes on behind them"):
            run(rows(150))
    assert len(read(tmp_path / "scores.jsonl")) == score._WINDOW
    assert len(run(rows(150))) == 150


def test_two_do_not_write_one_file(run: Score, tmp_path: Path) -> None:
    with score._Lines(tmp_path / "scores.jsonl", {}), pytest.raises(UserError, match="another process"):
        run(rows(3))


@forks
def test_a_kill_loses_no_row_and_scores_none_twice(reward_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "many.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows(1500)))
    output = tmp_path / "scores.jsonl"
    kills = 0
    for _ in range(20):
        known = output.stat().st_size if output.exists() else 0
        process = Fork(tmp_path / "printed", command("score", reward_folder, file, "-o", output))
        while (code := process.poll()) is None and (not output.exists() or output.stat().st_size <= known):
            time.sleep(0.002)
        if code is None and kills < 3:
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        if (process.end() if code is None else code) == 0:
            break
    lines = read(output)
    assert kills >= 2 and [line["row"] for line in lines] == [f"{file}:{n}" for n in range(1, 1501)]
    assert all("score" in line for line in lines)


def test_where_no_file_can_be(run: Score, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=r"that is a folder: name a file, such as .*scores.jsonl"):
        run(rows(1), output="folder")
    with pytest.raises(UserError, match=r"there is no folder .*absent: make it"):
        run(rows(1), output="absent/scores.jsonl")


def test_a_language_model_is_refused_and_leaves_nothing(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.jsonl").write_text(json.dumps(rows(1)[0]))
    config = read_use_config(str(tiny_model), [], SCORING).config
    with pytest.raises(UserError, match="is a language model, which writes text and has no head for scores"):
        score_file(config, str(tmp_path / "mine.jsonl"), tmp_path / "out.jsonl", make_console())
    assert [file.name for file in tmp_path.glob("out*")] == []


def test_the_yaml_that_trains_a_reward_model_means_what_it_trains(
    reward_folder: Path, tmp_path: Path
) -> None:
    file = tmp_path / "reward.yaml"
    keys = f"model_name_or_path: m\nstage: rm\ndo_train: true\ndataset: d\noutput_dir: {reward_folder}\n"
    file.write_text(keys)
    config = read_use_config(str(file), ["cutoff_len=99"], SCORING).config
    assert (config.model.model_name_or_path, config.data.cutoff_len) == (str(reward_folder), 99)
    file.write_text(keys.replace(str(reward_folder), str(tmp_path / "absent")))
    with pytest.raises(UserError, match=r"a reward model in .*absent, which is not there: prefkit train"):
        read_use_config(str(file), [], SCORING)
