"""A run's folder: its configuration, the rule that a resumed run must agree with it, and one run at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from etils import epath

from lvm.common import distributed, files
from lvm.common.config import from_config_dict, to_json
from lvm.common.errors import UserError
from lvm.common.logging import log_info
from lvm.training.lease import Lease

CONFIG = "config.json"

# What may differ when a run is resumed: it changes neither the data nor the mathematics of a step.
_FREE = (
    "config.mesh.",
    "config.model.remat",
    "config.loop.log_every",
    "config.loop.evaluate_every",
    "config.loop.picture_every",
    "config.loop.checkpoint_every",
    "config.loop.keep",
    "config.loop.max_skipped",
    "config.loop.input_workers",
    "config.loop.profile",
    "config.loop.compilation_cache",
    "config.loop.wandb",
    "config.loop.spike.",  # once it rewinds, the workdir says which batches are left out
    "config.loop.watchdog.",
    "config.distributed.",
    "config.loop.total_steps",
    "config.loop.total_tokens",
    "config.objective.accumulate_steps",
    "config.objective.logits_chunk",
    "config.tokenizer",
    "config.accept_changed_mixture",
    "config.flags",
    "config.deterministic",
    "compiler_options.",  # those of the devices it goes on on
    "config.data.stage_to",
    "config.data.skip_damaged",
    "config.data.store",  # where the codes lie; which codes they are is compared by the identity of the store
)


class Workdir:
    """Opens (or creates) a run's folder and holds its lock for as long as this object (or the process) lives.

    Args:
      path: the folder.
      kind: "lvm" or "tokenizer".
      record: what defines the run: {"config": …} and what it was resolved to, all JSON.
      accepted: beginnings of keys that may have changed too; it is said if they have.
      config_class: of the configuration: a run that began before some key existed is compared with its default.

    Raises:
      UserError: another run holds the folder, or it belongs to a run of another kind or configuration.
    """

    def __init__(
        self,
        path: epath.PathLike,
        kind: str,
        record: dict[str, Any],
        accepted: Sequence[str] = (),
        config_class: type | None = None,
    ):
        self._free = (*_FREE, *accepted)
        self.path = epath.Path(path)
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self.path}: is a file; --workdir wants a folder")
        self.path.mkdir(parents=True, exist_ok=True)
        distributed.on_process_zero(self._hold)
        record = files.as_json({"version": 1, "kind": kind, **record})
        if not (self.path / CONFIG).exists() and self._has_checkpoints():
            raise UserError(
                f"{self.path}: has checkpoints but no {CONFIG}; choose a new folder, or remove them"
            )
        if (self.path / CONFIG).exists():
            old = read_record(self.path, kind)
            if self._has_checkpoints():  # before the first, nothing is lost by starting otherwise
                if config_class is not None:
                    whole: Any = from_config_dict(
                        config_class, old["config"], f"{self.path / CONFIG}: config"
                    )
                    old["config"] = files.as_json(to_json(whole))
                self._compare(old, record)
        if distributed.is_first():
            files.write_json(self.path / CONFIG, record)

    def _hold(self) -> None:
        if files.is_remote(self.path):
            self._lease = Lease(self.path / ".lease")
            return
        self._lock = files.lock_file(self.path / ".lock")  # held while this lives
        if self._lock is None:
            raise UserError(f"{self.path}: another run is using this workdir")

    def _has_checkpoints(self) -> bool:
        return any((self.path / "checkpoints").glob("[0-9]*"))

    def _compare(self, old: dict[str, Any], new: dict[str, Any]) -> None:
        before, after = _flatten(old), _flatten(new)
        refused = []
        for key in sorted(before.keys() | after.keys()):
            if before.get(key) == after.get(key):
                continue
            change = f"{key}: {before.get(key)!r} → {after.get(key)!r}"
            if key.startswith(self._free):
                log_info(f"resuming with a changed {change}")
            else:
                refused.append(change)
        if refused:
            raise UserError(
                f"{self.path}: holds a run of another configuration ({'; '.join(refused)}); "
                "choose another --workdir or the configuration it was started with"
            )


def read_record(path: epath.PathLike, kind: str, needed: Sequence[str] = ()) -> dict[str, Any]:
    """What `Workdir` wrote.

    Raises:
      UserError: not a workdir, one of another kind, or one that lacks a `needed` key.
    """
    file = epath.Path(path) / CONFIG
    if not file.exists():
        raise UserError(
            f"{path}: not a model folder: {CONFIG} is missing; wanted a workdir of {kind} training"
        )
    record = files.read_json(file)
    if not isinstance(record, dict) or record.get("kind") != kind:
        found = record.get("kind") if isinstance(record, dict) else type(record).__name__
        raise UserError(f"{file}: holds {found!r}, wanted the workdir of a model of kind {kind!r}")
    missing = [key for key in needed if key not in record]
    if missing or (needed and "model" not in record["config"]):
        raise UserError(f"{file}: incomplete: {', '.join(missing) or 'config.model'} is missing")
    return record


def check_resumable(workdir: epath.PathLike) -> None:
    """That a workdir isn't of converted weights, which have no optimizer's state to go on with.

    Raises:
      UserError: it is.
    """
    path = epath.Path(workdir) / CONFIG
    if path.exists() and files.read_json(path).get("converted"):
        raise UserError(
            f"{workdir}: holds converted weights and no training; begin one with them in a new --workdir, "
            f"--config.init_from={workdir}"
        )


def _flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix[:-1]: tree}
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flatten(value, f"{prefix}{key}.")
    return flat
