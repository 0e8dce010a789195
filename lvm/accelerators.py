"""What runs a model: chips by name, with their peak and their memory, as vendors publish them."""

from __future__ import annotations

import dataclasses
from typing import Any

TERA, GIB = 10**12, 2**30


@dataclasses.dataclass(frozen=True)
class Accelerator:
    """One JAX device of a kind: a chip, or a core of the TPUs whose chips have two (v2, v3).

    Attributes:
      name: as people say it.
      device_kinds: what `jax.Device.device_kind` begins with.
      platform: "tpu" or "gpu".
      peak_flops: dense bfloat16 FLOP/s by the datasheet.
      hbm_bytes: memory.
    """

    name: str
    device_kinds: tuple[str, ...]
    platform: str
    peak_flops: float
    hbm_bytes: int


# Longer device kinds stand before those that they begin with: the first match counts.
ACCELERATORS = (
    Accelerator("v2", ("TPU v2",), "tpu", 22.5 * TERA, 8 * GIB),
    Accelerator("v3", ("TPU v3",), "tpu", 61.5 * TERA, 16 * GIB),
    Accelerator("v4", ("TPU v4",), "tpu", 275 * TERA, 32 * GIB),
    Accelerator("v5e", ("TPU v5 lite", "TPU v5e"), "tpu", 197 * TERA, 16 * GIB),
    Accelerator("v5p", ("TPU v5p", "TPU v5"), "tpu", 459 * TERA, 95 * GIB),
    Accelerator("v6e", ("TPU v6 lite", "TPU v6e"), "tpu", 918 * TERA, 32 * GIB),
    Accelerator("a100-40gb", ("NVIDIA A100-SXM4-40GB", "NVIDIA A100-PCIE-40GB"), "gpu", 312 * TERA, 40 * GIB),
    Accelerator("a100-80gb", ("NVIDIA A100",), "gpu", 312 * TERA, 80 * GIB),
    Accelerator("h100-pcie", ("NVIDIA H100 PCIe",), "gpu", 756 * TERA, 80 * GIB),
    Accelerator("h100", ("NVIDIA H100",), "gpu", 989 * TERA, 80 * GIB),
    Accelerator("h200", ("NVIDIA H200",), "gpu", 989 * TERA, 141 * 10**9),
    Accelerator("b200", ("NVIDIA B200",), "gpu", 2250 * TERA, 180 * 10**9),
)


def of_device(device: Any) -> Accelerator | None:
    """The accelerator that a JAX device is, or None for one that isn't listed (a CPU, say)."""
    for accelerator in ACCELERATORS:
        if device.device_kind.startswith(accelerator.device_kinds):
            return accelerator
    return None


def memory_bytes(device: Any) -> int | None:
    """What programs may use of a device's memory: as its runtime says, else by the table; None if neither does."""
    try:
        limit = (device.memory_stats() or {}).get("bytes_limit")
    except Exception:  # a device that isn't there (a topology's) raises its own runtime's error
        limit = None
    accelerator = of_device(device)
    return limit or (accelerator.hbm_bytes if accelerator else None)
