"""Benchmark of encoding from object storage: the time and memory until workers can decode their first image.

    python -m scripts.benchmark_sources                         200 tars of 1,000 images, then 2,000 tars by name
    python -m scripts.benchmark_sources --tars=20 --images=50   a small one

An object server on this machine delays each answer by 50 ms. Each of four processes opens the source, lists the first
part of its own shards and loads one image.
"""

import io
import json
import os
import pathlib
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence

import numpy as np
import PIL.Image

from lvm.common import cli
from lvm.data.images.preprocess import Preprocess
from lvm.data.images.sources import ImageSource, open_any_source
from scripts.peak_memory import peak_mib

LATENCY_S, PROCESSES = 0.05, 4
SPECS = ("gs://bucket/SET", "s3://bucket/SET", "gs://bucket/SET/*.tar")


def write_tars(folder: pathlib.Path, num_tars: int, num_images: int) -> None:
    """Writes tars of small images; the first one's content, under other names."""
    folder.mkdir(parents=True)
    content = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    PIL.Image.fromarray(pixels).save(content, "PNG")
    for tar_number in range(num_tars):
        path = folder / f"{tar_number:05d}.tar"
        if tar_number:
            os.link(folder / "00000.tar", path)
            continue
        with tarfile.open(path, "w") as tar:
            for i in range(num_images):
                member = tarfile.TarInfo(f"{i:06d}.png")
                member.size = len(content.getvalue())
                tar.addfile(member, io.BytesIO(content.getvalue()))


def measure_process(spec: str, process: int, num_shards: int) -> None:
    """Prints seconds, peak MiB and scenes listed of a process that begins to encode, as JSON."""
    start = time.perf_counter()
    source = open_any_source(spec, Preprocess(16))
    if not isinstance(source, ImageSource):
        raise TypeError(f"{spec} holds no images")
    shard = num_shards * process // PROCESSES
    part = source.part(source.plan(shard, num_shards)[0])
    images = source.load(part.scenes[0]).images
    seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds, "mb": peak_mib(), "scenes": len(part.scenes), "images": len(images)}))


def measure(spec: str, num_shards: int, environment: dict[str, str]) -> None:
    """Prints the worst figures of `PROCESSES` processes at once."""
    command = [sys.executable, "-m", "scripts.benchmark_sources", "--num_shards", str(num_shards), "--spec", spec]
    workers = [
        subprocess.Popen([*command, "--process", str(i)], stdout=subprocess.PIPE, env=environment)
        for i in range(PROCESSES)
    ]
    reports = [json.loads(worker.communicate()[0]) for worker in workers]
    seconds, mb = (max(report[key] for report in reports) for key in ("seconds", "mb"))
    print(f"{spec:24} {seconds:8.2f} s {mb:8.0f} MiB {reports[0]['scenes']:8} scenes listed")


def run(args: cli.Args) -> None:
    """Runs the benchmark, or one of its processes."""
    if args.spec:
        measure_process(args.spec, args.process, args.num_shards)
        return
    with tempfile.TemporaryDirectory() as folder:
        sets = {"tars": args.tars, "many": 10 * args.tars}
        for name, num_tars in sets.items():
            write_tars(pathlib.Path(folder) / "bucket" / name, num_tars, args.images)
        command = [sys.executable, "-m", "tests.object_server", folder, f"--latency_s={LATENCY_S}"]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            if server.stdout is None:
                raise RuntimeError("the object server has no output")
            environment = os.environ | json.loads(server.stdout.readline())
            print(f"{'source':24} {'first image':>10} {'memory':>11}   (worst of {PROCESSES} processes)")
            for name, num_tars in sets.items():
                for spec in SPECS:
                    measure(spec.replace("SET", name), num_tars, environment)
        finally:
            server.terminate()
            server.wait()


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    flags = cli.Flags(__doc__)
    flags.integer("tars", 200, "tars of the first set; the second has ten times as many")
    flags.integer("images", 1000, "images of a tar")
    flags.integer("num_shards", 200, "shards of a process's store")
    flags.integer("process", 0, "number of a process that is measured")
    flags.string("spec", "", "source of a process that is measured")
    return flags.run(run, argv)


if __name__ == "__main__":
    cli.exit_process(main())
