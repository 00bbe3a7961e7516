"""A config with more lines under it, loaded or refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from prefkit.config import ConfigError, LoadedConfig, load_config
from prefkit.config.checks import TRAINING
from prefkit.config.rules import Rules

MINIMAL = "model_name_or_path: m\nstage: dpo\ndo_train: true\ndataset: pairs\noutput_dir: out\n"


@pytest.fixture
def load(tmp_path: Path):
    """Load MINIMAL with more lines under it."""

    def run(
        lines: str = "", *overrides: str, base: str = MINIMAL, name: str = "run.yaml", rules: Rules = TRAINING
    ) -> LoadedConfig:
        path = tmp_path / name
        path.write_text(base + lines, encoding="utf-8")
        return load_config(path, overrides, rules)

    return run


@pytest.fixture
def problems(load):
    """The problems of MINIMAL with more lines under it."""

    def run(lines: str = "", *overrides: str, base: str = MINIMAL, name: str = "run.yaml") -> list[str]:
        with pytest.raises(ConfigError) as caught:
            load(lines, *overrides, base=base, name=name)
        return caught.value.problems

    return run
