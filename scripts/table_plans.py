"""Plans of the paper's model sizes on all TPU generations: the table of docs/tpu.md.

    python -m scripts.table_plans --out=runs/plans

Each plan runs `lvm plan --json` in a process of its own; its output is kept in `--out` and reused. One takes minutes on
two cores.
"""

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
from lvm.planning.collectives import BETWEEN_SLICES, PADDING, ideal_collective_bytes
from lvm.planning.meshes import format_mesh
from lvm.training.config import TrainConfig

SIZES = ("100m", "300m", "600m", "1b", "3b", "7b")
TARGETS = (("v5e:16x16", 1), ("v4:4x4x8", 1), ("v5p:4x4x8", 1), ("v6e:16x16", 1))
_BEGIN, _END = "<!-- plans: written by scripts.table_plans -->", "<!-- end of plans -->"
TWO_SLICES = ("3b", ("v5e:16x16", 2))

_HEADINGS = (
    "model", "chips", "mesh", "remat", "parameters", "optimizer", "temporaries", "total, GiB", "fits",
    "flops", "hbm", "ici, s", "received, GB", "× ideal", "padding", "compiled",
)  # fmt: skip


def all_plans() -> list[tuple[str, tuple[str, int]]]:
    """(size, (topology, slices)) of every row of the table."""
    return [*((size, target) for target in TARGETS for size in SIZES), TWO_SLICES]


def _path(size: str, topology: str, slices: int, folder: pathlib.Path) -> pathlib.Path:
    return folder / f"{size}-{slices}x{topology.replace(':', '-')}.json"


def load_or_make_plan(size: str, topology: str, slices: int, folder: pathlib.Path) -> dict[str, Any]:
    """The object of `lvm plan --json`, from `folder` if it is there.

    Raises:
      UserError: the plan failed.
    """
    path = _path(size, topology, slices, folder)
    if not path.exists():
        command = [sys.executable, "-m", "lvm.plan", f"--config=configs/lvm_{size}.py", "--json"]
        command += [f"--topology={topology}", f"--slices={slices}"]
        print(f"planning {size} on {slices} × {topology}")
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "JAX_PLATFORMS": "cpu"})
        if not done.stdout.strip():
            raise UserError(f"{' '.join(command[1:])}: {done.stderr.strip().splitlines()[-1]}")
        files.write_json(path, json.loads(done.stdout))
    return files.read_json(path)


def row(size: str, plan: dict[str, Any]) -> list[str]:
    """Cells of a plan."""
    config = from_config_dict(TrainConfig, plan["config"])
    slices = plan["chips"] // resolve(plan["topology"]).chips
    ideal = ideal_collective_bytes(config, slices)
    ideal.pop(BETWEEN_SLICES, None)
    received = {collective["kind"]: collective["bytes"] for collective in plan["collectives"]}
    padding, between = received.pop(PADDING, 0.0), received.pop(BETWEEN_SLICES, 0.0)
    memory, seconds = plan["per_chip"], plan["roofline_seconds"]
    total = sum(received.values())
    return [
        size,
        f"{f'{slices} × ' if slices > 1 else ''}{plan['topology']}",
        format_mesh(config.mesh),
        config.model.remat,
        *(f"{memory[f'{name}_bytes'] / GIB:.2f}" for name in ("params", "optimizer", "temp", "total")),
        f"{'yes' if plan['fits'] else 'no'}, of {memory['hbm_bytes'] / GIB:.0f}",
        *(f"{seconds[name]:.3f}" for name in ("flops", "hbm", "ici")),
        f"{total / 1e9:.2f}" + (f" + {between / 1e9:.2f} between slices" if between else ""),
        f"{total / sum(ideal.values()):.3f}",
        f"{padding / 1e9:.2f}",
        f"{plan['compile_seconds']:.0f} s",
    ]


def table(rows: list[list[str]]) -> list[str]:
    """A Markdown table."""
    marks = ["---"] * 4 + ["--:"] * (len(_HEADINGS) - 4)
    return ["| " + " | ".join(cells) + " |" for cells in ([*_HEADINGS], marks, *rows)]


def header(plan: dict[str, Any]) -> str:
    """A plan as the line in a configuration's header."""
    cells = dict(zip(_HEADINGS, row("", plan), strict=True))
    seconds = plan["roofline_seconds"]
    limit = max(seconds, key=lambda name: seconds[name])
    memory = f"{cells['total, GiB']} of {plan['per_chip']['hbm_bytes'] / GIB:.0f} GiB per chip"
    least = f"minimum step time {seconds[limit]:.2f} s ({limit})"
    return f"Plan on {cells['chips']}, {cells['mesh']}: {memory}; {least}."


def write(lines: list[str], headers: dict[str, str]) -> None:
    """Writes the table into docs/tpu.md and each size's header into its configuration."""
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
        if args.existing_only and not _path(size, topology, slices, folder).exists():
            continue
        plan = load_or_make_plan(size, topology, slices, folder)
        rows.append(row(size, plan))
        headers |= {size: header(plan)} if (topology, slices) == TARGETS[0] else {}
    print("\n".join(table(rows)))
    if args.write:
        write(table(rows), headers)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    flags = cli.Flags(__doc__)
    flags.string("out", "runs/plans", "folder of the plans")
    flags.boolean("existing_only", False, "show the plans in --out without making any")
    flags.boolean("write", False, "write the table into docs/tpu.md and the headers of configs/")
    return flags.run(_run, argv)


if __name__ == "__main__":
    cli.exit_process(main())
