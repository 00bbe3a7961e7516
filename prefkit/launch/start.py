"""From a plan to processes, and from their end to one message and one exit code."""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from prefkit.config.errors import UserError
from prefkit.config.schema import RunConfig
from prefkit.launch.failure import as_shell, describe, exit_code, find_first, full_story
from prefkit.launch.plan import Devices, Launch
from prefkit.launch.ranks import Ranks, own_command
from prefkit.runs.record import RECORD_FILE
from prefkit.train.launched import NODE, free_port
from prefkit.train.place import FAILURE_LOG, output_path

_SHOW_CURSOR = "\x1b[?25h"
_STARTED = "PREFKIT_LAUNCH_STARTED"  # when the first of all attempts began, for those that torchrun starts
_RESTARTED = "TORCHELASTIC_RESTART_COUNT"
_TO_SAVE = "600"
_ELASTIC_SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGUSR1"


def count_devices() -> Devices:
    """The accelerators here. It starts none of them, so that others may."""
    import torch

    visible = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if not torch.backends.cuda.is_built() or not named or visible > named.count(","):
        return Devices(visible, visible)
    return Devices(visible, _count_present())


def _count_present() -> int:
    """GPUs whatever CUDA_VISIBLE_DEVICES says, which CUDA reads once in a process."""
    import subprocess

    environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    code = "import torch; print(torch.cuda.device_count())"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    return int(done.stdout) if done.returncode == 0 else 0


def count_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def launch(plan: Launch, config: RunConfig, file: Path, overrides: Sequence[str]) -> int:
    """Train in several processes, again as often as the plan allows; the exit code.

    Raises `UserError` where the config is no file that each of them can read.
    """
    if not file.is_file():
        raise UserError(f"{file}: several processes read it, one after the other; write it to a file")
    if plan.meeting.rendezvous:
        return _run_torchrun(plan, file, overrides)
    is_again = int(os.environ.get(_RESTARTED, 0)) > 0 and NODE in os.environ
    began = float(os.environ.get(_STARTED, time.time()))
    left = plan.restarts
    while True:
        more = keys_that_go_on(config, began) if is_again else []
        code, may_go_on = _attempt(plan, config, own_command(["train", str(file), *overrides, *more]))
        if not (left and may_go_on):
            return code
        print(
            f"Starting all again, from the newest checkpoint; {left - 1} restarts are left.", file=sys.stderr
        )
        is_again, left = True, left - 1


def keys_that_go_on(config: RunConfig, began: float) -> list[str]:
    """Keys for another attempt: it goes on with what this launch has begun, and not with an older run."""
    record = output_path(config) / RECORD_FILE
    if not record.exists() or record.stat().st_mtime < began:
        return []
    return ["overwrite_output_dir=false", "resume_from_checkpoint=null"]


def _attempt(plan: Launch, config: RunConfig, command: Sequence[str]) -> tuple[int, bool]:
    """Start all, and wait: the exit code, and whether it may end otherwise when it is tried again."""
    place = output_path(config) / _log_name(plan)
    place.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(prefix="prefkit-") as name:
        folder = Path(name)
        ranks = Ranks(plan, command, folder)
        ranks.wait()
        ended = ranks.ended
        if not any(one.code for one in ended.values()):
            return 0, False
        if sys.stdout.isatty():
            print(_SHOW_CURSOR, end="", flush=True)
        first = find_first(ended)
        code = exit_code(first, ranks.stopped_by)
        if first is None or code == 128 + ranks.stopped_by:
            if 0 not in ended or ended[0].code < 0:  # otherwise number 0 has said so
                print(f"Ended by {signal.Signals(ranks.stopped_by).name}.", file=sys.stderr)
            return code, False
        log = None if first.is_users else _write_log(place, "".join(full_story(ended, folder)))
        print(describe(first, ended, plan.world, folder, log), file=sys.stderr)
        return code, not (first.is_users or ranks.stopped_by)


def _log_name(plan: Launch) -> str:
    """Each machine writes one, perhaps into the same folder."""
    stem, _, suffix = FAILURE_LOG.rpartition(".")
    return f"{stem}-{plan.meeting.node}.{suffix}" if plan.meeting.max_nodes > 1 else FAILURE_LOG


def _write_log(place: Path, text: str) -> Path:
    """Write what processes left behind; to another folder where that fails, for want of space perhaps."""
    try:
        place.write_text(text, "utf-8")
    except OSError:
        descriptor, name = tempfile.mkstemp(prefix="prefkit-", suffix=".log", text=True)
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            stream.write(text)
        return Path(name)
    return place


def _run_torchrun(plan: Launch, file: Path, overrides: Sequence[str]) -> int:
    """Have torch's elastic agent start one process here, which starts the others; the exit code."""
    level = os.environ.get("LOGLEVEL")
    os.environ["LOGLEVEL"] = "CRITICAL"  # read as its loggers are made
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    del os.environ["LOGLEVEL"]
    if level is not None:
        os.environ["LOGLEVEL"] = level
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ |= {NODE: str(plan.processes), _STARTED: str(time.time())}
    os.environ.setdefault("OMP_NUM_THREADS", str(plan.threads))
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", _TO_SAVE)  # seconds after a signal
    meeting = plan.meeting
    config = LaunchConfig(
        min_nodes=meeting.min_nodes,
        max_nodes=meeting.max_nodes,
        nproc_per_node=1,
        run_id=meeting.rendezvous,
        rdzv_backend="c10d",
        rdzv_endpoint=f"{meeting.address}:{meeting.port or free_port()}",
        max_restarts=plan.restarts,
        signals_to_handle=_ELASTIC_SIGNALS,
        logs_specs=DefaultLogsSpecs(log_dir=os.devnull),
    )
    command = own_command(["train", str(file), *overrides])
    try:
        elastic_launch(config, command[0])(*command[1:])
    except ChildFailedError as error:
        return as_shell(min(error.failures.values(), key=lambda failure: failure.timestamp).exitcode)
    except SignalException as error:
        return 128 + error.sigval
    return 0
