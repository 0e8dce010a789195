"""A run's folder (workdir): its record in `config.json`, the check that a resumed run agrees with it, and its lock."""

from collections.abc import Sequence
from typing import Any

from etils import epath
from flax import traverse_util

from lvm import __version__
from lvm.common import distributed, files
from lvm.common.config import from_config_dict, to_json
from lvm.common.errors import UserError
from lvm.common.logging import log_info
from lvm.data.store.manifest import same_codes
from lvm.training.lease import Lease

CONFIG = "config.json"
RUN_ID = "run_id"  # names the run in folders that several runs share, such as those of local checkpoints
RECORD_VERSION = 2  # 1 had config.data.sources, and other keys named otherwise

_CONVERT = {  # commands that read version 1
    "lvm": "lvm convert {} NEW --to=orbax, then --config.init_from=NEW",
    "tokenizer": "python -m tokenizer convert {} NEW --to=orbax, then --config.init_from=NEW "
    "--config.loss.autoencoder_steps=0",
}

_HASHES = ("weights", "hash", "codes")  # of a tokenizer

# Keys that may differ on resume, by prefix: they change neither the data nor the mathematics of a step.
_MAY_CHANGE = (
    "lvm_version",
    "folder",
    "config.mesh.",
    "config.model.remat",
    "config.model.attention",
    "config.loop.",  # the workdir itself records which batches `config.loop.spike` skipped
    "config.distributed.",
    "config.objective.accumulate_steps",
    "config.objective.rows_per_device",
    "config.objective.logits_chunk",
    "config.tokenizer",
    "config.branch_from",  # a path, of no effect after the first checkpoint
    "config.evaluations.",
    "config.evaluation_source",
    "config.accept_changed_mixture",
    "config.compiler_options",
    "config.deterministic",
    "compiler_options.",  # of the devices that the run resumes on
    "config.data.stage_to",
    "config.data.skip_damaged",
    "config.data.allow_missing",  # the components that are present are compared, `mixture`
    # Paths; what they hold is compared by its identity, `stores` or `source`.
    "config.data.store",
    "config.data.source",
    "config.loss.perceptual.weights",  # checkpoints hold what it has
    "config.loss.perceptual.heads",
    "config.data.cache_gigabytes",
    "config.data.cache_folder",
    "config.data.decoding",
)
# Keys that may also differ from the run that a branch begins with.
_MAY_BRANCH = (
    "config.init_from",
    *(f"config.optimizer.{name}" for name in ("schedule", "learning_rate", "end_learning_rate", "warmup_", "decay_")),
)
_MAY_CHANGE_BY_COMPONENT = (".store", ".max_repetitions")  # of `config.data.components.NAME`


class Workdir:
    """Opens or creates a run's folder, and holds its lock as long as this object or the process lives.

    Args:
      path: the folder.
      kind: "lvm" or "tokenizer".
      record: what defines the run, as JSON: {"config": …} and what it was resolved to.
      may_change: prefixes of further keys that may differ on resume; differences are logged.
      config_class: dataclass of the configuration, for the defaults of keys that an older record lacks.

    Raises:
      UserError: another run holds the folder, or it belongs to a run of another kind, configuration or release, or
        holds converted weights, which have no optimizer state to resume from.
    """

    def __init__(
        self,
        path: epath.PathLike,
        kind: str,
        record: dict[str, Any],
        may_change: Sequence[str] = (),
        config_class: type | None = None,
    ):
        self._may_change = (*_MAY_CHANGE, *may_change)
        self.path = epath.Path(path)
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self.path}: is a file; --workdir must be a folder")
        self.path.mkdir(parents=True, exist_ok=True)
        config_path = self.path / CONFIG
        if config_path.exists() and files.read_json(config_path).get("converted"):
            raise UserError(
                f"{path}: holds converted weights and no training; start one from them in a new --workdir with "
                f"--config.init_from={path}"
            )
        distributed.on_process_zero(self._acquire_lock)
        record = files.as_json({"version": RECORD_VERSION, "lvm_version": __version__, "kind": kind, **record})
        if any((self.path / "checkpoints").glob("[0-9]*")):  # before the first, nothing is lost by a fresh start
            self._check_record(kind, record, config_class)
        elif config_path.exists() and _load_record(self.path, kind) != record and distributed.is_first():
            (self.path / RUN_ID).unlink(missing_ok=True)  # local checkpoints are those of the former configuration
        if distributed.is_first():
            files.write_json(config_path, record)

    def _acquire_lock(self) -> None:
        if files.is_remote(self.path):
            self._lease = Lease(self.path / ".lease")
            return
        self._lock = files.lock_file(self.path / ".lock")
        if self._lock is None:
            raise UserError(f"{self.path}: another run is using this workdir")

    def _check_record(self, kind: str, new: dict[str, Any], config_class: type | None) -> None:
        path = self.path / CONFIG
        if not path.exists():
            raise UserError(f"{self.path}: has checkpoints but no {CONFIG}; choose a new folder, or remove them")
        old = _load_record(self.path, kind)
        if old.get("version") != RECORD_VERSION:
            raise UserError(
                f"{path}: record version {old.get('version')}, expected {RECORD_VERSION}: can't be resumed; use a new "
                f"--workdir (to keep the weights: {_CONVERT[kind].format(self.path)})"
            )
        if refused := _list_changes("resuming", path, old, new, self._may_change, config_class):
            raise UserError(
                f"{self.path}: holds a run of another configuration ({'; '.join(refused)}); "
                "choose another --workdir or the configuration it was started with"
            )


def check_branch(workdir: epath.PathLike, kind: str, record: dict[str, Any], config_class: type) -> None:
    """Checks that a run with this record may begin with a checkpoint of another one.

    Raises:
      UserError: no workdir, or one whose model, data, batch or optimizer differ.
    """
    path = epath.Path(workdir) / CONFIG
    old, new = _load_record(workdir, kind), files.as_json(record)
    allowed = (*_MAY_CHANGE, *_MAY_BRANCH, "version", "kind")
    if refused := _list_changes("branching off", path, old, new, allowed, config_class):
        raise UserError(f"config.branch_from: {workdir} is a run of another configuration ({'; '.join(refused)})")


def _list_changes(
    verb: str,
    path: epath.Path,
    old: dict[str, Any],
    new: dict[str, Any],
    may_change: tuple[str, ...],
    config_class: type | None,
) -> list[str]:
    """Keys that differ between two records and may not, as `key: old → new`; logs those that may."""
    before, after = old.get("tokenizer"), new.get("tokenizer")  # of a transformer's codes; no hash: of unknown ones
    if before and after and "hash" in before and (not before["hash"] or same_codes(before, after)):
        form = {key: value for key, value in after.items() if key not in _HASHES}
        new = new | {"tokenizer": form | {key: value for key, value in before.items() if key in _HASHES}}
    if config_class is not None:
        try:
            config: Any = from_config_dict(config_class, old["config"], f"{path}: config")
        except UserError as error:
            advice = _CONVERT[old["kind"]].format(path.parent)
            raise UserError(
                f"{error}. The run is of another release and can't be continued; to keep its weights: {advice}"
            ) from error
        old = {**old, "config": files.as_json(to_json(config))}
    before, after = (traverse_util.flatten_dict(tree, sep=".") for tree in (old, new))
    refused = []
    for key in sorted(before.keys() | after.keys()):
        if before.get(key) == after.get(key):
            continue
        change = f"{key}: {before.get(key)!r} → {after.get(key)!r}"
        of_component = key.startswith("config.data.components.") and key.endswith(_MAY_CHANGE_BY_COMPONENT)
        if of_component or key.startswith(may_change):
            log_info(f"{verb} with a changed {change}")
        else:
            refused.append(change)
    return refused


def _load_record(folder: epath.PathLike, kind: str) -> dict[str, Any]:
    path = epath.Path(folder) / CONFIG
    if not path.exists():
        problem = f"not a model folder: {CONFIG} is missing" if path.parent.exists() else "doesn't exist"
        raise UserError(f"{folder}: {problem}; expected a workdir of {kind} training")
    record = files.read_json(path)
    if not isinstance(record, dict) or record.get("kind") != kind:
        actual = record.get("kind") if isinstance(record, dict) else type(record).__name__
        raise UserError(f"{path}: holds {actual!r}, expected the workdir of a model of kind {kind!r}")
    return record


def read_record(folder: epath.PathLike, kind: str, required_keys: Sequence[str] = ()) -> dict[str, Any]:
    """The record of a workdir that a model is read from; see `current_record` for older ones.

    Raises:
      UserError: not a workdir, one of another kind, or one that lacks a required key.
    """
    record = _load_record(folder, kind)
    missing = [key for key in required_keys if key not in record]
    if missing or (required_keys and "model" not in record["config"]):
        path = epath.Path(folder) / CONFIG
        raise UserError(f"{path}: incomplete: {', '.join(missing) or 'config.model'} is missing")
    return current_record(record)


def current_record(record: dict[str, Any]) -> dict[str, Any]:
    """The record itself, if it is of this version; of an older one what still has the same meaning.

    That is the model, the identities of its tokenizer and stores, and the held-out fraction, which moves to the top.
    """
    if record.get("version") == RECORD_VERSION:
        return record
    old = record.get("config", {})
    config = {"model": old["model"]} if "model" in old else {}
    heldout = {key: old["data"][key] for key in ("heldout_fraction",) if key in old.get("data", {})}
    return {**record, **heldout, "version": RECORD_VERSION, "config": config}
