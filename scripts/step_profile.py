"""Where the time of a training step goes, by kind of work: read off a trace of `jax.profiler`."""

from __future__ import annotations

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

_PROFILED = 3  # steps in a trace
KINDS = ("matmul", "attention", "elementwise and norms", "optimizer", "collectives", "other", "idle")


def profile(step: Step, batch: Mapping[str, np.ndarray], folder: pathlib.Path) -> list[str]:
    """Traces a few steps on one batch into `folder`; the lines of the table of where their time goes."""
    state = step.init()
    batch = step.shard_batch(batch)
    state, metrics = step(state, batch)
    jax.block_until_ready(state)
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with jax.profiler.trace(str(folder), profiler_options=options):
        for _ in range(_PROFILED):
            state, metrics = step(state, batch)
        jax.block_until_ready((state, metrics))
    newest = max(folder.rglob("*.trace.json.gz"), key=lambda path: path.stat().st_mtime)
    with gzip.open(newest, "rt") as stream:
        events = json.load(stream)["traceEvents"]
    kinds = kinds_of_instructions(step.compile().as_text())
    shares = where_time_goes(events, lambda event: kind_of_event(event, kinds))
    total = sum(shares.values())
    if not total:
        return ["no operation of the device is in the trace"]
    lines = [f"{'kind of work':<24} {'ms a step':>10} {'share':>8}"]
    for kind in KINDS:
        taken = shares.get(kind, 0.0)
        lines.append(f"{kind:<24} {taken / 1000 / _PROFILED:>10.2f} {taken / total:>8.1%}")
    lines.append(f"{'all':<24} {total / 1000 / _PROFILED:>10.2f} {1:>8.1%}")
    return lines


def kinds_of_instructions(hlo: str) -> dict[str, str]:
    """Name of an instruction of the compiled program, as `_key` has it → kind of work."""
    kinds: dict[str, str] = {}
    products: set[str] = set()  # computations with a matrix product; callees come before their callers
    computation = ""
    for line in hlo.splitlines():
        if line and not line[0].isspace():
            found = re.match(r"(?:ENTRY )?%?([\w.\-]+) ", line)
            computation = found[1] if found else ""
            continue
        found = re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = ", line)
        if not found:
            continue
        called = re.search(r"calls=%?([\w.\-]+)", line)
        product = bool(re.search(r"\b(dot|convolution)\(|cublas|__triton_gemm", line))
        if product or (called and called[1] in products):
            products.add(computation)
            product = True
        name = re.search(r'op_name="([^"]*)"', line)
        kinds[_key(found[1])] = _kind(found[1], name[1] if name else "", product)
    return kinds


def _kind(instruction: str, op_name: str, product: bool) -> str:
    if re.search(r"all.?reduce|all.?gather|reduce.?scatter|all.?to.?all|collective|nccl", instruction, re.I):
        return "collectives"
    if re.search(r"attention|fmha|flash|sdpa", f"{op_name} {instruction}", re.I):
        return "attention"
    if product or re.search(r"gemm|cublas|cutlass|nvjet|xmma|dot", instruction, re.I):
        return "matmul"
    if op_name and "jvp" not in op_name:  # what gradients are made of has been through it
        return "optimizer"
    if op_name or re.search(r"fusion|reduce|broadcast|scatter|gather|slice|transpose|pad", instruction):
        return "elementwise and norms"
    return "other"


def kind_of_event(event: dict[str, Any], kinds: dict[str, str]) -> str:
    """By the instruction that an event of the device says it belongs to, else by the kernel's name."""
    kernel, instruction = event["name"], (event.get("args") or {}).get("hlo_op", "")
    by_name = _kind(kernel, "", False)
    if by_name in ("collectives", "attention", "matmul"):
        found = kinds.get(_key(instruction), by_name)
        return "attention" if "attention" in (found, by_name) else by_name
    return kinds.get(_key(instruction)) or kinds.get(_key(kernel)) or by_name


def _key(name: str) -> str:
    return re.sub(r"\W", "_", name)


def where_time_goes(events: list[Any], kind: Callable[[dict[str, Any]], str]) -> dict[str, float]:
    """Kind of work → microseconds between the first operation's start and the last one's end.

    Operations that run at the same time share it.
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
    """Operations of the streams of a GPU or of a TPU's core; of a CPU, those of every thread."""
    labels = {
        (e["pid"], e.get("tid"), e["name"]): e["args"].get("name", "") for e in events if e.get("ph") == "M"
    }
    devices = {
        pid for (pid, _, what), label in labels.items() if what == "process_name" and "/device:" in label
    }
    streams = {
        (pid, tid)
        for (pid, tid, what), label in labels.items()
        if what == "thread_name" and pid in devices and label.startswith(("Stream", "XLA Ops"))
    }
    for event in events:
        if event.get("ph") != "X" or event["name"].startswith(("while", "conditional")):  # these hold others
            continue
        if (event["pid"], event["tid"]) in streams or (not streams and "hlo_op" in (event.get("args") or {})):
            yield event
