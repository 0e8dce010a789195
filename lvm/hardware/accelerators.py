"""What runs a model: chips by name with their figures as vendors publish them, and slices of them by every name in use.

One slice of 256 chips of TPU v5e is "v5e-256" here, "v5litepod-256" to Google's tools and "v5e:16x16" to libtpu;
`resolve` takes all three.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from typing import Any

from lvm.common.errors import UserError

TERA, GIGA, GIB = 10**12, 10**9, 2**30
_GPUS_A_HOST = 8


@dataclasses.dataclass(frozen=True)
class Pod:
    """What slices a generation of TPUs is had in.

    Attributes:
      accelerator_type_prefix: of a slice, before the hyphen.
      cores_per_chip: cores of a chip where a name's number counts cores, 1 where it counts chips.
      gke_accelerator: value of the node label `cloud.google.com/gke-tpu-accelerator`.
      torus_dimensions: of the torus.
      max_chips: of one slice.
      chips_per_host: in slices of more than one host.
      chip_config: libtpu's name of how a chip's cores are used; "" is its default.
    """

    accelerator_type_prefix: str
    cores_per_chip: int
    gke_accelerator: str
    torus_dimensions: int
    max_chips: int
    chips_per_host: int = 4
    chip_config: str = ""

    def topologies(self) -> list[tuple[int, ...]]:
        """Every slice, by its chips along each dimension, from small to large."""
        found: list[tuple[int, ...]]
        if self.torus_dimensions == 2:
            flat = [(1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16), (16, 32), (32, 32)]
            # The chips of v2 and v3 come by fours, 4 × 2 of them not alone.
            found = [shape for shape in flat if self.cores_per_chip == 1 or shape not in ((1, 1), (2, 4))]
        else:
            # Below one cube of 64 chips a few shapes, above it whole cubes side by side.
            cubes = itertools.combinations_with_replacement(range(4, 25, 4), 3)
            found = [(2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4), *cubes]
        return sorted((s for s in found if math.prod(s) <= self.max_chips), key=lambda s: (math.prod(s), s))


@dataclasses.dataclass(frozen=True)
class Accelerator:
    """One JAX device of a kind: a chip, or a core of the TPUs whose chips have two (v2, v3).

    Attributes:
      name: as people say it.
      device_kinds: what `jax.Device.device_kind` begins with.
      platform: "tpu" or "gpu".
      peak_flops: dense bfloat16 FLOP/s by the datasheet.
      hbm_bytes: memory.
      hbm_bandwidth: bytes/s of that memory.
      link_bandwidth: bytes/s that it receives, and sends at the same time, over all of its links to the chips of its
        slice (ICI) or the GPUs of its host (NVLink): half of what datasheets call bidirectional; 0 is not listed.
      network_bandwidth: the same between slices or hosts, its share of the host's network; 0 is not listed.
      pod: the slices of a TPU.
    """

    name: str
    device_kinds: tuple[str, ...]
    platform: str
    peak_flops: float
    hbm_bytes: int
    hbm_bandwidth: float = 0.0
    link_bandwidth: float = 0.0
    network_bandwidth: float = 0.0
    pod: Pod | None = None


# TPUs: cloud.google.com/tpu/docs/{v2,v3,v4,v5e,v5p,v6e}: HBM; "Interchip Interconnect BW" 2400 (v4), 1600 (v5e), 4800
# (v5p) and 3200 (v6e) Gbps; data center network of a pod divided by its chips (v5e, v6e) or of a chip (v5p). GPUs:
# NVIDIA's datasheets, NVLink halved; the network is that of DGX systems, a port of 200 (A100) or 400 Gbps a GPU.
# Longer device kinds stand before those that they begin with: the first match counts.
ACCELERATORS = (
    Accelerator(
        "v2", ("TPU v2",), "tpu", 22.5 * TERA, 8 * GIB, 350 * GIGA,
        pod=Pod("v2", 2, "", 2, 256),
    ),
    Accelerator(
        "v3", ("TPU v3",), "tpu", 61.5 * TERA, 16 * GIB, 450 * GIGA,
        pod=Pod("v3", 2, "tpu-v3-slice", 2, 1024),
    ),
    Accelerator(
        "v4", ("TPU v4",), "tpu", 275 * TERA, 32 * GIB, 1200 * GIGA, 300 * GIGA,
        pod=Pod("v4", 2, "tpu-v4-podslice", 3, 4096, chip_config="megacore"),
    ),
    Accelerator(
        "v5e", ("TPU v5 lite", "TPU v5e"), "tpu", 197 * TERA, 16 * GIB, 819 * GIGA, 200 * GIGA, 3.125 * GIGA,
        pod=Pod("v5litepod", 1, "tpu-v5-lite-podslice", 2, 256),
    ),
    Accelerator(
        "v5p", ("TPU v5p", "TPU v5"), "tpu", 459 * TERA, 95 * GIB, 2765 * GIGA, 600 * GIGA, 6.25 * GIGA,
        pod=Pod("v5p", 2, "tpu-v5p-slice", 3, 6144),
    ),
    Accelerator(
        "v6e", ("TPU v6 lite", "TPU v6e"), "tpu", 918 * TERA, 32 * GIB, 1600 * GIGA, 400 * GIGA, 12.5 * GIGA,
        pod=Pod("v6e", 1, "tpu-v6e-slice", 2, 256),
    ),
    Accelerator(
        "a100-40gb", ("NVIDIA A100-SXM4-40GB", "NVIDIA A100-PCIE-40GB"), "gpu", 312 * TERA, 40 * GIB,
        1555 * GIGA, 300 * GIGA, 25 * GIGA,
    ),
    Accelerator(
        "a100-80gb", ("NVIDIA A100",), "gpu", 312 * TERA, 80 * GIB, 2039 * GIGA, 300 * GIGA, 25 * GIGA
    ),
    Accelerator("h100-pcie", ("NVIDIA H100 PCIe",), "gpu", 756 * TERA, 80 * GIB, 2000 * GIGA, 64 * GIGA, 25 * GIGA),
    Accelerator("h100", ("NVIDIA H100",), "gpu", 989 * TERA, 80 * GIB, 3350 * GIGA, 450 * GIGA, 50 * GIGA),
    Accelerator("h200", ("NVIDIA H200",), "gpu", 989 * TERA, 141 * 10**9, 4800 * GIGA, 450 * GIGA, 50 * GIGA),
    Accelerator("b200", ("NVIDIA B200",), "gpu", 2250 * TERA, 180 * 10**9, 8000 * GIGA, 900 * GIGA, 50 * GIGA),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Slice:
    """Chips that are had together: a slice of a TPU pod, or GPUs.

    Attributes:
      accelerator: the kind.
      chips, hosts, chips_per_host: how many; `chips` is `hosts` × `chips_per_host`.
      shape: chips along each dimension of the torus; () for GPUs.
    """

    accelerator: Accelerator
    chips: int
    hosts: int
    chips_per_host: int
    shape: tuple[int, ...] = ()

    @property
    def generation(self) -> str:
        return self.accelerator.name

    @property
    def topology(self) -> str:
        """`16x16`, as GKE's label `gke-tpu-topology` has it; "" for GPUs."""
        return "x".join(map(str, self.shape))

    @property
    def link_bandwidth(self) -> float:
        """Bytes/s that a chip receives from the others; between GPUs of several hosts, by the hosts' network."""
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
        """`v5litepod-256`, as `gcloud` takes it; "" for GPUs."""
        pod = self.accelerator.pod
        return f"{pod.accelerator_type_prefix}-{self.chips * pod.cores_per_chip}" if pod else ""

    @property
    def name(self) -> str:
        """`v5e-256`: the generation, and what Google counts in its names (cores on v2, v3, v4 and v5p)."""
        pod = self.accelerator.pod
        return f"{self.generation}-{self.chips * (pod.cores_per_chip if pod else 1)}"


def resolve(name: str) -> Slice:
    """The slice of a name: `v5e-256`, `v5litepod-256`, `v5e:16x16`; of GPUs `h100` (one) or `h100-8`.

    Raises:
      UserError: an unknown kind of chip, or a slice that doesn't exist; says the nearest that does.
    """
    kind, mark, size = re.fullmatch(r"(.*?)(?:(:|-)([\dx]+))?", name.strip().lower()).groups()  # type: ignore[union-attr]
    found = [a for a in ACCELERATORS if kind in (a.name, a.pod.accelerator_type_prefix if a.pod else a.name)]
    if not found:
        kinds = ", ".join(a.name for a in ACCELERATORS)
        raise UserError(
            f"{name}: no such accelerator; there are {kinds}, as in v5e-256, v5litepod-256 or v5e:16x16"
        )
    accelerator = found[0]
    if accelerator.pod is None:
        return _gpus(accelerator, name, mark, size)
    shape: tuple[int, ...] | None = None
    wanted: float
    if mark == ":" and re.fullmatch(r"\d+(x\d+)+", size):
        shape = tuple(map(int, size.split("x")))
        wanted = math.prod(shape)
    elif mark == "-" and size.isdigit():
        wanted = int(size) / accelerator.pod.cores_per_chip
    else:
        example = _slice(accelerator, accelerator.pod.topologies()[-1])
        raise UserError(f"{name}: how many chips? as in {example.name} or {example.libtpu_name}")
    return _find(accelerator, name, shape, wanted)


def slices_of(accelerator: Accelerator) -> list[Slice]:
    """Every slice of a TPU, from small to large; of as many chips, the most cubic one alone."""
    assert accelerator.pod is not None
    by_chips: dict[int, tuple[int, ...]] = {}
    for shape in accelerator.pod.topologies():
        best = by_chips.get(math.prod(shape))
        by_chips[math.prod(shape)] = min(shape, best, key=sum) if best else shape
    return [_slice(accelerator, shape) for shape in by_chips.values()]


def _find(accelerator: Accelerator, name: str, shape: tuple[int, ...] | None, wanted: float) -> Slice:
    assert accelerator.pod is not None
    if shape in accelerator.pod.topologies():
        return _slice(accelerator, shape)
    known = slices_of(accelerator)
    for candidate in known:
        if shape is None and candidate.chips == wanted:
            return candidate
    nearest = min(known, key=lambda s: abs(math.log(s.chips / max(wanted, 0.5))))
    counted = (
        " (the number counts cores, two a chip)" if accelerator.pod.cores_per_chip == 2 and not shape else ""
    )
    raise UserError(
        f"{name}: no such slice{counted}; the nearest is {nearest.name} = {nearest.libtpu_name}, {nearest.chips} chips"
    )


def _slice(accelerator: Accelerator, shape: tuple[int, ...]) -> Slice:
    pod, chips = accelerator.pod, math.prod(shape)
    assert pod is not None
    # Eight chips of v5e and v6e are one host; larger slices have hosts of four.
    alone = 8 if pod.cores_per_chip == 1 else pod.chips_per_host
    chips_per_host = chips if chips <= alone else pod.chips_per_host
    return Slice(accelerator, chips, chips // chips_per_host, chips_per_host, shape)


def _gpus(accelerator: Accelerator, name: str, mark: str | None, size: str | None) -> Slice:
    if mark == ":" or (size and not size.isdigit()):
        raise UserError(f"{name}: GPUs have no topology; say how many, as in {accelerator.name}-8")
    count = int(size or 1)
    per_host = min(count, _GPUS_A_HOST)
    if not count or count % per_host:
        nearest = max(1, round(count / _GPUS_A_HOST)) * _GPUS_A_HOST
        raise UserError(
            f"{name}: hosts have {_GPUS_A_HOST} GPUs; the nearest is {accelerator.name}-{nearest}"
        )
    return Slice(accelerator, count, count // per_host, per_host)


def accelerator_of(device: Any) -> Accelerator | None:
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
    accelerator = accelerator_of(device)
    return limit or (accelerator.hbm_bytes if accelerator else None)
