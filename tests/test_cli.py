"""The command line: some of it as a subprocess, as a user meets it, the rest in forks, which are faster."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import prefkit
from tests.train.forks import FORKS, call

pytestmark = FORKS
BIN = Path(sys.executable).parent


def call_afresh(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "prefkit", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_train(write_config, tmp_path: Path) -> None:
    done = call_afresh("train", write_config(), "pref_loss=ipo", "run_name=two words")
    assert done.returncode == 0, done.stderr
    assert "Reference:" in done.stdout and "adapter_model.safetensors" in done.stdout
    assert done.stderr == ""
    assert "pref_loss: ipo" in (tmp_path / "out" / "config.yaml").read_text()


def test_the_saved_config_trains_again(write_config, tmp_path: Path) -> None:
    assert call("train", write_config()).returncode == 0
    again = call("train", tmp_path / "out" / "config.yaml")
    assert again.returncode == 0 and "is finished" in again.stdout


def test_config_errors_all_at_once_before_torch(write_config) -> None:
    config = write_config(pref_loss="sigmod", pref_bta=0.2, lora_rank=0)
    done = call("train", config, "--learning_rate=1")
    assert done.returncode == 2 and done.stdout == ""
    for part in ("did you mean sigmoid", "did you mean pref_beta", "lora_rank", "write learning_rate=1"):
        assert part in done.stderr
    assert "Traceback" not in done.stderr
    code = f"import sys; sys.argv = ['prefkit', 'train', {str(config)!r}]\nfrom prefkit.cli import main\n"
    code += "try: main()\nfinally: assert not {'torch', 'transformers', 'rich.console'} & sys.modules.keys()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr


def test_data_errors_name_file_and_row(write_config, dataset_dir: Path) -> None:
    (dataset_dir / "pairs.json").write_text('[{"instruction": "Q", "chosen": "a"}]')
    done = call("train", write_config())
    assert done.returncode == 1
    assert "pairs.json:1: column 'rejected' is missing" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("name", ["prefkit", "llamafactory-cli", "lmf"])
def test_console_scripts(name: str) -> None:
    done = subprocess.run([BIN / name, "version"], capture_output=True, text=True)
    assert done.stdout.strip() == f"prefkit {prefkit.__version__}"


def test_help_names_the_verbs() -> None:
    for words in (["--help"], ["help"]):
        done = call_afresh(*words)
        assert done.returncode == 0
        assert all(verb in done.stdout for verb in ("train", "version", "env"))


def test_keys_are_explained_without_torch() -> None:
    done = call("keys", "pref_beta")
    assert done.returncode == 0 and "  type          float, 0 < x\n" in done.stdout
    done = call("keys", "zzzz")
    assert done.returncode == 1 and done.stderr.startswith("error: no key has zzzz in its name")
    code = "import sys; sys.argv = ['prefkit', 'keys']\nfrom prefkit.cli import main\n"
    code += "try: main()\nfinally: assert not {'torch', 'transformers', 'rich.console'} & sys.modules.keys()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "learning_rate" in done.stdout, done.stderr


def test_env() -> None:
    done = call_afresh("env")
    assert done.returncode == 0 and "transformers" in done.stdout and "python" in done.stdout


@pytest.mark.parametrize("verb", ["webchat", "webui", "eval"])
def test_verbs_of_other_tools_say_what_to_use(verb: str) -> None:
    done = call(verb, "x.yaml")
    assert done.returncode != 0 and f"prefkit has no `{verb}`" in done.stderr


def test_an_unknown_verb() -> None:
    done = call_afresh("trian", "x.yaml")
    assert done.returncode == 2 and "No such command 'trian'" in done.stderr


def test_a_missing_file() -> None:
    done = call("train", "nowhere.yaml")
    assert done.returncode == 2 and "nowhere.yaml" in done.stderr


@pytest.fixture
def trained(write_config, tmp_path: Path) -> Path:
    """A folder with a trained adapter."""
    done = call("train", write_config())
    assert done.returncode == 0, done.stderr
    return tmp_path / "out"


def test_export_chat_and_their_errors(trained: Path, tmp_path: Path) -> None:
    done = call("export", trained, f"export_dir={tmp_path / 'model'}")
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert "probe rows agree" in done.stdout and "chat" in done.stdout
    for source in (trained, tmp_path / "model"):
        done = call("chat", source, "max_new_tokens=4", "temperature=0", stdin="Hi\n/exit\n")
        assert done.returncode == 0 and done.stderr == "", done.stderr
    done = call("export", trained, "export_dri=x")
    assert done.returncode == 2 and "did you mean export_dir" in done.stderr
    done = call("export", tmp_path / "nothing.yaml")
    assert done.returncode == 1 and "nothing.yaml does not exist" in done.stderr
    done = call("chat", trained, f"model_name_or_path={tmp_path}")
    assert done.returncode == 1 and "has no config.json" in done.stderr and "Traceback" not in done.stderr


def test_api_listens_to_this_machine_alone(trained: Path) -> None:
    done = call("api", trained, "--host", "0.0.0.0", "--port", "0")
    assert done.returncode == 1 and "token" in done.stderr and "Traceback" not in done.stderr
