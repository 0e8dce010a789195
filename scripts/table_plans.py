"""Plans of all of the paper's sizes on all kinds of pods, as the table of docs/tpu.md.

    python -m scripts.table_plans --out=runs/plans

Each plan is a process of `lvm.plan --json`; what it prints is kept in `--out`, and a plan that is there isn't made
again. One takes minutes on two cores.
"""

from __future__ import annotations

import json
import os
import pathlib
import re
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from lvm.common import cli, files
from lvm.common.config import from_config_dict
from lvm.common.errors import UserError
from lvm.hardware.accelerators import GIB, resolve
from lvm.hardware.sharding import AXES
from lvm.planning.collectives import BETWEEN_SLICES, PADDING, ideal_collective_bytes
from lvm.training.config import TrainConfig

SIZES = ("100m", "300m", "600m", "1b", "3b", "7b")
TARGETS = (("v5e:16x16", 1), ("v4:4x4x8", 1), ("v5p:4x4x8", 1), ("v6e:16x16", 1))
_BEGIN, _END = "<!-- plans: written by scripts.table_plans -->", "<!-- end of plans -->"
TWO_SLICES = ("3b", ("v5e:16x16", 2))

_HEADINGS = (
    "model", "chips", "mesh", "remat", "parameters", "optimizer", "temporaries", "total, GiB", "fits",
    "flops", "hbm", "ici, s", "received, GB", "of theory", "padding", "compiled",
)  # fmt: skip


def all_plans() -> list[tuple[str, tuple[str, int]]]:
    """(size, (topology, slices)) of every line of the table."""
    return [*((size, target) for target in TARGETS for size in SIZES), TWO_SLICES]


def _path(size: str, topology: str, slices: int, folder: pathlib.Path) -> pathlib.Path:
    return folder / f"{size}-{slices}x{topology.replace(':', '-')}.json"


def planned(size: str, topology: str, slices: int, folder: pathlib.Path) -> dict[str, Any]:
    """The object that `lvm.plan --json` prints, made unless it is there.

    Raises:
      UserError: the plan failed.
    """
    path = _path(size, topology, slices, folder)
    if not path.exists():
        command = [sys.executable, "-m", "lvm.plan", f"--config=configs/lvm_{size}.py", "--json"]
        command += [f"--topology={topology}", f"--slices={slices}"]
        print(f"planning {size} on {slices} × {topology}")
        done = subprocess.run(
            command, capture_output=True, text=True, env={**os.environ, "JAX_PLATFORMS": "cpu"}
        )
        if not done.stdout.strip():
            raise UserError(f"{' '.join(command[1:])}: {done.stderr.strip().splitlines()[-1]}")
        files.write_json(path, json.loads(done.stdout))
    return files.read_json(path)


def row(size: str, found: dict[str, Any]) -> list[str]:
    """The cells of a plan."""
    config = from_config_dict(TrainConfig, found["config"])
    slices = found["chips"] // resolve(found["topology"]).chips
    mesh = " × ".join(
        f"{axis} {getattr(config.mesh, axis)}" for axis in AXES if getattr(config.mesh, axis) > 1
    )
    sizes = {axis: getattr(config.mesh, axis) for axis in AXES}
    parts = config.objective.accumulate_steps
    wanted = ideal_collective_bytes(config.model, config.batch_size, sizes, slices, parts)
    wanted.pop(BETWEEN_SLICES, None)
    sent = {collective["kind"]: collective["bytes"] for collective in found["collectives"]}
    padding, between = sent.pop(PADDING, 0.0), sent.pop(BETWEEN_SLICES, 0.0)
    memory, seconds = found["per_chip"], found["roofline_seconds"]
    total = sum(sent.values())
    return [
        size,
        f"{f'{slices} × ' if slices > 1 else ''}{found['topology']}",
        mesh,
        config.model.remat,
        *(f"{memory[f'{part}_bytes'] / GIB:.2f}" for part in ("params", "optimizer", "temp", "total")),
        f"{'yes' if found['fits'] else 'no'}, of {memory['hbm_bytes'] / GIB:.0f}",
        *(f"{seconds[name]:.3f}" for name in ("flops", "hbm", "ici")),
        f"{total / 1e9:.2f}" + (f" + {between / 1e9:.2f} between slices" if between else ""),
        f"{total / sum(wanted.values()):.3f}",
        f"{padding / 1e9:.2f}",
        f"{found['compile_seconds']:.0f} s",
    ]


def table(rows: list[list[str]]) -> list[str]:
    """A Markdown table."""
    marks = ["---"] * 4 + ["--:"] * (len(_HEADINGS) - 4)
    return ["| " + " | ".join(cells) + " |" for cells in ([*_HEADINGS], marks, *rows)]


def header(found: dict[str, Any]) -> str:
    """A plan as the line of a configuration's header."""
    cells = dict(zip(_HEADINGS, row("", found), strict=True))
    seconds = found["roofline_seconds"]
    limit = max(seconds, key=lambda name: seconds[name])
    memory = f"{cells['total, GiB']} of {found['per_chip']['hbm_bytes'] / GIB:.0f} GiB a chip"
    least = f"a step takes {seconds[limit]:.2f} s at least ({limit})"
    return f"Plan on {cells['chips']}, {cells['mesh']}: {memory}; {least}."


def write(lines: list[str], headers: dict[str, str]) -> None:
    """Puts the table into docs/tpu.md, and each size's header into its configuration."""
    page = pathlib.Path("docs/tpu.md")
    before, _, rest = page.read_text().partition(_BEGIN)
    text = "\n".join([before + _BEGIN, *lines, _END + rest.partition(_END)[2]])
    files.write_atomically(page, text.encode())
    for size, line in headers.items():
        config = pathlib.Path(f"configs/lvm_{size}.py")
        text = re.sub(r"^Plan on .*$", line, config.read_text(), count=1, flags=re.MULTILINE)
        files.write_atomically(config, text.encode())


def _run(args: cli.Args) -> None:
    folder = pathlib.Path(args.out)
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[list[str]] = []
    headers: dict[str, str] = {}
    for size, (topology, slices) in all_plans():
        if args.made and not _path(size, topology, slices, folder).exists():
            continue
        found = planned(size, topology, slices, folder)
        rows.append(row(size, found))
        headers |= {size: header(found)} if (topology, slices) == TARGETS[0] else {}
    print("\n".join(table(rows)))
    if args.write:
        write(table(rows), headers)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    flags = cli.Flags(__doc__)
    flags.string("out", "runs/plans", "where what plans printed is kept")
    flags.boolean("made", False, "show the plans that are there, and make none")
    flags.boolean("write", False, "put the table into docs/tpu.md and the headers of configs/")
    return flags.run(_run, argv)


if __name__ == "__main__":
    cli.exit_process(main())
