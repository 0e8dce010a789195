"""Plan of a sweep: points → runs with every setting that training needs; refuses or warns of what would mislead."""

import collections
import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Sequence

import numpy as np
from etils import epath

from lvm.common import cli
from lvm.common.config import from_config_dict
from lvm.common.errors import UserError
from lvm.data.mixture.mixture import Mixture
from lvm.data.mixture.rows import Rows
from lvm.hardware.accelerators import resolve
from lvm.model.flops import train_flops_per_token
from lvm.model.transformer import ModelConfig
from lvm.model.vocabulary import Vocabulary
from lvm.planning.estimate import MemoryModel, count_parameters
from lvm.planning.meshes import format_mesh, valid_meshes
from lvm.planning.plan import Target, estimate_plan, with_choice
from lvm.scaling.config import Point, SweepConfig
from lvm.scaling.manifest import FORMAT, MANIFEST, Run, Sweep, read_sweep, write_sweep
from lvm.scaling.rules import RULES, Case, Hyperparameters
from lvm.scaling.shapes import make_shape
from lvm.training.config import TrainConfig

_OFF_CENTER = 0.5  # of half the log range of sizes: IsoFLOP parabolas are biased on off-center grids
_ABBREVIATIONS = {
    "budget": "c", "tokens": "d", "tokens_per_param": "r", "width": "w", "num_layers": "l", "batch_size": "b",
    "learning_rate": "lr",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class _Draft:
    """A run whose schedule is not chosen yet."""

    name: str
    point: Point
    base: TrainConfig
    model: ModelConfig
    choice: Hyperparameters
    steps: int
    tokens: float

    @property
    def branch_key(self) -> tuple[object, ...]:
        """Equal for runs that share a trunk."""
        return (self.model, *sorted(self.point.overrides.items()), self.point.batch_size, self.point.learning_rate)


def plan_sweep(config: SweepConfig) -> Sweep:
    """Plans every run of a sweep.

    Raises:
      UserError: a point is impossible, misses its budget or its rule's range, repeats data too often, or fits no mesh;
        two points are one run; the sizes of a budget lie on one side of its expected minimum.
    """
    planner = _Planner(config)
    runs = planner.plan()
    planner.warnings.extend(_check_budgets(config, runs))
    return Sweep(FORMAT, runs, tuple(planner.warnings))


def extend_sweep(folder: epath.PathLike, sweep: Sweep) -> None:
    """Writes a manifest, or adds runs to the one of an earlier plan.

    Raises:
      UserError: a run of the earlier plan is missing or has changed.
    """
    if (epath.Path(folder) / MANIFEST).exists():
        runs = {run.name: run for run in sweep.runs}
        for run in read_sweep(folder).runs:
            if runs.get(run.name) != run:
                problem = "has changed" if run.name in runs else "is missing"
                raise UserError(
                    f"--out={folder}: has a sweep whose run {run.name} {problem} in this plan; use another folder"
                )
    write_sweep(folder, sweep)


class _Planner:
    def __init__(self, config: SweepConfig):
        self._config, self.warnings = config, list[str]()
        self._target: Target | None = None
        if config.accelerator:
            slice_ = resolve(config.accelerator)
            self._target = Target(slice_, 1, (), slice_.accelerator.hbm_bytes)
        self._vocabulary_size = Vocabulary.for_codes(config.num_codes).size
        self._memory = MemoryModel()

    def plan(self) -> tuple[Run, ...]:
        points = {_name(point): point for point in self._config.points}
        if len(points) < len(self._config.points):
            counts = collections.Counter(map(_name, self._config.points))
            raise UserError(f"config.points: {counts.most_common(1)[0][0]} is there twice")
        drafts = {name: self._draft(name, point) for name, point in points.items()}
        groups: dict[tuple[object, ...], list[_Draft]] = collections.defaultdict(list)
        for draft in drafts.values():
            if draft.point.branch:
                groups[draft.branch_key].append(draft)
        runs: dict[str, Run] = {}
        for group in groups.values():
            runs |= self._branches(group)
        for name, draft in drafts.items():
            if not draft.point.branch:
                runs[name] = self._run(draft, self._warmup(draft))
        for (name, run), (other, earlier) in itertools.combinations(runs.items(), 2):
            if run.arguments == earlier.arguments:
                raise UserError(f"config.points: {name} and {other} are the same run; widths are snapped to shapes")
        return tuple(runs[name] for name in drafts)

    @functools.cache  # noqa: B019 (lives as long as its plan)
    def _base(self, overrides: tuple[str, ...]) -> TrainConfig:
        arguments = [f"--config={self._config.train}", *overrides]
        config = _load(arguments)
        if not (config.data.heldout_fraction and config.heldout_batches):
            raise UserError(
                f"{self._config.train}: config.data.heldout_fraction={config.data.heldout_fraction} and "
                f"config.heldout_batches={config.heldout_batches}; a sweep compares held-out losses: set both"
            )
        return config

    def _draft(self, name: str, point: Point, like: _Draft | None = None) -> _Draft:
        """A run; with the batch and learning rate of another one where `like` is given."""
        config = self._config
        base = self._base(tuple(_overrides(point)))
        size = self._vocabulary_size
        shape = point.width, point.num_layers, point.num_heads, point.mlp_size
        model = make_shape(dataclasses.replace(base.model, vocabulary_size=size), config.shape, *shape)
        per_token = train_flops_per_token(model, model.context, config.flops_convention)
        tokens = point.tokens or point.tokens_per_param * count_parameters(model) or point.budget / per_token
        if like is not None:
            choice = dataclasses.replace(like.choice, warnings=())
        else:
            choice = self._choose(name, point, base, model, tokens)
        step_tokens = choice.batch_size * model.context
        steps = max(1, round(tokens / step_tokens))
        error = steps * step_tokens / tokens - 1
        if abs(error) > config.flops_tolerance:
            raise UserError(
                f"{name}: {steps} steps of {choice.batch_size} rows miss its {tokens:.4g} tokens by {error:+.1%}, more "
                f"than flops_tolerance={config.flops_tolerance:g}; use fewer rows or a larger budget"
            )
        return _Draft(name, point, base, model, choice, steps, float(steps * step_tokens))

    def _choose(self, name: str, point: Point, base: TrainConfig, model: ModelConfig, tokens: float) -> Hyperparameters:
        unit = 1
        if self._target is not None:
            unit = max(1, self._target.chips // (base.mesh.sequence * base.mesh.tensor))
        case = Case(
            width=model.hidden_size,
            params=_without_embedding(model),
            tokens=tokens,
            context=model.context,
            rows_unit=unit,
            batch_size=point.batch_size,
            learning_rate=point.learning_rate,
            base_batch_size=base.batch_size,
            base_learning_rate=base.optimizer.learning_rate,
        )
        parametrization, rule = base.model.parametrization.name, self._config.rule.name
        if parametrization != "standard" and rule != "fixed":
            raise UserError(
                f"{name}: {parametrization} carries over the base model's learning rate, which rule.name={rule} would "
                "scale again; use fixed"
            )
        try:
            choice = RULES[self._config.rule.name](case, self._config.rule)
        except UserError as error:
            raise UserError(f"{name}: {error}") from error
        self.warnings += [f"{name}: {warning}" for warning in choice.warnings]
        return dataclasses.replace(choice, learning_rate=float(f"{choice.learning_rate:.4g}"))

    def _branches(self, group: Sequence[_Draft]) -> dict[str, Run]:
        """Runs of the points that share a trunk, which is the run of the most tokens."""
        *others, trunk = sorted(group, key=lambda draft: draft.tokens)
        if trunk.base.optimizer.schedule != "wsd":
            raise UserError(
                f"{trunk.name}: branch=True needs config.optimizer.schedule=wsd, not {trunk.base.optimizer.schedule}"
            )
        drafts = [self._draft(draft.name, draft.point, like=trunk) for draft in others]
        warmup = self._warmup(drafts[0] if drafts else trunk)
        starts = [draft.steps - self._decay(draft) for draft in drafts]
        if starts and starts[0] <= warmup:
            raise UserError(f"{drafts[0].name}: branches off at step {starts[0]}, in the warm-up of {warmup} steps")
        keep = f"({','.join(map(str, starts))},)"
        runs = {trunk.name: self._run(trunk, warmup, *([f"loop.keep_steps={keep}"] if starts else []))}
        for draft, start in zip(drafts, starts, strict=True):
            runs[draft.name] = self._run(draft, warmup, trunk=trunk.name, trunk_step=start)
        return runs

    def _warmup(self, draft: _Draft) -> int:
        return round(self._config.rule.warmup_fraction * draft.steps)

    def _decay(self, draft: _Draft) -> int:
        return max(1, round(self._config.rule.decay_fraction * draft.steps))

    def _run(self, draft: _Draft, warmup: int, *more: str, trunk: str = "", trunk_step: int = 0) -> Run:
        config, model, choice, base = self._config, draft.model, draft.choice, draft.base
        settings = {
            "model.hidden_size": model.hidden_size,
            "model.num_layers": model.num_layers,
            "model.num_heads": model.num_heads,
            "model.mlp_size": model.mlp_size,
            "batch_size": choice.batch_size,
            "optimizer.learning_rate": choice.learning_rate,
            "optimizer.warmup_steps": warmup,
            "optimizer.warmup_tokens": 0,
            "loop.total_steps": draft.steps,
            "loop.total_tokens": 0,
        }
        if base.optimizer.schedule == "wsd":
            settings |= {"optimizer.decay_steps": self._decay(draft), "optimizer.decay_tokens": 0}
        if base.optimizer.schedule != "constant":
            settings["optimizer.end_learning_rate"] = float(f"{config.rule.end_fraction * choice.learning_rate:.4g}")
        overridden = {key.removeprefix("config.") for key in draft.point.overrides}
        if choice.b2 is not None and "optimizer.b2" not in overridden:
            settings["optimizer.b2"] = float(f"{choice.b2:.6g}")
        # A point's schedule=wsd needs decay_steps to be valid.
        if clash := sorted(overridden & settings.keys() - {"optimizer.decay_steps"}):
            raise UserError(
                f"{draft.name}: {clash[0]} is chosen by the sweep, {settings[clash[0]]}; a point can't set it"
            )
        pairs = [*(f"{key}={value}" for key, value in settings.items()), *more]
        arguments = [f"--config={config.train}", *_overrides(draft.point), *(f"--config.{pair}" for pair in pairs)]
        mesh, micro_batches = "", base.objective.accumulate_steps
        if self._target is not None:
            if clash := sorted(key for key in overridden if key.startswith(("mesh.", "objective.accumulate_steps"))):
                raise UserError(f"{draft.name}: {clash[0]} is chosen for the accelerator; a point can't set it")
            placed = self._place(draft.name, self._target, _load(arguments))
            mesh, micro_batches = format_mesh(placed.mesh), placed.objective.accumulate_steps
            arguments += [f"--config.mesh.{axis}={getattr(placed.mesh, axis)}" for axis in ("data", "fsdp")]
            arguments += [
                f"--config.objective.accumulate_steps={micro_batches}",
                "--config.objective.rows_per_device=0",
            ]
        checked = _load(arguments)
        per_token = train_flops_per_token(model, model.context, config.flops_convention)
        return Run(
            name=draft.name,
            workdir=f"runs/{draft.name}",
            params=count_parameters(model),
            params_without_embedding=_without_embedding(model),
            tokens=draft.tokens,
            flops=draft.tokens * per_token,
            steps=draft.steps,
            evaluation=f"evaluations/{draft.name}" if config.evaluation else "",
            arguments=tuple(arguments),
            evaluation_arguments=config.evaluation,
            budget=draft.point.budget,
            batch_size=choice.batch_size,
            learning_rate=choice.learning_rate,
            warmup_steps=warmup,
            mesh=mesh,
            micro_batches=micro_batches,
            epochs=self._epochs(draft, checked),
            device_hours=self._device_hours(draft.tokens * per_token * (1 - trunk_step / draft.steps)),
            trunk=trunk,
            trunk_step=trunk_step,
        )

    def _place(self, name: str, target: Target, config: TrainConfig) -> TrainConfig:
        """The mesh with the least sharding, then the fewest micro-batches, that fits by the memory model."""
        model = dataclasses.replace(config.model, vocabulary_size=self._vocabulary_size)
        config = dataclasses.replace(config, model=model)
        remat = "full" if model.remat == "auto" else model.remat
        meshes = valid_meshes(model, config.mesh, target.chips, target.slices, config.batch_size)
        for mesh in sorted(meshes, key=lambda mesh: mesh.fsdp):
            rows = config.batch_size // (mesh.data * mesh.fsdp)
            counts = [2**power for power in range(rows.bit_length()) if rows % 2**power == 0]
            choices = [with_choice(config, remat, mesh, config.batch_size, count) for count in counts]
            smallest = estimate_plan(choices[-1], target, self._memory)
            if smallest.fits:
                room = target.usable_bytes - smallest.total_bytes + smallest.temp_bytes
                return next(choice for choice in choices if int(self._memory.temp_bytes(choice)) <= room)
        if not meshes:
            raise UserError(f"{name}: no mesh of {target.name} divides its {config.batch_size} rows and its shape")
        raise UserError(f"{name}: {count_parameters(model):,} parameters do not fit {target.name}; use a larger one")

    def _device_hours(self, flops: float) -> float:
        rate = self._config.device_flops
        if not rate and self._target is not None:
            rate = self._config.mfu * self._target.slice.accelerator.peak_flops
        return flops / rate / 3600 if rate else 0.0

    def _epochs(self, draft: _Draft, config: TrainConfig) -> float:
        limit, unique = self._config.max_epochs, self._config.unique_tokens
        if unique:
            epochs = draft.tokens / unique
        else:
            rows = Rows(self._mixture, self._vocabulary, config.model.context, config.batch_size)
            rows.check_repetitions(draft.steps)
            counts = rows.sentences_read(draft.steps)
            components = rows.mixture.components
            epochs = max(n / component.sentences_per_epoch for n, component in zip(counts, components, strict=True))
        if epochs > limit:
            raise UserError(
                f"{draft.name}: {draft.tokens:.3g} tokens are {epochs:.3g} epochs, more than max_epochs={limit:g}; "
                "use fewer tokens or more data"
            )
        return epochs

    @functools.cached_property
    def _mixture(self) -> Mixture:
        base = self._base(())
        try:
            mixture = Mixture(base.data, base.seed)
        except UserError as error:
            raise UserError(f"{error}; without the stores, set config.unique_tokens") from error
        if (num_codes := mixture.stores[0].num_codes) != self._config.num_codes:
            raise UserError(f"config.num_codes={self._config.num_codes}: the stores have {num_codes} codes")
        return mixture

    @property
    def _vocabulary(self) -> Vocabulary:
        return Vocabulary.for_codes(self._config.num_codes)


def _check_budgets(config: SweepConfig, runs: Sequence[Run]) -> list[str]:
    """Warnings of budgets whose sizes don't surround the expected minimum well.

    Raises:
      UserError: all sizes of a budget lie on one side of it.
    """
    by_budget: dict[float, dict[float, float]] = collections.defaultdict(dict)
    for run in runs:
        if run.budget:
            by_budget[run.budget][run.params] = run.tokens / run.params
    warnings = []
    for budget, ratios in sorted(by_budget.items()):
        if len(ratios) < 2:
            warnings.append(f"budget {budget:.3g}: has one size; its minimum is unknown")
            continue
        sizes = np.array(sorted(ratios))
        logs = np.log([ratios[size] / config.tokens_per_param for size in sizes.tolist()])  # falls with the size
        smaller, larger = int((logs > 0).sum()), int((logs < 0).sum())
        text = (
            f"budget {budget:.3g}: of {len(sizes)} sizes, {smaller} lie below and {larger} above the expected minimum"
        )
        optimum = math.exp(np.interp(0.0, -logs, np.log(sizes)))
        hint = f"at {config.tokens_per_param:g} tokens per parameter, about {optimum:.3g} parameters"
        if not smaller or not larger:
            side = "larger" if not larger else "smaller"
            raise UserError(f"{text} ({config.tokens_per_param:g} tokens per parameter); add {side} sizes")
        half = math.log(sizes[-1] / sizes[0]) / 2
        offset = abs(math.log(optimum) - math.log(sizes[0]) - half) / half
        if min(smaller, larger) < 2:
            warnings.append(f"{text} ({hint}); its parabola will be biased: have two on each side")
        elif offset > _OFF_CENTER:
            warnings.append(f"{text} ({hint}), {offset:.0%} off the center; its parabola will be biased")
    return warnings


def _load(arguments: Sequence[str]) -> TrainConfig:
    """The configuration that `lvm train` would have with these arguments."""
    try:
        return from_config_dict(TrainConfig, cli.read_config(arguments))
    except UserError as error:
        raise UserError(f"{arguments[0].removeprefix('--config=')}: {error}") from error


def _without_embedding(model: ModelConfig) -> int:
    """Parameters without embedding and output projection."""
    return count_parameters(model) - (1 if model.tie_embeddings else 2) * model.vocabulary_size * model.hidden_size


def _overrides(point: Point) -> list[str]:
    return [f"--config.{key.removeprefix('config.')}={value}" for key, value in point.overrides.items()]


def _name(point: Point) -> str:
    """`c1e18-w512`: what distinguishes a point, of characters that paths may have."""
    parts = [
        f"{short}{getattr(point, key):g}".replace("+", "")
        for key, short in _ABBREVIATIONS.items()
        if getattr(point, key)
    ]
    parts += [f"{key.split('.')[-1]}={value}" for key, value in point.overrides.items()]
    return re.sub(r"[^\w.=-]", "_", "-".join(parts))
