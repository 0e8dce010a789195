"""Observations of a sweep, one finished run a row: parameters N, tokens D, training FLOPs C and loss L."""

import csv
import dataclasses
import io
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from etils import epath
from jaxtyping import Bool, Float, Int, Shaped

from lvm.common import files
from lvm.common.errors import UserError

# Field → names of its column, in lower-case letters and digits; the first that a table has is read.
COLUMNS = {
    "params": ("params", "parameters", "nparams", "numparams", "modelsize", "modelparameters", "n"),
    "tokens": ("tokens", "ntokens", "numtokens", "trainingtokens", "traintokens", "datasetsize", "d"),
    "flops": ("flops", "flop", "trainingflop", "trainingflops", "trainflops", "compute", "budget", "c"),
    "loss": ("loss", "heldoutloss", "evalloss", "validationloss", "valloss", "testloss", "finalloss", "l"),
}
SCORE, PERPLEXITY = "score/", "perplexity/"  # prefixes of a table's columns of downstream metrics
FLOPS = 6.0  # of a parameter and a token: C = 6·N·D where a table has two of the three (arXiv 2001.08361)
_ARRAYS = ("params", "tokens", "flops", "loss", "name", "run")


@dataclasses.dataclass(frozen=True)
class Observations:
    """Rows that a law is fitted to, in the order of their table.

    Attributes:
      params: N.
      tokens: D.
      flops: C.
      loss: L, in nats per token.
      name: of each row, unique: its number in the table from 1, or a run's name.
      run: number of the run that a row is of; rows of a run are resampled together.
      metrics: downstream metric → its values, NaN where a row has none; names begin with `SCORE` or `PERPLEXITY`.
      excluded: name → reason, of the rows that were left out.
    """

    params: Float[np.ndarray, " n"]
    tokens: Float[np.ndarray, " n"]
    flops: Float[np.ndarray, " n"]
    loss: Float[np.ndarray, " n"]
    name: Shaped[np.ndarray, " n"]
    run: Int[np.ndarray, " n"]
    metrics: Mapping[str, Float[np.ndarray, " n"]] = dataclasses.field(default_factory=dict)
    excluded: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.loss)

    @property
    def flops_ratio(self) -> float:
        """Median of C / (N·D), which is 6 without attention, embedding and output projection."""
        return float(np.median(self.flops / (self.params * self.tokens)))

    def take(self, indices: Shaped[np.ndarray, " m"]) -> "Observations":
        """Rows by index, which may repeat, or by mask; the others are not recorded as excluded."""
        arrays = {name: getattr(self, name)[indices] for name in _ARRAYS}
        metrics = {name: values[indices] for name, values in self.metrics.items()}
        return dataclasses.replace(self, **arrays, metrics=metrics)

    def keep(self, is_kept: Bool[np.ndarray, " n"], reasons: str | Sequence[str]) -> "Observations":
        """The rows that are kept; the others are excluded for a reason, one for all or one a row."""
        reasons = [reasons] * len(self) if isinstance(reasons, str) else reasons
        dropped = {str(self.name[i]): reasons[i] for i in np.flatnonzero(~is_kept).tolist()}
        return dataclasses.replace(self.take(is_kept), excluded={**self.excluded, **dropped})

    def budgets(self, tolerance: float = 0.25) -> Int[np.ndarray, " n"]:
        """Number of each row's compute budget, from the smallest, each a range of FLOPs of this relative width."""
        order = np.argsort(self.flops, kind="stable")
        numbers = np.empty(len(self), np.int64)
        number, limit = -1, -math.inf
        for i in order:
            if self.flops[i] > limit:
                number, limit = number + 1, self.flops[i] * (1 + tolerance)
            numbers[i] = number
        return numbers


def read_csv(path: epath.PathLike, columns: Mapping[str, str] | None = None) -> Observations:
    """Reads a table of finished runs.

    Args:
      path: a CSV file with a header. Of params, tokens and flops two suffice: C = 6·N·D. Columns that begin with
        `score/` or `perplexity/` are downstream metrics, whose cells may be empty.
      columns: field of `COLUMNS` → name of its column, for tables with other names.

    Raises:
      UserError: no such file, no CSV, a missing column, a value that is no positive number, equal rows, or no row.
    """
    names, lines = _read_lines(path)
    chosen = dict(columns or {})
    if unknown := sorted(chosen.keys() - COLUMNS.keys()):
        raise UserError(f"--columns: {unknown[0]!r} must be one of {', '.join(COLUMNS)}")
    column_of = {field: column for field in COLUMNS if (column := _find_column(path, field, names, chosen))}
    if "loss" not in column_of or len(column_of.keys() - {"loss"}) < 2:
        missing = [field for field in COLUMNS if field not in column_of]
        raise UserError(
            f"{path}: no column for {', '.join(missing)} among {', '.join(names)}; loss and two of params, tokens and "
            "flops are required: name them with --columns=loss=NAME,…"
        )
    if not lines:
        raise UserError(f"{path}: no rows below the header")
    at = {field: names.index(column) for field, column in column_of.items()}
    table = {
        field: np.array([_to_positive(path, row, names[i], line[i]) for row, line in enumerate(lines, 1)])
        for field, i in at.items()
    }
    metrics = {
        name: np.array([_to_float(path, row, name, line[i]) for row, line in enumerate(lines, 1)])
        for i, name in enumerate(names)
        if name.startswith((SCORE, PERPLEXITY))
    }
    if "params" not in table:
        table["params"] = table["flops"] / FLOPS / table["tokens"]
    if "tokens" not in table:
        table["tokens"] = table["flops"] / FLOPS / table["params"]
    if "flops" not in table:
        table["flops"] = FLOPS * table["params"] * table["tokens"]
    _reject_duplicates(path, table)
    numbers = np.arange(len(lines))
    params, tokens, flops, loss = (table[field] for field in COLUMNS)
    return Observations(params, tokens, flops, loss, (numbers + 1).astype(str), numbers, metrics)


def select(
    observations: Observations, drop_highest: int = 0, min_flops: float = 0.0, max_flops: float = math.inf
) -> Observations:
    """Leaves rows out, each with its reason: the highest losses of all rows, then those outside of [min, max) FLOPs.

    Raises:
      UserError: nothing is left.
    """
    is_kept = np.ones(len(observations), bool)
    is_kept[np.argsort(observations.loss, kind="stable")[max(0, len(observations) - drop_highest) :]] = False
    kept = observations.keep(is_kept, f"one of the {drop_highest} highest losses")
    kept = kept.keep(kept.flops >= min_flops, f"fewer than {min_flops:g} FLOPs")
    kept = kept.keep(kept.flops < max_flops, f"{max_flops:g} FLOPs or more")
    if not len(kept):
        raise UserError(
            f"--drop_highest={drop_highest}, --min_flops={min_flops:g} and --max_flops={max_flops:g} leave none of "
            f"{len(observations)} rows"
        )
    return kept


def drop_outliers(
    observations: Observations, residuals: Float[np.ndarray, " n"], max_deviations: float
) -> Observations:
    """Leaves out rows with a residual of more than so many robust deviations (1.4826 × median absolute deviation).

    `residuals` are of the log loss. Each row left out has its residual in its reason.
    """
    deviation = 1.4826 * float(np.median(np.abs(residuals - np.median(residuals))))
    is_kept = np.abs(residuals) <= max_deviations * max(deviation, 1e-12)  # rounding is no outlier
    reasons = [
        f"outlier: loss {np.expm1(-r):+.2%} from the fit, {abs(r) / max(deviation, 1e-12):.1f} robust deviations"
        for r in residuals
    ]
    return observations.keep(is_kept, reasons)


def _read_lines(path: epath.PathLike) -> tuple[list[str], list[list[str]]]:
    """The header and the rows, of equal length."""
    if not epath.Path(path).exists():
        raise UserError(f"--csv={path}: no such file")
    try:
        text = files.read_bytes(path).decode("utf-8-sig")
        lines = [line for line in csv.reader(io.StringIO(text, newline=""), strict=True) if any(map(str.strip, line))]
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: not a CSV file in UTF-8: {error}") from error
    if not lines:
        raise UserError(f"{path}: empty; expected a header and a row for each run")
    names = [name.strip() for name in lines[0]]
    for row, line in enumerate(lines[1:], 1):
        if len(line) != len(names):
            raise UserError(f"{path}, row {row}: {len(line)} cells; the header has {len(names)}")
    return names, lines[1:]


def _find_column(path: epath.PathLike, field: str, names: Sequence[str], chosen: Mapping[str, str]) -> str | None:
    if field in chosen and chosen[field] not in names:
        raise UserError(f"--columns={field}={chosen[field]}: {path} has no such column; it has {', '.join(names)}")
    normalized = [re.sub(r"[^a-z0-9]", "", name.lower()) for name in names]
    candidates = [names[normalized.index(alias)] for alias in COLUMNS[field] if alias in normalized]
    column = chosen.get(field) or next(iter(candidates), None)
    if column and Counter(names)[column] > 1:
        raise UserError(f"{path}: {Counter(names)[column]} columns are named {column!r}; rename all but one")
    return column


def _to_float(path: epath.PathLike, row: int, column: str, text: str) -> float:
    try:
        return float(text) if text.strip() else math.nan
    except ValueError as error:
        raise UserError(f"{path}, row {row}: {column} is {text!r}; expected a number") from error


def _to_positive(path: epath.PathLike, row: int, column: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (value > 0 and math.isfinite(value)):
        raise UserError(f"{path}, row {row}: {column} is {text!r}; expected a positive number")
    return value


def _reject_duplicates(path: epath.PathLike, table: Mapping[str, np.ndarray]) -> None:
    rows: dict[tuple[float, ...], int] = {}
    for row, key in enumerate(zip(*(table[name].tolist() for name in ("params", "tokens", "loss")), strict=True), 1):
        if (first := rows.setdefault(key, row)) != row:
            raise UserError(f"{path}: row {row} equals row {first} in params, tokens and loss; remove one of them")
