"""What the environment asks for: one process, a place among others, or several to start. No torch here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from prefkit.launch.schedulers import Task, read_task
from prefkit.launch.variables import Meeting, Variables
from prefkit.train.launched import NODE

_BY_ACCELERATE = "ACCELERATE_DYNAMO_USE_FULLGRAPH"  # set by `accelerate launch`, and by nothing else
_ONE_BY_ACCELERATE = (
    "accelerate launch starts one process on a CPU, whatever --num_processes says, unless it has mpirun. "
    "`NPROC_PER_NODE=2 prefkit train ...` starts two."
)


@dataclass(frozen=True)
class Devices:
    """How many accelerators are `visible`, and `present` whatever CUDA_VISIBLE_DEVICES says."""

    visible: int = 0
    present: int = 0


@dataclass(frozen=True)
class Alone:
    """This process trains by itself; `notes` are for the user."""

    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Member:
    """This process is one of several that somebody else has started; `variables` are still to be set."""

    variables: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Launch:
    """Processes to start on this machine, each with so many `threads`; `reason` says why so many."""

    processes: int
    reason: str
    threads: int
    meeting: Meeting = field(default_factory=Meeting)
    restarts: int = 0
    notes: tuple[str, ...] = ()

    @property
    def world(self) -> int:
        """The number of processes on all machines."""
        return self.processes * self.meeting.max_nodes

    @property
    def ranks(self) -> range:
        """The numbers of those on this machine."""
        return range(self.meeting.node * self.processes, (self.meeting.node + 1) * self.processes)

    def describe(self) -> str:
        """What is started, in a sentence."""
        count = "1 process" if self.processes == 1 else f"{self.processes} processes"
        each = "" if self.processes == 1 else "each "
        threads = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        where = f"on this machine{self.meeting.describe()}"
        return f"Starting {count} {where} ({self.reason}), {each}with {threads}."


def make_plan(
    environment: Mapping[str, str], count_devices: Callable[[], Devices], cores: int
) -> Alone | Member | Launch:
    """Read the environment. `count_devices` is called only where the answer depends on it.

    Raises `UserError`, which names every variable that is wrong.
    """
    if NODE in environment:
        return _as_node(environment, cores)
    if "RANK" in environment and "WORLD_SIZE" in environment:
        return Member({} if "LOCAL_RANK" in environment else {"LOCAL_RANK": "0"})
    variables = Variables(environment)
    task = read_task(environment)
    devices = count_devices()
    if task is None or variables.ask_for_nodes():
        return _start(variables, devices, cores, Task())
    processes = variables.number(
        "NPROC_PER_NODE", task.local_size if task.local_size > 1 else devices.visible
    )
    if task.local_size == 1 and processes > 1:  # the task has a machine to itself, with several GPUs
        return _start(variables, devices, cores, task)
    if task.local_size > 1 and processes != task.local_size:
        variables.wrong(
            f"NPROC_PER_NODE={processes}: {task.starter} has started {task.local_size} processes on this "
            "machine; leave it out, or have one task on each machine"
        )
    task.check(variables)
    variables.finish()
    return Member(task.variables(environment, devices.visible, cores))


def rank_of(environment: Mapping[str, str]) -> int:
    """The number of this process among those that somebody else has started; 0 where there are none."""
    if "RANK" in environment:
        return int(environment["RANK"])
    task = read_task(environment)
    return 0 if task is None or Variables(environment).ask_for_nodes() else task.rank


def _as_node(environment: Mapping[str, str], cores: int) -> Launch:
    """What torchrun's process on a machine starts."""
    processes, nodes = int(environment[NODE]), int(environment["WORLD_SIZE"])
    meeting = Meeting(
        int(environment["RANK"]), nodes, nodes, environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
    )
    return Launch(processes, "RDZV_ID", _threads(environment, cores, processes), meeting)


def _start(variables: Variables, devices: Devices, cores: int, task: Task) -> Alone | Launch:
    """Processes to start here, or none where nothing asks for several."""
    notes = variables.check_visible(devices.visible, devices.present)
    processes = variables.number("NPROC_PER_NODE", max(devices.visible, 1), 1)
    if 0 < devices.visible < processes:
        variables.wrong(
            f"NPROC_PER_NODE={processes}: each process takes a GPU, and {devices.visible} are visible"
        )
    meeting = variables.meeting(task)
    restarts = variables.number("MAX_RESTARTS", 0)
    forced = variables.truth("FORCE_TORCHRUN")
    variables.finish()
    environment = variables.environment
    is_given = bool(environment.get("NPROC_PER_NODE"))
    # One process that sees several GPUs would be taken for their owner, and has to be told that it is not.
    several = max(processes, devices.visible) > 1 and (is_given or _BY_ACCELERATE not in environment)
    if not (forced or several or meeting.max_nodes > 1 or meeting.rendezvous or restarts):
        if _BY_ACCELERATE in environment and "MASTER_PORT" in environment and not devices.visible:
            notes += (_ONE_BY_ACCELERATE,)
        return Alone(notes)
    if is_given:
        reason = "NPROC_PER_NODE"
    elif devices.visible:
        reason = "1 GPU is visible" if processes == 1 else f"{processes} GPUs are visible"
    else:
        reason = "no GPU here; NPROC_PER_NODE=2 would start two"
    return Launch(processes, reason, _threads(environment, cores, processes), meeting, restarts, notes)


def _threads(environment: Mapping[str, str], cores: int, processes: int) -> int:
    """Threads of each process: what OMP_NUM_THREADS says, or a share of the cores."""
    given = environment.get("OMP_NUM_THREADS", "")
    return int(given) if given.isdecimal() else max(cores // processes, 1)
