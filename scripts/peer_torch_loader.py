"""JPEG → 256×256 by torch's DataLoader, for `scripts.benchmark_encode`: Pillow decodes and resizes, as in ours."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from scripts.contenders import Clock, Report


class Pictures(torch.utils.data.Dataset):
    """Files as tensors [3, R, R]: uint8, or float32 in [0, 1] as most recipes have it."""

    def __init__(self, files: Sequence[pathlib.Path], resolution: int, as_float: bool):
        self._files, self._resolution, self._as_float = files, resolution, as_float

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> torch.Tensor:
        with Image.open(self._files[index]) as picture:
            side = (self._resolution, self._resolution)
            image = picture.convert("RGB").resize(side, Image.Resampling.BICUBIC)
        tensor = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
        return tensor.float().div(255) if self._as_float else tensor


def run(job: dict[str, Any], report: Report) -> None:
    """Reads all files once for each kind of tensor, after the first batch has come."""
    files = sorted(pathlib.Path(job["folder"]).iterdir())
    for as_float in (False, True):
        loader = torch.utils.data.DataLoader(
            Pictures(files, job["resolution"], as_float), batch_size=64, num_workers=job["workers"]
        )
        batches = iter(loader)
        next(batches)
        clock = Clock()
        for batch in batches:
            clock.count(len(batch))
        kind = "float32" if as_float else "uint8"
        report(
            {
                "part": "host",
                "what": f"torch {torch.__version__} DataLoader, {kind}",
                **clock.rates(),
            }
        )
