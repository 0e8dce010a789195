"""The paper's run in figures: the tables of docs/scale.md.

    python -m scripts.table_scale                                   print the tables
    python -m scripts.table_scale --write                           write them into docs/scale.md
    python -m scripts.table_scale --mfu=0.5 --v5e=0.6 --h100=2.5    with your utilization and prices

Computed from the configuration, the FLOP count (`lvm/model/flops.py`), the store's layout (`lvm/data/store/format.py`)
and datasheets (`lvm/hardware/accelerators.py`). Utilization and prices are flags: the page names their sources.
"""

import dataclasses
import pathlib
from collections.abc import Sequence

from configs.data_uvd_v1 import training
from lvm.common import cli, files
from lvm.data.store import format
from lvm.hardware.accelerators import Slice, resolve
from lvm.model.flops import train_flops_per_token
from lvm.model.vocabulary import Vocabulary
from lvm.planning.estimate import count_parameters

IMAGES, TOKENS = 1.64e9, 420e9  # UVDv1, one epoch (arXiv 2312.00785)
CODES = 256  # of an image
NUM_CODES = 8192  # of the tokenizer
SHARDS, KEY_BYTES = 25_000, 40
JPEG_BYTES = 40 * 1024  # of 500×375, quality of the benchmark
ENCODER_FLOPS = 216.3e9  # an image through LVM's tokenizer (python -m scripts.benchmark_tokenizer)
DECODED_PER_CORE = 500  # JPEGs of 500×375 a core second, read, decoded and resized (BENCHMARKS.md, Encoding)
CHECKPOINT_BYTES = 12  # a parameter: float32 weights and AdamW's two moments
STORAGE_PRICE, GET_PRICE, PUT_PRICE = 0.020, 0.4e-6, 5e-6  # dollars a GB and month, a GET, a PUT or a listing
_PAGE = pathlib.Path("docs/scale.md")
_BEGIN, _END = "<!-- {}: written by scripts.table_scale -->", "<!-- end of {} -->"


def store_table() -> list[str]:
    """The store: figure, value, source."""
    grid_bytes, index_bytes = format.grid_bytes(CODES), format.SCENE_DTYPE.itemsize + 4 + KEY_BYTES
    codes, index = IMAGES * grid_bytes, IMAGES * index_bytes
    return _table(
        ["", "value", "source"],
        ["images", f"{IMAGES:,.0f}", "the paper"],
        ["codes", f"{codes / 1e9:,.0f} GB", f"computed: {grid_bytes} bytes an image"],
        ["index", f"{index / 1e9:,.0f} GB", f"computed: {index_bytes} bytes a scene of one image"],
        ["shards", f"{SHARDS:,} of {codes / SHARDS / 1e6:.0f} MB", "chosen"],
        ["storage", f"${(codes + index) / 1e9 * STORAGE_PRICE:,.0f} a month", f"vendor's page: ${STORAGE_PRICE} a GB"],
        ["one epoch of reads", f"${IMAGES * GET_PRICE:,.0f}", f"vendor's page: ${GET_PRICE * 1e6:g} a million"],
    )  # fmt: skip


def encoding_table(machines: Sequence[tuple[Slice, float]], mfu: float) -> list[str]:
    """Encoding all images on each (machine, dollars a chip-hour)."""
    rows = []
    for slice, price in machines:
        rate = slice.chips * slice.accelerator.peak_flops * mfu / ENCODER_FLOPS  # images/s
        hours = IMAGES / rate / 3600
        chip_hours, host_rate = hours * slice.chips, rate / slice.hosts
        rows.append([
            slice.name, f"{chip_hours:,.0f}", f"{hours:.1f}", f"${chip_hours * price:,.0f}", f"{rate:,.0f}",
            f"{host_rate:,.0f}", f"{host_rate / DECODED_PER_CORE:.1f}", f"{host_rate * JPEG_BYTES / 1e6:,.0f}",
        ])  # fmt: skip
    headings = ["", "chip-hours", "hours", "cost", "images/s", "a host", "cores a host to decode", "MB/s a host"]
    return _table(headings, *rows)


def training_table(machines: Sequence[tuple[Slice, float]], mfu: float) -> list[str]:
    """Training the 3B on each (machine, dollars a chip-hour)."""
    config = training("3b", remat="attention", fsdp=64)
    model = dataclasses.replace(config.model, vocabulary_size=Vocabulary.for_codes(NUM_CODES).size)
    tokens = config.batch_size * model.context
    steps, flops = round(TOKENS / tokens), tokens * train_flops_per_token(model, model.context, "causal")
    state = count_parameters(model) * CHECKPOINT_BYTES
    rows = []
    for slice, price in machines:
        fastest = flops / (slice.chips * slice.accelerator.peak_flops)
        hours, rate = steps * fastest / mfu / 3600, IMAGES / steps / (fastest / mfu)
        chip_hours = hours * slice.chips
        rows.append([
            slice.name, f"{slice.hosts} × {slice.chips_per_host}", f"{steps:,}", f"{fastest / mfu:.2f}",
            f"{fastest:.2f}", f"{hours:,.0f}", f"{chip_hours:,.0f}", f"${chip_hours * price:,.0f}", f"{rate:,.0f}",
            f"{rate / slice.hosts:,.0f}", f"{state / slice.hosts / 1e9:.1f}",
        ])  # fmt: skip
    headings = [
        "", "hosts × chips", "steps", "s a step", "at 100 %", "hours", "chip-hours", "cost", "images/s", "a host",
        "checkpoint, GB a host",
    ]  # fmt: skip
    return _table(headings, *rows)


def _table(*rows: Sequence[str]) -> list[str]:
    return ["| " + " | ".join(cells) + " |" for cells in (rows[0], ["---"] * len(rows[0]), *rows[1:])]


def write(page: pathlib.Path, tables: dict[str, list[str]]) -> None:
    """Writes each table between its marks in a page."""
    text = page.read_text()
    for name, lines in tables.items():
        begin, end = _BEGIN.format(name), _END.format(name)
        before, _, rest = text.partition(begin)
        text = "\n".join([before + begin, "", *lines, "", end + rest.partition(end)[2]])
    files.write_atomically(page, text.encode())


def _run(args: cli.Args) -> None:
    machines = [(resolve("v5e-256"), args.v5e), (resolve("h100-64"), args.h100)]
    tables = {
        "store": store_table(),
        "encoding": encoding_table(machines, args.mfu),
        "training": training_table(machines, args.mfu),
    }
    for name, lines in tables.items():
        print("\n".join([f"{name}:", *lines, ""]))
    if args.write:
        write(_PAGE, tables)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    flags = cli.Flags(__doc__)
    flags.float("mfu", 0.4, "model FLOPs utilization, assumed", lower_bound=0.01)
    flags.float("v5e", 1.20, "dollars a v5e chip-hour", lower_bound=0.0)
    flags.float("h100", 3.99, "dollars an H100-hour", lower_bound=0.0)
    flags.boolean("write", False, "write the tables into docs/scale.md")
    return flags.run(_run, argv)


if __name__ == "__main__":
    cli.exit_process(main())
