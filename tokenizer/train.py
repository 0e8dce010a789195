"""Train a tokenizer, or resume its run.

python -m tokenizer train --config=configs/demo_tokenizer.py --workdir=DIR
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import numpy as np

from lvm.common import cli, distributed
from lvm.common.config import from_config_dict, to_json
from lvm.common.errors import UserError
from lvm.common.logging import log_info, log_warning
from lvm.data.images.sources import ImageSource, open_any_source
from lvm.hardware.sharding import make_mesh
from lvm.model.nnx_utils import Params
from lvm.training.checkpoint import latest_step
from lvm.training.loop import Loop, LoopConfig, is_finished
from lvm.training.step import Step, enable_compilation_cache
from lvm.training.task import State
from lvm.training.workdir import Workdir
from tokenizer import weights
from tokenizer.config import TokenizerConfig, build_task
from tokenizer.images import TrainingImages
from tokenizer.network import quantizer_params
from tokenizer.quantizers.base import Quantizer

_HELDOUT_IMAGES = 128  # per stream, for the metrics of training


def _load_weights(quantizer: Quantizer, params: Params | None, perceptual: Params, state: State) -> State:
    """Replaces weights of a fresh state: the perceptual loss's, and the tokenizer's with all that follows from them."""
    training = state["training"]
    replaced = {"perceptual": perceptual}
    if params is not None:
        replaced["quantizer"] = quantizer.init_state(quantizer_params(params))
        replaced |= {"generator": params} if "generator" in training else {}
        state = state | {"params": _put(params, state["params"])}
    return state | {"training": training | {name: _put(new, training[name]) for name, new in replaced.items()}}


def _put(tree: Params, like: Params) -> Params:
    # Copies: the state is donated, and no two parts of it may share an array.
    return jax.tree.map(lambda x, old: jax.device_put(np.array(x), old.sharding), tree, like)


def load_init_params(config: TokenizerConfig) -> Params:
    """Reads the parameters of `config.init_from`.

    Raises:
      UserError: not a tokenizer folder, or one of another model or preprocess than the configuration's.
    """
    stored = weights.read(config.init_from)
    theirs = {"model": stored.config.describe(), "preprocess": to_json(stored.preprocess)}
    ours = {"model": config.model.describe(), "preprocess": to_json(config.preprocess)}
    different = [
        f"config.{group}.{key}={ours[group].get(key)!r}, there {theirs[group].get(key)!r}"
        for group in ours
        for key in ours[group] | theirs[group]
        if ours[group].get(key) != theirs[group].get(key)
    ]
    if different:
        raise UserError(f"config.init_from={config.init_from}: another tokenizer ({'; '.join(different)})")
    dtype, stored_dtype = config.model.compute_dtype, stored.config.compute_dtype
    if config.train == "decoder" and dtype != stored_dtype:
        log_warning(
            f"config.model.compute_dtype={dtype}, but {config.init_from} computes in {stored_dtype}: the new tokenizer "
            "will encode some images to other codes"
        )
    return stored.params


def train(config: TokenizerConfig, workdir: str) -> None:
    """Trains, or resumes training, in `workdir`; does nothing if the run is finished."""
    if not config.data.source:
        raise UserError("config.data.source is empty; give a folder of images or the config file of a source")
    distributed.join(config.distributed)
    source = open_any_source(config.data.source, config.preprocess)
    if not isinstance(source, ImageSource):
        raise UserError(f"config.data.source={config.data.source}: holds ready codes; a tokenizer is trained on images")
    preprocess = config.preprocess.to_json()
    record = {"config": to_json(config), "preprocess": preprocess, "source": source.describe()}
    loop = config.loop.with_total_steps(0)
    config.adversarial.check(config.batch_size, config.model.resolution, loop.total_steps)
    run = Workdir(workdir, "tokenizer", record, config_class=TokenizerConfig)
    if is_finished(run, loop):
        return
    for failure in source.skipped_files:
        log_info(f"skipped {failure.key}: {failure.reason}")
    images = TrainingImages(
        source, config.data, config.preprocess, config.batch_size, config.seed,
        run.path / "image_counts", loop.input_workers, jax.process_index(),
    )  # fmt: skip
    with images:
        _run_loop(config, loop, run, images)


def _run_loop(config: TokenizerConfig, loop: LoopConfig, run: Workdir, images: TrainingImages) -> None:
    task = build_task(config, loop.total_steps, images.heldout(_HELDOUT_IMAGES))
    enable_compilation_cache(loop.compilation_cache, run.path)
    initialize = None
    if latest_step(run.path) is None:
        initial = load_init_params(config) if config.init_from else None
        perceptual = config.loss.perceptual.load()
        initialize = functools.partial(_load_weights, config.model.quantizer, initial, perceptual)
    step = Step(task, make_mesh(config.mesh), config.seed, config.mesh.zero1, initialize=initialize)
    # The images have workers of their own; the loop reads ahead in threads that wait for them.
    Loop(step, images.read, dataclasses.replace(loop, input_workers=0), run).run()


def _run(args: cli.Args) -> None:
    train(from_config_dict(TokenizerConfig, args.config), args.workdir)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    flags = cli.Flags(__doc__)
    flags.config()
    flags.string("workdir", None, "run directory, local or gs://", required=True)
    return flags.run(_run, argv)


if __name__ == "__main__":
    cli.exit_process(main())
