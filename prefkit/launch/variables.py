"""The variables of a launch, by the names that LLaMA-Factory gave them, each checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from prefkit.config.errors import UserError

if TYPE_CHECKING:
    from prefkit.launch.schedulers import Task

_TRUE, _FALSE = {"true", "y", "yes", "on", "1"}, {"false", "n", "no", "off", "0", ""}
_LAST_PORT = 65535
HERE = "127.0.0.1"


@dataclass(frozen=True)
class Meeting:
    """How processes of several machines, or of one, find each other.

    This machine has the number `node`. `port` 0 is any that is free. With `rendezvous`, torchrun agrees with
    the others on who takes part, and on the numbers.
    """

    node: int = 0
    min_nodes: int = 1
    max_nodes: int = 1
    address: str = HERE
    port: int = 0
    rendezvous: str = ""

    def describe(self) -> str:
        """Where others are, as the middle of a sentence; nothing if there are none."""
        nodes = (
            str(self.max_nodes)
            if self.min_nodes == self.max_nodes
            else f"{self.min_nodes} to {self.max_nodes}"
        )
        if self.rendezvous:
            return f", as soon as {nodes} machines have met at {self.address}" if self.max_nodes > 1 else ""
        if self.max_nodes > 1:
            return f", number {self.node} of {nodes} that meet at {self.address}:{self.port}"
        return ""


class Variables:
    """Reads an environment, and notes what is wrong with it until `finish`."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.environment = environment
        self._problems: list[str] = []

    def wrong(self, text: str) -> None:
        """Note something that is wrong; the same only once."""
        if text not in self._problems:
            self._problems.append(text)

    def finish(self) -> None:
        """Raises `UserError` with all that is wrong."""
        if self._problems:
            lines = [f"  {problem}" for problem in self._problems]
            raise UserError("\n".join(["these environment variables cannot be used:", *lines]))

    def ask_for_nodes(self) -> bool:
        """Whether processes are asked for in words, whoever has started this one."""
        names = ("NNODES", "NODE_RANK", "RDZV_ID")
        return self.truth("FORCE_TORCHRUN") or any(self.environment.get(name) for name in names)

    def truth(self, name: str) -> bool:
        """A variable that is true or not."""
        value = self.environment.get(name, "").strip().lower()
        if value not in _TRUE | _FALSE:
            self.wrong(f"{name}={value}: write 1, or leave it out")
        return value in _TRUE

    def number(self, name: str, default: int, least: int = 0, most: int | None = None) -> int:
        """A whole number; the default where it is absent, empty or wrong."""
        text = self.environment.get(name, "").strip()
        if not text:
            return default
        number = int(text) if text.isascii() and text.isdecimal() else -1
        if number < least or (most is not None and number > most):
            limits = f"from {least}" if most is None else f"from {least} to {most}"
            self.wrong(f"{name}={text}: write a whole number {limits}")
            return default
        return number

    def meeting(self, task: Task) -> Meeting:
        """How this machine finds others; what is not said is that of the task which this process is."""
        given = self.environment.get
        nodes = self.number("NNODES", task.nodes, 1)
        rendezvous = given("RDZV_ID", "").strip()
        least = self.number("MIN_NNODES", min(self.number("MAX_NNODES", nodes, 1), nodes), 1)
        most = self.number("MAX_NNODES", max(least, nodes), 1)
        if least > most:
            self.wrong(f"MIN_NNODES={least}: it is more than MAX_NNODES={most}")
        for name in ("MIN_NNODES", "MAX_NNODES"):
            if given(name) and not rendezvous:
                self.wrong(f"{name}={given(name)}: it needs RDZV_ID, the same text on each machine")
        node = task.node
        if not rendezvous:
            least = most = nodes
            node = self.number("NODE_RANK", task.node)
            if node >= nodes:
                self.wrong(f"NODE_RANK={node}: NNODES={nodes} machines count from 0 to {nodes - 1}")
        if most > 1 and task.nodes == 1:
            for name, what in (
                ("MASTER_ADDR", "the address of machine 0"),
                ("MASTER_PORT", "a port of machine 0"),
            ):
                if not given(name):
                    self.wrong(f"{name}: absent; {most} machines need {what}, the same on each")
        port = self.number("MASTER_PORT", task.port, 1, _LAST_PORT)
        return Meeting(node, least, most, given("MASTER_ADDR") or task.address, port, rendezvous)

    def check_visible(self, visible: int, present: int) -> tuple[str, ...]:
        """Whether the GPUs that CUDA_VISIBLE_DEVICES names are there; what to tell the user."""
        text = self.environment.get("CUDA_VISIBLE_DEVICES", "")
        named = [part.strip() for part in text.split(",") if part.strip() not in ("", "-1")]
        if not named:
            return ()
        if not present:
            return (f"CUDA_VISIBLE_DEVICES={text}: there is no GPU here, so it has no effect.",)
        if visible < len(named):
            there = "GPU 0" if present == 1 else f"GPUs 0 to {present - 1}"
            self.wrong(
                f"CUDA_VISIBLE_DEVICES={text}: of these {len(named)}, {visible} can be used; here are {there}"
            )
        return ()
