"""Train a tokenizer, or resume its run.

python -m tokenizer train --config=configs/demo_tokenizer.py --workdir=DIR
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np

from lvm.common import cli, distributed, statistics
from lvm.common.config import from_config_dict, to_json
from lvm.common.errors import UserError
from lvm.common.logging import log_info
from lvm.data.images.sources import open_source
from lvm.hardware.sharding import make_mesh
from lvm.model.nnx_utils import Params
from lvm.training import optimizer
from lvm.training.loop import Loop, is_finished
from lvm.training.step import Step, enable_compilation_cache
from lvm.training.task import State
from lvm.training.workdir import Workdir, check_resumable
from tokenizer import quantizers, weights
from tokenizer.config import TokenizerConfig
from tokenizer.images import ImagePool, TrainingImages, split_scenes
from tokenizer.objective import TokenizerObjective

_HELDOUT_IMAGES = 128  # of each stream, for the figures that training logs
_PICTURED = 4  # images of each stream in a picture


class TokenizerTask(TokenizerObjective):
    """The objective with what a run measures and shows of it on held-out images."""

    heldout: dict[str, np.ndarray]  # stream → uint8 [n, R, R, 3]

    def evaluate(self, state: State, stopping: Callable[[], bool] = lambda: False) -> dict[str, float]:
        """PSNR in dB of each stream's held-out images, `heldout_psnr/STREAM`."""
        figures: dict[str, float] = {}
        for stream, images in self.heldout.items():
            if stopping():
                return {}
            psnr = statistics.psnr(self._reconstruct(state, images), images)  # [n]
            figures[f"heldout_psnr/{stream}"] = float(psnr.mean())
        return figures

    def pictures(self, state: State) -> dict[str, np.ndarray]:
        """Held-out images above their reconstructions, a pair of rows a stream."""
        rows = []
        for images in self.heldout.values():
            shown = images[:: max(1, len(images) // _PICTURED)][:_PICTURED]
            padded = np.zeros((_PICTURED, *images.shape[1:]), np.uint8)
            padded[: len(shown)] = shown
            rows += [
                np.concatenate(list(padded), 1),
                np.concatenate(list(self._reconstruct(state, padded)), 1),
            ]
        return {"reconstructions": np.concatenate(rows)} if rows else {}

    def _reconstruct(self, state: State, images: np.ndarray) -> np.ndarray:
        if not hasattr(self, "_jitted"):
            self._jitted = jax.jit(self.reconstruct)
        return np.asarray(self._jitted(state["params"], images))


class WarmStartStep(Step):
    """A step whose first state has given weights, and the codebook's averages that follow from them."""

    params: Params

    def init(self) -> State:
        """See `Step.init`; the optimizer's state is a fresh one."""
        state = super().init()
        averages = quantizers.init_moving_averages(self.params["codebook"])
        training = state["training"] | {
            "averages": self._placed(averages, self.state["training"]["averages"])
        }
        return state | {"params": self._placed(self.params, self.state["params"]), "training": training}

    @staticmethod
    def _placed(tree: Params, like: Params) -> Params:
        # Copies: the state is donated, and two parts of it must not share an array.
        return jax.tree.map(lambda x, spec: jax.device_put(np.array(x), spec.sharding), tree, like)


def load_init_params(config: TokenizerConfig) -> Params:
    """The parameters in `config.init_from`.

    Raises:
      UserError: no tokenizer's folder, or another network or preprocessing than the configuration's.
    """
    found = weights.read(config.init_from)
    theirs = {"model": to_json(found.config), "preprocess": found.preprocess.to_json()}
    ours = {"model": to_json(config.model), "preprocess": config.preprocess.to_json()}
    different = [
        f"config.{part}.{key}: {value!r}, there {theirs[part][key]!r}"
        for part in ours
        for key, value in ours[part].items()
        if value != theirs[part][key] and key != "compute_dtype"
    ]
    if different:
        raise UserError(f"config.init_from: {config.init_from}: another tokenizer ({'; '.join(different)})")
    return found.params


def train(config: TokenizerConfig, workdir: str) -> None:
    """Trains, or goes on training, in `workdir`; does nothing where it is complete."""
    if not config.data.source:
        raise UserError("config.data.source: empty; give a folder of images or a config file of a source")
    distributed.join(config.distributed)
    source = open_source(config.data.source, config.preprocess)
    record = {
        "config": to_json(config),
        "preprocess": config.preprocess.to_json(),
        "source": source.describe(),
    }
    loop = config.loop.with_total_steps(0)
    check_resumable(workdir)
    place = Workdir(workdir, "tokenizer", record, config_class=TokenizerConfig)
    if is_finished(place, loop):
        return
    for skipped in source.skipped:
        log_info(f"skipped {skipped.key}: {skipped.reason}")
    tx, schedule = optimizer.build(config.optimizer, loop.total_steps)
    trainable = TokenizerTask(
        config.model,
        config.loss,
        tx,
        schedule,
        batch_size=config.batch_size,
        has_codebook=bool(config.init_from),
    )
    side, limit = config.model.resolution, config.data.max_gigabytes
    training, heldout = split_scenes(source, config.data)
    pool = ImagePool(source, training, side, limit)
    trainable.heldout = {}
    if len(heldout):
        images = ImagePool(source, heldout, side, limit).images
        trainable.heldout = {s: x[:: -(-len(x) // _HELDOUT_IMAGES)] for s, x in images.items() if len(x)}
    log_info(f"{len(training)} scenes to train on, {len(heldout)} held out; " + _count(pool))
    batches = TrainingImages(pool, config.data.rgb_share, config.batch_size, config.seed)
    enable_compilation_cache(loop.compilation_cache, place.path)
    make = WarmStartStep if config.init_from else Step
    step = make(trainable, make_mesh(config.mesh), config.seed, config.mesh.zero1)
    if isinstance(step, WarmStartStep):
        step.params = load_init_params(config)
    Loop(step, lambda number, rows: _rows(batches.batch(number), rows), loop, place).run()


def _rows(batch: Mapping[str, np.ndarray], rows: np.ndarray) -> dict[str, np.ndarray]:
    return {name: x[rows] for name, x in batch.items()}


def _count(pool: ImagePool) -> str:
    return ", ".join(f"{len(images)} {stream}" for stream, images in pool.images.items()) + " images"


def _run(args: cli.Args) -> None:
    config = from_config_dict(TokenizerConfig, args.config)
    train(config, args.workdir)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    flags = cli.Flags(__doc__)
    flags.config()
    flags.string("workdir", None, "where the run lives", required=True)
    return flags.run(_run, argv)


if __name__ == "__main__":
    cli.exit_process(main())
