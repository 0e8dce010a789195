"""Accelerators with their published figures, and the slices they are offered in.

A slice of 256 TPU v5e chips is "v5e-256" here, "v5litepod-256" to gcloud and "v5e:16x16" to libtpu; `resolve` accepts
all three.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Sequence
from typing import Any

from lvm.common.errors import UserError

TERA, GIGA, GIB = 1e12, 1e9, 2**30
_GPUS_PER_HOST = 8
_SHAPES_2D = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16), (16, 32), (32, 32))
# From 4 × 4 × 4 on, whole cubes of 64 chips.
_SHAPES_3D = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4), *itertools.combinations_with_replacement(range(4, 25, 4), 3))


@dataclasses.dataclass(frozen=True)
class Pod:
    """Slice shapes and names of a TPU generation."""

    accelerator_type_prefix: str  # of gcloud's accelerator types, before the hyphen
    cores_per_chip: int  # 2 where the number in a slice's name counts cores, 1 where it counts chips
    gke_accelerator: str  # value of the node label `cloud.google.com/gke-tpu-accelerator`
    torus_dimensions: int  # 2 or 3
    max_chips: int  # of one slice
    chips_per_host: int = 4  # in slices of more than one host
    chip_config: str = ""  # libtpu's chip configuration; "" is its default

    def topologies(self) -> list[tuple[int, ...]]:
        """Slice shapes offered (chips along each torus dimension), by size."""
        shapes: Sequence[tuple[int, ...]] = _SHAPES_2D if self.torus_dimensions == 2 else _SHAPES_3D
        # v2 and v3 are offered in multiples of four chips, except 2 × 4.
        excluded = ((1, 1), (2, 4)) if self.cores_per_chip == 2 else ()
        offered = [s for s in shapes if math.prod(s) <= self.max_chips and s not in excluded]
        return sorted(offered, key=lambda s: (math.prod(s), s))


@dataclasses.dataclass(frozen=True)
class Accelerator:
    """One JAX device of a kind: a chip, or a core of two-core chips (TPU v2, v3).

    Attributes:
      link_bandwidth: bytes/s in each direction, over all links to the chips of its slice (ICI) or the GPUs of its host
        (NVLink): half of what datasheets call bidirectional; 0 if not published.
      network_bandwidth: the same between slices or hosts, as a share of the host's network; 0 if not published.
    """

    name: str
    device_kinds: tuple[str, ...]  # prefixes of `jax.Device.device_kind`
    platform: str  # "tpu" or "gpu"
    peak_flops: float  # dense bfloat16 FLOP/s from the datasheet
    hbm_bytes: int
    hbm_bandwidth: float = 0.0  # bytes/s
    link_bandwidth: float = 0.0
    network_bandwidth: float = 0.0
    pod: Pod | None = None  # slices of a TPU; None for GPUs


# TPUs: cloud.google.com/tpu/docs/{v2,v3,v4,v5e,v5p,v6e}: HBM; "Interchip Interconnect BW" 2400 (v4), 1600 (v5e), 4800
# (v5p) and 3200 (v6e) Gbps; data center network per pod divided by its chips (v5e, v6e), or per chip (v5p). GPUs:
# NVIDIA datasheets, NVLink halved; network of DGX systems, one port of 200 (A100) or 400 Gbps per GPU.
# The first match counts: longer device kinds come before their prefixes.
ACCELERATORS = (
    Accelerator("v2", ("TPU v2",), "tpu", 22.5 * TERA, 8 * GIB, 350 * GIGA, pod=Pod("v2", 2, "", 2, 256)),
    Accelerator("v3", ("TPU v3",), "tpu", 61.5 * TERA, 16 * GIB, 450 * GIGA, pod=Pod("v3", 2, "tpu-v3-slice", 2, 1024)),
    Accelerator("v4", ("TPU v4",), "tpu", 275 * TERA, 32 * GIB, 1200 * GIGA, 300 * GIGA,
                pod=Pod("v4", 2, "tpu-v4-podslice", 3, 4096, chip_config="megacore")),
    Accelerator("v5e", ("TPU v5 lite", "TPU v5e"), "tpu", 197 * TERA, 16 * GIB, 819 * GIGA, 200 * GIGA, 3.125 * GIGA,
                pod=Pod("v5litepod", 1, "tpu-v5-lite-podslice", 2, 256)),
    Accelerator("v5p", ("TPU v5p", "TPU v5"), "tpu", 459 * TERA, 95 * GIB, 2765 * GIGA, 600 * GIGA, 6.25 * GIGA,
                pod=Pod("v5p", 2, "tpu-v5p-slice", 3, 6144)),
    Accelerator("v6e", ("TPU v6 lite", "TPU v6e"), "tpu", 918 * TERA, 32 * GIB, 1600 * GIGA, 400 * GIGA, 12.5 * GIGA,
                pod=Pod("v6e", 1, "tpu-v6e-slice", 2, 256)),
    Accelerator("a100-40gb", ("NVIDIA A100-SXM4-40GB", "NVIDIA A100-PCIE-40GB"), "gpu", 312 * TERA, 40 * GIB,
                1555 * GIGA, 300 * GIGA, 25 * GIGA),
    Accelerator("a100-80gb", ("NVIDIA A100",), "gpu", 312 * TERA, 80 * GIB, 2039 * GIGA, 300 * GIGA, 25 * GIGA),
    Accelerator("h100-pcie", ("NVIDIA H100 PCIe",), "gpu", 756 * TERA, 80 * GIB, 2000 * GIGA, 64 * GIGA, 25 * GIGA),
    Accelerator("h100", ("NVIDIA H100",), "gpu", 989 * TERA, 80 * GIB, 3350 * GIGA, 450 * GIGA, 50 * GIGA),
    Accelerator("h200", ("NVIDIA H200",), "gpu", 989 * TERA, 141 * 10**9, 4800 * GIGA, 450 * GIGA, 50 * GIGA),
    Accelerator("b200", ("NVIDIA B200",), "gpu", 2250 * TERA, 180 * 10**9, 8000 * GIGA, 900 * GIGA, 50 * GIGA),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Slice:
    """A slice of a TPU pod, or a number of GPUs."""

    accelerator: Accelerator
    chips: int  # `hosts` × `chips_per_host`
    hosts: int
    chips_per_host: int
    shape: tuple[int, ...] = ()  # chips along each torus dimension; () for GPUs

    @property
    def generation(self) -> str:
        return self.accelerator.name

    @property
    def topology(self) -> str:
        """`16x16`, the value of GKE's label `gke-tpu-topology`; "" for GPUs."""
        return "x".join(map(str, self.shape))

    @property
    def link_bandwidth(self) -> float:
        """Bytes/s that a chip receives from the others; for GPUs on several hosts, over the hosts' network."""
        chip = self.accelerator
        if self.shape or self.hosts == 1:
            return chip.link_bandwidth
        return min(chip.link_bandwidth, self.chips_per_host * chip.network_bandwidth)

    @property
    def libtpu_name(self) -> str:
        """`v5e:16x16`; "" for GPUs."""
        return f"{self.generation}:{self.topology}" if self.shape else ""

    @property
    def accelerator_type(self) -> str:
        """gcloud's accelerator type, `v5litepod-256`; "" for GPUs."""
        pod = self.accelerator.pod
        return f"{pod.accelerator_type_prefix}-{self.chips * pod.cores_per_chip}" if pod else ""

    @property
    def name(self) -> str:
        """`v5e-256`: the generation and gcloud's count (of cores on v2, v3, v4 and v5p, of chips elsewhere)."""
        pod = self.accelerator.pod
        return f"{self.generation}-{self.chips * (pod.cores_per_chip if pod else 1)}"


def resolve(name: str) -> Slice:
    """Parses a slice's name: `v5e-256`, `v5litepod-256`, `v5e:16x16`; for GPUs `h100` (one) or `h100-8`.

    Raises:
      UserError: an unknown accelerator, or a slice that is not offered; names the nearest one that is.
    """
    kind, separator, size = re.fullmatch(r"(.*?)(?:(:|-)([\dx]+))?", name.strip().lower()).groups()  # type: ignore[union-attr]
    matches = [a for a in ACCELERATORS if kind in (a.name, a.pod and a.pod.accelerator_type_prefix)]
    if not matches:
        kinds = ", ".join(a.name for a in ACCELERATORS)
        raise UserError(f"{name}: unknown accelerator; use {kinds}, as in v5e-256, v5litepod-256 or v5e:16x16")
    accelerator = matches[0]
    if accelerator.pod is None:
        return _gpus(accelerator, name, separator, size)
    slices = [_slice(accelerator, shape) for shape in accelerator.pod.topologies()]
    cores_per_chip = accelerator.pod.cores_per_chip
    if separator == ":" and re.fullmatch(r"\d+(x\d+)+", size):
        chips: float = math.prod(map(int, size.split("x")))
        matching = [s for s in slices if s.topology == size]
    elif separator == "-" and size.isdigit():
        chips = int(size) / cores_per_chip
        matching = [s for s in slices_of(accelerator) if s.chips == chips]
    else:
        example = slices[-1]
        raise UserError(f"{name}: the size is missing, as in {example.name} or {example.libtpu_name}")
    if matching:
        return matching[0]
    nearest = min(slices_of(accelerator), key=lambda s: abs(math.log(s.chips / max(chips, 0.5))))
    counts = " (the number counts cores, two per chip)" if separator == "-" and cores_per_chip == 2 else ""
    raise UserError(
        f"{name}: no such slice{counts}; the nearest is {nearest.name} = {nearest.libtpu_name}, {nearest.chips} chips"
    )


def slices_of(accelerator: Accelerator) -> list[Slice]:
    """Slices of a TPU by size; of those with equal chips, only the most cubic."""
    assert accelerator.pod is not None
    by_chips = itertools.groupby(accelerator.pod.topologies(), math.prod)
    return [_slice(accelerator, min(shapes, key=sum)) for _, shapes in by_chips]


def _slice(accelerator: Accelerator, shape: tuple[int, ...]) -> Slice:
    pod, chips = accelerator.pod, math.prod(shape)
    assert pod is not None
    # Eight chips of v5e and v6e are one host; larger slices have hosts of four.
    max_single_host = 8 if pod.cores_per_chip == 1 else pod.chips_per_host
    chips_per_host = chips if chips <= max_single_host else pod.chips_per_host
    return Slice(accelerator, chips, chips // chips_per_host, chips_per_host, shape)


def _gpus(accelerator: Accelerator, name: str, separator: str | None, size: str | None) -> Slice:
    if separator == ":" or (size and not size.isdigit()):
        raise UserError(f"{name}: GPUs have no topology; give their number, as in {accelerator.name}-8")
    count = int(size or 1)
    per_host = min(count, _GPUS_PER_HOST)
    if not count or count % per_host:
        nearest = max(1, round(count / _GPUS_PER_HOST)) * _GPUS_PER_HOST
        raise UserError(f"{name}: hosts have {_GPUS_PER_HOST} GPUs; the nearest is {accelerator.name}-{nearest}")
    return Slice(accelerator, count, count // per_host, per_host)


def accelerator_of(device: Any) -> Accelerator | None:
    """The table's entry for a JAX device; None if it has none (a CPU, for example)."""
    return next((a for a in ACCELERATORS if device.device_kind.startswith(a.device_kinds)), None)


def memory_bytes(device: Any) -> int | None:
    """Memory available to programs on a device: the runtime's limit, else the table's; None if unknown."""
    try:
        limit = (device.memory_stats() or {}).get("bytes_limit")
    except Exception:  # runtimes raise their own errors, for example for the devices of a topology description
        limit = None
    accelerator = accelerator_of(device)
    return limit or (accelerator.hbm_bytes if accelerator else None)
