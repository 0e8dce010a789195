"""Checkpoints of a run: `checkpoints/STEP/{params,training,meta}`, written by Orbax in the background.

`params` alone is what inference loads; `training` is the rest of the state. A step's folder is renamed into
place when it is whole, so a kill in the middle of a save leaves the checkpoint before it as the newest.
"""

from __future__ import annotations

import errno
import os
import shutil
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from lvm import files
from lvm.errors import UserError
from lvm.training.trainable import State

FOLDER = "checkpoints"
_OVERHEAD = 2**20  # bytes of a checkpoint that are not arrays


class Checkpoints:
    """The checkpoints of one workdir.

    Args:
      workdir: the run's folder.
      keep: how many of the newest are kept.
      read_only: for inference: nothing is created or cleaned up.
    """

    def __init__(self, workdir: epath.PathLike, keep: int = 1, read_only: bool = False):
        options = ocp.CheckpointManagerOptions(max_to_keep=None if read_only else keep, read_only=read_only)
        self._manager = ocp.CheckpointManager(epath.Path(workdir).resolve() / FOLDER, options=options)

    def latest(self) -> int | None:
        """The newest whole checkpoint's step, or None."""
        return self._manager.latest_step()

    def save(self, state: State, step: int, meta: dict[str, Any]) -> None:
        """Starts writing; returns when the arrays are copied. Waits for the save before it.

        Raises:
          OSError: the disk is full, known before anything is written where it can be.
        """
        self._check_space(state)
        items = ocp.args.Composite(
            params=ocp.args.StandardSave(state["params"]),
            training=ocp.args.StandardSave(state["training"]),
            meta=ocp.args.JsonSave(meta),
        )
        with files.clear_disk_errors(self._manager.directory):
            self._manager.save(step, args=items)

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
        with files.clear_disk_errors(self._manager.directory):
            self._manager.wait_until_finished()

    def close(self) -> None:
        with files.clear_disk_errors(self._manager.directory):
            self._manager.close()


def newest_step(workdir: epath.PathLike) -> int | None:
    """The step of a workdir's newest whole checkpoint, or None. Looks, and changes nothing."""
    if not (epath.Path(workdir) / FOLDER).exists():
        return None
    checkpoints = Checkpoints(workdir, read_only=True)
    step = checkpoints.latest()
    checkpoints.close()
    return step


def load_params(workdir: epath.PathLike, abstract: Any) -> tuple[Any, int]:
    """The newest parameters of a workdir, on this process's first device, and their step.

    Raises:
      UserError: the workdir holds no whole checkpoint.
    """
    step = newest_step(workdir)
    if step is None:
        raise UserError(f"{workdir}: no checkpoint yet; wanted a folder that training has saved into")
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), abstract)
    checkpoints = Checkpoints(workdir, read_only=True)
    try:
        params = checkpoints.restore_params(step, placed)
    except (KeyError, ValueError, FileNotFoundError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{workdir}/{FOLDER}/{step}: doesn't hold these parameters: {reason}") from error
    checkpoints.close()
    return params, step
