"""Benchmark of the published tokenizers beside torch: same networks, same images, one table.

    python -m scripts.benchmark_tokenizer                            one accelerator; torch if it is installed
    python -m scripts.benchmark_tokenizer --profile=FOLDER           with a breakdown of our time
    python -m scripts.benchmark_tokenizer --flips=64 --nospeed       share of codes that bfloat16 changes

Ours is `Tokenizer` with random weights. Each contender runs in its own process, one after the other; a failure is
reported in its row. Exits with 1 if ours has no figure.
"""

import dataclasses
import functools
import gzip
import json
import os
import pathlib
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lvm.common import cli, errors
from lvm.common.errors import UserError
from lvm.data.images.preprocess import Preprocess
from lvm.data.images.sources.generated import GeneratedSource
from lvm.hardware import accelerators
from lvm.model import nnx_utils
from scripts import step_profile
from scripts.contenders import Report, contend, cpu_name, run_job
from tokenizer.network import VARIANTS, VQGAN
from tokenizer.pretrained import DataParallel, Tokenizer

Job = dict[str, Any]
_PROFILED_CALLS = 3
# Kinds of `scripts.step_profile` that a tokenizer has; all others are elementwise work here.
_KINDS = {"matmul": "convolutions and products", "idle": "idle", "collectives": "collectives"}
_OTHER_KINDS = "norms and elementwise"


def _run(args: cli.Args) -> None:
    if args.job:
        run_job(json.loads(args.job), run_ours, "scripts.peer_torch_vqgan")
        return
    for network in args.network:
        if network not in VARIANTS:
            raise UserError(f"--network: {network!r} is not one of {', '.join(VARIANTS)}")
    if args.speed:
        _compare(args)
    for network in args.network if args.flips else ():  # last: initializes this process's accelerator
        print(flips(network, args.flips))


def _compare(args: cli.Args) -> None:
    ends, load = time.monotonic() + 60 * args.minutes, os.getloadavg()
    contenders = [(network, name) for network in args.network for name in ("ours", args.peer) if name != "none"]
    records: list[dict[str, Any]] = []
    for number, (network, name) in enumerate(contenders):
        print(f"\n== {network}, {name}")
        machine = next((r for r in records if r["network"] == network and "platform" in r), {})
        if name == "torch" and not machine:
            records.append({"network": network, "contender": name, "failed": "not run: ours didn't start"})
            continue
        limit = max(0.1, (ends - time.monotonic()) / (len(contenders) - number))
        records += _contend(args, network, name, limit, machine)
    print("\n" + "\n".join(_machine_lines(args, records, load)))
    print("\n" + table(records))
    done = {r["network"] for r in records if r["contender"] == "ours" and "milliseconds" in r}
    if done != set(args.network):
        sys.exit(errors.EXIT_ERROR)


def _contend(args: cli.Args, network: str, name: str, limit: float, machine: dict[str, Any]) -> list[dict[str, Any]]:
    """Runs a contender in its own process; returns its records, with one more for a failure."""
    job = {
        "contender": name,
        "network": network,
        "batch_size": machine.get("batch_size") or args.batch_size,
        "steps": args.steps,
        "warmup": args.warmup,
        "dtype": machine.get("dtype") or args.dtype,
        "platform": machine.get("platform", ""),
        "compile": args.torch_compile,
        "profile": args.profile,
    }
    records = contend("scripts.benchmark_tokenizer", job, limit)
    return [{"network": network, "contender": name, **record} for record in records]


def random_images(job: Job) -> np.ndarray:
    """Images of all contenders: uint8 [B, R, R, 3]."""
    side = VARIANTS[job["network"]].resolution
    return np.random.default_rng(0).integers(0, 256, (job["batch_size"], side, side, 3), dtype=np.uint8)


def random_codes(job: Job) -> np.ndarray:
    """Codes of all contenders: int32 [B, N]."""
    config = VARIANTS[job["network"]]
    shape = (job["batch_size"], config.codes_per_image)
    return np.random.default_rng(1).integers(0, config.codebook_size, shape, dtype=np.int32)


def random_tokenizer(network: str, dtype: str) -> Tokenizer:
    """A published network with random weights."""
    config = dataclasses.replace(VARIANTS[network], compute_dtype=dtype)
    init = jax.jit(lambda rng: nnx_utils.init_params(lambda rngs: VQGAN(config, rngs), rng))
    return Tokenizer(config, Preprocess(config.resolution), init(jax.random.key(0)))


def run_ours(job: Job, report: Report) -> None:
    """Reports our encoding and decoding on one device, and their profiles if asked for."""
    device = jax.devices()[0]
    on_cpu = device.platform == "cpu"
    job = job | {
        "dtype": job["dtype"] if job["dtype"] != "auto" else "float32" if on_cpu else "bfloat16",
        "batch_size": job["batch_size"] or (2 if on_cpu else 64),
    }
    report(
        {
            "platform": device.platform,
            "device": device.device_kind,
            "dtype": job["dtype"],
            "batch_size": job["batch_size"],
            "libraries": f"jax {jax.__version__}",
        }
    )
    tokenizer = random_tokenizer(job["network"], job["dtype"])
    inputs = {"encode": jnp.asarray(random_images(job)), "decode": jnp.asarray(random_codes(job))}
    for work, function in (("encode", tokenizer.encoder), ("decode", tokenizer.decoder)):
        call = functools.partial(_wait_for, function, inputs[work])
        lowered = function.lower(inputs[work], 1)
        operations = (lowered.cost_analysis() or {}).get("flops", 0.0) / job["batch_size"]
        report(measure("", work, job, call) | {"operations": operations})
        if job["profile"]:
            folder = pathlib.Path(job["profile"], job["network"], work)
            report({"work": work, "profile": profile(call, lowered.compile().as_text() or "", folder)})


def _wait_for(function: DataParallel, rows: jax.Array) -> None:
    jax.block_until_ready(function(rows, 1))


def measure(variant: str, work: str, job: Job, call: Callable[[], None]) -> dict[str, Any]:
    """Measures a contender: the median of the calls after warm-up (which compiles), as a row of the table."""

    def seconds() -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    for _ in range(job["warmup"]):
        seconds()
    timed = [seconds() for _ in range(job["steps"])]
    median = statistics.median(timed)
    print(
        f"{work} {variant}: {1000 * median:.1f} ms a call of {job['batch_size']} "
        f"({1000 * min(timed):.1f} to {1000 * max(timed):.1f}), {job['batch_size'] / median:.2f} images/s"
    )
    return {
        "variant": variant,
        "work": work,
        "batch_size": job["batch_size"],
        "milliseconds": 1000 * median,
        "images_per_second": job["batch_size"] / median,
    }


def profile(call: Callable[[], None], hlo: str, folder: pathlib.Path) -> list[str]:
    """Traces a few calls into `folder`; returns the lines of a table of their time by kind of work."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with jax.profiler.trace(str(folder), profiler_options=options):
        for _ in range(_PROFILED_CALLS):
            call()
    newest = max(folder.rglob("*.trace.json.gz"), key=lambda path: path.stat().st_mtime)
    with gzip.open(newest, "rt") as stream:
        events = json.load(stream)["traceEvents"]
    of_instruction = step_profile.kinds_of_instructions(hlo)

    def kind(event: dict[str, Any]) -> str:
        return _KINDS.get(step_profile.kind_of_event(event, of_instruction), _OTHER_KINDS)

    shares = step_profile.time_by_kind(events, kind)
    total = sum(shares.values())
    if not total:
        return ["the trace has no device operation"]
    lines = [f"{'kind of work':<26} {'ms a call':>10} {'share':>8}"]
    for name in (*_KINDS.values(), _OTHER_KINDS):
        taken = shares.get(name, 0.0)
        lines.append(f"{name:<26} {taken / 1000 / _PROFILED_CALLS:>10.2f} {taken / total:>8.1%}")
    return lines


def flips(network: str, count: int) -> str:
    """One line: the share of codes of generated images that bfloat16 changes.

    The codebook is sampled with the mean and scale of the latents, so that many codes are used.
    """
    exact = random_tokenizer(network, "float32")
    source = GeneratedSource(exact.preprocess, num_scenes=count, num_frames=1, streams=("rgb",))
    images = np.concatenate([source.load(i).images[:, 0] for i in range(count)])  # [count, R, R, 3]
    latents = exact.encode_latents(images)  # [count, N, C]
    rng = np.random.default_rng(0)
    rows = latents.mean((0, 1)) + latents.std((0, 1)) * rng.standard_normal(exact.params["codebook"].shape)
    params = exact.params | {"codebook": jnp.asarray(rows, jnp.float32)}
    codes = []
    for dtype in ("float32", "bfloat16"):
        config = dataclasses.replace(exact.config, compute_dtype=dtype)
        codes.append(Tokenizer(config, exact.preprocess, params).encode(images))
    share = float(np.mean(codes[0] != codes[1]))
    used = len(np.unique(codes[0]))
    return f"{network}: bfloat16 changes {share:.2%} of {codes[0].size} codes ({used} in use; random weights)"


def table(records: list[dict[str, Any]]) -> str:
    """Formats the rows of all contenders, ours relative to the fastest of torch, and the profiles."""
    titles = ["network", "contender", "work", "images a call", "ms a call", "images/s", "GFLOP/s", "× torch"]
    lines, profiles = [titles], []
    for record in records:
        name = ", ".join(filter(None, [record["contender"], record.get("variant")]))
        start = [record["network"], name, record.get("work", "")]
        if "failed" in record:
            lines.append([*start, record["failed"]])
        elif "milliseconds" in record:
            same = [r for r in records if r["network"] == record["network"] and r.get("work") == record["work"]]
            operations = next((r["operations"] for r in same if "operations" in r), 0.0)
            rate = record["images_per_second"]
            row = [str(record["batch_size"]), f"{record['milliseconds']:.1f}", f"{rate:.2f}"]
            lines.append([*start, *row, f"{operations * rate / 1e9:.0f}", _relative_to_torch(record, same)])
        elif "profile" in record:
            profiles += [
                "",
                f"{record['network']}, our {record['work']} by kind of work:",
                *record["profile"],
            ]
    whole = [line for line in lines if len(line) == len(titles)]
    widths = [max(len(line[i]) for line in whole) for i in range(len(titles))]
    rows = ["  ".join(f"{c:<{w}}" for c, w in zip(line, widths, strict=False)).rstrip() for line in lines]
    return "\n".join(rows + profiles)


def _relative_to_torch(record: dict[str, Any], same: list[dict[str, Any]]) -> str:
    rates = [r["images_per_second"] for r in same if r["contender"] == "torch" and "images_per_second" in r]
    return f"{record['images_per_second'] / max(rates):.2f}" if rates and record["contender"] == "ours" else ""


def _machine_lines(args: cli.Args, records: list[dict[str, Any]], load: tuple[float, ...]) -> list[str]:
    libraries = dict.fromkeys(r["libraries"] for r in records if "libraries" in r)
    lines = [", ".join([f"Python {platform.python_version()}", *libraries])]
    machine = next((r for r in records if "device" in r), None)
    if machine is None:
        return lines
    if machine["platform"] == "cpu":
        before = ", ".join(f"{x:.1f}" for x in load)
        name = cpu_name()
        lines.append(f"{name}, {os.cpu_count()} cores, load before the run {before} (1, 5, 15 minutes)")
    else:
        chip = (
            accelerators.accelerator_of(SimpleNamespace(device_kind=machine["device"]))
            if machine["dtype"] == "bfloat16"
            else None
        )
        peak = f", {chip.peak_flops / accelerators.TERA:g} TFLOP/s in bfloat16" if chip else ""
        lines.append(machine["device"] + peak)
    lines.append(f"{machine['dtype']}, random weights and images, medians of {args.steps} calls")
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    flags = cli.Flags(__doc__)
    flags.comma_list("network", ["maskgit", "lvm"], f"networks, of {', '.join(VARIANTS)}")
    flags.integer("batch_size", 0, "images per call; 0: 2 on a CPU, else 64", lower_bound=0)
    flags.integer("steps", 8, "timed calls", lower_bound=1)
    flags.integer("warmup", 2, "calls before them", lower_bound=1)
    flags.enum("peer", "torch", ["torch", "none"], "peer to compare with")
    flags.enum(
        "dtype",
        "auto",
        ["auto", "bfloat16", "float32"],
        "compute dtype; auto: float32 on a CPU, else bfloat16",
    )
    flags.boolean("torch_compile", True, "measure torch.compile too")
    flags.string("profile", "", "folder for traces of ours; prints a breakdown")
    flags.integer("flips", 0, "images to compare the codes of bfloat16 and float32 on; 0: none", lower_bound=0)
    flags.boolean("speed", True, "measure speed")
    flags.float("minutes", 15.0, "time limit of all contenders, shared evenly")
    flags.string("job", "", "internal: the work of one contender, as JSON")
    return flags.run(_run, argv)


if __name__ == "__main__":
    cli.exit_process(main())
