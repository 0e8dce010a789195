"""Checkpoints of a run: `checkpoints/STEP/{params,training,meta}`, written by Orbax in the background.

`params` alone is what inference loads; `training` is the rest of the state. A step's folder is renamed into
place when it is whole, so a kill in the middle of a save leaves the checkpoint before it as the newest. After that
the checksums of its files are written beside it, and compared before anything is restored.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from lvm.common import distributed, files
from lvm.common.errors import UserError
from lvm.common.logging import log_info
from lvm.training import checksums
from lvm.training.task import State

FOLDER = "checkpoints"
CHECKSUMS = "checksums"
DAMAGED = "damaged-checkpoints"
_POLL, _REMOTE_POLL = 0.2, 2.0  # seconds
_OVERHEAD = 2**20  # bytes of a checkpoint that are not arrays
_CHUNK = 2**26  # bytes of an array that are stored, and so read, together


class Checkpoints:
    """The checkpoints of one workdir.

    Args:
      workdir: the run's folder.
      keep: how many of the newest are kept.
      keep_every: those of steps that it divides are kept for good; 0 for none.
      read_only: for inference: nothing is created or cleaned up.
    """

    def __init__(self, workdir: epath.PathLike, keep: int = 1, keep_every: int = 0, read_only: bool = False):
        options = ocp.CheckpointManagerOptions(
            max_to_keep=None if read_only else keep, keep_period=keep_every or None, read_only=read_only
        )
        path = epath.Path(workdir)
        self._workdir = path if files.is_remote(path) else path.resolve()
        self._manager = ocp.CheckpointManager(self._workdir / FOLDER, options=options)
        self._sealing: threading.Thread | None = None
        self._failed = False
        self._problem: Exception | None = None

    def latest_step(self) -> int | None:
        """The newest whole checkpoint's step, or None."""
        return self._manager.latest_step()

    def all_steps(self) -> list[int]:
        """The steps of all whole checkpoints, ascending."""
        return sorted(self._manager.all_steps())

    def delete_after(self, step: int) -> None:
        """Deletes the checkpoints of later steps, the newest first; none may be under way."""
        for later in reversed(self.all_steps()):
            if later > step:
                self._manager.delete(later)
                if distributed.is_first():
                    self._record(later).unlink(missing_ok=True)

    def save(self, state: State, step: int, meta: dict[str, Any]) -> None:
        """Starts writing; returns when the arrays are copied. Waits for the save before it.

        Raises:
          OSError: the disk is full, known before anything is written where it can be.
        """
        self._check_space(state)
        items = ocp.args.Composite(
            params=ocp.args.StandardSave(state["params"], save_args=chunked_save_args(state["params"])),
            training=ocp.args.StandardSave(state["training"]),
            meta=ocp.args.JsonSave(meta),
        )
        self.wait()
        with self._writing():
            self._manager.save(step, args=items)
        if distributed.is_first():
            self._sealing = threading.Thread(target=self._seal, args=(step,), name="checksums", daemon=True)
            self._sealing.start()

    def _seal(self, step: int) -> None:
        """Waits until a step's folder is whole, then writes its checksums and forgets those of deleted ones."""
        folder = self._manager.directory / str(step)
        # On disk the folder appears by a rename, when all that belongs to it is written; on gs:// a file says so.
        while not (folder.exists() and ocp.utils.is_checkpoint_finalized(folder)):
            if self._failed:
                return
            time.sleep(_REMOTE_POLL if files.is_remote(folder) else _POLL)
        try:
            checksums.write(folder, self._record(step))
            for record in (self._workdir / CHECKSUMS).glob("*.json"):
                if not (self._manager.directory / record.stem).exists():
                    record.unlink(missing_ok=True)
        except Exception as error:  # of this thread; `wait` raises it in the run's own
            self._problem = error

    def _record(self, step: int) -> epath.Path:
        return self._workdir / CHECKSUMS / f"{step}.json"

    def _wait_for_sealing(self) -> None:
        if self._sealing is not None:
            self._sealing.join()
            self._sealing = None
        if self._problem is not None:
            problem, self._problem = self._problem, None
            raise problem

    def latest_intact_step(self) -> int | None:
        """The newest step whose files are as they were written; one decision, of the first process, for all.

        Damaged checkpoints newer than it are named and moved to `damaged-checkpoints/`.

        Raises:
          UserError: there are checkpoints, but all are damaged.
          OSError: files can't be read; nothing is decided on that.
        """
        found = distributed.broadcast(distributed.on_process_zero(self._newest_sound) or 0)
        self._manager.reload()
        return None if found < 0 else found

    def _newest_sound(self) -> int:
        damaged: dict[int, str] = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            problem = self.problem(step)
            if problem is None:
                self._set_aside(damaged, step)
                return step
            damaged[step] = problem
        if damaged:
            raise UserError(
                f"{self._manager.directory}: every checkpoint is damaged ({'; '.join(damaged.values())}); "
                "restore the files or choose another --workdir"
            )
        return -1

    def _set_aside(self, damaged: dict[int, str], used: int) -> None:
        for step, problem in damaged.items():
            log_info(f"damaged checkpoint: {problem}; going back to step {used}")
            aside = self._workdir / DAMAGED
            aside.mkdir(exist_ok=True)
            target = next(p for n in range(10_000) if not (p := aside / f"{step}-{n}").exists())
            files.move(self._manager.directory / str(step), target)
            self._record(step).unlink(missing_ok=True)

    def problem(self, step: int, under: str = "") -> str | None:
        """What is wrong with a step's files, of which the names begin with `under`; None if nothing is."""
        record = self._record(step)
        if not record.exists():
            # A kill between the last rename and the checksums leaves a whole checkpoint.
            log_info(f"{self._manager.directory / str(step)}: has no checksums, so it is used as it is")
            return None
        return checksums.problem(self._manager.directory / str(step), record, under)

    def _check_space(self, state: State) -> None:
        folder = os.fspath(self._manager.directory)
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves(state)) + _OVERHEAD
        if "://" not in folder and shutil.disk_usage(folder).free < needed:
            raise OSError(
                errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: a checkpoint needs {needed:,} bytes", folder
            )

    def restore(self, step: int, abstract: State) -> tuple[State, dict[str, Any]]:
        """The state at `step`, sharded as `abstract` says, and its meta."""
        items = ocp.args.Composite(
            params=ocp.args.StandardRestore(abstract["params"]),
            training=ocp.args.StandardRestore(abstract["training"]),
            meta=ocp.args.JsonRestore(),
        )
        restored = self._manager.restore(step, args=items)
        counter = jax.device_put(jax.numpy.int32(step), abstract["step"].sharding)
        return {"step": counter, "params": restored.params, "training": restored.training}, restored.meta

    def restore_params(self, step: int, abstract: Any) -> Any:
        """The parameters alone."""
        items = ocp.args.Composite(params=ocp.args.StandardRestore(abstract))
        return self._manager.restore(step, args=items).params

    def wait(self) -> None:
        """Returns when the save under way is whole on disk."""
        with self._writing():
            self._manager.wait_until_finished()
        self._wait_for_sealing()

    def close(self) -> None:
        with self._writing():
            self._manager.close()  # waits for the save under way
        self._wait_for_sealing()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            with files.clear_disk_errors(self._manager.directory):
                yield
        except BaseException:
            self._failed = True  # no folder will appear, and sealing must not wait for it
            raise


def chunked_save_args(params: Any) -> Any:
    """How parameters are cut into chunks on disk: a layer of a stacked tensor is read without its neighbours."""

    def args(path: Any, leaf: Any) -> ocp.SaveArgs:
        stacked = getattr(path[0], "key", None) == "layers"
        return ocp.SaveArgs(chunk_byte_size=_CHUNK, shard_axes=(0,) if stacked else ())

    return jax.tree.map_with_path(args, params)


def latest_step(workdir: epath.PathLike) -> int | None:
    """The step of a workdir's newest whole checkpoint, or None. Looks, and changes nothing."""
    if not (epath.Path(workdir) / FOLDER).exists():
        return None
    checkpoints = Checkpoints(workdir, read_only=True)
    step = checkpoints.latest_step()
    checkpoints.close()
    return step


def load_params(workdir: epath.PathLike, abstract: Any) -> tuple[Any, int]:
    """The newest parameters of a workdir, on this process's first device, and their step.

    Raises:
      UserError: the workdir holds no whole checkpoint, or the newest is damaged.
    """
    step = intact_step(workdir)
    return restore_params(workdir, step, abstract), step


def intact_step(workdir: epath.PathLike, step: int | None = None) -> int:
    """The step of a whole checkpoint whose parameters are as they were written: `step`, or the newest.

    Raises:
      UserError: the workdir holds no such checkpoint, or it is damaged.
    """
    newest = latest_step(workdir)
    if newest is None:
        raise UserError(f"{workdir}: no checkpoint yet; wanted a folder that training has saved into")
    checkpoints = Checkpoints(workdir, read_only=True)
    step, steps = newest if step is None else step, checkpoints.all_steps()
    if step not in steps:
        raise UserError(f"{workdir}: no checkpoint of step {step}; it has {', '.join(map(str, steps))}")
    problem = checkpoints.problem(step, under="params/")
    checkpoints.close()
    if problem:
        raise UserError(
            f"damaged checkpoint: {problem}; resume its training, which goes back to the one before"
        )
    return step


def restore_params(workdir: epath.PathLike, step: int, abstract: Any) -> Any:
    """The parameters of a workdir's step, of the shapes and dtypes of `abstract`, on this process's first device.

    Raises:
      UserError: the checkpoint holds others.
    """
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), abstract)
    checkpoints = Checkpoints(workdir, read_only=True)
    try:
        return checkpoints.restore_params(step, placed)
    except (KeyError, ValueError, FileNotFoundError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{workdir}/{FOLDER}/{step}: doesn't hold these parameters: {reason}") from error
    finally:
        checkpoints.close()
