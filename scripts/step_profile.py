"""Breakdown of a training step by kind of work, from a trace of `jax.profiler`."""

import gzip
import json
import pathlib
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from lvm.training.step import Step

_PROFILED_STEPS = 3
KINDS = ("matmul", "attention", "elementwise and norms", "optimizer", "collectives", "other", "idle")


def profile(step: Step, batch: Mapping[str, np.ndarray], folder: pathlib.Path) -> list[str]:
    """Traces a few steps on one batch into `folder`; returns the lines of a table of their time by kind of work."""
    state = step.init()
    batch = step.shard_batch(batch)
    state, metrics = step(state, batch)
    jax.block_until_ready(state)
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with jax.profiler.trace(str(folder), profiler_options=options):
        for _ in range(_PROFILED_STEPS):
            state, metrics = step(state, batch)
        jax.block_until_ready((state, metrics))
    newest = max(folder.rglob("*.trace.json.gz"), key=lambda path: path.stat().st_mtime)
    with gzip.open(newest, "rt") as stream:
        events = json.load(stream)["traceEvents"]
    kinds = kinds_of_instructions(step.compile().as_text())
    shares = time_by_kind(events, lambda event: kind_of_event(event, kinds))
    total = sum(shares.values())
    if not total:
        return ["the trace has no device operation"]
    lines = [f"{'kind of work':<24} {'ms a step':>10} {'share':>8}"]
    for kind in KINDS:
        taken = shares.get(kind, 0.0)
        lines.append(f"{kind:<24} {taken / 1000 / _PROFILED_STEPS:>10.2f} {taken / total:>8.1%}")
    lines.append(f"{'all':<24} {total / 1000 / _PROFILED_STEPS:>10.2f} {1:>8.1%}")
    return lines


def kinds_of_instructions(hlo: str) -> dict[str, str]:
    """Instruction of the compiled program (its `_key`) → kind of work."""
    kinds: dict[str, str] = {}
    products: set[str] = set()  # computations with a matrix product; callees precede their callers
    computation = ""
    for line in hlo.splitlines():
        if line and not line[0].isspace():
            header = re.match(r"(?:ENTRY )?%?([\w.\-]+) ", line)
            computation = header[1] if header else ""
            continue
        instruction = re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = ", line)
        if not instruction:
            continue
        callee = re.search(r"calls=%?([\w.\-]+)", line)
        is_product = bool(re.search(r"\b(dot|convolution)\(|cublas|__triton_gemm", line))
        if is_product or (callee and callee[1] in products):
            products.add(computation)
            is_product = True
        op_name = re.search(r'op_name="([^"]*)"', line)
        kinds[_key(instruction[1])] = _kind(instruction[1], op_name[1] if op_name else "", is_product)
    return kinds


def _kind(instruction: str, op_name: str, is_product: bool) -> str:
    if re.search(r"all.?reduce|all.?gather|reduce.?scatter|all.?to.?all|collective|nccl", instruction, re.I):
        return "collectives"
    if re.search(r"attention|fmha|flash|sdpa", f"{op_name} {instruction}", re.I):
        return "attention"
    if is_product or re.search(r"gemm|cublas|cutlass|nvjet|xmma|dot", instruction, re.I):
        return "matmul"
    if op_name and "jvp" not in op_name:  # gradients have passed through jvp
        return "optimizer"
    if op_name or re.search(r"fusion|reduce|broadcast|scatter|gather|slice|transpose|pad", instruction):
        return "elementwise and norms"
    return "other"


def kind_of_event(event: dict[str, Any], kinds: dict[str, str]) -> str:
    """Kind of a device event, by its HLO instruction where it names one, else by the kernel's name."""
    kernel, instruction = event["name"], (event.get("args") or {}).get("hlo_op", "")
    by_name = _kind(kernel, "", False)
    if by_name in ("collectives", "attention", "matmul"):
        by_instruction = kinds.get(_key(instruction), by_name)
        return "attention" if "attention" in (by_instruction, by_name) else by_name
    return kinds.get(_key(instruction)) or kinds.get(_key(kernel)) or by_name


def _key(name: str) -> str:
    return re.sub(r"\W", "_", name)


def time_by_kind(events: list[Any], kind: Callable[[dict[str, Any]], str]) -> dict[str, float]:
    """Kind of work → microseconds, from the first operation's start to the last one's end.

    Concurrent operations share their time; time without any is idle.
    """
    edges: list[tuple[float, int, str]] = []
    for event in _device_events(events):
        name = kind(event)
        edges += (event["ts"], 1, name), (event["ts"] + event["dur"], -1, name)
    if not edges:
        return {}
    edges.sort()
    shares: dict[str, float] = defaultdict(float)
    running: dict[str, int] = defaultdict(int)
    last = edges[0][0]
    for moment, change, name in edges:
        busy = sum(running.values())
        for running_name, count in running.items():
            shares[running_name] += (moment - last) * count / max(busy, 1)
        shares["idle"] += (moment - last) * (busy == 0)
        running[name] += change
        last = moment
    return shares


def _device_events(events: list[Any]) -> Iterator[dict[str, Any]]:
    """Operations on GPU streams or TPU cores; on a CPU, those of every thread."""
    labels = {(e["pid"], e.get("tid"), e["name"]): e["args"].get("name", "") for e in events if e.get("ph") == "M"}
    devices = {pid for (pid, _, what), label in labels.items() if what == "process_name" and "/device:" in label}
    streams = {
        (pid, tid)
        for (pid, tid, what), label in labels.items()
        if what == "thread_name" and pid in devices and label.startswith(("Stream", "XLA Ops"))
    }
    for event in events:
        if event.get("ph") != "X" or event["name"].startswith(("while", "conditional")):  # these contain other events
            continue
        if (event["pid"], event["tid"]) in streams or (not streams and "hlo_op" in (event.get("args") or {})):
            yield event
