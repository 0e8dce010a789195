"""Benchmark of encoding: images per second from JPEGs to a store, host and devices also alone, beside torch.

    python -m scripts.benchmark_encode                                  a small network, for a CPU
    python -m scripts.benchmark_encode --network=maskgit --workers=8    a published network with random weights

The host part is reading, decoding and resizing; torch's DataLoader does the same with as many workers, if torch is
installed. Each row runs in its own process, timed from its first batch on, by wall clock and by CPU time, which other
load does not affect.
"""

import json
import os
import pathlib
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from PIL import Image

from lvm.common import cli
from lvm.common.errors import UserError
from lvm.data.images.augment import Augment
from lvm.data.images.decode_pool import Chunk, DecodePool
from lvm.data.images.decode_worker import Limits
from lvm.data.images.decoding import SceneDecoder
from lvm.data.images.preprocess import Preprocess
from lvm.data.images.sources import open_source
from lvm.model import nnx_utils
from scripts.contenders import Clock, Report, contend, cpu_name, run_job
from tokenizer import Tokenizer
from tokenizer.encoding import Encoder
from tokenizer.network import VARIANTS, VQGAN, VQGANConfig

Job = dict[str, Any]
_SMALL = VQGANConfig(
    patch_size=8, channels=32, channel_multipliers=(1, 2), encoder_blocks=1, decoder_blocks=1, middle_blocks=0,
    codebook_size=1024, codebook_dim=8, norm_groups=8,
)  # fmt: skip
NETWORKS = {"small": _SMALL, **VARIANTS}
SIZES = ((500, 375), (1280, 960))  # photo sizes: typical of datasets, and of cameras and the web
_FAST = {"decode": "reduced", "resizer": "swscale"}
_MODULE = "scripts.benchmark_encode"


def make_photos(folder: pathlib.Path, size: tuple[int, int], count: int) -> int:
    """Writes JPEGs of smooth noise with some detail, about as large as photos; returns their mean size in bytes."""
    folder.mkdir()
    rng, (width, height) = np.random.default_rng(0), size

    def noise(cell: int) -> np.ndarray:
        coarse = rng.integers(0, 256, (height // cell + 2, width // cell + 2, 3), dtype=np.uint8)
        return np.asarray(Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC), np.float32)

    for index in range(count):
        pixels = 0.7 * noise(64) + 0.2 * noise(12) + 0.1 * noise(3)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{index:06d}.jpg", quality=90)
    return sum(file.stat().st_size for file in folder.iterdir()) // count


def host(job: Job, report: Report) -> None:
    """Measures reading and decoding alone, as in the encoder's workers."""
    for resizer, decode in (("pillow", "full"), ("swscale", "full"), ("swscale", "reduced")):
        preprocess = Preprocess(job["resolution"], decode=decode, resizer=resizer)
        source = open_source(job["folder"], preprocess)
        decoder = SceneDecoder(source, Augment(0, preprocess))
        chunks = (Chunk(decoder, scenes) for scenes in decoder.chunks(range(len(source))))
        with DecodePool(job["workers"], Limits()) as pool:
            read = pool.map(chunks)
            next(read)
            clock = Clock()
            for chunk, _ in read:
                clock.count(len(chunk.items))
        report({"part": "host", "what": f"ours, {resizer}, decode={decode}", **clock.rates()})


def random_tokenizer(job: Job) -> Tokenizer:
    """The network with random weights, in this device's compute dtype."""
    on_cpu = jax.default_backend() == "cpu"
    config = NETWORKS[job["network"]]
    config = VQGANConfig(**{**vars(config), "compute_dtype": "float32" if on_cpu else "bfloat16"})
    init = jax.jit(lambda rng: nnx_utils.init_params(lambda rngs: VQGAN(config, rngs), rng))
    return Tokenizer(config, Preprocess(config.resolution, **_FAST), init(jax.random.key(0)))


def device(job: Job, report: Report) -> None:
    """Measures the devices alone: images in host memory to codes in host memory."""
    tokenizer, R = random_tokenizer(job), job["resolution"]
    size = job["batch_size"] * tokenizer.num_devices
    images = np.random.default_rng(0).integers(0, 256, (size, R, R, 3), dtype=np.uint8)
    np.asarray(tokenizer.encode_async(images))
    start, calls, pending = time.perf_counter(), 0, []
    while time.perf_counter() - start < job["seconds"] or calls < 3:
        pending.append(tokenizer.encode_async(images))
        calls += 1
        if len(pending) > 2:
            np.asarray(pending.pop(0))
    for codes in pending:
        np.asarray(codes)
    rate = calls * size / (time.perf_counter() - start)
    name = jax.local_devices()[0].device_kind
    report({"part": "device", "what": f"ours, {tokenizer.num_devices} × {name}", "rate": rate})


def end_to_end(job: Job, report: Report) -> None:
    """Measures JPEGs to a store, after the first shard: starting processes and compiling are excluded."""
    tokenizer = random_tokenizer(job)
    source = open_source(job["folder"], tokenizer.preprocess)
    with tempfile.TemporaryDirectory() as folder:
        out, shards = pathlib.Path(folder, "store"), 8
        augment = Augment(0, tokenizer.preprocess)
        Encoder(tokenizer, source, out, shards, job["batch_size"], augment, job["workers"], Limits()).run()
        times = [(out / f"shard-{i:05d}-of-{shards:05d}.json").stat().st_mtime for i in (0, shards - 1)]
    images = len(source) - len(source) // shards
    report(
        {
            "part": "end to end",
            "what": "ours, swscale, decode=reduced",
            "rate": images / (times[1] - times[0]),
        }
    )


_PARTS = {"host": host, "device": device, "end to end": end_to_end}


def compare(args: cli.Args, folder: pathlib.Path, size: tuple[int, int]) -> list[dict[str, Any]]:
    """Returns all rows for photos of one size."""
    resolution = NETWORKS[args.network].resolution
    job: Job = {
        "folder": str(folder),
        "resolution": resolution,
        "workers": args.workers,
        "network": args.network,
        "batch_size": args.batch_size,
        "seconds": args.seconds,
    }
    records = []
    for contender, part in (("ours", "host"), ("torch", "host"), ("ours", "device"), ("ours", "end to end")):
        rows = contend(_MODULE, {**job, "contender": contender, "part": part}, args.limit)
        records += [{"part": part, "what": contender, **record, "contender": contender} for record in rows]
    return records


def table(records: list[dict[str, Any]], workers: int) -> list[str]:
    """Formats the rows, ours relative to the fastest of torch, and the number of cores that the devices could use."""
    titles = f"{'images/s':>10} {'a core second':>14} {'× torch':>9} {'by cores':>9}"
    lines = [f"{'part':<12} {'what':<36} {titles}"]
    peers = [r for r in records if r["contender"] == "torch" and "rate" in r]
    for record in records:
        start = f"{record['part']:<12} {record['what']:<36} "
        if "rate" not in record:
            lines.append(start + record["failed"])
            continue
        lines.append(f"{start}{record['rate']:>10.1f}")
        if peers and record["part"] == "host":
            relative = [record[x] / max(peer[x] for peer in peers) for x in ("rate", "core_rate")]
            lines[-1] += f" {record['core_rate']:>14.1f} {relative[0]:>9.2f} {relative[1]:>9.2f}"
    rates = {r["part"]: r["rate"] for r in records if r["contender"] == "ours" and "rate" in r}
    if len(rates) == len(_PARTS):
        slower = min(rates["host"], rates["device"])
        lines.append(f"end to end is {rates['end to end'] / slower:.0%} of the slower of host and devices")
        lines.append(f"the devices could use {rates['device'] / rates['host'] * workers:.1f} cores like these")
    return lines


def _run(args: cli.Args) -> None:
    if args.job:
        run_job(
            json.loads(args.job),
            lambda job, report: _PARTS[job["part"]](job, report),
            "scripts.peer_torch_loader",
        )
        return
    if args.network not in NETWORKS:
        raise UserError(f"--network: {args.network!r} is not one of {', '.join(NETWORKS)}")
    if args.images < 256:
        raise UserError(f"--images: {args.images} is too few to time; use at least 256")
    print(f"{cpu_name()}, {os.cpu_count()} cores, load {', '.join(f'{x:.1f}' for x in os.getloadavg())}")
    for size in SIZES:
        with tempfile.TemporaryDirectory() as folder:
            photos = pathlib.Path(folder, "photos")
            mean_bytes = make_photos(photos, size, args.images)
            title = f"{args.images} JPEGs of {size[0]}×{size[1]}, {mean_bytes / 1024:.0f} KiB each"
            print(f"\n{title}, network {args.network}, {args.workers} worker processes")
            print("\n".join(table(compare(args, photos, size), args.workers)))
    print(f"\nload after {', '.join(f'{x:.1f}' for x in os.getloadavg())}")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    flags = cli.Flags(__doc__)
    flags.string("network", "small", f"network, one of {', '.join(NETWORKS)}")
    flags.integer("images", 2048, "photos of each size")
    flags.integer("workers", os.cpu_count() or 1, "reader processes, of ours and of torch")
    flags.integer("batch_size", 64, "images per device and call")
    flags.float("seconds", 10.0, "seconds to time the devices alone")
    flags.float("limit", 600.0, "time limit of a row in seconds")
    flags.string("job", "", "internal: the work of one row, as JSON")
    return flags.run(_run, argv)


if __name__ == "__main__":
    cli.exit_process(main())
