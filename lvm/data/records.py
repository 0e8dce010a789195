"""The files of a store's shards: found on disk or staged, opened when they are first asked for, read by number."""

from __future__ import annotations

import collections
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from array_record.python import array_record_module
from etils import epath

from lvm import files
from lvm.data import staging
from lvm.data.scenes import INDEX, DamagedError
from lvm.errors import UserError

# Records that a process keeps, of all stores: where neighbours are read soon, each comes once.
_RECENT_BYTES = 2**26
# A record at a time and none beside it: ArrayRecord's own threads cost thirty times what they read.
_OPTIONS = "readahead_buffer_size:0,max_parallelism:1"
RECORDS, INDEXES = ".array_record", ".index"


class _Recent:
    """The records that were read last, up to a number of bytes in all."""

    def __init__(self, limit: int):
        self._limit, self._bytes = limit, 0
        self._records: collections.OrderedDict[Any, bytes] = collections.OrderedDict()
        self._lock = threading.Lock()

    def read(self, keys: Sequence[Any], read: Callable[[int], bytes]) -> list[bytes]:
        """The records of `keys`; `read` gets the places of those that aren't here."""
        with self._lock:
            found = [self._records.get(key) for key in keys]
            missing = [place for place, record in enumerate(found) if record is None]
            for key, record in zip(keys, found, strict=True):
                if record is not None:
                    self._records.move_to_end(key)
        new = [read(place) for place in missing]
        with self._lock:
            for place, record in zip(missing, new, strict=True):
                found[place] = record
                if self._records.setdefault(keys[place], record) is record:
                    self._bytes += len(record)
            while self._bytes > self._limit:
                self._bytes -= len(self._records.popitem(last=False)[1])
        return found  # type: ignore[return-value]


_recent = _Recent(_RECENT_BYTES)


class Shards:
    """The shards of one store.

    Args:
      path: the store.
      entries: of its manifest, one a shard.
      stage_to: a local folder that shards are copied to before they are read; "" reads them where they are.
      identity: of the store, which tells its staged shards from those of others.
    """

    def __init__(
        self,
        path: epath.Path,
        entries: Sequence[Mapping[str, Any]],
        stage_to: str,
        identity: Callable[[], str],
    ):
        self.path, self._entries, self._stage_to, self._identity = path, entries, stage_to, identity
        self._token = object()  # tells this object's records from those of a store that was here before
        self._readers: dict[int, Any] = {}
        self._indexes: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def where(self, shard: int, record: Any) -> str:
        """A record's name in messages."""
        return f"{self.path / self._entries[shard]['name']}{RECORDS}, record {record}"

    def index(self, shard: int) -> np.ndarray:
        """`scenes.INDEX` entries of a shard's scenes, memory-mapped.

        Raises:
          UserError: the file is missing or has another size than the manifest says.
        """
        if shard not in self._indexes:
            scenes = self._entries[shard]["scenes"]
            file = self._file(shard, INDEXES)
            index = np.memmap(file, INDEX, mode="r").view(np.ndarray) if scenes else np.zeros(0, INDEX)
            self._indexes[shard] = index
        return self._indexes[shard]

    def read(self, shard: int, records: Sequence[int]) -> list[bytes]:
        """The bytes of records of a shard.

        Raises:
          DamagedError: one of them can't be read; names shard and record.
        """
        keys = [(self._token, shard, record) for record in records]
        return _recent.read(keys, lambda place: self._read(shard, records[place]))

    def check_opens(self, shard: int) -> None:
        """Raises DamagedError, naming the shard, where not even its records can be found; UserError as `index`."""
        self._reader(shard)

    def _read(self, shard: int, record: int) -> bytes:
        reader = self._reader(shard)
        try:
            return reader.read(record, record + 1)[0]
        except (IndexError, ValueError, RuntimeError) as error:
            raise DamagedError(f"{self.where(shard, record)}: can't be read: {error}") from error

    def _reader(self, shard: int) -> Any:
        if shard not in self._readers:
            name, wanted = (
                f"{self.path / self._entries[shard]['name']}{RECORDS}",
                self._entries[shard]["records"],
            )
            file = self._file(shard, RECORDS)
            try:
                reader = array_record_module.ArrayRecordReader(os.fspath(file), _OPTIONS)
                found = reader.num_records()
            except (ValueError, RuntimeError) as error:
                raise DamagedError(f"{name}: damaged: can't be opened: {error}") from error
            if found != wanted:
                raise DamagedError(f"{name}: damaged: {found} records are found, the manifest says {wanted}")
            self._readers[shard] = reader
        return self._readers[shard]

    def _file(self, shard: int, suffix: str) -> epath.Path:
        """A shard's file where it can be opened."""
        name = self._entries[shard]["name"] + suffix
        listed = self._entries[shard]["files"][name]
        if self._stage_to:
            return staging.stage(self.path / name, listed, epath.Path(self._stage_to) / self._identity()[:16])
        if files.is_remote(self.path):
            raise UserError(
                f"{self.path}: shards are read from local disk; name a folder that they are copied to "
                "(--config.data.stage_to)"
            )
        check_size(self.path / name, listed)
        return self.path / name


def check_size(file: epath.Path, listed: Mapping[str, Any]) -> None:
    """Raises UserError where a file is missing or has another size than its store's manifest says."""
    size = size_of(file)
    if size != listed["bytes"]:
        found = "is missing" if size is None else f"has {size} bytes"
        raise UserError(f"{file}: {found}, the manifest says {listed['bytes']}; encode it again")


def size_of(file: epath.Path) -> int | None:
    """A file's bytes, or None where there is none."""
    return file.stat().length if file.exists() else None
