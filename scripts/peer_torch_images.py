"""Peer of `scripts.benchmark_images`: random resized crops and flips of JPEGs by torch's DataLoader."""

import math
import pathlib
import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from scripts.contenders import Report, loading_rates


class CroppedFiles(torch.utils.data.Dataset):
    """Image files as tensors [3, R, R], uint8 or float32 in [0, 1]."""

    def __init__(self, files: Sequence[pathlib.Path], augment: Callable[[Image.Image], Image.Image], as_float: bool):
        self._files, self._augment, self._as_float = files, augment, as_float

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> torch.Tensor:
        with Image.open(self._files[index]) as file:
            image = self._augment(file.convert("RGB"))
        tensor = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
        return tensor.float().div(255) if self._as_float else tensor


class PillowCrop:
    """torchvision's RandomResizedCrop and RandomHorizontalFlip by its rule, with Pillow alone."""

    def __init__(self, resolution: int, scale: Sequence[float]):
        self._side, self._scale = (resolution, resolution), scale

    def __call__(self, image: Image.Image) -> Image.Image:
        width, height = image.size
        for _ in range(10):
            area = width * height * random.uniform(*self._scale)
            aspect = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
            w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < w <= width and 0 < h <= height:
                left, top = random.randint(0, width - w), random.randint(0, height - h)
                break
        else:
            w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
            left, top = (width - w) // 2, (height - h) // 2
        image = image.crop((left, top, left + w, top + h)).resize(self._side, Image.Resampling.BILINEAR)
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if random.random() < 0.5 else image


def run(job: dict[str, Any], report: Report) -> None:
    """Reports the rates by Pillow and, where it loads, by torchvision, after the first batch."""
    crops: dict[str, Callable[[Image.Image], Image.Image]] = {"Pillow": PillowCrop(job["resolution"], job["scale"])}
    try:
        from torchvision import transforms

        crop = transforms.RandomResizedCrop(job["resolution"], tuple(job["scale"]))
        crops["torchvision"] = transforms.Compose([crop, transforms.RandomHorizontalFlip()])
    except (ImportError, RuntimeError) as error:  # its wheels fit one build of torch
        print(f"torchvision does not load: {error}")
    files = sorted(pathlib.Path(job["folder"]).rglob("*.jp*g"))
    files *= math.ceil(job["images"] / len(files))
    for name, crop in crops.items():
        for as_float in (False, True):
            dataset = CroppedFiles(files[: job["images"]], crop, as_float)
            loader = torch.utils.data.DataLoader(dataset, batch_size=64, num_workers=job["workers"], shuffle=True)
            kind = "float32" if as_float else "uint8"
            report({"what": f"torch {torch.__version__} DataLoader, {name}, {kind}", **loading_rates(loader)})
