"""The place of a process that srun or mpirun has started, read from what they set."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from prefkit.launch.variables import HERE, Variables

# Rank, number of ranks, and the same on this machine: of Open MPI, and of MPICH and Intel MPI.
_MPI = (
    (
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
)
_MPI_PORT = 29500
_FIRST_PORT, _PORTS = 10000, 20000  # below those that the system gives to connections


@dataclass(frozen=True)
class Task:
    """A process among others: its number, and where number 0 is; `port` 0 is any."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    node: int = 0
    nodes: int = 1
    address: str = HERE
    port: int = 0
    starter: str = ""
    cores: int = 0

    def check(self, variables: Variables) -> None:
        """Note what this task needs and has not."""
        if not (self.address or variables.environment.get("MASTER_ADDR")):
            variables.wrong(f"MASTER_ADDR: absent; {self.nodes} machines need the address of the first")

    def variables(self, environment: Mapping[str, str], visible: int, cores: int) -> dict[str, str]:
        """What torch.distributed reads, for this task.

        A task that sees one GPU only has number 0 on its machine, which is the number of that GPU.
        """
        found = {
            "RANK": self.rank,
            "WORLD_SIZE": self.size,
            "LOCAL_RANK": 0 if visible == 1 else self.local_rank,
            "LOCAL_WORLD_SIZE": self.local_size,
            "MASTER_ADDR": self.address,
            "MASTER_PORT": self.port,
            "OMP_NUM_THREADS": self.cores or max(cores // self.local_size, 1),
        }
        kept = ("MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")
        return {
            name: str(value) for name, value in found.items() if not (name in kept and environment.get(name))
        }


def read_task(environment: Mapping[str, str]) -> Task | None:
    """The task that this process is, if it is one of several."""
    if (task := _read_slurm(environment)) is not None:
        return task
    for rank, size, local_rank, local_size in _MPI:
        if int(environment.get(size, 1)) > 1:
            local = int(environment.get(local_size, 1))
            number, all_of_them = int(environment[rank]), int(environment[size])
            nodes = max(all_of_them // local, 1)
            address = HERE if nodes == 1 else ""
            here = int(environment.get(local_rank, 0))
            return Task(
                number, all_of_them, here, local, number // local, nodes, address, _MPI_PORT, "mpirun"
            )
    return None


def _read_slurm(environment: Mapping[str, str]) -> Task | None:
    """A task of srun. A batch script is none, although its job has as many: it has no step."""
    of_job = "1" if environment.get("ENVIRONMENT") == "BATCH" else environment.get("SLURM_NTASKS", "1")
    size = int(environment.get("SLURM_STEP_NUM_TASKS", of_job))
    if "SLURM_PROCID" not in environment or size < 2:
        return None
    node = int(environment.get("SLURM_NODEID", 0))
    nodes = int(environment.get("SLURM_STEP_NUM_NODES") or environment.get("SLURM_NNODES") or 1)
    counts = environment.get("SLURM_STEP_TASKS_PER_NODE") or environment.get("SLURM_TASKS_PER_NODE")
    local_sizes = tasks_per_node(counts) if counts else [size // nodes] * nodes
    hosts = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST") or ""
    address = HERE if nodes == 1 else first_host(hosts)
    step = f"{environment.get('SLURM_JOB_ID', '0')}{environment.get('SLURM_STEP_ID', '0')}"
    return Task(
        int(environment["SLURM_PROCID"]),
        size,
        int(environment.get("SLURM_LOCALID", 0)),
        local_sizes[node],
        node,
        nodes,
        address,
        _FIRST_PORT + int(step) % _PORTS,
        "srun",
        int(environment.get("SLURM_CPUS_PER_TASK", 0)),
    )


def first_host(hosts: str) -> str:
    """The first of Slurm's short list of hosts.

    >>> first_host("gpu[08-11,20],me"), first_host("rack[1-2]n[03,07]"), first_host("a-1,b"), first_host("")
    ('gpu08', 'rack1n03', 'a-1', '')
    """
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", hosts)
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first[0] if first else "")


def tasks_per_node(counts: str) -> list[int]:
    """How many tasks each machine has, from Slurm's short list.

    >>> tasks_per_node("4(x2),1")
    [4, 4, 1]
    """
    found = re.findall(r"(\d+)(?:\(x(\d+)\))?", counts)
    return [int(count) for count, times in found for _ in range(int(times or 1))]
