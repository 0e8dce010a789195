"""Accelerators by device kind, and slices by their names."""

import dataclasses

import jax
import numpy as np
import pytest

from lvm.common.errors import UserError
from lvm.hardware.accelerators import ACCELERATORS, accelerator_of, memory_bytes, resolve, slices_of


@dataclasses.dataclass
class Device:
    device_kind: str
    stats: dict | None = None

    def memory_stats(self):
        if self.stats is None:
            raise RuntimeError("not supported")
        return self.stats


@pytest.mark.parametrize(
    ("kind", "name", "teraflops"),
    [
        ("TPU v4", "v4", 275),
        ("TPU v5 lite", "v5e", 197),
        ("TPU v5", "v5p", 459),
        ("TPU v5p", "v5p", 459),
        ("TPU v6 lite", "v6e", 918),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb", 312),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb", 312),
        ("NVIDIA H100 80GB HBM3", "h100", 989),
        ("NVIDIA H100 PCIe", "h100-pcie", 756),
        ("NVIDIA H200", "h200", 989),
    ],
)
def test_accelerator_of_device_kind(kind, name, teraflops):
    accelerator = accelerator_of(Device(kind))
    assert (accelerator.name, accelerator.peak_flops) == (name, teraflops * 1e12)


def test_accelerator_of_unlisted_devices_is_none():
    assert accelerator_of(jax.devices("cpu")[0]) is None
    assert accelerator_of(Device("TPU v99")) is None


def test_accelerator_of_each_listed_kind():
    for accelerator in ACCELERATORS:
        for kind in accelerator.device_kinds:
            assert accelerator_of(Device(kind)) is accelerator


def test_memory_bytes_prefers_runtime_over_table():
    assert memory_bytes(Device("TPU v4", {"bytes_limit": 31 * 2**30})) == 31 * 2**30
    assert memory_bytes(Device("TPU v4")) == 32 * 2**30
    assert memory_bytes(Device("a toaster")) is None


@pytest.mark.parametrize(
    ("names", "chips", "hosts", "per_host", "gke"),
    [
        (("v5e-256", "v5litepod-256", "v5e:16x16"), 256, 64, 4, "tpu-v5-lite-podslice"),
        (("v4-32", "v4:2x2x4"), 16, 4, 4, "tpu-v4-podslice"),
        (("v4-256", "v4:4x4x8"), 128, 32, 4, "tpu-v4-podslice"),
        (("v5p-128", "v5p:4x4x4"), 64, 16, 4, "tpu-v5p-slice"),
        (("v5p-12288", "v5p:16x16x24"), 6144, 1536, 4, "tpu-v5p-slice"),
        (("v6e-8", "v6e:2x4", "V6E-8"), 8, 1, 8, "tpu-v6e-slice"),
        (("v5litepod-16", "v5e:4x4"), 16, 4, 4, "tpu-v5-lite-podslice"),
        (("v3-8", "v3:2x2"), 4, 1, 4, "tpu-v3-slice"),
    ],
)
def test_resolve_accepts_every_name_of_a_slice(names, chips, hosts, per_host, gke):
    slices = [resolve(name) for name in names]
    assert len(set(slices)) == 1
    first = slices[0]
    assert (first.chips, first.hosts, first.chips_per_host) == (chips, hosts, per_host)
    assert first.accelerator.pod.gke_accelerator == gke
    assert first.libtpu_name in names
    assert resolve(first.accelerator_type) == resolve(first.name) == resolve(first.libtpu_name) == first


def test_resolve_gpus_by_kind_and_number():
    assert (resolve("h100").chips, resolve("h100").topology, resolve("h100").libtpu_name) == (1, "", "")
    a100 = resolve("a100-80gb-16")
    assert (a100.generation, a100.chips, a100.hosts, a100.chips_per_host) == ("a100-80gb", 16, 2, 8)
    # Eight ports of 400 Gbps between hosts are slower than NVLink between GPUs.
    assert resolve("h100-16").link_bandwidth == 400e9 < resolve("h100-8").link_bandwidth


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5e:10x10", "no such slice; .* v5e-128 = v5e:8x16, 128 chips"),
        ("v5litepod-1024", "no such slice; .* v5e-256 = v5e:16x16, 256 chips"),
        ("v4-33", r"no such slice \(.* counts cores.*\); .* v4-32 = v4:2x2x4, 16 chips"),
        ("v4:4x4", "no such slice; .* v4-32 = v4:2x2x4, 16 chips"),
        ("v5p:4x8x4", "no such slice; .* v5p-256 = v5p:4x4x8, 128 chips"),
        ("v4-0", "no such slice .*v4-8"),
        ("v5e", ".* v5e-256 or v5e:16x16"),
        ("v9-8", "unknown accelerator; .*v2, v3, v4, v5e, v5p, v6e, "),
        ("v5e:", "unknown accelerator"),
        ("", "unknown accelerator"),
        ("h100-12", ".*h100-16"),
        ("h100-0", ".*h100-8"),
        ("h100:2x2", ".*no topology.* h100-8"),
    ],
)
def test_resolve_rejects_unknown_and_names_nearest(name, message):
    with pytest.raises(UserError, match=rf"^{name}: {message}"):
        resolve(name)


@pytest.mark.parametrize("name", ["v2", "v3", "v4", "v5e", "v5p", "v6e"])
def test_resolve_inverts_the_names_of_every_slice(name):
    accelerator = next(a for a in ACCELERATORS if a.name == name)
    for s in slices_of(accelerator):
        assert resolve(s.name) == resolve(s.accelerator_type) == resolve(s.libtpu_name) == s
        assert s.chips == s.hosts * s.chips_per_host == np.prod(s.shape)


@pytest.mark.parametrize("name", ["v4", "v5e", "v5p", "v6e"])
def test_slices_are_known_to_libtpu(name):
    pytest.importorskip("libtpu", reason="compiling for TPUs needs libtpu: pip install '.[plan]'")
    from lvm.planning import topology

    known = slices_of(next(a for a in ACCELERATORS if a.name == name))
    for s in (s for s in known if s.chips <= 512):
        devices = topology.topology_devices(s)
        assert len(devices) == s.chips, s.name
        assert accelerator_of(devices[0]) is s.accelerator
        assert len({device.process_index for device in devices}) == s.hosts, s.name
