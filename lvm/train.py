"""Train a transformer on a store of codes, or resume its run.

lvm train --config=configs/demo_lvm.py --workdir=DIR
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from lvm.common import cli, distributed
from lvm.common.config import from_config_dict, to_json
from lvm.common.errors import UserError
from lvm.common.logging import log_info
from lvm.data.mixture.mixture import Mixture
from lvm.data.mixture.rows import Rows
from lvm.hardware.compiler_options import DETERMINISM_COST, compiler_options
from lvm.hardware.sharding import make_mesh
from lvm.inference.contact_sheet import completion_sheet
from lvm.inference.generator import Generator, SamplingParams
from lvm.interop.init_from import WarmStartStep, load_initial_model
from lvm.interop.lazy_checkpoint import LazyCheckpoint
from lvm.model.flops import CONVENTIONS, train_flops_per_token
from lvm.model.nnx_utils import count_params
from lvm.model.transformer import ModelConfig
from lvm.model.vocabulary import Vocabulary
from lvm.training import optimizer
from lvm.training.checkpoint import latest_step
from lvm.training.config import TrainConfig
from lvm.training.loop import Loop, is_finished
from lvm.training.memory import explain_out_of_memory, find_fitting_step
from lvm.training.next_token import NextTokenTask
from lvm.training.step import Step, enable_compilation_cache
from lvm.training.task import State
from lvm.training.workdir import Workdir, check_resumable
from tokenizer import Tokenizer

# What a changed mixture changes of a run's record.
_MIXTURE = ("config.data.", "mixture.", "stores", "sources")


def train(config: TrainConfig, workdir: str) -> None:
    """Trains, or goes on training, in `workdir`; does nothing where it is complete."""
    distributed.join(config.distributed)
    mixture = Mixture(config.data, config.seed)
    store = mixture.stores[0]
    vocabulary = Vocabulary.for_codes(store.num_codes)
    record = {
        "config": to_json(config),
        "compiler_options": compiler_options(jax.default_backend(), config.flags, config.deterministic),
        "tokenizer": store.manifest["tokenizer"],
        "stores": [store.identity() for store in mixture.stores],
        "sources": [store.manifest["source"] for store in mixture.stores],
        "mixture": {**mixture.record(), "identity": mixture.identity()},
    }
    tokens = config.batch_size * config.model.context
    loop = config.loop.with_total_steps(tokens)
    accepted = _MIXTURE if config.accept_changed_mixture else ()
    check_resumable(workdir)
    place = Workdir(workdir, "lvm", record, accepted, TrainConfig)
    if is_finished(place, loop):
        return
    vocabulary.save(place.path)
    model = _with_vocabulary(config.model, vocabulary)
    first = None
    if config.init_from and latest_step(place.path) is None:
        first = load_initial_model(config.init_from, model, vocabulary, store.manifest["tokenizer"])
    tx, schedule = optimizer.build(config.optimizer, loop.total_steps, tokens)
    rows = Rows(mixture, vocabulary, model.context, config.batch_size)
    rows.check_repetitions(loop.total_steps)
    mesh = make_mesh(config.mesh)
    if config.deterministic:
        log_info(f"deterministic, which costs {DETERMINISM_COST[jax.default_backend()]}")
    task = NextTokenTask(
        model,
        rows.batch_spec,
        [source.name for source in mixture.components],
        tx,
        schedule,
        mesh,
        config.objective,
        heldout=_heldout_batches(config, vocabulary, model.context),
    )
    if config.tokenizer:
        task.render_pictures = _pictures(config, task, vocabulary)
    elif loop.picture_every:
        log_info("no config.tokenizer: no pictures of answers are drawn")
    log_info(f"{count_params(task.params_shape):,} parameters, attention by {task.kernel}")
    for line in rows.summary():
        log_info(line)
    enable_compilation_cache(loop.compilation_cache, place.path)
    # The peak that MFU is a share of is that of bfloat16.
    conventions = CONVENTIONS if model.dtype == "bfloat16" else ()
    flops = {name: tokens * train_flops_per_token(model, model.context, name) for name in conventions}
    step, memory_advice = _step(config, task, mesh, first)
    Loop(step, rows.batch, loop, place, tokens, flops, memory_advice).run()


def _step(
    config: TrainConfig, task: NextTokenTask, mesh: Mesh, first: LazyCheckpoint | None
) -> tuple[Step, Callable[[], str]]:
    """The step that fits, and what to say should it run out of memory all the same."""

    def make(policy: str, parts: int) -> Step:
        model = dataclasses.replace(task.config, remat=policy)
        objective = dataclasses.replace(task.objective, accumulate_steps=parts)
        chosen = dataclasses.replace(task, config=model, objective=objective)
        if first is not None:
            return WarmStartStep(first, chosen, mesh, config.seed, config.mesh.zero1)
        platform = mesh.devices.flat[0].platform
        options = compiler_options(platform, config.flags, config.deterministic)
        return Step(chosen, mesh, config.seed, config.mesh.zero1, options)

    parts = task.objective.accumulate_steps
    step = find_fitting_step(make, task.config.remat, parts)
    chosen = step.task
    assert isinstance(chosen, NextTokenTask)  # as `make` made it; "auto" is resolved there
    return step, lambda: explain_out_of_memory(make, step, chosen.config.remat, parts)


def _with_vocabulary(model: ModelConfig, vocabulary: Vocabulary) -> ModelConfig:
    if model.vocabulary_size not in (0, vocabulary.size):
        raise UserError(
            f"config.model.vocabulary_size: {model.vocabulary_size}, the store's codes need {vocabulary.size} "
            "(0 takes that)"
        )
    return dataclasses.replace(model, vocabulary_size=vocabulary.size)


def _heldout_batches(config: TrainConfig, vocabulary: Vocabulary, context: int) -> list[dict]:
    if not (config.data.heldout_fraction and config.heldout_batches):
        return []
    rows = Rows(Mixture(config.data, config.seed, "heldout"), vocabulary, context, config.batch_size)
    return [rows.batch(step) for step in range(config.heldout_batches)]


def _pictures(config: TrainConfig, task: NextTokenTask, vocabulary: Vocabulary) -> Callable[[State], dict]:
    """Answers to a held-out sentence of each source, decoded: what the loop shows of a state."""
    tokenizer = Tokenizer.load(config.tokenizer)
    side = "heldout" if config.data.heldout_fraction else "train"
    mixture = Mixture(config.data, config.seed, side)
    if tokenizer.identity()["hash"] != mixture.stores[0].manifest["tokenizer"]["hash"]:
        raise UserError(
            f"config.tokenizer: {config.tokenizer} is not the tokenizer that made the store's codes"
        )
    sentences = {source.name: source.sentence(0) for source in mixture.components}
    fitting = {name: codes for name, codes in sentences.items() if codes.size <= task.config.context}
    if len(fitting) < len(sentences):
        log_info(f"no pictures of {', '.join(sentences.keys() - fitting.keys())}: longer than the context")

    def draw(state: State) -> dict[str, np.ndarray]:
        generator = Generator(task.config, state["params"], task.mesh)

        def answer(prompt: np.ndarray, num_images: int) -> np.ndarray:
            row = np.concatenate([[vocabulary.bos], prompt.ravel()]).astype(np.int32)
            length, greedy = num_images * prompt.shape[1], SamplingParams(temperature=0.0)
            tokens = generator([row], length, greedy, [0], num_allowed=vocabulary.num_codes)
            return tokens.reshape(num_images, prompt.shape[1])

        return {
            f"answers-{name}": completion_sheet(codes, answer, tokenizer.decode)
            for name, codes in fitting.items()
        }

    return draw


def _run(args: cli.Args) -> None:
    train(from_config_dict(TrainConfig, args.config), args.workdir)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    flags = cli.Flags(__doc__)
    flags.config()
    flags.string("workdir", None, "where the run lives", required=True)
    return flags.run(_run, argv)


if __name__ == "__main__":
    cli.exit_process(main())
