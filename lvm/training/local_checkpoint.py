"""Local checkpoints: each process saves its shards of the state to its host's own disk, often and cheaply.

After a restart on the same hosts, all processes restore the newest step that each of them has intact, unless a
persistent checkpoint (`lvm.training.checkpoint`) is newer and intact. The files of a step are

    FOLDER/RUN/pPROCESS/STEP/{shards.safetensors,meta.json}, FOLDER/RUN/pPROCESS/STEP.json

where the last one, with the checksums, is written when the others are complete. RUN identifies the run: local steps of
another one, or of another mesh, are never restored.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import os
import secrets
import shutil
from typing import Any

import jax
import numpy as np
import safetensors.numpy
from etils import epath

from lvm.common import distributed, files, progress
from lvm.common.errors import UserError
from lvm.common.logging import log_info, log_warning
from lvm.common.validation import check_positive
from lvm.training import checksums
from lvm.training.task import State
from lvm.training.workdir import RUN_ID

_SHARDS, _META = "shards.safetensors", "meta.json"
_MAX_STEPS = 16  # that a process offers


@dataclasses.dataclass(frozen=True)
class LocalCheckpointConfig:
    """Checkpoints on the disks of the hosts, between the persistent ones.

    Attributes:
      folder: on each host's own disk, such as /tmp/lvm; "" for none. Shared by runs; needs `keep` + 1 times the host's
        shards of the state.
      every: interval in steps.
      keep: how many of the latest are kept; at least 2, since hosts may be one apart when one of them dies.
    """

    folder: str = ""
    every: int = 50
    keep: int = 2

    def __post_init__(self) -> None:
        check_positive(self, "every")
        if not 2 <= self.keep < _MAX_STEPS:
            raise UserError(f"keep={self.keep} must be between 2 and {_MAX_STEPS - 1}")
        if files.is_remote(self.folder):
            raise UserError(f"folder={self.folder!r} must be on a disk of the host, such as /tmp/lvm")


class LocalCheckpoints:
    """The local checkpoints of this process. All processes must call `latest_intact_step` equally often.

    Args:
      config: see `LocalCheckpointConfig`; without a folder nothing is saved or restored.
      workdir: of the run.
      abstract: shapes, dtypes and shardings of the state.
    """

    def __init__(self, config: LocalCheckpointConfig, workdir: epath.PathLike, abstract: State):
        self._config, self._workdir, self._abstract = config, epath.Path(workdir), abstract
        self._executor = concurrent.futures.ThreadPoolExecutor(1, "local-checkpoint")
        self._writing: concurrent.futures.Future[None] | None = None
        if not config.folder:
            return
        parent = epath.Path(config.folder) / _run_id(self._workdir)
        self._folder = parent / f"p{jax.process_index()}"
        self._layout = _layout(abstract)
        others = [path for path in parent.parent.glob("*") if path != parent]
        if others:
            log_info(f"{config.folder}: ignoring local checkpoints of other runs: {len(others)}, {others[0].name}, …")

    def is_due(self, step: int) -> bool:
        """True for the steps to save."""
        return bool(self._config.folder) and step % self._config.every == 0

    def save(self, state: State, step: int, meta: dict[str, Any]) -> None:
        """Copies this process's shards, then writes them in the background; a failure to write is a warning."""
        self.wait()
        shards = {
            _name(path, shard.index, array.shape): shard.data
            for path, array in jax.tree.leaves_with_path(state)
            for shard in array.addressable_shards
        }
        for data in shards.values():
            data.copy_to_host_async()
        # Bytes, so that any dtype is saved; copies, since the next step overwrites the state's memory.
        copies = {name: np.array(data).reshape(-1).view(np.uint8) for name, data in shards.items()}
        self._writing = self._executor.submit(self._write, copies, step, meta)

    def _write(self, shards: dict[str, np.ndarray], step: int, meta: dict[str, Any]) -> None:
        try:
            self._delete(step)
            folder = self._folder / str(step)
            folder.mkdir(parents=True)
            safetensors.numpy.save_file(shards, folder / _SHARDS)
            files.write_json(folder / _META, {"layout": self._layout, "meta": meta})
            checksums.write(folder, self._record(step))
            for old in self._steps()[: -self._config.keep]:
                self._delete(old)
            if distributed.is_first():
                progress.write(self._workdir, step)
        except Exception as error:  # such as a full disk: the run has its persistent checkpoints
            log_warning(f"{self._folder}: step {step} is not saved locally: {error}")

    def wait(self) -> None:
        """Returns once the save in progress has ended."""
        if self._writing is not None:
            self._writing.result()
            self._writing = None

    def latest_intact_step(self, before: int) -> int:
        """The newest step, earlier than `before`, that all processes have intact; 0 if there is none."""
        if not self._config.folder:
            return 0
        steps = [step for step in self._steps() if 0 < step < before][-_MAX_STEPS:]
        offered = distributed.gather(np.array(steps + [-1] * (_MAX_STEPS - len(steps)), np.int32))
        common = set(offered[0].tolist()).intersection(*offered.tolist()) - {-1}
        for step in sorted(common, reverse=True):
            damage = self._find_damage(step)
            if damage:
                log_warning(f"damaged local checkpoint: {damage}")
            if not distributed.gather(np.array(bool(damage))).any():
                return step
        return 0

    def restore(self, step: int) -> tuple[State, dict[str, Any]]:
        """The state at a step of `latest_intact_step`, and its meta."""
        folder = self._folder / str(step)
        log_info(f"{self._folder}: resuming from step {step}")
        shards = safetensors.numpy.load_file(folder / _SHARDS)

        def load(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
            def shard(index: Any) -> np.ndarray:
                shape = [len(range(*part.indices(size))) for part, size in zip(index, leaf.shape, strict=True)]
                return shards[_name(path, index, leaf.shape)].view(leaf.dtype).reshape(shape)

            return jax.make_array_from_callback(leaf.shape, leaf.sharding, shard)

        state = jax.tree.map_with_path(load, self._abstract)
        return state, files.read_json(folder / _META)["meta"]

    def delete_after(self, step: int) -> None:
        """Deletes this process's later steps: they belong to a course of training that will not be continued."""
        if self._config.folder:
            self.wait()
            for later in self._steps():
                if later > step:
                    self._delete(later)

    def remove(self) -> None:
        """Deletes this process's local checkpoints, at the end of a run."""
        if self._config.folder:
            self.wait()
            shutil.rmtree(self._folder, ignore_errors=True)
            with contextlib.suppress(OSError):  # other processes' are still there
                os.rmdir(self._folder.parent)

    def _steps(self) -> list[int]:
        """Steps that are complete, ascending."""
        return sorted(int(path.stem) for path in self._folder.glob("*.json") if path.stem.isdecimal())

    def _record(self, step: int) -> epath.Path:
        return self._folder / f"{step}.json"

    def _delete(self, step: int) -> None:
        self._record(step).unlink(missing_ok=True)  # first: a step without it is none
        shutil.rmtree(self._folder / str(step), ignore_errors=True)

    def _find_damage(self, step: int) -> str | None:
        folder, record = self._folder / str(step), self._record(step)
        try:
            if set(files.read_side_file(record)) != {_SHARDS, _META}:
                return f"{record}: not the checksums of {_SHARDS} and {_META}"
            if damage := checksums.find_damage(folder, record):
                return damage
            layout = files.read_json(folder / _META)["layout"]
        except OSError as error:
            return f"{folder}: {error}"
        return None if layout == self._layout else f"{folder}: of another mesh or model; ignored"


def _run_id(workdir: epath.Path) -> str:
    """The identity of the run in a workdir, made at its first start."""

    def read_or_make() -> int:
        path = workdir / RUN_ID
        text = path.read_text().strip() if path.exists() else ""
        if text:
            return int(text, 16)
        number = secrets.randbits(60)
        files.write_atomically(path, f"{number:015x}\n".encode())
        return number

    return f"{distributed.broadcast(distributed.on_process_zero(read_or_make) or 0):015x}"


def _name(path: Any, index: tuple[slice, ...], shape: tuple[int, ...]) -> str:
    """A shard's name, the same for replicas: `['params']['w'] 0:8,4:8`."""
    ranges = (part.indices(size) for part, size in zip(index, shape, strict=True))
    return f"{jax.tree_util.keystr(path)} {','.join(f'{start}:{stop}' for start, stop, _ in ranges)}"


def _layout(abstract: State) -> str:
    """Hash of the state's shapes and dtypes, and of which shards this process has of how many processes."""
    leaves = [
        (str(leaf.dtype), leaf.shape, sorted({_name(path, index, leaf.shape) for index in _local_indices(leaf)}))
        for path, leaf in jax.tree.leaves_with_path(abstract)
    ]
    return hashlib.sha256(json.dumps([jax.process_count(), leaves]).encode()).hexdigest()


def _local_indices(leaf: jax.ShapeDtypeStruct) -> list[tuple[slice, ...]]:
    return list(leaf.sharding.addressable_devices_indices_map(leaf.shape).values())
