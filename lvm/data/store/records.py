"""The files of a store's shards: found on disk or staged, opened when they are first asked for, read by number.

A shard is an ArrayRecord file, and whole records are read as such. Single grids are read where they lie: records
aren't compressed, and the index tells the place of each one's blocks, so an image of a page costs a read of 2 KiB.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import resource
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO, NoReturn

import numpy as np
from array_record.python import array_record_module
from etils import epath

from lvm.common import files
from lvm.common.errors import UserError
from lvm.data.store import format, staging
from lvm.data.store.format import RECORD_DTYPE, SCENE_DTYPE, DamagedError, Scene

# A record at a time and none beside it: ArrayRecord's own threads cost thirty times what they read.
_OPTIONS = "readahead_buffer_size:0,max_parallelism:1"
RECORDS_SUFFIX, INDEX_SUFFIX = ".array_record", ".index"
# ArrayRecord's files are Riegeli's: every 64 KiB, wherever that is in a record, stand 24 bytes of its own
# (Riegeli's "riegeli_records_file_format.md", "Block header"). Places count the bytes between them.
_CHUNK, _OWN = 2**16, 24
_BETWEEN = _CHUNK - _OWN
FILE_CHECKSUM_MISMATCH = "damaged: its checksum is not the manifest's"
_LARGEST = 2**44  # bytes of a shard
_GAP = 2**13  # bytes that are sooner read than left out


def read_ranges(descriptors: Sequence[int], places: np.ndarray, sizes: np.ndarray) -> bytes:
    """Pieces of ArrayRecord files, joined, without block headers; zeros where nothing can be read.

    Args:
      descriptors: the file of each piece.
      places, sizes: int64 [n], where each begins and its bytes.
    """
    first, last = places // _BETWEEN, (places + sizes - 1) // _BETWEEN
    starts, lengths = places + _OWN * (first + 1), sizes + _OWN * (last - first)
    pieces = list(map(_pread, descriptors, lengths.tolist(), starts.tolist()))
    for number in np.flatnonzero(last > first).tolist():
        data, header = pieces[number], int(_BETWEEN - places[number] % _BETWEEN)
        kept = [data[at + _OWN : at + _CHUNK] for at in range(header, len(data), _CHUNK)]
        pieces[number] = b"".join([data[:header], *kept])
    return b"".join(pieces)


def _pread(descriptor: int, size: int, place: int) -> bytes:
    try:
        data = os.pread(descriptor, size, place)
    except OSError:  # of the disk; zeros don't fit their checksum
        data = b""
    return data if len(data) == size else data.ljust(size, b"\0")


class Shards:
    """The shards of one store.

    Args:
      path: the store.
      entries: of its manifest, one a shard.
      stage_to: a local folder that shards are copied to before they are read; "" reads them where they are.
      identity: of the store, which tells its staged shards from those of others.
      streams: number of streams in each stream set.
    """

    def __init__(
        self,
        path: epath.Path,
        entries: Sequence[Mapping[str, Any]],
        stage_to: str,
        identity: Callable[[], str],
        streams: Sequence[int],
    ):
        self.path, self._entries, self._stage_to, self._identity = path, entries, stage_to, identity
        self._streams = streams
        self._readers: dict[int, Any] = {}
        self._opened: dict[int, BinaryIO] = {}
        self._indexes: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        _allow_files()

    def __len__(self) -> int:
        return len(self._entries)

    def where(self, shard: int, record: Any) -> str:
        """A record's name in messages."""
        copied = f" (copied to {self._staged()})" if self._stage_to else ""
        return f"{self.path / self._entries[shard]['name']}{RECORDS_SUFFIX}{copied}, record {record}"

    def index(self, shard: int) -> tuple[np.ndarray, np.ndarray]:
        """`scenes.INDEX` of a shard's scenes and `scenes.PLACES` of its records, memory-mapped.

        Raises:
          UserError: the file is missing, or isn't what the manifest says.
        """
        if shard not in self._indexes:
            entry = self._entries[shard]
            path = self._find(shard, INDEX_SUFFIX)
            # It decides what is read where: damage there would be another image in silence.
            with _opening():
                if files.sha256(path) != entry["files"][path.name]["sha256"]:
                    raise UserError(f"{path}: {FILE_CHECKSUM_MISMATCH}")
                empty = np.zeros(0, np.uint8)
                data = np.memmap(path, np.uint8, mode="r") if entry["scenes"] else empty
            split = len(data) - entry["records"] * RECORD_DTYPE.itemsize
            if split < 0 or split % SCENE_DTYPE.itemsize:
                raise UserError(
                    f"{path}: {len(data)} bytes don't hold the manifest's {entry['records']} records"
                )
            data = data.view(np.ndarray)
            self._indexes[shard] = data[:split].view(SCENE_DTYPE), data[split:].view(RECORD_DTYPE)
        return self._indexes[shard]

    def page(self, shard: int, record: int) -> list[Scene]:
        """All scenes of a record.

        Raises:
          DamagedError: it can't be read, or isn't what was written; names shard and record.
        """
        reader = self._reader(shard)
        try:
            data = reader.read(record, record + 1)[0]
        except (IndexError, ValueError, RuntimeError) as error:
            raise DamagedError(f"{self.where(shard, record)}: can't be read: {error}") from error
        return format.unpack(data, self._streams, lambda: self.where(shard, record))

    def grids(self, entries: np.ndarray, grids: np.ndarray, codes_per_image: int) -> np.ndarray:
        """Single grids: uint16 [n, N]. Each block is read once.

        Args:
          entries: `scenes.ENTRY` [n], the scene of each.
          grids: int64 [n], its place in the record.
          codes_per_image: N.

        Raises:
          DamagedError: a block is damaged, or the index tells of grids that aren't there; names shard and record.
        """
        if not len(entries):
            return np.zeros((0, codes_per_image), np.uint16)
        if (beyond := grids >= entries["grids"]).any():
            self._refuse(entries[np.argmax(beyond)])
        stride = format.blocks_size(format.BLOCK_SIZE, codes_per_image)
        before = grids // format.BLOCK_SIZE * stride  # of the record's blocks, in bytes
        rest = format.blocks_size(entries["grids"].astype(np.int64), codes_per_image) - before
        records = entries["shard"].astype(np.int64) * _LARGEST + entries["start"]
        blocks, at, which = np.unique(records + before, return_index=True, return_inverse=True)
        sizes = np.minimum(rest[at], stride)
        # Blocks of a record that lie near each other come in one read, with what is between them.
        new = (np.diff(records[at], prepend=-1) != 0) | (np.diff(blocks, prepend=0) > stride + _GAP)
        firsts, run = np.flatnonzero(new), np.cumsum(new) - 1
        lasts = np.append(firsts[1:], len(blocks)) - 1
        lengths = blocks[lasts] + sizes[lasts] - blocks[firsts]
        shards, places = np.divmod(blocks[firsts], _LARGEST)
        content = read_ranges([self._descriptor(shard) for shard in shards.tolist()], places, lengths)
        begun = (np.cumsum(lengths) - lengths - blocks[firsts])[run] + blocks  # in the content
        damaged = format.first_damaged_block(content, begun, sizes)
        if damaged is not None:
            self._refuse(entries[at[damaged]])
        within = grids % format.BLOCK_SIZE * 2 * codes_per_image
        return format.gather_grids(content, begun[which] + within, codes_per_image)

    def _refuse(self, entry: np.void) -> NoReturn:
        """Raises DamagedError for a scene's record, in the words of whoever reads all of it if that fails too."""
        shard, record = int(entry["shard"]), int(entry["record"])
        where, rest = self.where(shard, record), ""
        try:
            self.page(shard, record)
        except DamagedError as error:
            if str(error).startswith(where):
                raise
            rest = f"; {error}"  # of the whole shard: each record that is damaged counts all the same
        raise DamagedError(f"{where}: {format.CHECKSUM_MISMATCH}{rest}")

    def check_opens(self, shard: int) -> None:
        """Raises DamagedError, naming the shard, where not even its records can be found; UserError as `index`."""
        self._reader(shard)

    def _descriptor(self, shard: int) -> int:
        file = self._opened.get(shard)
        if file is None:
            # Of two threads the first one's stays: a file that nobody keeps is closed.
            with _opening():
                file = self._opened.setdefault(shard, open(self._find(shard, RECORDS_SUFFIX), "rb"))  # noqa: SIM115
        return file.fileno()

    def _reader(self, shard: int) -> Any:
        if shard not in self._readers:
            name = f"{self.path / self._entries[shard]['name']}{RECORDS_SUFFIX}"
            wanted, file = self._entries[shard]["records"], self._find(shard, RECORDS_SUFFIX)
            try:
                reader = array_record_module.ArrayRecordReader(os.fspath(file), _OPTIONS)
                found = reader.num_records()
            except (ValueError, RuntimeError) as error:
                raise DamagedError(f"{name}: damaged: can't be opened: {error}") from error
            if found != wanted:
                raise DamagedError(f"{name}: damaged: {found} records are found, the manifest says {wanted}")
            self._readers[shard] = reader
        return self._readers[shard]

    def _staged(self) -> epath.Path:
        return epath.Path(self._stage_to) / self._identity()[:16]

    def _find(self, shard: int, suffix: str) -> epath.Path:
        """A shard's file where it can be opened."""
        name = self._entries[shard]["name"] + suffix
        listed = self._entries[shard]["files"][name]
        if self._stage_to:
            return staging.stage(self.path / name, listed, self._staged())
        if files.is_remote(self.path):
            raise UserError(
                f"{self.path}: shards are read from local disk; name a folder that they are copied to "
                "(--config.data.stage_to)"
            )
        check_size(self.path / name, listed)
        return self.path / name


@functools.cache
def _allow_files() -> None:
    """Lets this process have as many open files as the system allows: a shard takes two, the usual limit is 1024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(ValueError, OSError):  # some systems call a limit endless that isn't
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


@contextlib.contextmanager
def _opening() -> Iterator[None]:
    """Raises UserError where too many files are open."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.EMFILE, errno.ENFILE):
            raise
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        raise UserError(
            f"{error.filename}: {error.strerror}: each shard takes two, and this process may have {soft} (ulimit -n)"
        ) from error


def check_size(file: epath.Path, listed: Mapping[str, Any]) -> None:
    """Raises UserError where a file is missing or has another size than its store's manifest says."""
    size = file_size(file)
    if size != listed["bytes"]:
        found = "is missing" if size is None else f"has {size} bytes"
        raise UserError(f"{file}: {found}, the manifest says {listed['bytes']}; encode it again")


def file_size(file: epath.Path) -> int | None:
    """A file's bytes, or None where there is none."""
    return file.stat().length if file.exists() else None
