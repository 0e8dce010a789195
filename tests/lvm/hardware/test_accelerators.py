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
def test_devices_are_known_by_their_kind(kind, name, teraflops):
    found = accelerator_of(Device(kind))
    assert (found.name, found.peak_flops) == (name, teraflops * 1e12)


def test_a_cpu_is_no_accelerator():
    assert accelerator_of(jax.devices("cpu")[0]) is None
    assert accelerator_of(Device("TPU v99")) is None


def test_every_kind_finds_its_own_row():
    for accelerator in ACCELERATORS:
        for kind in accelerator.device_kinds:
            assert accelerator_of(Device(kind)) is accelerator


def test_the_runtime_knows_memory_better_than_the_table():
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
def test_a_slice_is_found_by_all_of_its_names(names, chips, hosts, per_host, gke):
    slices = [resolve(name) for name in names]
    assert len(set(slices)) == 1
    found = slices[0]
    assert (found.chips, found.hosts, found.chips_per_host) == (chips, hosts, per_host)
    assert found.accelerator.pod.gke_accelerator == gke
    assert {found.name, found.libtpu_name} <= {name.lower() for name in (*names, found.accelerator_type)} | {
        found.name
    }
    assert resolve(found.accelerator_type) == resolve(found.name) == resolve(found.libtpu_name) == found


def test_gpus_are_named_by_kind_and_number():
    assert (resolve("h100").chips, resolve("h100").topology, resolve("h100").libtpu_name) == (1, "", "")
    found = resolve("a100-80gb-16")
    assert (found.generation, found.chips, found.hosts, found.chips_per_host) == ("a100-80gb", 16, 2, 8)
    # Between hosts eight ports of 400 Gbps are slower than NVLink is between GPUs.
    assert resolve("h100-16").link_bandwidth == 400e9 < resolve("h100-8").link_bandwidth


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5e:10x10", "no such slice; the nearest is v5e-128 = v5e:8x16, 128 chips"),
        ("v5litepod-1024", "no such slice; the nearest is v5e-256 = v5e:16x16, 256 chips"),
        (
            "v4-33",
            r"no such slice \(the number counts cores, two a chip\); the nearest is v4-32 = v4:2x2x4, 16 chips",
        ),
        ("v4:4x4", "no such slice; the nearest is v4-32 = v4:2x2x4, 16 chips"),
        ("v5p:4x8x4", "no such slice; the nearest is v5p-256 = v5p:4x4x8, 128 chips"),
        ("v4-0", "no such slice .*; the nearest is v4-8"),
        ("v5e", "how many chips. as in v5e-256 or v5e:16x16"),
        ("v9-8", "no such accelerator; there are v2, v3, v4, v5e, v5p, v6e, "),
        ("v5e:", "no such accelerator"),
        ("", "no such accelerator"),
        ("h100-12", "hosts have 8 GPUs; the nearest is h100-16"),
        ("h100-0", "hosts have 8 GPUs; the nearest is h100-8"),
        ("h100:2x2", "GPUs have no topology; say how many, as in h100-8"),
    ],
)
def test_what_does_not_exist_is_refused_with_the_nearest(name, message):
    with pytest.raises(UserError, match=rf"^{name}: {message}"):
        resolve(name)


@pytest.mark.parametrize("name", ["v2", "v3", "v4", "v5e", "v5p", "v6e"])
def test_every_slice_is_found_by_its_own_names(name):
    accelerator = next(a for a in ACCELERATORS if a.name == name)
    for found in slices_of(accelerator):
        assert resolve(found.name) == resolve(found.accelerator_type) == resolve(found.libtpu_name) == found
        assert found.chips == found.hosts * found.chips_per_host == np.prod(found.shape)


@pytest.mark.parametrize("name", ["v4", "v5e", "v5p", "v6e"])
def test_libtpu_knows_these_slices(name):
    pytest.importorskip("libtpu", reason="compiling for TPUs needs libtpu: pip install '.[plan]'")
    from lvm.planning import topology

    known = slices_of(next(a for a in ACCELERATORS if a.name == name))
    for described in (found for found in known if found.chips <= 512):
        devices = topology.topology_devices(described)
        assert len(devices) == described.chips, described.name
        assert accelerator_of(devices[0]) is described.accelerator
        assert len({device.process_index for device in devices}) == described.hosts, described.name
