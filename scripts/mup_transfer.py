"""Learning-rate transfer: the best learning rate at each width, under the standard parametrization and muP.

    python -m scripts.mup_transfer --config=configs/demo_lvm.py --config.data.store='("STORE",)' --out=transfer.csv
    python -m scripts.mup_transfer --config=… --out=transfer.csv --dry_run       table and plot of the runs so far

Each finished run is a row of the CSV, appended at once; a later start makes those that are missing. Runs of all widths
and learning rates see the same batches; the loss of a run is the mean over its last quarter of steps. At each width
learning rates are tried from `--learning_rate` on, by factors of 2, until the best has a worse one on either side.
"""

import csv
import dataclasses
import pathlib
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib import colormaps
from matplotlib.figure import Figure

from lvm.common import cli
from lvm.common.config import from_config_dict
from lvm.common.errors import UserError
from lvm.common.logging import log_info
from lvm.model.parametrization import ParametrizationConfig
from lvm.scaling.coordinate_check import at_width
from lvm.training import optimizer
from lvm.training.config import TrainConfig, make_rows
from lvm.training.next_token import NextTokenTask

COLUMNS = ("parametrization", "width", "log2_learning_rate", "learning_rate", "steps", "loss")
Losses = dict[tuple[str, int, int], float]  # (parametrization, width, exponent of 2) → loss


def read_losses(path: pathlib.Path, steps: int) -> Losses:
    """The finished runs of a table, from which a last line that was cut off is removed.

    Raises:
      UserError: a run of another number of steps.
    """
    if not path.exists():
        return {}
    content = path.read_bytes()
    if not content.endswith(b"\n"):
        content = content[: content.rfind(b"\n") + 1]
        path.write_bytes(content)
    rows = [*csv.DictReader(content.decode().splitlines())]
    if other := [row["steps"] for row in rows if int(row["steps"]) != steps]:
        raise UserError(f"{path}: has runs of {other[0]} steps, not of --steps={steps}; use another file")
    return {
        (row["parametrization"], int(row["width"]), int(row["log2_learning_rate"])): float(row["loss"]) for row in rows
    }


def next_exponent(losses: dict[int, float], start: int) -> int | None:
    """The next exponent to try at a width; None if the best one lies between two worse ones."""
    if not losses:
        return start
    best = min(losses, key=losses.__getitem__)
    return next((exponent for exponent in (best + 1, best - 1) if exponent not in losses), None)


def make_trainer(config: TrainConfig, name: str, width: int, steps: int) -> Callable[[float], float]:
    """A function from learning rate to loss, which compiles once for all learning rates."""
    rows = make_rows(config)
    parametrization = ParametrizationConfig(name, 0 if name == "standard" else config.model.hidden_size)
    model = dataclasses.replace(
        at_width(config.model, width), vocabulary_size=rows.vocabulary.size, parametrization=parametrization
    )
    relative = dataclasses.replace(
        config.optimizer, learning_rate=1.0, end_learning_rate=0.1, warmup_steps=steps // 10, schedule="cosine"
    )
    tx, schedule = optimizer.build(relative, steps, model=model)
    # Updates are proportional to the learning rate, which is state here.
    scaled = optax.inject_hyperparams(lambda rate: optax.chain(tx, optax.scale(rate)))(rate=1.0)
    task = NextTokenTask(model, rows.batch_spec, (), scaled, schedule, objective=config.objective)
    initialize, update = jax.jit(lambda: task.init(jax.random.key(config.seed))), jax.jit(task.update, donate_argnums=0)
    batches = [rows.batch(step) for step in range(steps)]

    def train(learning_rate: float) -> float:
        state, losses = initialize(), []
        state["training"]["optimizer"].hyperparams["rate"] = jnp.float32(learning_rate)
        for step, batch in enumerate(batches):
            state, metrics = update(state, batch, jax.random.key(step))
            losses.append(metrics["loss"])
        return float(np.mean(np.nan_to_num(jax.device_get(losses[-steps // 4 :]), nan=np.inf)))

    return train


def best_exponents(losses: Losses, name: str) -> dict[int, int]:
    """The exponent of the lowest loss at each width."""
    widths = sorted({width for parametrization, width, _ in losses if parametrization == name})
    return {
        width: min((loss, e) for (n, w, e), loss in losses.items() if (n, w) == (name, width))[1] for width in widths
    }


def table(losses: Losses) -> list[str]:
    """Lines of a Markdown table: the best learning rate of each width and its loss."""
    lines = ["| parametrization | width | best learning rate | loss |", "|---|---|---|---|"]
    for name in sorted({key[0] for key in losses}, reverse=True):
        for width, exponent in best_exponents(losses, name).items():
            lines.append(f"| {name} | {width} | 2^{exponent} | {losses[name, width, exponent]:.3f} |")
    return lines


def plot(losses: Losses, path: pathlib.Path) -> None:
    """Loss against learning rate, one panel a parametrization, one line a width; stars are the best."""
    names = sorted({key[0] for key in losses}, reverse=True)
    figure = Figure(figsize=(4.2 * len(names), 3.6), dpi=110, layout="constrained")
    widths = sorted({key[1] for key in losses})
    colors = dict(zip(widths, colormaps["viridis"](np.linspace(0, 0.9, len(widths))), strict=True))
    for axes, name in zip(figure.subplots(1, len(names), sharey=True, squeeze=False)[0], names, strict=True):
        for width, best in best_exponents(losses, name).items():
            points = sorted((2.0**e, loss) for (n, w, e), loss in losses.items() if (n, w) == (name, width))
            axes.plot(*zip(*points, strict=True), "o-", color=colors[width], markersize=3, label=f"width {width}")
            axes.plot(2.0**best, losses[name, width, best], "*", color=colors[width], markersize=12)
        axes.set_xscale("log", base=2)
        axes.set(title=name, xlabel="learning rate")
        axes.legend(frameon=False, fontsize=8)
    figure.axes[0].set_ylabel("loss, nats per token")
    figure.savefig(path, metadata={"Software": None})


def _run(args: cli.Args) -> None:
    config, path = from_config_dict(TrainConfig, args.config), pathlib.Path(args.out)
    losses = read_losses(path, args.steps)
    if invalid := [width for width in args.widths if not width.isdecimal()]:
        raise UserError(f"--widths: {invalid[0]!r} is not a hidden size; expected integers, such as 64,128")
    for width in [] if args.dry_run else map(int, args.widths):
        for name in args.parametrizations:
            train = None
            while True:
                at_this_width = {e: loss for (n, w, e), loss in losses.items() if (n, w) == (name, width)}
                exponent = next_exponent(at_this_width, args.start)
                if exponent is None:
                    break
                train = train or make_trainer(config, name, width, args.steps)
                losses[name, width, exponent] = loss = train(2.0**exponent)
                is_new = not (path.exists() and path.stat().st_size)
                with path.open("a", newline="") as file:
                    writer = csv.writer(file)
                    writer.writerows([COLUMNS] if is_new else [])
                    writer.writerow((name, width, exponent, 2.0**exponent, args.steps, f"{loss:.6f}"))
                log_info(f"{name}, width {width}, learning rate 2^{exponent}: loss {loss:.4f}")
    print("\n".join(table(losses)))
    plot(losses, path.with_suffix(".png"))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    flags = cli.Flags(__doc__)
    flags.config()
    flags.string("out", None, "table of runs (CSV); the plot is beside it", required=True)
    flags.comma_list("widths", ("64", "128", "256", "512"), "hidden sizes")
    flags.comma_list("parametrizations", ("mup", "standard"), "of standard and mup; the base model is the config's")
    flags.integer("start", -7, "exponent of 2 of the first learning rate at a width")
    flags.integer("steps", 150, "steps of a run", lower_bound=10)
    flags.boolean("dry_run", False, "only print the table and draw the plot")
    return flags.run(_run, argv)


if __name__ == "__main__":
    cli.exit_process(main())
