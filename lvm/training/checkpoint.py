"""Checkpoints of a run: `checkpoints/STEP/{params,training,meta}`, saved by Orbax in the background.

`params` is all that inference loads; `training` is the rest of the state. A step's folder is renamed into place once
it is complete, so a kill during a save leaves the previous checkpoint as the latest. Checksums of its files are then
written to `checksums/STEP.json`, and verified before a restore. This is the one module that uses Orbax.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import errno
import functools
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from etils import epath
from orbax.checkpoint import checkpoint_managers
from orbax.checkpoint._src.serialization import tensorstore_utils

from lvm.common import distributed, files, progress
from lvm.common.errors import UserError
from lvm.common.logging import log_warning, warn_once
from lvm.training import checksums
from lvm.training.task import State

FOLDER = "checkpoints"
CHECKSUMS = "checksums"
DAMAGED = "damaged-checkpoints"
_REQUIRED = ("params/manifest.ocdbt", "training/manifest.ocdbt", "meta/metadata")  # files of a complete checkpoint
_POLL_S, _REMOTE_POLL_S = 0.2, 2.0
_OVERHEAD_BYTES = 2**20  # of a checkpoint, beside its arrays
_CHUNK_BYTES = 2**26  # of an array on disk: the unit of reads
_CACHE_BYTES = 2**27  # of chunks kept in memory: one may hold several small layers


# Orbax warns of folders opened to read and of arrays that aren't JAX's, both intended: users can't act on it.
_INTENDED = re.compile("Given directory is read only|No jax.Array in TypeHandlerRegistry")
logging.getLogger("absl").addFilter(lambda record: not _INTENDED.search(record.getMessage()))


class Checkpoints:
    """The checkpoints of one workdir.

    Keeps the latest `keep`, and forever those of steps divisible by `keep_every` (0 for none) and of `keep_steps`. With
    `read_only` nothing is created or deleted.
    """

    def __init__(
        self, workdir: epath.PathLike, keep: int = 1, keep_every: int = 0, keep_steps: Sequence[int] = (),
        read_only: bool = False,
    ):  # fmt: skip
        options = ocp.CheckpointManagerOptions(
            preservation_policy=None if read_only else _preservation_policy(keep, keep_every, keep_steps),
            read_only=read_only,
            create=not read_only,
            save_interval_steps=int(not read_only),  # Orbax warns where it has to change these two itself
        )
        path = epath.Path(workdir)
        self._workdir = path if files.is_remote(path) else path.resolve()
        if not read_only:
            _set_file_locking(path)
        self._manager = ocp.CheckpointManager(self._workdir / FOLDER, options=options)
        self._executor = concurrent.futures.ThreadPoolExecutor(1, "checksums")
        self._checksums: concurrent.futures.Future[None] | None = None  # of the save in progress
        self._save_failed = False

    def latest_step(self) -> int | None:
        """The step of the latest complete checkpoint, or None; logs which folders are none."""
        for step in sorted(self._manager.all_steps(), reverse=True):
            if not (problem := self._find_missing(step)):
                return step
            warn_once(f"not a checkpoint: {problem}")
        return None

    def all_steps(self) -> list[int]:
        """The steps of all complete checkpoints, ascending."""
        return sorted(step for step in self._manager.all_steps() if not self._find_missing(step))

    def _find_missing(self, step: int) -> str | None:
        """One line naming what a step's folder lacks, such as an interrupted copy; None if it is complete."""
        folder = self._folder(step)
        missing = [name.partition("/")[0] for name in _REQUIRED if not (folder / name).exists()]
        return f"{folder}: lacks {', '.join(missing)}" if missing else None

    def delete_after(self, step: int) -> None:
        """Deletes the checkpoints of later steps, the latest first. No save may be in progress."""
        for later in reversed(self.all_steps()):
            if later > step:
                self._manager.delete(later)
                if distributed.is_first():
                    self._record(later).unlink(missing_ok=True)

    def save(self, state: State, step: int, meta: dict[str, Any]) -> None:
        """Waits for the previous save, then starts this one; returns once the arrays are copied.

        Raises:
          OSError: the disk is full; raised before anything is written if possible.
        """
        folder, needed = self._manager.directory, sum(x.nbytes for x in jax.tree.leaves(state)) + _OVERHEAD_BYTES
        if not files.is_remote(folder) and shutil.disk_usage(folder).free < needed:
            message = f"{os.strerror(errno.ENOSPC)}: a checkpoint needs {needed:,} bytes"
            raise OSError(errno.ENOSPC, message, os.fspath(folder))
        items = ocp.args.Composite(
            params=ocp.args.StandardSave(state["params"], save_args=_chunked(state["params"])),
            training=ocp.args.StandardSave(state["training"]),
            meta=ocp.args.JsonSave(meta),
        )
        self.wait()
        with self._note_failure():
            self._manager.save(step, args=items)
        if distributed.is_first():
            self._checksums = self._executor.submit(self._write_checksums, step)

    def _write_checksums(self, step: int) -> None:
        """Waits until a step's folder is complete, then writes its checksums."""
        folder = self._folder(step)
        # On disk Orbax renames the complete folder into place; on gs:// it writes a marker file.
        while not (folder.exists() and ocp.utils.is_checkpoint_finalized(folder)):
            if self._save_failed:
                return
            time.sleep(_REMOTE_POLL_S if files.is_remote(folder) else _POLL_S)
        checksums.write(folder, self._record(step))
        progress.write(self._workdir, step)

    def _folder(self, step: int) -> epath.Path:
        return self._manager.directory / str(step)

    def _record(self, step: int) -> epath.Path:
        return self._workdir / CHECKSUMS / f"{step}.json"

    def latest_intact_step(self, fallback: int = 0) -> int | None:
        """The latest step whose files match their checksums; the first process decides for all.

        Later, damaged checkpoints are logged and moved to `damaged-checkpoints/`.

        Args:
          fallback: a step that the run can restore from elsewhere, 0 for none: it is returned if no later checkpoint is
            intact, and earlier ones are not looked at.

        Raises:
          UserError: there are checkpoints, but all are damaged.
          OSError: files can't be read, so nothing can be decided.
        """
        find = functools.partial(self._find_intact_step, fallback)
        step = distributed.broadcast(distributed.on_process_zero(find) or 0)
        self._manager.reload()
        return None if step < 0 else step

    def _find_intact_step(self, fallback: int) -> int:
        damaged: dict[int, str] = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            if step <= fallback:
                break
            damage = self._find_missing(step) or self.find_damage(step)
            if damage is None:
                self._quarantine(damaged, step)
                return step
            damaged[step] = damage
        if fallback:
            self._quarantine(damaged, fallback)
            return fallback
        if damaged:
            raise UserError(
                f"{self._manager.directory}: every checkpoint is damaged ({'; '.join(damaged.values())}); "
                "restore the files or choose another --workdir"
            )
        return -1

    def _quarantine(self, damaged: dict[int, str], intact: int) -> None:
        quarantine = self._workdir / DAMAGED
        for step, damage in damaged.items():
            log_warning(f"damaged checkpoint: {damage}; going back to step {intact}")
            quarantine.mkdir(exist_ok=True)
            target = next(p for n in range(10_000) if not (p := quarantine / f"{step}-{n}").exists())
            files.move(self._folder(step), target)
            self._record(step).unlink(missing_ok=True)

    def find_damage(self, step: int, prefix: str = "") -> str | None:
        """See `checksums.find_damage`. A kill between the final rename and the checksums leaves none of them."""
        return checksums.find_damage(self._folder(step), self._record(step), prefix)

    def restore(self, step: int, abstract: State) -> tuple[State, dict[str, Any]]:
        """The state at `step`, with the shapes, dtypes and shardings of `abstract`, and its meta."""
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
        return self._manager.restore(step, args=ocp.args.Composite(params=ocp.args.StandardRestore(abstract))).params

    def wait(self) -> None:
        """Returns once the save in progress is complete on disk."""
        self._finish(self._manager.wait_until_finished)

    def close(self) -> None:
        """Waits for the save in progress and releases all resources."""
        self._finish(self._manager.close)

    def _finish(self, wait: Callable[[], None]) -> None:
        with self._note_failure():
            wait()
        future, self._checksums = self._checksums, None
        if future is None:
            return
        future.result()
        # Not before: Orbax deletes the checkpoints that a save replaces once its folder is complete.
        for record in (self._workdir / CHECKSUMS).glob("*.json"):
            if not (self._manager.directory / record.stem).exists():
                record.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _note_failure(self) -> Iterator[None]:
        try:
            with files.clear_disk_errors(self._manager.directory):
                yield
        except BaseException:
            self._save_failed = True  # the folder will never appear: the checksum thread must not wait for it
            raise


def _preservation_policy(keep: int, keep_every: int, keep_steps: Sequence[int]) -> Any:
    policies: list[Any] = [checkpoint_managers.LatestN(n=keep), checkpoint_managers.CustomSteps(steps=keep_steps)]
    if keep_every:
        policies.append(checkpoint_managers.EveryNSteps(interval_steps=keep_every))
    return checkpoint_managers.AnyPreservationPolicy(policies=policies)


def _set_file_locking(workdir: epath.Path) -> None:
    """Lets TensorStore write without file locks where there are none; Orbax has no option for it.

    Each process writes files of its own, and the workdir is that of one run.
    """
    if not files.is_remote(workdir) and not files.has_locks(workdir):
        tensorstore_utils._DEFAULT_OCDBT_TS_CONTEXT["file_io_locking"] = {"mode": "none"}


def _chunked(params: Any) -> Any:
    """Save arguments of a tree of parameters: each layer of a stacked tensor is a chunk, and so can be read alone."""

    def save_args(path: Any, leaf: Any) -> ocp.SaveArgs:
        is_stacked = getattr(path[0], "key", None) == "layers"
        return ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES, shard_axes=(0,) if is_stacked else ())

    return jax.tree.map_with_path(save_args, params)


def _open(workdir: epath.PathLike) -> contextlib.closing[Checkpoints]:
    return contextlib.closing(Checkpoints(workdir, read_only=True))


def latest_step(workdir: epath.PathLike) -> int | None:
    """The step of a workdir's latest complete checkpoint, or None. Changes nothing."""
    if not (epath.Path(workdir) / FOLDER).exists():
        return None
    with _open(workdir) as checkpoints:
        return checkpoints.latest_step()


def intact_step(workdir: epath.PathLike, step: int | None = None, prefix: str = "params/") -> int:
    """`step`, by default the latest, after verifying its parameters, or the files below `prefix`, by their checksums.

    Raises:
      UserError: the workdir has no such checkpoint, or it is damaged.
    """
    latest = latest_step(workdir)
    if latest is None:
        raise UserError(f"{workdir}: no checkpoint yet; expected a workdir that training has saved to")
    with _open(workdir) as checkpoints:
        step, steps = latest if step is None else step, checkpoints.all_steps()
        if step not in steps:
            raise UserError(f"{workdir}: no checkpoint of step {step}; it has {', '.join(map(str, steps))}")
        damage = checkpoints.find_damage(step, prefix)
    if damage:
        raise UserError(f"damaged checkpoint: {damage}; resume its training, which falls back to the one before")
    return step


def restore_state(workdir: epath.PathLike, step: int, abstract: State) -> tuple[State, dict[str, Any]]:
    """The whole state of a step of another run, verified against its checksums, and its meta.

    Raises:
      UserError: the workdir has no such checkpoint, or it is damaged.
    """
    distributed.on_process_zero(functools.partial(intact_step, workdir, step, prefix=""))
    with _open(workdir) as checkpoints:
        return checkpoints.restore(step, abstract)


def load_params(workdir: epath.PathLike, abstract: Any) -> tuple[Any, int]:
    """A workdir's latest parameters, a tree of the given shapes and dtypes on this process's first device; their step.

    Raises:
      UserError: the workdir has no checkpoint, or the latest is damaged or holds other parameters.
    """
    step = intact_step(workdir)
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), abstract)
    with _open(workdir) as checkpoints:
        try:
            return checkpoints.restore_params(step, abstract), step
        except (KeyError, ValueError, FileNotFoundError) as error:
            reason = " ".join(str(error).split())[:300]
            raise UserError(f"{workdir}/{FOLDER}/{step}: doesn't hold these parameters: {reason}") from error


# --- Tensors read and written one slice at a time ---------------------------------------------------------------------


def open_params(
    workdir: epath.PathLike, step: int, shapes: Mapping[str, Sequence[int]]
) -> dict[str, tensorstore.TensorStore]:
    """Opens the parameters of a checkpoint, by dotted name, for reads of slices; reads no values.

    Raises:
      UserError: one is missing.
    """
    folder = epath.Path(workdir) / FOLDER / str(step) / "params"
    context = tensorstore.Context({"cache_pool": {"total_bytes_limit": _CACHE_BYTES}})
    database, arrays = checksums.ocdbt_spec(folder), {}
    for name, shape in shapes.items():
        spec = {"driver": "zarr", "kvstore": {**database, "path": f"{name}/"}}
        try:
            arrays[name] = tensorstore.open(spec, context=context, open=True, read=True).result()
        except (ValueError, OSError) as error:
            raise UserError(f"{folder}: doesn't hold {name} {list(shape)}") from error
    return arrays


@runtime_checkable
class LazyArray(Protocol):
    """An array whose values are read on request, with `slices` along its first axis if it is a stack."""

    @property
    def slices(self) -> Sequence[LazyArray]: ...

    def read(self) -> np.ndarray: ...


class _LazyArrayHandler(ocp.type_handlers.NumpyHandler):
    """Writes lazy arrays as Orbax writes arrays, with one slice in memory at a time."""

    def __init__(self) -> None:
        super().__init__(deepcopy_host_arrays=False)

    async def serialize(self, values: Sequence[LazyArray], infos: Any, args: Any = None) -> list[Any]:
        for value, info, arg in zip(values, infos, args, strict=True):
            for future in await super().serialize([value], [info], [arg]):
                await asyncio.to_thread(future.result)
        return []

    async def _open_and_write(self, value: LazyArray, tspec: Any, ts_context: Any) -> None:
        """Called by Orbax for each array."""
        array = await tensorstore.open(tensorstore.Spec(tspec), create=True, open=True, context=ts_context)
        for index, part in enumerate(value.slices):
            await array[index].write(part.read())
        if not value.slices:
            await array.write(value.read())


def save_lazy_params(workdir: epath.PathLike, step: int, params: Any) -> None:
    """Writes a checkpoint of parameters alone, a tree of `LazyArray`s: training can start from it, not resume."""
    leaf_type = type(jax.tree.leaves(params)[0])
    registry = ocp.type_handlers.create_type_handler_registry((leaf_type, _LazyArrayHandler()))
    path = epath.Path(workdir)
    _set_file_locking(path)
    with ocp.CheckpointManager(
        path / FOLDER,
        options=ocp.CheckpointManagerOptions(enable_async_checkpointing=False),
        item_handlers={
            "params": ocp.PyTreeCheckpointHandler(type_handler_registry=registry),
            "training": ocp.StandardCheckpointHandler(),
            "meta": ocp.JsonCheckpointHandler(),
        },
    ) as manager:
        items = ocp.args.Composite(
            params=ocp.args.PyTreeSave(params, save_args=_chunked(params)),
            training=ocp.args.StandardSave({"step": np.int32(step)}),
            meta=ocp.args.JsonSave({"converted": True}),
        )
        manager.save(step, args=items)
    checksums.write(path / FOLDER / str(step), path / CHECKSUMS / f"{step}.json")
