"""The 7B released beside the paper (arXiv 2312.00785): 6,545,477,632 parameters with 8192 codes, 420B tokens.

Hardware: TPU v4-256 (128 chips) or more; the mesh fits v4, v5e, v5p and v6e.
Plan on v5e:16x16, data 4 × fsdp 64: 9.44 of 16 GiB per chip; minimum step time 2.30 s (flops).
Measured step time and MFU: not measured.
"""

from ml_collections import ConfigDict

from configs.data_uvd_v1 import training
from lvm.common.config import to_config_dict


def get_config() -> ConfigDict:
    """FSDP over 64 chips: the state and a batch's rows fit the 16 GiB of a v5e."""
    return to_config_dict(training("7b", remat="attention", fsdp=64))
