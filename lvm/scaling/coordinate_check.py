"""Coordinate check: sizes of activations against the model's width over the first steps of training.

Under muP the change of every activation since initialization keeps its size as the model grows wider; under the
standard parametrization it grows (Tensor Programs V, arXiv 2203.03466, appendix D.1).
"""

import dataclasses
import io
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib

matplotlib.use("Agg")

import numpy as np
from etils import epath
from jaxtyping import Array, Float, Int
from matplotlib import colormaps
from matplotlib.figure import Figure

from lvm.common import files
from lvm.common.errors import UserError
from lvm.common.logging import log_info
from lvm.model.attention import attend
from lvm.model.nnx_utils import Params, abstract_module, merge
from lvm.model.transformer import ModelConfig, Transformer, rope_cos_sin
from lvm.training import optimizer
from lvm.training.config import TrainConfig, make_rows
from lvm.training.next_token import NextTokenTask

MODULES = ("embedding", "scores", "attention", "mlp", "hidden", "logits")
RESULTS, PLOT = "coordinates.json", "coordinates.png"
_SCORED = 64  # positions whose attention scores are measured
Sizes = dict[str, Float[np.ndarray, "steps widths"]]  # module → mean absolute value of its output


@dataclasses.dataclass(frozen=True)
class CoordinateCheck:
    """Sizes of activations after 0, 1, … steps.

    Attributes:
      widths: hidden sizes.
      sizes: of each of `MODULES`: embedding; scores, attention and mlp, averages over layers, the latter two as added
        to the residual stream; hidden, the residual stream after the last layer; logits.
      changes: sizes of the differences to the activations before training.
    """

    widths: tuple[int, ...]
    sizes: Sizes
    changes: Sizes

    def slope(self, values: Float[np.ndarray, " widths"]) -> float:
        """The exponent p of values that grow as widthᵖ."""
        return float(np.polyfit(np.log(self.widths), np.log(values), 1)[0])

    def table(self) -> list[tuple[str, float, float, float]]:
        """Rows of a module and its exponents: of the initial size, of the last one, and of the last change."""
        return [
            (
                name,
                self.slope(self.sizes[name][0]),
                self.slope(self.sizes[name][-1]),
                self.slope(self.changes[name][-1]),
            )
            for name in MODULES
        ]


def at_width(config: ModelConfig, width: int) -> ModelConfig:
    """The model at another width: heads of the same size, the MLP and the number of heads in proportion.

    Raises:
      UserError: heads or key-value heads would not be whole.
    """
    heads, kv_heads, mlp_size = (size * width for size in (config.num_heads, config.num_kv_heads, config.mlp_size))
    if heads % config.hidden_size or kv_heads % config.hidden_size:
        unit = config.head_dim * (config.num_heads // config.kv_heads)
        raise UserError(f"widths: {width} is not a multiple of {unit}, the head dim × query heads of a key-value head")
    return dataclasses.replace(
        config,
        hidden_size=width,
        num_heads=heads // config.hidden_size,
        num_kv_heads=kv_heads // config.hidden_size,
        mlp_size=round(mlp_size / config.hidden_size),
    )


def coordinate_check(
    config: TrainConfig, batch: Mapping[str, np.ndarray], vocabulary_size: int, widths: Sequence[int], steps: int = 5
) -> CoordinateCheck:
    """Trains models of several widths for a few steps on one batch, at the constant peak learning rate.

    Args:
      config: model, seed, objective and optimizer; the model is widened by `at_width`.
      batch: of `lvm.data.mixture.rows`, on which every step trains.
      vocabulary_size: of the tokens in the batch.
      widths: hidden sizes, at least two.
      steps: number of steps.

    Raises:
      UserError: fewer than two widths, or one that the heads do not divide.
    """
    if len(set(widths)) < 2 or min(widths) < 1:
        raise UserError(f"widths: {', '.join(map(str, widths))}; expected at least two different hidden sizes")
    models = [at_width(config.model, width) for width in sorted(set(widths))]
    columns = []
    for model in models:
        log_info(f"coordinate check at width {model.hidden_size}")
        model = dataclasses.replace(model, vocabulary_size=vocabulary_size, remat="none")
        columns.append(_measure(config, model, batch, steps))
    sizes, changes = (
        {name: np.array([column[index][name] for column in columns]).T for name in MODULES} for index in range(2)
    )
    return CoordinateCheck(tuple(model.hidden_size for model in models), sizes, changes)


def _measure(
    config: TrainConfig, model: ModelConfig, batch: Mapping[str, np.ndarray], steps: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Sizes and changes of one model after each number of steps."""
    constant = dataclasses.replace(
        config.optimizer, schedule="constant", end_learning_rate=optimizer.OptimizerConfig.end_learning_rate,
        warmup_steps=0, warmup_tokens=0, decay_steps=0, decay_tokens=0,
    )  # fmt: skip
    tx, schedule = optimizer.build(constant, steps + 1, model=model)
    spec = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in batch.items()}
    task = NextTokenTask(model, spec, (), tx, schedule, objective=config.objective)
    state = jax.jit(task.init)(jax.random.key(config.seed))
    update = jax.jit(task.update)
    graphdef, _ = abstract_module(lambda rngs: Transformer(model, rngs, stacked=False))

    @jax.jit
    def measure(params: Params) -> dict[str, Array]:
        layers = {str(i): jax.tree.map(lambda x, i=i: x[i], params["layers"]) for i in range(model.num_layers)}
        module = merge(graphdef, {**params, "layers": layers})
        tokens, positions = jnp.asarray(batch["tokens"][:, :-1]), jnp.asarray(batch["positions"])
        return activations(module, tokens, positions, task.kernel)

    initial: dict[str, Array] = measure(state["params"])
    sizes: dict[str, list[float]] = {name: [] for name in MODULES}
    changes: dict[str, list[float]] = {name: [] for name in MODULES}
    for step in range(steps + 1):
        outputs = measure(state["params"]) if step else initial
        for name, output in outputs.items():
            sizes[name].append(float(jnp.abs(output).mean()))
            changes[name].append(float(jnp.abs(output - initial[name]).mean()))
        state, _ = update(state, dict(batch), jax.random.key(step))
    return sizes, changes


def activations(
    model: Transformer, tokens: Int[Array, "B T"], positions: Int[Array, "B T"], kernel: str
) -> dict[str, Float[Array, "..."]]:
    """The outputs of `MODULES` of a model with unrolled layers, float32; packed sentences attend to each other."""
    config = model.config
    rope = rope_cos_sin(positions, config.head_dim, config.rope_theta)
    x = model.embedding[...][tokens].astype(config.dtype)
    outputs: dict[str, Any] = {"embedding": x, "scores": [], "attention": [], "mlp": []}
    for layer in model.layers:
        query, key, value = layer.attention.project_qkv(layer.attention_norm(x), rope)
        repeated = jnp.repeat(key[:, :_SCORED], config.num_heads // config.kv_heads, axis=2)
        scores = jnp.einsum("bqhd,bkhd->bhqk", query[:, :_SCORED], repeated) / config.head_dim**0.5
        outputs["scores"].append(scores)
        outputs["attention"].append(layer.attention.project_out(attend(query, key, value, kernel)))
        x = x + outputs["attention"][-1]
        outputs["mlp"].append(layer.mlp(layer.mlp_norm(x)))
        x = x + outputs["mlp"][-1]
    outputs |= {"hidden": x, "logits": model.logits(x)}
    return {name: jnp.asarray(output, jnp.float32) for name, output in outputs.items()}


def plot(check: CoordinateCheck) -> bytes:
    """A PNG: one column a module, sizes above and their changes below, against width, one line a step."""
    figure = Figure(figsize=(2.3 * len(MODULES), 4.6), dpi=110, layout="constrained")
    axes = figure.subplots(2, len(MODULES), sharex=True)
    num_steps = len(check.sizes[MODULES[0]])
    colors = colormaps["viridis"](np.linspace(0, 0.9, num_steps))
    for column, name in enumerate(MODULES):
        for row, values in enumerate((check.sizes[name], check.changes[name])):
            for step in range(row, num_steps):  # nothing has changed after 0 steps
                label = f"step {step}" if column == row == 0 else None
                axes[row, column].plot(check.widths, values[step], "o-", color=colors[step], markersize=3, label=label)
            axes[row, column].set_xscale("log", base=2)
            axes[row, column].set_yscale("log", base=2)
            axes[row, column].set_xticks(check.widths, [str(width) for width in check.widths])
        axes[0, column].set_title(f"{name} (slope {check.slope(check.sizes[name][-1]):+.2f})", fontsize=9)
        axes[1, column].set_title(f"its change (slope {check.slope(check.changes[name][-1]):+.2f})", fontsize=9)
        axes[1, column].set_xlabel("width")
    axes[0, 0].set_ylabel("mean |activation|")
    axes[1, 0].set_ylabel("mean |change since step 0|")
    figure.legend(loc="outside right center", frameon=False, fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def run(config: TrainConfig, out: epath.PathLike, widths: Sequence[int], steps: int) -> CoordinateCheck:
    """Checks a training configuration on its own first batch; writes coordinates.json and coordinates.png."""
    rows = make_rows(config)
    check = coordinate_check(config, rows.batch(0), rows.vocabulary.size, widths, steps)
    folder = epath.Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "parametrization": dataclasses.asdict(config.model.parametrization),
        "learning_rate": config.optimizer.learning_rate,
        "widths": check.widths,
        "sizes": {name: values.tolist() for name, values in check.sizes.items()},
        "changes": {name: values.tolist() for name, values in check.changes.items()},
    }
    files.write_json(folder / RESULTS, content)
    files.write_atomically(folder / PLOT, plot(check))
    return check
