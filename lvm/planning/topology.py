"""The devices of a TPU slice that isn't there, as libtpu describes them."""

from __future__ import annotations

import glob
import importlib.util
import os
from typing import Any

import jax

from lvm.common.errors import UserError
from lvm.hardware.accelerators import Slice

INSTALL = "pip install '.[plan]'"
# What libtpu would otherwise ask the machine it is on, and complain at length that it isn't a TPU's.
_ABSENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "TPU_STDERR_LOG_LEVEL": "3",
}
_HOSTS = {1: [1, 1, 1], 4: [2, 2, 1], 8: [2, 4, 1]}  # chips of a host along each dimension
PLANNED = ("v4", "v5e", "v5p", "v6e")


def devices(described: Slice, slices: int = 1) -> list[Any]:
    """The chips of one or several slices; programs can be compiled for them.

    Raises:
      UserError: libtpu isn't installed, or it is of a generation that isn't planned for.
    """
    if described.generation not in PLANNED:
        raise UserError(f"{described.name}: TPUs that are planned for are {', '.join(PLANNED)}")
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(f"planning for TPUs compiles with libtpu, which isn't installed: {INSTALL}")
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # it only compiles: nobody's devices are taken
    if not (glob.glob("/dev/accel*") or glob.glob("/dev/vfio/*")):
        for name, value in _ABSENT.items():
            os.environ.setdefault(name, value)
    jax.config.update("jax_platforms", "cpu")
    from jax.experimental import topologies

    options: dict[str, Any] = {"chips_per_host_bounds": _HOSTS[described.chips_per_host]}
    if slices > 1:
        options["num_slices"] = slices
    pod = described.accelerator.pod
    if pod is not None and pod.chip_config:
        options["chip_config_name"] = pod.chip_config
    found = topologies.get_topology_desc(platform="tpu", topology_name=described.libtpu_name, **options)
    return list(found.devices)
