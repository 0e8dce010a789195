import dataclasses

import jax
import pytest

from lvm.accelerators import ACCELERATORS, memory_bytes, of_device


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
    found = of_device(Device(kind))
    assert (found.name, found.peak_flops) == (name, teraflops * 1e12)


def test_a_cpu_is_no_accelerator():
    assert of_device(jax.devices("cpu")[0]) is None
    assert of_device(Device("TPU v99")) is None


def test_every_kind_finds_its_own_row():
    for accelerator in ACCELERATORS:
        for kind in accelerator.device_kinds:
            assert of_device(Device(kind)) is accelerator


def test_the_runtime_knows_memory_better_than_the_table():
    assert memory_bytes(Device("TPU v4", {"bytes_limit": 31 * 2**30})) == 31 * 2**30
    assert memory_bytes(Device("TPU v4")) == 32 * 2**30
    assert memory_bytes(Device("a toaster")) is None
