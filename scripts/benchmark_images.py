"""Benchmark of a tokenizer's training images: JPEG → random resized crop → flip, per core, beside torch.

    python -m scripts.benchmark_images                  500×375 photos to 256×256
    python -m scripts.benchmark_images --folder=PHOTOS  a folder of JPEGs of one's own
    python -m scripts.benchmark_images --memory=1000000 memory over so many small images of tars

torch's DataLoader does the same with as many workers: with Pillow, and with torchvision's transforms where torchvision
loads. Contenders take turns, each in its own process, timed from its first batch on by CPU time of all of its
processes; rows are medians over the rounds. The quality of our fast crops is their PSNR to Pillow's of the same window.
"""

import dataclasses
import functools
import io
import json
import pathlib
import statistics
import tarfile
import tempfile
from collections.abc import Sequence
from typing import Any

import numpy as np
import PIL.Image
import psutil

from lvm.common import cli
from lvm.common.errors import UserError
from lvm.data.images.preprocess import Preprocess
from lvm.data.images.random_crop import Crop, RandomCrop
from lvm.data.images.sources import ImageSource, open_any_source, open_source
from lvm.data.mixture.loader import prefetch_batches
from scripts.benchmark_encode import make_photos
from scripts.contenders import Clock, Report, contend, cpu_name, run_job
from tokenizer.images import ImagesConfig, TrainingImages

Job = dict[str, Any]
_MODULE, _BATCH = "scripts.benchmark_images", 64
_RESIZERS = ("swscale", "pillow")


def _images(job: Job, resizer: str, workers: int, folder: str) -> TrainingImages:
    preprocess = Preprocess(job["resolution"], filter="bilinear", resizer=resizer)
    source = open_source(job["folder"], preprocess)
    config = ImagesConfig(heldout_fraction=0.0, rgb_share=1.0, crop=RandomCrop(tuple(job["scale"])))
    return TrainingImages(source, config, preprocess, _BATCH, 0, folder, workers)


@functools.cache
def _worker_images(job: str, folder: str) -> TrainingImages:
    return _images(json.loads(job), "swscale", 0, folder).__enter__()


def _read_in_worker(job: str, folder: str, step: int) -> dict[str, np.ndarray]:
    return dict(_worker_images(job, folder).read(step, np.arange(_BATCH)))


def ours(job: Job, report: Report) -> None:
    """Measures the pipeline with its decode pool, and the same in Grain's workers, which read whole batches."""
    steps, workers, rows = job["images"] // _BATCH, job["workers"], np.arange(_BATCH)
    with tempfile.TemporaryDirectory() as folder:
        for resizer in _RESIZERS:
            with _images(job, resizer, workers, folder) as images:
                rates = _measure(prefetch_batches(lambda step: images.read(step, rows), 0, steps))
            report({"what": f"ours, {resizer}", **rates})
        read = functools.partial(_read_in_worker, json.dumps(job), folder)
        report({"what": "ours, swscale, in Grain's workers", **_measure(prefetch_batches(read, 0, steps, workers))})


def _measure(batches: Any) -> dict[str, float]:
    next(batches)
    clock = Clock()
    for batch in batches:
        clock.count(len(batch["images"]))
    return clock.rates()


def quality(folder: str, resolution: int, scale: Sequence[float], count: int = 200) -> tuple[float, float]:
    """Returns the mean and the least PSNR in dB between crops of both resizers."""
    preprocess = Preprocess(resolution, filter="bilinear")
    source = open_source(folder, preprocess)
    psnr, rng = [], np.random.default_rng(0)
    for index in range(min(count, len(source))):
        # The window as the fast crop takes it, at whole pixels.
        crop = Crop(resolution, filter="bilinear", resizer="swscale", settings=RandomCrop(tuple(scale)))
        crop = dataclasses.replace(crop, samples=tuple(rng.random(4)))
        fast = source.load_image(index, 0, "rgb", crop)
        slow = source.load_image(index, 0, "rgb", _PillowCrop(**vars(crop)))
        error = np.mean((fast.astype(np.float64) - slow) ** 2)
        psnr.append(10 * np.log10(255**2 / max(error, 1e-3)))
    return float(np.mean(psnr)), float(np.min(psnr))


class _PillowCrop(Crop):
    """A crop of the window that `resizer` says, scaled by Pillow."""

    def __call__(self, image: Any, extent: Any = None) -> np.ndarray:
        rgb = self.to_rgb(image)
        return Preprocess(self.resolution, filter=self.filter)(rgb.crop(self.crop_box(*rgb.size)))

    def scale_frame(self, frame: Any) -> Any:
        return None  # read by Pillow


def memory(count: int, workers: int) -> None:
    """Prints the memory of this process and its workers while `count` images of 200 tars of 5,000 are read."""
    buffer = io.BytesIO()
    PIL.Image.fromarray(np.arange(768, dtype=np.uint8).reshape(16, 16, 3)).save(buffer, "JPEG")
    batch, process, content = 512, psutil.Process(), buffer.getvalue()
    with tempfile.TemporaryDirectory() as folder:
        for i in range(200):
            with tarfile.open(f"{folder}/{i:03d}.tar", "w") as tar:
                for j in range(5000):
                    info = tarfile.TarInfo(f"{j:06d}.jpg")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
        preprocess = Preprocess(16, filter="bilinear", resizer="swscale")
        source = open_any_source(folder, preprocess)
        assert isinstance(source, ImageSource)
        config = ImagesConfig(heldout_fraction=0.01, rgb_share=1.0)
        with TrainingImages(source, config, preprocess, batch, 0, f"{folder}/counts", workers) as images:
            rows, steps = np.arange(batch), count // batch
            for step, _ in enumerate(prefetch_batches(lambda step: images.read(step, rows), 0, steps)):
                if step % max(1, steps // 20) == 0 or step == steps - 1:
                    own = process.memory_info().rss / 1e6
                    theirs = [child.memory_info().rss / 1e6 for child in process.children()]
                    text = ", ".join(f"{size:.0f}" for size in theirs)
                    print(f"{(step + 1) * batch:,} images: {own:.0f} MB, workers {text} MB", flush=True)


def _run(args: cli.Args) -> None:
    if args.memory:
        memory(args.memory, args.workers)
        return
    if min(args.resolution, args.images, args.rounds, args.workers) < 1:
        raise UserError("--resolution, --images, --rounds and --workers must be positive")
    with tempfile.TemporaryDirectory() as folder:
        photos = args.folder or f"{folder}/photos"
        if not args.folder:
            size = make_photos(pathlib.Path(photos), (500, 375), 500)
            print(f"500 photos of 500×375, {size:,} bytes each")
        print(f"{cpu_name()}; {args.workers} workers, batches of {_BATCH}")
        for scale in ((0.8, 1.0), (0.08, 1.0)):
            mean, least = quality(photos, args.resolution, scale)
            area = f"area of crops {scale[0]:g} to {scale[1]:g}"
            print(f"{area}; PSNR of swscale's to Pillow's: mean {mean:.1f} dB, least {least:.1f} dB")
            job = {name: getattr(args, name) for name in ("resolution", "images", "workers")}
            job |= {"folder": photos, "scale": scale}
            turns = [who for _ in range(args.rounds) for who in ("ours", "torch")]
            rows = [r for who in turns for r in contend(_MODULE, {**job, "contender": who}, 60 * args.minutes)]
            _print(rows)


def _print(rows: Sequence[dict[str, Any]]) -> None:
    for failure in dict.fromkeys(row["failed"] for row in rows if "failed" in row):
        print(f"  failed: {failure}")
    medians: dict[str, tuple[float, float]] = {}
    for what in dict.fromkeys(row["what"] for row in rows if "what" in row):
        rounds = [row for row in rows if row.get("what") == what]
        core_rate, rate = (statistics.median(row[name] for row in rounds) for name in ("core_rate", "rate"))
        medians[what] = core_rate, rate
    peers = [rates[0] for what, rates in medians.items() if what.startswith("torch") and "uint8" in what]
    for what, (core_rate, rate) in medians.items():
        ratio = f", {core_rate / max(peers):.2f} × torch" if any(peers) else ""  # 0: too few images for a rate
        print(f"  {what}: {core_rate:,.0f} images/s a core, {rate:,.0f} images/s{ratio}", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark, or one contender of it, and returns the exit code."""
    flags = cli.Flags(__doc__)
    flags.string("folder", "", "folder of JPEGs; by default photos are made")
    flags.integer("resolution", 256, "side of the crops")
    flags.integer("images", 3200, "images of each row and round")
    flags.integer("rounds", 3, "turns of each contender")
    flags.integer("memory", 0, "images of the run that measures memory, instead of speed")
    flags.integer("workers", 2, "worker processes")
    flags.float("minutes", 10.0, "limit of each contender")
    flags.string("job", "", "a contender's work, as JSON; internal")

    def run(args: cli.Args) -> None:
        if args.job:
            run_job(json.loads(args.job), ours, "scripts.peer_torch_images")
        else:
            _run(args)

    return flags.run(run, argv)


if __name__ == "__main__":
    cli.exit_process(main())
