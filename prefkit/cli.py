"""The command line: each verb imports what it needs when it runs, so that `--help` needs no torch."""

from __future__ import annotations

import atexit
import os
import re
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from prefkit import __version__
from prefkit.config.errors import UserError
from prefkit.train.launched import end_with_parent, has_starter, is_launched, write_report

if TYPE_CHECKING:
    from prefkit.config.rules import Rules
    from prefkit.config.schema import RunConfig, UseConfig
    from prefkit.serve.assistant import Sampling

app = typer.Typer(
    help="Preference training of language models from one YAML file.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

# Verbs of the tools that people come from, and what to do here.
_ELSEWHERE = {
    "eval": "Set do_eval: true and eval_dataset or val_size in the YAML that trains.",
    "webchat": "There is no web page: `prefkit chat FOLDER` talks in the terminal.",
    "webui": "There is no web page; `prefkit train config.yaml` runs from one YAML file, see docs/keys.md.",
}


@app.command(context_settings={"ignore_unknown_options": True, "allow_extra_args": True})
def train(
    config: Annotated[Path, typer.Argument(help="The YAML or JSON file.", show_default=False)],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[key=value]...", help="Keys to set besides.")
    ] = None,
) -> None:
    """Train as a YAML file says, in a process for each GPU; docs/keys.md lists its keys, docs/distributed.md
    the variables for several processes."""
    from prefkit.config.load import load_config

    loaded = load_config(config, overrides or [])
    from prefkit.train.place import command_that_goes_on, look_ahead

    if _leads() and not has_starter():  # or it has done so
        _say_warnings(loaded.warnings)
        look_ahead(loaded.config, print)
    if (code := _start_several(loaded.config, config, overrides or [])) is not None:
        sys.exit(code)
    _quiet_libraries()

    from prefkit.runs.report import make_console
    from prefkit.train.run import train as run
    from prefkit.train.signals import Interrupted

    console = make_console()
    try:
        run(loaded.config, console)
    except Interrupted as end:
        console.show_cursor()
        if not console.quiet:
            command = command_that_goes_on(loaded.config)
            place = "from there" if end.checkpoint else "from the newest checkpoint, if there is one"
            print(f"\n{end} To go on {place}: {command}.", file=sys.stderr)
        sys.exit(end.exit_code)


@app.command(context_settings={"ignore_unknown_options": True, "allow_extra_args": True})
def check(
    config: Annotated[Path, typer.Argument(help="The YAML or JSON file.", show_default=False)],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[key=value]...", help="Keys to set besides.")
    ] = None,
    memory: Annotated[str | None, typer.Option(help="Memory to fit into, such as 24GB.")] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON object instead of the report.")] = False,
    page: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.html",
            help="Write rows as the model sees them, pictures and tokens, to a page for a browser.",
        ),
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="How many rows --page shows.")] = 5,
) -> None:
    """Tell what a training would do and take; no weights are read. Exits with 3 if it does not fit."""
    from prefkit.config.load import load_config

    loaded = load_config(config, overrides or [])
    if json:
        _say_warnings(loaded.warnings)
    from prefkit.check.memory import parse_size

    budget = parse_size(memory) if memory else None
    _quiet_libraries()

    from prefkit.check.material import read_material
    from prefkit.check.page import check_target, write_page
    from prefkit.check.report import print_report, write_json
    from prefkit.check.run import report_on
    from prefkit.runs.report import make_console

    def say(text: str) -> None:
        print(text, file=sys.stderr)

    if page:
        check_target(page)
    material = read_material(loaded, say)
    if page:
        write_page(material, page, rows)
        say(f"The page of rows is {page}.")
    report = report_on(material, budget, say)
    if json:
        write_json(report, sys.stdout)
    else:
        print_report(make_console(), report)
    if report.memory.fits is False:
        sys.exit(3)


_SOURCE = typer.Argument(
    help="The folder of a run, adapter or model, a Hugging Face id, or a YAML file.", show_default=False
)


@app.command(context_settings={"ignore_unknown_options": True, "allow_extra_args": True})
def export(
    source: Annotated[str, _SOURCE],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[key=value]...", help="Keys, as export_dir=models/mine."),
    ] = None,
) -> None:
    """Merge adapters into their base, and write a model that plain transformers reads."""
    from prefkit.config.uses import EXPORT

    config = _read_use(source, overrides, EXPORT)
    from prefkit.runs.report import make_console
    from prefkit.serve.export import export as run

    console = make_console()
    console.print(f"Loading {config.model.model_name_or_path} ...")
    run(config, console.print)


@app.command(context_settings={"ignore_unknown_options": True, "allow_extra_args": True})
def chat(
    source: Annotated[str, _SOURCE],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[key=value]...", help="Keys, such as temperature=0.")
    ] = None,
) -> None:
    """Talk to a model in the terminal; /help there lists the commands."""
    from prefkit.config.uses import TALKING

    config = _read_use(source, overrides, TALKING)
    from prefkit.runs.report import make_console
    from prefkit.serve.chat import chat as run
    from prefkit.serve.load import load_assistant

    run(load_assistant(config), _sampling(config), make_console())


@app.command(context_settings={"ignore_unknown_options": True, "allow_extra_args": True})
def api(
    source: Annotated[str, _SOURCE],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[key=value]...", help="Keys, such as max_new_tokens=256.")
    ] = None,
    host: Annotated[str, typer.Option(envvar="API_HOST", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(envvar="API_PORT", help="Port to listen on.")] = 8000,
) -> None:
    """Serve a model as OpenAI does: /v1/chat/completions. API_KEY in the environment is the token, if any."""
    from prefkit.config.uses import TALKING

    config = _read_use(source, overrides, TALKING)
    from prefkit.serve.api import check_address, serve
    from prefkit.serve.load import load_assistant

    token = os.environ.get("API_KEY") or None
    check_address(host, token)
    print(f"Loading {config.model.model_name_or_path} ...", flush=True)
    serve(load_assistant(config), _sampling(config), host, port, token, media_hosts=config.data.media_hosts)


@app.command(context_settings={"ignore_unknown_options": True, "allow_extra_args": True})
def score(
    source: Annotated[str, _SOURCE],
    data: Annotated[
        str, typer.Argument(help="A file of rows, or a data set of dataset_info.json.", show_default=False)
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[key=value]...", help="Keys, such as cutoff_len=4096.")
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The file of scores, a line for each row.")
    ] = Path("scores.jsonl"),
) -> None:
    """Score rows with a reward model: prompts with a response, or with chosen and rejected."""
    from prefkit.config.uses import SCORING

    config = _read_use(source, overrides, SCORING)
    from prefkit.runs.report import make_console
    from prefkit.serve.score import score_file

    score_file(config, data, output.expanduser(), make_console())


@app.command(context_settings={"ignore_unknown_options": True, "allow_extra_args": True})
def serve(
    source: Annotated[str, _SOURCE],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[key=value]...", help="Keys, such as cutoff_len=4096.")
    ] = None,
    host: Annotated[str, typer.Option(envvar="API_HOST", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(envvar="API_PORT", help="Port to listen on.")] = 8000,
) -> None:
    """Serve the scores of a reward model: /v1/rewards for messages, /v1/score/evaluation for texts that are
    templated. API_KEY in the environment is the token, if any."""
    from prefkit.config.uses import SCORING

    config = _read_use(source, overrides, SCORING)
    from prefkit.serve.http import check_address
    from prefkit.serve.load import load_scorer
    from prefkit.serve.rewards import serve as run

    token = os.environ.get("API_KEY") or None
    check_address(host, token)
    print(f"Loading {config.model.trained_last} ...", flush=True)
    run(load_scorer(config), host, port, token, config.data.media_hosts)


def _read_use(source: str, overrides: list[str] | None, rules: Rules) -> UseConfig:
    """The config of a use, its warnings said."""
    from prefkit.runs.use import read_use_config

    loaded = read_use_config(source, overrides or [], rules)
    _say_warnings(loaded.warnings)
    _quiet_libraries()
    return loaded.config


def _start_several(config: RunConfig, file: Path, overrides: list[str]) -> int | None:
    """Train in several processes, if there are to be; the exit code, or None where this one trains."""
    from prefkit.launch.plan import Alone, Devices, Launch, Member, make_plan
    from prefkit.launch.start import count_cores, count_devices, launch

    count = Devices if config.training.get("use_cpu") else count_devices
    plan = make_plan(os.environ, count, count_cores())
    if isinstance(plan, Member):
        os.environ.update(plan.variables)
        return None
    for note in plan.notes:
        print(note)
    if isinstance(plan, Alone):
        return None
    assert isinstance(plan, Launch)
    if not has_starter():
        print(plan.describe(), flush=True)
    return launch(plan, config, file, overrides)


def _leads() -> bool:
    """Whether this process speaks for those that it works together with, if any."""
    from prefkit.launch.plan import rank_of

    return rank_of(os.environ) == 0


def _say_warnings(texts: Iterable[str]) -> None:
    for text in texts:
        print(f"warning: {text}", file=sys.stderr)


def _sampling(config: UseConfig) -> Sampling:
    from dataclasses import asdict

    from prefkit.serve.assistant import Sampling

    return Sampling(**asdict(config.generation))


@app.command()
def keys(
    name: Annotated[
        str, typer.Argument(help="A key, or a part of its name; none lists all.", show_default=False)
    ] = "",
) -> None:
    """Say what a key of the YAML does: type, limits, default, and who reads it."""
    from prefkit.config.describe import explain

    print(explain(name))


@app.command()
def version() -> None:
    """Print the version."""
    print(f"prefkit {__version__}")


@app.command()
def env() -> None:
    """Print versions and hardware, for a bug report."""
    import platform

    import torch

    from prefkit.runs.record import library_versions

    facts: dict[str, Any] = {**library_versions(), "python": platform.python_version()}
    facts["platform"] = platform.platform()
    facts["threads"] = torch.get_num_threads()
    facts["accelerators"] = (
        ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())) or "none"
    )
    for name, value in facts.items():
        print(f"{name:14} {value}")


@app.command("help")
def show_help(context: typer.Context) -> None:
    """Show this help."""
    assert context.parent is not None
    print(context.parent.get_help())


def _quiet_libraries() -> None:
    """What libraries say about their own workings is not for the person who trains."""
    import logging

    import torch
    import transformers

    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed, where it is installed, warns without it
    warnings.simplefilter("ignore", FutureWarning)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for name in ("torch", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)


def main() -> None:
    """Entry point of `prefkit`, `llamafactory-cli` and `lmf`."""
    # Before torch is loaded: threads that wait for each other sleep, instead of taking the core that another
    # process, or the thread they wait for, could use.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if len(sys.argv) > 1 and sys.argv[1] in _ELSEWHERE:
        sys.exit(f"prefkit has no `{sys.argv[1]}`. {_ELSEWHERE[sys.argv[1]]}")
    if is_launched():
        end_with_parent()
    if "LOCAL_RANK" in os.environ:  # deepspeed says it once more, before all other arguments
        sys.argv = [word for word in sys.argv if not re.fullmatch(r"--local[_-]rank=\d+", word)]
    try:
        code = _run()
    except KeyboardInterrupt:
        code = 130
    except BaseException as error:
        code = 1
        if is_launched():
            write_report(error)
        elif not _is_rank():
            raise
        else:
            sys.excepthook(*sys.exc_info())
    _leave(code)


def _run() -> int:
    """Run the verb; the exit code."""
    try:
        app()
    except UserError as error:
        if is_launched():
            write_report(error)
        elif error.of_one_rank or _leads():
            print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def _leave(code: int) -> NoReturn:
    """End the process.

    A rank ends without the interpreter's own clearing up: a thread of gloo that still holds a tensor would
    then ask for the lock of an interpreter that is gone, and abort the process after all its work is done.
    """
    if _is_rank():
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _is_rank() -> bool:
    """Whether this process has worked together with others."""
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_available() and distributed.is_initialized()
