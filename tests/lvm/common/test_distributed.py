"""Joining the processes of a run, by the environment that a launcher or a cluster sets."""

import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from lvm.common import distributed
from lvm.common.distributed import DistributedConfig
from lvm.common.errors import EXIT_ALONE, UserError
from lvm.launch.local import free_port

STEP = {"SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_STEP_NODELIST": "node[1-2]"}
LAUNCHED = {distributed.COORDINATOR: "host:1", distributed.NUM_PROCESSES: "2", distributed.PROCESS_ID: "1"}


@pytest.fixture
def joined(monkeypatch):
    """Options of each call of `jax.distributed.initialize`, in an environment without a cluster."""
    calls = []
    for name in list(os.environ):
        if name.startswith(("SLURM_", "LVM_", "TPU_", "MEGASCALE_")) or name == "grpc_proxy":
            monkeypatch.delenv(name)
    monkeypatch.setattr(jax.distributed, "initialize", lambda **options: calls.append(options))
    monkeypatch.setattr(distributed, "set_process", lambda index, count: None)
    yield calls
    os.environ.pop("grpc_proxy", None)


@pytest.mark.parametrize(("variables", "count"), [({}, 0), (STEP, 1), (LAUNCHED, 1)])
def test_join_follows_environment(joined, monkeypatch, variables, count):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    distributed.join(DistributedConfig())
    assert len(joined) == count
    if variables == LAUNCHED:
        assert (joined[0]["coordinator_address"], joined[0]["process_id"]) == ("host:1", 1)
    assert dict(os.environ).get("grpc_proxy") == ("" if count else None)  # processes reach each other without a proxy


def test_batch_script_without_srun_is_one_process(joined, monkeypatch, caplog):
    monkeypatch.setenv("SLURM_NTASKS", "2")
    monkeypatch.setenv("SLURM_PROCID", "0")
    distributed.join(DistributedConfig())
    assert joined == []
    assert "SLURM_NTASKS=2" in caplog.text
    assert "srun" in caplog.text


@pytest.mark.parametrize("variables", [{distributed.NUM_PROCESSES: "two"}, {distributed.PROCESS_ID: ""}])
def test_join_refuses_malformed_launcher_variables(joined, monkeypatch, variables):
    for name, value in (LAUNCHED | variables).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=next(iter(variables))):
        distributed.join(DistributedConfig())


LATE = """
import sys, time
from lvm.common import distributed
time.sleep(float(sys.argv[1]))
distributed.join(distributed.DistributedConfig(initialization_timeout=int(sys.argv[2])))
"""


def join_late(seconds, timeout, processes):
    """Exit codes and output of two processes, of which the second is late."""
    ranks = []
    for rank in range(processes):
        variables = {distributed.COORDINATOR: f"localhost:{free_port()}" if not ranks else ranks[0].args[-1]}
        variables |= {distributed.NUM_PROCESSES: "2", distributed.PROCESS_ID: str(rank), "JAX_PLATFORMS": "cpu"}
        arguments = [str(seconds * rank), str(timeout), variables[distributed.COORDINATOR]]
        command = [sys.executable, "-c", LATE, *arguments]
        ranks.append(subprocess.Popen(command, env={**os.environ, **variables}, stderr=subprocess.PIPE, text=True))
    errors = [rank.communicate()[1] for rank in ranks]
    return [rank.returncode for rank in ranks], errors


def test_join_alone_exits_with_a_code_of_its_own():
    codes, errors = join_late(0, 2, processes=1)
    assert codes == [EXIT_ALONE]
    assert errors[0].startswith("error: the other processes of the run have not joined in 2 s"), errors


@pytest.mark.slow
def test_join_waits_for_a_process_400_s_late():
    codes, errors = join_late(400, 600, processes=2)
    assert codes == [0, 0], errors


def test_join_without_a_cluster_to_detect_is_user_error(joined, monkeypatch):
    def undefined(**options):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", undefined)
    monkeypatch.setenv(distributed.COORDINATOR, "auto")
    with pytest.raises(UserError, match=f"{distributed.COORDINATOR}=auto: .*coordinator_address"):
        distributed.join(DistributedConfig())


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("rows", [1, 4, 5])
def test_map_rows_shares_rows_among_processes(monkeypatch, count, rows):
    """Each process maps its share alone, and all get all rows, in order."""
    values = np.arange(rows * 2).reshape(rows, 2)
    shares: list[np.ndarray] = []
    monkeypatch.setattr(distributed, "_num_processes", lambda: count)
    monkeypatch.setattr(distributed, "gather", lambda share: shares.append(share) or share[None])
    for index in range(count):
        monkeypatch.setattr(jax, "process_index", lambda index=index: index)
        result = distributed.map_rows(lambda x: 10 * x, values)
    if count == 1:  # nothing to gather
        shares.append(result)
    assert len({len(share) for share in shares}) == 1
    np.testing.assert_array_equal(np.concatenate(shares)[:rows], 10 * values)
