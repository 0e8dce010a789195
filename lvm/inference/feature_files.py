"""Features of a store's images on disk: arrays with an index, shard by shard, shared by processes."""

import concurrent.futures
import contextlib
import dataclasses
import functools
import pathlib
import random
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from etils import epath
from jaxtyping import Integer, Shaped

from lvm.common import files
from lvm.common.arrays import create_arrays
from lvm.common.claims import Claims
from lvm.common.errors import UserError
from lvm.common.logging import Progress, log_info
from lvm.data.store.format import ENTRY_DTYPE, SCENE_DTYPE, shard_name
from lvm.data.store.reader import Store
from lvm.inference.features import check_layers, check_pools
from lvm.inference.pretrained import LVM

HEADER, MANIFEST, CLAIMS = "header.json", "features.json", "claims"
_LOG_EVERY_S, _POLL_S = 10.0, 5.0


@dataclasses.dataclass(frozen=True)
class _Grids:
    """The grids of a stream in a shard, one a row.

    Attributes:
      entries: `ENTRY_DTYPE` of its scene.
      scenes: number of the scene in the shard.
      frames, streams: its frame and the index of its stream in the scene.
    """

    entries: Shaped[np.ndarray, " rows"]
    scenes: Integer[np.ndarray, " rows"]
    frames: Integer[np.ndarray, " rows"]
    streams: Integer[np.ndarray, " rows"]

    def __len__(self) -> int:
        return len(self.entries)


class FeatureWriter:
    """Writes the features of a store's shards.

    Args:
      model, store: whose features of which images.
      stream: of the images.
      pools, layers, copies: as of `LVM.features`.
      histogram: also write the counts of each image's codes.
      dtype: "float32" or "float16".
      batch_size: images of a call.

    Raises:
      UserError: no scene has the stream, or a setting doesn't fit the model.
    """

    def __init__(
        self, model: LVM, store: Store, out: str, stream: str, pools: Sequence[str], layers: Sequence[int] | None,
        copies: int, histogram: bool, dtype: str, batch_size: int,
    ):  # fmt: skip
        if stream not in store.streams:
            raise UserError(f"--stream={stream}: {store.path} has the streams {', '.join(store.streams)}")
        self._model, self._store, self._out, self._stream = model, store, epath.Path(out), stream
        self._pools, self._layers = check_pools(pools), check_layers(layers, model.config.num_layers)
        self._copies, self._histogram, self._dtype = copies, histogram, np.dtype(dtype)
        self._batch_size, self.num_shards = batch_size, len(store.shards)
        model.features(np.zeros((1, store.codes_per_image), np.int32), pools, layers, copies)  # fails early

    def header(self) -> dict[str, Any]:
        """All that features depend on but the batch size, with the shapes of a row."""
        model = self._model
        return {
            "model": {"step": model.step, "weights": self._weights, "record": model.record},
            "store": self._store.identity(),
            "stream": self._stream,
            "layers": list(self._layers),
            "copies": self._copies,
            "dtype": self._dtype.name,
            "arrays": {name: list(shape) for name, (shape, _) in self._arrays().items()},
            "num_shards": self.num_shards,
        }

    @functools.cached_property
    def _weights(self) -> str:
        return self._model.weights_hash()

    def begin(self) -> None:
        """Begins or resumes the output. Raises UserError if it holds something else or features of other settings."""
        self._out.mkdir(parents=True, exist_ok=True)
        path, header = self._out / HEADER, files.as_json(self.header())
        if not path.exists() and any(not p.name.startswith(".") for p in self._out.iterdir()) and not path.exists():
            raise UserError(f"{self._out}: not empty and no folder of features; choose a new folder for --out")
        if files.create(path, files.json_bytes(header)):
            return
        if changed := [key for key, value in header.items() if files.read_json(path).get(key) != value]:
            raise UserError(f"{self._out}: has features of another {', '.join(changed)}; choose a new folder for --out")

    def missing(self, shards: Sequence[int]) -> list[int]:
        """Those of some shards that have no entry, by one listing."""
        existing = files.sizes(self._out)
        return [shard for shard in shards if f"{self._name(shard)}.json" not in existing]

    def run(self, shards: Sequence[int]) -> None:
        """Writes the missing ones of these shards."""
        for shard in self.missing(shards):
            self.write(shard)

    def run_queue(self) -> None:
        """Writes shards that no other process writes until none is missing."""
        every = range(self.num_shards)
        with Claims(self._out / CLAIMS) as claims:
            while missing := self.missing(every):
                busy = claims.busy()
                free = [shard for shard in missing if self._name(shard) not in busy]
                random.shuffle(free)  # processes compete for few
                shard = next((shard for shard in free if claims.acquire(self._name(shard))), None)
                if shard is None:
                    time.sleep(_POLL_S)
                    continue
                try:
                    if self.missing([shard]):  # completed since the listing
                        self.write(shard)
                finally:
                    claims.release(self._name(shard))

    def finish(self) -> None:
        """Writes the manifest, and removes what killed processes left, if all shards exist."""
        if missing := self.missing(range(self.num_shards)):
            log_info(f"{self._out}: {len(missing)} of {self.num_shards} shards are missing")
            return
        paths = [self._out / f"{self._name(shard)}.json" for shard in range(self.num_shards)]
        entries = list(files.map_concurrently(files.read_json, paths))
        rows = sum(entry["rows"] for entry in entries)
        files.write_json(self._out / MANIFEST, self.header() | {"rows": rows, "shards": entries})
        if not files.is_remote(self._out):
            for path in self._out.glob(".*.partial"):
                shutil.rmtree(path, ignore_errors=True)
        with contextlib.suppress(OSError):
            (self._out / CLAIMS).rmtree(missing_ok=True)
        log_info(f"{self._out}: features of {rows} images, {', '.join(self._arrays())}")

    def write(self, shard: int) -> None:
        """Writes one shard, unless another process completes it meanwhile.

        Raises:
          UserError: damaged codes, hidden states that aren't finite, or a feature beyond float16.
          OSError: the disk is full.
        """
        try:
            self._write(shard)
        except FileNotFoundError:
            if self.missing([shard]):
                raise
            # This process was paused, lost its claim, and `finish` of another one removed its folder.
            log_info(f"{self._name(shard)}: completed by another process")

    def _write(self, shard: int) -> None:
        """Writes a shard's arrays and index under temporary names, then its entry."""
        name, grids = self._name(shard), self._grids(shard)
        log_info(f"{name}: {len(grids)} images")
        with self._scratch_folder(name) as folder:
            layout = {f"{name}.{key}": ((len(grids), *shape), dtype) for key, (shape, dtype) in self._arrays().items()}
            arrays = create_arrays(folder, layout)
            for rows, codes in self._batches(grids, name):
                for key, values in self._features(codes).items():
                    arrays[f"{name}.{key}"][rows] = values
            del arrays  # flushed
            index = f"{name}.index.parquet"
            pq.write_table(self._index(shard, grids), folder / index)
            described = {}
            for file in [*sorted(f"{key}.npy" for key in layout), index]:
                described[file] = {"bytes": files.file_size(folder / file), "sha256": files.sha256(folder / file)}
                files.put(folder / file, self._out / file)
        files.write_json(self._out / f"{name}.json", {"name": name, "rows": len(grids), "files": described})

    def _name(self, shard: int) -> str:
        return shard_name(shard, self.num_shards)

    def _arrays(self) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """Shape of a row and dtype of each array."""
        layers, D, N = len(self._layers), self._model.config.hidden_size, self._store.codes_per_image
        shapes: dict[str, tuple[int, ...]] = {
            pool: (layers, N, D) if pool == "codes" else (layers, D) for pool in self._pools
        }
        arrays = {pool: (shape, self._dtype) for pool, shape in shapes.items()}
        if self._histogram:
            arrays["histogram"] = ((self._store.num_codes,), np.dtype(np.uint16))
        return arrays

    def _grids(self, shard: int) -> _Grids:
        """The grids of the stream, scene after scene."""
        scenes = self._store.shards[shard].scenes()
        column = [names.index(self._stream) if self._stream in names else -1 for names in self._store.stream_sets]
        columns = np.array(column)[scenes["stream_set"]]
        rows = np.repeat(np.arange(len(scenes)), np.where(columns >= 0, scenes["frames"], 0))
        entries = np.zeros(len(rows), ENTRY_DTYPE)
        for field in SCENE_DTYPE.names or ():
            entries[field] = scenes[field][rows]
        entries["shard"] = shard
        starts = np.flatnonzero(np.diff(rows, prepend=-1))
        frames = np.arange(len(rows)) - np.repeat(starts, np.diff(starts, append=len(rows)))
        return _Grids(entries, rows, frames, columns[rows])

    def _batches(self, grids: _Grids, name: str) -> Iterator[tuple[slice, np.ndarray]]:
        """Rows and their codes; the next ones are read while the devices compute."""

        def read(start: int) -> np.ndarray:
            rows = slice(start, start + self._batch_size)
            return self._store.grids(grids.entries[rows], grids.frames[rows], grids.streams[rows])

        progress, logged_at = Progress(len(grids), unit="images"), time.monotonic()
        starts = range(0, len(grids), self._batch_size)
        with concurrent.futures.ThreadPoolExecutor(1) as reader:
            following = reader.submit(read, 0) if starts else None
            for start in starts:
                assert following is not None
                codes = following.result().astype(np.int32)
                following = reader.submit(read, start + self._batch_size) if start != starts[-1] else None
                done = start + len(codes)
                yield slice(start, done), codes
                if time.monotonic() - logged_at > _LOG_EVERY_S:
                    log_info(f"{name}: {progress.line(done)}")
                    logged_at = time.monotonic()

    def _features(self, codes: Integer[np.ndarray, "B N"]) -> dict[str, np.ndarray]:
        padded = np.pad(codes, ((0, self._batch_size - len(codes)), (0, 0)))  # one shape, one compilation
        states = self._model.features(padded, self._pools, self._layers, self._copies)
        features: dict[str, np.ndarray] = {}
        for pool, values in states.items():
            if not np.isfinite(values[: len(codes)]).all():
                raise UserError(
                    f"--model: hidden states of step {self._model.step} are NaN or infinite; its training diverged, or "
                    "its weights are damaged: use another checkpoint"
                )
            with np.errstate(over="ignore"):
                features[pool] = values[: len(codes)].astype(self._dtype)
            if not np.isfinite(features[pool]).all():
                raise UserError(
                    f"--dtype={self._dtype.name}: a feature is {np.abs(values).max():g}, beyond its range; use float32"
                )
        if self._histogram:
            counts = [np.bincount(grid, minlength=self._store.num_codes) for grid in codes]
            features["histogram"] = np.stack(counts).astype(np.uint16)
        return features

    def _index(self, shard: int, grids: _Grids) -> pa.Table:
        files_of_shard = self._store.shards[shard]
        keys = [files_of_shard.key(i) for i in np.unique(grids.scenes).tolist()]
        rows = np.unique(grids.scenes, return_inverse=True)[1]
        classes = [*self._store.classes, ""]
        return pa.table(
            {
                "key": pa.array(keys, pa.string()).take(pa.array(rows)),
                "scene": pa.array(grids.scenes, pa.int64()),
                "frame": pa.array(grids.frames, pa.int32()),
                "class": pa.array([classes[i] for i in grids.entries["class_id"]], pa.string()),
                "group": pa.array(grids.entries["group"], pa.uint64()),
            }
        )

    @contextlib.contextmanager
    def _scratch_folder(self, name: str) -> Iterator[pathlib.Path]:
        """A local folder for unfinished files, in the output if that is local."""
        if files.is_remote(self._out):
            with tempfile.TemporaryDirectory() as temporary:
                yield pathlib.Path(temporary)
            return
        folder = pathlib.Path(self._out, f".{name}.{uuid.uuid4().hex}.partial")
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
