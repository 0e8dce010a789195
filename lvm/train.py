"""Train a transformer on a store of codes, or resume its run.

lvm train --config=configs/demo_lvm.py --workdir=DIR
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from lvm.common import cli, distributed
from lvm.common.config import from_config_dict, to_json
from lvm.common.errors import UserError
from lvm.common.logging import log_info
from lvm.data.images.sources import open_source
from lvm.data.mixture import loader
from lvm.data.mixture.mixture import Mixture
from lvm.data.mixture.rows import Rows
from lvm.data.store.manifest import same_codes
from lvm.evaluation import evaluator
from lvm.evaluation.config import EvalConfig
from lvm.evaluation.evaluator import Context
from lvm.evaluation.heldout import check_source
from lvm.evaluation.in_training import TrainingEvaluation, training_evaluations
from lvm.hardware.compiler_options import DETERMINISM_COST, OptionValue, compiler_options
from lvm.hardware.sharding import batch_sharding, make_mesh
from lvm.inference.contact_sheet import completion_sheet
from lvm.inference.generator import Generator, SamplingParams
from lvm.inference.pretrained import LVM
from lvm.interop.init_from import load_initial_model, load_weights
from lvm.interop.models import check_tokenizer
from lvm.model.flops import CONVENTIONS, train_flops_per_token
from lvm.model.nnx_utils import count_params
from lvm.model.vocabulary import Vocabulary
from lvm.training import optimizer
from lvm.training.checkpoint import latest_step
from lvm.training.config import TrainConfig, make_rows
from lvm.training.goodput import COMPILE, INDEX, Goodput
from lvm.training.loop import Loop, is_finished
from lvm.training.memory import explain_out_of_memory, find_fitting_step
from lvm.training.next_token import NextTokenTask
from lvm.training.step import Step, enable_compilation_cache
from lvm.training.task import State
from lvm.training.workdir import Workdir, check_branch
from tokenizer import Tokenizer

# Keys of a run's record that depend on the mixture.
_MIXTURE_KEYS = ("config.data.", "mixture.", "stores", "sources")


def train(config: TrainConfig, workdir: str) -> None:
    """Starts or resumes training in `workdir`; does nothing if it is complete."""
    times = Goodput()
    tokens = config.batch_size * config.model.context
    loop = config.loop.with_total_steps(tokens)
    optimizer.build_schedule(config.optimizer, loop.total_steps, tokens)  # its errors, before waiting for processes
    distributed.join(config.distributed)
    with times.spent_on(INDEX):
        mixture = Mixture(config.data, config.seed)
    store = mixture.stores[0]
    vocabulary = Vocabulary.for_codes(store.num_codes)
    options = compiler_options(jax.default_backend(), config.compiler_options, config.deterministic)
    record = {
        "config": to_json(config),
        "folder": os.getcwd(),  # in which relative paths of the configuration begin
        "compiler_options": options,
        "tokenizer": mixture.tokenizer,
        "stores": [store.identity() for store in mixture.stores],
        "sources": [store.manifest["source"] for store in mixture.stores],
        "mixture": {**mixture.record(), "identity": mixture.identity()},
    }
    may_change = _MIXTURE_KEYS if config.accept_changed_mixture else ()
    run = Workdir(workdir, "lvm", record, may_change, TrainConfig)
    if is_finished(run, loop):
        return
    vocabulary.save(run.path)
    if config.model.vocabulary_size not in (0, vocabulary.size):
        raise UserError(
            f"config.model.vocabulary_size={config.model.vocabulary_size}, but the store's codes need "
            f"{vocabulary.size}; 0 takes that"
        )
    model = dataclasses.replace(config.model, vocabulary_size=vocabulary.size)
    if config.branch and latest_step(run.path) is None:
        check_branch(config.branch[0], "lvm", record, TrainConfig)
    initialize = None
    if config.init_from and latest_step(run.path) is None:
        checkpoint = load_initial_model(config.init_from, model, vocabulary, mixture.tokenizer)
        initialize = functools.partial(load_weights, checkpoint)
    tx, schedule = optimizer.build(config.optimizer, loop.total_steps, tokens, model)
    rows = Rows(mixture, vocabulary, model.context, config.batch_size)
    rows.check_repetitions(loop.total_steps)
    if config.deterministic:
        log_info(f"deterministic, which costs {DETERMINISM_COST[jax.default_backend()]}")
    names, mesh = [component.name for component in mixture.components], make_mesh(config.mesh)
    objective = config.objective.for_mesh(config.batch_size, mesh.shape["data"], mesh.shape["fsdp"])
    task = NextTokenTask(model, rows.batch_spec, names, tx, schedule, mesh, objective, num_codes=store.num_codes)
    with times.spent_on(INDEX):  # after the task has checked that the mesh divides the batch
        task.heldout = _read_heldout(config, mesh)
    if config.objective.rows_per_device:
        log_info(f"{objective.accumulate_steps} micro-batches a step")
    if config.tokenizer:
        task.pictures = _picture_renderer(config, task, vocabulary)
    elif loop.picture_every:
        log_info("config.tokenizer is empty: no pictures of answers are rendered")
    log_info(f"{count_params(task.params_shape):,} parameters, {task.kernel} attention")
    for line in rows.summary():
        log_info(line)
    enable_compilation_cache(loop.compilation_cache, run.path)
    # MFU is relative to the peak of bfloat16.
    conventions = CONVENTIONS if model.dtype == "bfloat16" else ()
    flops = {name: tokens * train_flops_per_token(model, model.context, name) for name in conventions}
    evaluations = _evaluations(config, task, vocabulary, record)
    with times.spent_on(COMPILE):
        step, memory_advice = _fitting_step(config, task, options, initialize)
    Loop(step, rows.counted_batch, loop, run, tokens, flops, memory_advice, times, config.branch, evaluations).run()


def _read_heldout(config: TrainConfig, mesh: Mesh) -> list[dict[str, np.ndarray]]:
    """The held-out batches; of each, the rows on this process's devices."""
    if not (config.data.heldout_fraction and config.heldout_batches):
        return []
    rows, size = make_rows(config, "heldout"), config.batch_size
    local_rows = loader.local_rows(batch_sharding(mesh, size), (size,))
    return [rows.batch(step, local_rows) for step in range(config.heldout_batches)]


def _fitting_step(
    config: TrainConfig,
    task: NextTokenTask,
    options: Mapping[str, OptionValue],
    initialize: Callable[[State], State] | None,
) -> tuple[Step, Callable[[], str]]:
    """The step with a remat policy that fits in memory, and advice should it run out of memory nevertheless."""

    def make_step(policy: str, accumulate_steps: int) -> Step:
        model = dataclasses.replace(task.config, remat=policy)
        objective = dataclasses.replace(task.objective, accumulate_steps=accumulate_steps)
        candidate = dataclasses.replace(task, config=model, objective=objective)
        assert task.mesh is not None
        return Step(candidate, task.mesh, config.seed, config.mesh.zero1, options, initialize)

    accumulate_steps = task.objective.accumulate_steps
    step = find_fitting_step(make_step, task.config.remat, accumulate_steps)
    assert isinstance(step.task, NextTokenTask)
    policy = step.task.config.remat  # "auto" is resolved
    return step, lambda: explain_out_of_memory(make_step, step, policy, accumulate_steps)


def _evaluations(
    config: TrainConfig, task: NextTokenTask, vocabulary: Vocabulary, record: dict[str, Any]
) -> dict[str, TrainingEvaluation]:
    """`config.evaluations`, of held-out scenes of the training source or held-out sentences of the stores."""
    if not config.evaluations:
        return {}
    if not config.tokenizer:
        raise UserError("config.tokenizer is empty; config.evaluations need the folder of the tokenizer")
    tokenizer = Tokenizer.load(config.tokenizer)
    check_tokenizer(record["tokenizer"], vocabulary, tokenizer.identity(), config.tokenizer)
    source = open_source(config.evaluation_source, tokenizer.preprocess) if config.evaluation_source else None
    if source is not None:
        check_source(source, record["sources"], False, config.evaluation_source)
    # Without weights, which each evaluation takes from the state.
    model = dataclasses.replace(task.config, remat="none", attention="auto")
    context = Context(
        LVM(model, vocabulary, {}, record, 0, task.mesh),
        evaluator.Tokenizer.of(tokenizer, EvalConfig.batch_size),
        config.data,
        source,
        max_scenes=EvalConfig.max_scenes,
    )
    return training_evaluations(config.evaluations, context)


def _picture_renderer(
    config: TrainConfig, task: NextTokenTask, vocabulary: Vocabulary
) -> Callable[[State], dict[str, np.ndarray]]:
    """Renders answers to a held-out sentence of each component."""
    tokenizer = Tokenizer.load(config.tokenizer)
    mixture = Mixture(config.data, config.seed, "heldout" if config.data.heldout_fraction else "train")
    if not same_codes(tokenizer.identity(), mixture.tokenizer):
        raise UserError(f"config.tokenizer={config.tokenizer} is not the tokenizer that made the store's codes")
    sentences = {component.name: component.sentence(0) for component in mixture.components}
    fitting = {name: codes for name, codes in sentences.items() if codes.size <= task.config.context}
    if len(fitting) < len(sentences):
        log_info(f"no pictures of {', '.join(sentences.keys() - fitting.keys())}: longer than the context")

    def render(state: State) -> dict[str, np.ndarray]:
        generator = Generator(task.config, state["params"], task.mesh)

        def answer(prompt: np.ndarray, num_images: int) -> np.ndarray:
            row = np.concatenate([[vocabulary.bos], prompt.ravel()]).astype(np.int32)
            length, greedy = num_images * prompt.shape[1], SamplingParams(temperature=0.0)
            tokens = generator([row], length, greedy, [0], num_allowed=vocabulary.num_codes)
            return tokens.reshape(num_images, prompt.shape[1])

        return {f"answers-{name}": completion_sheet(codes, answer, tokenizer.decode) for name, codes in fitting.items()}

    return render


def _run(args: cli.Args) -> None:
    train(from_config_dict(TrainConfig, args.config), args.workdir)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    flags = cli.Flags(__doc__)
    flags.config()
    flags.string("workdir", None, "run directory, new or to resume", required=True)
    return flags.run(_run, argv)


if __name__ == "__main__":
    cli.exit_process(main())
