"""Trains a transformer: `python -m lvm.train --config=configs/demo_lvm.py --workdir=DIR`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
from absl import flags
from jax.sharding import Mesh
from ml_collections import config_flags

from lvm import cli, distributed
from lvm.config import from_config_dict, to_json
from lvm.console import say
from lvm.data.mixture import Mixture, MixtureConfig
from lvm.data.rows import Rows
from lvm.distributed import DistributedConfig
from lvm.errors import UserError
from lvm.evaluation.pictures import completion
from lvm.flops import CONVENTIONS, train_flops_per_token
from lvm.generate import Sampling, generate_tokens
from lvm.mesh import MeshConfig, make_mesh
from lvm.model import ModelConfig
from lvm.module import count_params
from lvm.training import optimizer
from lvm.training.loop import Loop, LoopConfig, is_finished
from lvm.training.memory import advice, fitting_step
from lvm.training.objective import NextCode, ObjectiveConfig
from lvm.training.programs import cache_programs
from lvm.training.step import Step
from lvm.training.trainable import State
from lvm.training.workdir import Workdir
from lvm.vocabulary import Vocabulary
from tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A transformer's training.

    Attributes:
      seed: everything random follows from it and the step.
      batch_size: rows a step.
      heldout_batches: batches of held-out sentences that the held-out loss averages over.
      tokenizer: a tokenizer's folder, to show pictures of answers while training; "" shows none.
      accept_changed_mixture: goes on with a run whose mixture was another one until now.
    """

    seed: int = 0
    batch_size: int = 128
    heldout_batches: int = 4
    tokenizer: str = ""
    accept_changed_mixture: bool = False
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    data: MixtureConfig = dataclasses.field(default_factory=MixtureConfig)
    objective: ObjectiveConfig = dataclasses.field(default_factory=ObjectiveConfig)
    optimizer: optimizer.OptimizerConfig = dataclasses.field(default_factory=optimizer.OptimizerConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    distributed: DistributedConfig = dataclasses.field(default_factory=DistributedConfig)
    loop: LoopConfig = dataclasses.field(default_factory=LoopConfig)


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
        "tokenizer": store.manifest["tokenizer"],
        "stores": [store.identity() for store in mixture.stores],
        "sources": [store.manifest["source"] for store in mixture.stores],
        "mixture": {**mixture.record(), "identity": mixture.identity()},
    }
    tokens = config.batch_size * config.model.context
    loop = config.loop.in_steps(tokens)
    accepted = _MIXTURE if config.accept_changed_mixture else ()
    place = Workdir(workdir, "lvm", record, accepted, TrainConfig)
    if is_finished(place, loop):
        return
    vocabulary.save(place.path)
    model = _with_vocabulary(config.model, vocabulary)
    tx, schedule = optimizer.build(config.optimizer, loop.total_steps, tokens)
    rows = Rows(mixture, vocabulary, model.context, config.batch_size)
    rows.check_repetitions(loop.total_steps)
    mesh = make_mesh(config.mesh)
    trainable = NextCode(
        model,
        rows.batch_spec,
        [source.name for source in mixture.sources],
        tx,
        schedule,
        mesh,
        config.objective,
        heldout=_heldout_batches(config, vocabulary, model.context),
    )
    if config.tokenizer:
        trainable.draw = _pictures(config, trainable, vocabulary)
    say(f"{count_params(trainable.params_shape):,} parameters, attention by {trainable.kernel}")
    for line in rows.notes():
        say(line)
    cache_programs(loop.compilation_cache, place.path)
    # The peak that MFU is a share of is that of bfloat16.
    conventions = CONVENTIONS if model.dtype == "bfloat16" else ()
    flops = {name: tokens * train_flops_per_token(model, model.context, name) for name in conventions}
    step, memory_advice = _step(config, trainable, mesh)
    Loop(step, rows.batch, loop, place, tokens, flops, memory_advice).run()


def _step(config: TrainConfig, trainable: NextCode, mesh: Mesh) -> tuple[Step, Callable[[], str]]:
    """The step that fits, and what to say should it run out of memory all the same."""

    def make(policy: str, parts: int) -> Step:
        model = dataclasses.replace(trainable.config, remat=policy)
        objective = dataclasses.replace(trainable.objective, accumulate_steps=parts)
        chosen = dataclasses.replace(trainable, config=model, objective=objective)
        return Step(chosen, mesh, config.seed, config.mesh.zero1)

    parts = trainable.objective.accumulate_steps
    step = fitting_step(make, trainable.config.remat, parts)
    chosen = step.trainable
    assert isinstance(chosen, NextCode)  # as `make` made it; "auto" is resolved there
    return step, lambda: advice(make, step, chosen.config.remat, parts)


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


def _pictures(config: TrainConfig, trainable: NextCode, vocabulary: Vocabulary) -> Callable[[State], dict]:
    """Answers to a held-out sentence of each source, decoded: what the loop shows of a state."""
    tokenizer = Tokenizer.load(config.tokenizer)
    side = "heldout" if config.data.heldout_fraction else "train"
    mixture = Mixture(config.data, config.seed, side)
    if tokenizer.identity()["hash"] != mixture.stores[0].manifest["tokenizer"]["hash"]:
        raise UserError(
            f"config.tokenizer: {config.tokenizer} is not the tokenizer that made the store's codes"
        )
    sentences = {source.name: source.sentence(0) for source in mixture.sources}
    fitting = {name: codes for name, codes in sentences.items() if codes.size <= trainable.config.context}
    if len(fitting) < len(sentences):
        say(f"no pictures of {', '.join(sentences.keys() - fitting.keys())}: longer than the context")

    def draw(state: State) -> dict[str, np.ndarray]:
        def answer(prompt: np.ndarray, num_images: int) -> np.ndarray:
            row = np.concatenate([[vocabulary.bos], prompt.ravel()]).astype(np.int32)
            length, allowed = num_images * prompt.shape[1], vocabulary.num_codes
            sampling = Sampling(temperature=0.0)
            tokens = generate_tokens(
                trainable.graphdef, state["params"], [row], length, sampling, [0], num_allowed=allowed
            )
            return tokens.reshape(num_images, prompt.shape[1])

        return {
            f"answers-{name}": completion(codes, answer, tokenizer.decode) for name, codes in fitting.items()
        }

    return draw


def main() -> None:
    """The command."""
    train(from_config_dict(TrainConfig, _CONFIG.value), _WORKDIR.value)


if __name__ == "__main__":
    _CONFIG = config_flags.DEFINE_config_file("config", help_string="a file of configs/", lock_config=True)
    _WORKDIR = flags.DEFINE_string("workdir", None, "where the run lives", required=True)
    flags.mark_flag_as_required("config")
    cli.run(main)
