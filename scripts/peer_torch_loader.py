"""Peer of `scripts.benchmark_encode`: JPEG → 256×256 by torch's DataLoader, with Pillow as in ours."""

import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from scripts.contenders import Report, loading_rates


class ImageFiles(torch.utils.data.Dataset):
    """Image files as tensors [3, R, R]: uint8, or float32 in [0, 1] as in most recipes."""

    def __init__(self, files: Sequence[pathlib.Path], resolution: int, as_float: bool):
        self._files, self._resolution, self._as_float = files, resolution, as_float

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> torch.Tensor:
        with Image.open(self._files[index]) as file:
            side = (self._resolution, self._resolution)
            image = file.convert("RGB").resize(side, Image.Resampling.BICUBIC)
        tensor = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
        return tensor.float().div(255) if self._as_float else tensor


def run(job: dict[str, Any], report: Report) -> None:
    """Reports the rate over all files for each tensor dtype, after the first batch."""
    files = sorted(pathlib.Path(job["folder"]).iterdir())
    for as_float in (False, True):
        loader = torch.utils.data.DataLoader(
            ImageFiles(files, job["resolution"], as_float), batch_size=64, num_workers=job["workers"]
        )
        kind = "float32" if as_float else "uint8"
        report(
            {
                "part": "host",
                "what": f"torch {torch.__version__} DataLoader, {kind}",
                **loading_rates(loader),
            }
        )
