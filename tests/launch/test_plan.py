"""What each environment asks for, and every variable that is wrong."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from prefkit.config.errors import UserError
from prefkit.launch.plan import Alone, Devices, Launch, Member, make_plan, rank_of
from prefkit.launch.variables import Meeting

CPU, ONE, FOUR = Devices(), Devices(1, 1), Devices(4, 4)
FORCE = {"FORCE_TORCHRUN": "1"}
TWO_NODES = {"NNODES": "2", "MASTER_ADDR": "10.0.0.5", "MASTER_PORT": "29500"}
SLURM = {
    "SLURM_JOB_ID": "1234567",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_NTASKS": "4",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
}
A_TASK_EACH = {"SLURM_PROCID": "1", "SLURM_LOCALID": "0", "SLURM_STEP_NUM_TASKS": "2"}
A_TASK_EACH = SLURM | A_TASK_EACH | {"SLURM_STEP_TASKS_PER_NODE": "1(x2)"}


def plan(environment: dict[str, str], devices: Devices = CPU, cores: int = 8) -> Any:
    return make_plan(environment, lambda: devices, cores)


def started(environment: dict[str, str], devices: Devices = CPU, processes: int = 1, **meeting: Any) -> None:
    found = plan(environment, devices)
    assert isinstance(found, Launch)
    assert found.processes == processes and found.meeting == replace(Meeting(), **meeting)


@pytest.mark.parametrize("devices", [CPU, ONE])
def test_nothing_asked_for(devices: Devices) -> None:
    for environment in ({}, {"FORCE_TORCHRUN": "0"}, {"NNODES": "1"}, {"NPROC_PER_NODE": "1"}):
        assert plan(environment, devices) == Alone()
    for environment in ({"RANK": "1"}, {"WORLD_SIZE": "2"}, {"MASTER_ADDR": "a", "MASTER_PORT": "1"}):
        assert plan(environment, devices) == Alone()


@pytest.mark.parametrize("value", ["1", "true", "True", "Y", "yes", "ON"])
def test_forced(value: str) -> None:
    started({"FORCE_TORCHRUN": value}, CPU, 1)
    started({"FORCE_TORCHRUN": value}, ONE, 1)
    started({"FORCE_TORCHRUN": value, "NPROC_PER_NODE": "2"}, CPU, 2)


def test_as_many_processes_as_gpus_unless_said() -> None:
    started({}, FOUR, 4)
    started(FORCE, FOUR, 4)
    started({"NPROC_PER_NODE": "3"}, FOUR, 3)
    started({"NPROC_PER_NODE": "2"}, CPU, 2)
    started({"FORCE_TORCHRUN": "1", "NPROC_PER_NODE": ""}, FOUR, 4)
    started({"NPROC_PER_NODE": "1"}, FOUR, 1)


def test_what_is_said_of_it() -> None:
    said = {
        "(NPROC_PER_NODE), each with 4 threads.": plan({"NPROC_PER_NODE": "2"}),
        "Starting 1 process on this machine (no gpu here; NPROC_PER_NODE=2 would start two), with 8": plan(
            FORCE
        ),
        "Starting 4 processes on this machine (4 GPUs are visible), each with 2 threads.": plan({}, FOUR),
        "machine, number 1 of 2 that meet at 10.0.0.5:29500 (1 GPU is": plan(
            TWO_NODES | {"NODE_RANK": "1"}, ONE
        ),
        "as soon as 1 to 2 machines have met": plan(
            TWO_NODES | {"RDZV_ID": "x", "MIN_NNODES": "1", "MAX_NNODES": "2"}, FOUR
        ),
    }
    for text, found in said.items():
        assert text.lower() in found.describe().lower()


def test_threads_are_a_share_of_the_cores_unless_said() -> None:
    assert plan({"NPROC_PER_NODE": "3"}, cores=8).threads == 2
    assert plan({"NPROC_PER_NODE": "16"}, cores=8).threads == 1
    assert plan({"NPROC_PER_NODE": "2", "OMP_NUM_THREADS": "7"}).threads == 7


def test_several_machines() -> None:
    where = {"max_nodes": 2, "address": "10.0.0.5", "port": 29500}
    started(TWO_NODES, FOUR, 4, min_nodes=2, **where)
    started(TWO_NODES | {"NODE_RANK": "1"}, ONE, 1, node=1, min_nodes=2, **where)
    found = plan(TWO_NODES | {"NODE_RANK": "1", "NPROC_PER_NODE": "2"})
    assert found.world == 4 and list(found.ranks) == [2, 3]
    elastic = {"RDZV_ID": "job", "MASTER_ADDR": "10.0.0.5", "MASTER_PORT": "29500"}
    started(elastic | {"MIN_NNODES": "1", "MAX_NNODES": "2"}, ONE, 1, rendezvous="job", **where)
    started(elastic | {"NNODES": "2"}, ONE, 1, min_nodes=2, rendezvous="job", **where)
    started(elastic | {"NNODES": "1", "MAX_NNODES": "2"}, ONE, 1, rendezvous="job", **where)
    started({"RDZV_ID": "job"}, CPU, 1, rendezvous="job")
    assert plan({"MAX_RESTARTS": "2"}).restarts == 2


WRONG = [
    ({"FORCE_TORCHRUN": "maybe"}, CPU, ["FORCE_TORCHRUN=maybe: write 1"]),
    ({"NPROC_PER_NODE": "two"}, CPU, ["NPROC_PER_NODE=two: write a whole number from 1"]),
    ({"NPROC_PER_NODE": "0"}, CPU, ["NPROC_PER_NODE=0"]),
    ({"NPROC_PER_NODE": "8"}, FOUR, ["NPROC_PER_NODE=8: each process takes a GPU, and 4 are visible"]),
    ({"NNODES": "2"}, ONE, ["MASTER_ADDR: absent", "MASTER_PORT: absent"]),
    (TWO_NODES | {"NODE_RANK": "2"}, ONE, ["NODE_RANK=2: NNODES=2 machines count from 0 to 1"]),
    (TWO_NODES | {"MASTER_PORT": "99999"}, ONE, ["MASTER_PORT=99999: write a whole number from 1 to 65535"]),
    (
        {"MIN_NNODES": "1", "MAX_NNODES": "2"},
        ONE,
        ["MIN_NNODES=1: it needs RDZV_ID", "MAX_NNODES=2: it needs"],
    ),
    (
        TWO_NODES | {"RDZV_ID": "x", "MIN_NNODES": "3", "MAX_NNODES": "2"},
        ONE,
        ["MIN_NNODES=3: it is more than"],
    ),
    ({"MAX_RESTARTS": "-1"}, CPU, ["MAX_RESTARTS=-1: write a whole number from 0"]),
    (
        {"CUDA_VISIBLE_DEVICES": "0,7"},
        Devices(1, 4),
        ["CUDA_VISIBLE_DEVICES=0,7: of these 2, 1 can be used; here are GPUs 0 to 3"],
    ),
    (
        {
            "NNODES": "x",
            "NPROC_PER_NODE": "y",
            "MASTER_PORT": "z",
            "FORCE_TORCHRUN": "no way",
            "MAX_RESTARTS": "1.5",
        },
        CPU,
        ["NNODES=x", "NPROC_PER_NODE=y", "MASTER_PORT=z", "FORCE_TORCHRUN=no way", "MAX_RESTARTS=1.5"],
    ),
    (SLURM | {"NPROC_PER_NODE": "4"}, CPU, ["NPROC_PER_NODE=4: srun has started 2 processes"]),
]


@pytest.mark.parametrize(("environment", "devices", "parts"), WRONG)
def test_every_variable_that_is_wrong_is_named(
    environment: dict[str, str], devices: Devices, parts: list[str]
) -> None:
    with pytest.raises(UserError) as error:
        plan(environment, devices)
    lines = str(error.value).splitlines()[1:]
    assert len(lines) == len(parts)
    for part in parts:
        assert any(line.strip().startswith(part) for line in lines), part


@pytest.mark.parametrize("value", ["0,1,2,3", "GPU-8932f937"])
def test_gpus_that_are_named_where_there_is_none(value: str) -> None:
    (note,) = plan({"CUDA_VISIBLE_DEVICES": value}).notes
    assert note == f"CUDA_VISIBLE_DEVICES={value}: there is no GPU here, so it has no effect."
    assert plan({"CUDA_VISIBLE_DEVICES": value} | FORCE).notes == (note,)
    for hidden in ("", "-1"):
        assert plan({"CUDA_VISIBLE_DEVICES": hidden}, Devices(0, 4)) == Alone()


def test_a_rank_stays_one() -> None:
    """Of torchrun, deepspeed or accelerate; nothing is counted, and FORCE_TORCHRUN starts none again."""

    def count() -> Devices:
        raise AssertionError

    ranks = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}
    assert make_plan(ranks | FORCE | {"NPROC_PER_NODE": "nonsense"}, count, 2) == Member()
    del ranks["LOCAL_RANK"]
    assert make_plan(ranks, count, 2) == Member({"LOCAL_RANK": "0"})
    assert rank_of(ranks) == 1 and rank_of({}) == 0


def test_one_process_of_accelerate_stays_one() -> None:
    launched = {"ACCELERATE_DYNAMO_USE_FULLGRAPH": "False"}
    assert plan(launched, FOUR) == Alone()
    (note,) = plan(launched | {"MASTER_PORT": "29500"}, CPU).notes
    assert "accelerate launch starts one process on a CPU" in note
    started(launched | {"NPROC_PER_NODE": "2"}, FOUR, 2)


def test_a_task_of_srun() -> None:
    found = plan(SLURM, FOUR)
    assert found == Member(
        {
            "RANK": "3",
            "WORLD_SIZE": "4",
            "LOCAL_RANK": "1",
            "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "gpu07",
            "MASTER_PORT": str(10000 + 12345670 % 20000),
            "OMP_NUM_THREADS": "4",
        }
    )
    assert rank_of(SLURM) == 3
    given = {"MASTER_ADDR": "me", "MASTER_PORT": "1", "OMP_NUM_THREADS": "2"}
    assert not plan(SLURM | given, FOUR).variables.keys() & given.keys()
    alone = plan(SLURM | {"SLURM_CPUS_PER_TASK": "6"}, ONE).variables
    assert alone["LOCAL_RANK"] == "0" and alone["OMP_NUM_THREADS"] == "6"
    here = {"SLURM_STEP_NUM_NODES": "1", "SLURM_NODEID": "0", "SLURM_STEP_TASKS_PER_NODE": "4"}
    assert plan(SLURM | here).variables["MASTER_ADDR"] == "127.0.0.1"


def test_a_task_for_each_machine_stands_for_all_of_its_gpus() -> None:
    port = 10000 + 12345670 % 20000
    where = {"node": 1, "min_nodes": 2, "max_nodes": 2, "address": "gpu07", "port": port}
    started(A_TASK_EACH, FOUR, 4, **where)
    started(A_TASK_EACH | {"NPROC_PER_NODE": "2"}, CPU, 2, **where)
    assert plan(A_TASK_EACH, ONE).variables["WORLD_SIZE"] == "2"
    # Whoever numbers machines in words is heard, task of srun or not.
    started(A_TASK_EACH | TWO_NODES, ONE, 1, min_nodes=2, max_nodes=2, address="10.0.0.5", port=29500)


def test_what_is_no_task() -> None:
    batch = {"ENVIRONMENT": "BATCH", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"}
    terminal = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"}
    for environment in (batch, terminal):
        assert plan(environment) == Alone() and rank_of(environment) == 0
        started(environment, FOUR, 4)


def test_a_process_of_mpirun() -> None:
    four = {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4"}
    found = plan(four | {"OMPI_COMM_WORLD_LOCAL_RANK": "3", "OMPI_COMM_WORLD_LOCAL_SIZE": "4"}, FOUR)
    assert found.variables["RANK"] == found.variables["LOCAL_RANK"] == "3"
    assert found.variables["MASTER_ADDR"] == "127.0.0.1"
    spread = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "1"}
    with pytest.raises(UserError, match="MASTER_ADDR: absent"):
        plan(spread)
    assert "MASTER_ADDR" not in plan(spread | {"MASTER_ADDR": "me"}).variables
