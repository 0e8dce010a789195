"""Devices of TPU slices that are not attached, as libtpu describes them for ahead-of-time compilation."""

import glob
import importlib.util
import os
from typing import Any

import jax

from lvm.common.errors import UserError
from lvm.hardware.accelerators import Slice

INSTALL = "pip install '.[plan]'"
# Without these, libtpu queries the metadata server and logs at length that this host has no TPU.
_NO_TPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "TPU_STDERR_LOG_LEVEL": "3",
}
_HOST_BOUNDS = {1: [1, 1, 1], 4: [2, 2, 1], 8: [2, 4, 1]}  # chips per host → chips along each dimension
SUPPORTED = ("v4", "v5e", "v5p", "v6e")


def topology_devices(slice_: Slice, slices: int = 1) -> list[Any]:
    """Devices of one or several slices, for which programs can be compiled.

    Raises:
      UserError: libtpu is not installed, or the TPU generation is not supported.
    """
    if slice_.generation not in SUPPORTED:
        raise UserError(f"{slice_.name}: cannot plan for this TPU; use one of {', '.join(SUPPORTED)}")
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(f"planning for TPUs compiles with libtpu, which is not installed: {INSTALL}")
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # compiles only; takes no device from another process
    if not (glob.glob("/dev/accel*") or glob.glob("/dev/vfio/*")):
        for name, value in _NO_TPU_ENVIRONMENT.items():
            os.environ.setdefault(name, value)
    jax.config.update("jax_platforms", "cpu")
    from jax.experimental import topologies

    options: dict[str, Any] = {"chips_per_host_bounds": _HOST_BOUNDS[slice_.chips_per_host]}
    if slices > 1:
        options["num_slices"] = slices
    pod = slice_.accelerator.pod
    if pod is not None and pod.chip_config:
        options["chip_config_name"] = pod.chip_config
    topology = topologies.get_topology_desc(platform="tpu", topology_name=slice_.libtpu_name, **options)
    return list(topology.devices)
