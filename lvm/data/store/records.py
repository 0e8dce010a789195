"""Files of a store's shards: opened on first use, local or staged, with random access to records and grids.

A shard is an ArrayRecord file; whole records are read through that library. Single grids are read directly: records are
uncompressed and the index has the offset of each one's blocks, so one image of a page costs a read of 2 KiB.
"""

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
from jaxtyping import Int, Shaped, UInt16

from lvm.common import files
from lvm.common.errors import UserError
from lvm.data.store import format, staging
from lvm.data.store.format import RECORD_DTYPE, SCENE_DTYPE, DamagedError, Scene

# One record per read and no read-ahead: ArrayRecord's threads cost thirty times the read itself.
_OPTIONS = "readahead_buffer_size:0,max_parallelism:1"
RECORDS_SUFFIX, INDEX_SUFFIX = ".array_record", ".index"
# ArrayRecord files are Riegeli files: every 64 KiB begins with a 24-byte block header, even inside a record
# ("Block header" in Riegeli's riegeli_records_file_format.md). Our offsets do not count these headers.
_RIEGELI_BLOCK, _RIEGELI_HEADER = 2**16, 24
_PAYLOAD = _RIEGELI_BLOCK - _RIEGELI_HEADER
FILE_CHECKSUM_MISMATCH = "damaged: checksum differs from the manifest's"
_MAX_SHARD_SIZE = 2**44  # bytes; shard · this + offset is a key that sorts by both
_MAX_GAP = 2**13  # bytes between blocks that are cheaper to read than to skip


def read_ranges(descriptors: Sequence[int], offsets: Int[np.ndarray, " n"], sizes: Int[np.ndarray, " n"]) -> bytes:
    """Reads byte ranges of ArrayRecord files without the Riegeli block headers, concatenated.

    Unreadable bytes are zeros, which fail their checksum.

    Args:
      descriptors: the file of each range.
      offsets, sizes: of the ranges, in bytes.
    """
    first, last = offsets // _PAYLOAD, (offsets + sizes - 1) // _PAYLOAD
    starts = offsets + _RIEGELI_HEADER * (first + 1)
    lengths = sizes + _RIEGELI_HEADER * (last - first)
    chunks = list(map(_pread, descriptors, lengths.tolist(), starts.tolist()))
    for i in np.flatnonzero(last > first).tolist():
        data, header = chunks[i], int(_PAYLOAD - offsets[i] % _PAYLOAD)
        headers = range(header, len(data), _RIEGELI_BLOCK)
        payloads = [data[at + _RIEGELI_HEADER : at + _RIEGELI_BLOCK] for at in headers]
        chunks[i] = b"".join([data[:header], *payloads])
    return b"".join(chunks)


def _pread(descriptor: int, size: int, offset: int) -> bytes:
    try:
        return os.pread(descriptor, size, offset).ljust(size, b"\0")
    except OSError:
        return b"\0" * size


class Shards:
    """The shards of one store.

    Args:
      path: the store.
      entries: the manifest's entries of the shards.
      stage_to: local folder that shards are copied to before they are read; "" reads them in place.
      identity: hash of the store, which names its folder in `stage_to`.
      num_streams: number of streams of each stream set.
    """

    def __init__(
        self, path: epath.Path, entries: Sequence[Mapping[str, Any]], stage_to: str, identity: Callable[[], str],
        num_streams: Sequence[int],
    ):  # fmt: skip
        self.path, self._entries, self._stage_to, self._identity = path, entries, stage_to, identity
        self._num_streams = num_streams
        self._readers: dict[int, Any] = {}
        self._files: dict[int, BinaryIO] = {}
        self._indexes: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        _raise_open_file_limit()

    def __len__(self) -> int:
        return len(self._entries)

    def record_name(self, shard: int, record: int) -> str:
        """The name of a record in messages."""
        staged = f" (copied to {self._staging_folder()})" if self._stage_to else ""
        return f"{self.path / self._entries[shard]['name']}{RECORDS_SUFFIX}{staged}, record {record}"

    def index(self, shard: int) -> tuple[np.ndarray, np.ndarray]:
        """The memory-mapped index of a shard: `SCENE_DTYPE` of its scenes and `RECORD_DTYPE` of its records.

        Raises:
          UserError: the file is missing, or differs from the manifest.
        """
        if shard not in self._indexes:
            entry, path = self._entries[shard], self._local_path(shard, INDEX_SUFFIX)
            # Offsets have no other check: a corrupted index would silently return another image.
            with _too_many_files(path):
                if files.sha256(path) != entry["files"][path.name]["sha256"]:
                    raise UserError(f"{path}: {FILE_CHECKSUM_MISMATCH}")
                data = np.zeros(0, np.uint8)
                if entry["scenes"]:
                    data = np.memmap(path, np.uint8, mode="r").view(np.ndarray)
            split = len(data) - entry["records"] * RECORD_DTYPE.itemsize
            if split < 0 or split % SCENE_DTYPE.itemsize:
                raise UserError(f"{path}: {len(data)} bytes don't hold {entry['records']} records")
            self._indexes[shard] = data[:split].view(SCENE_DTYPE), data[split:].view(RECORD_DTYPE)
        return self._indexes[shard]

    def page(self, shard: int, record: int) -> list[Scene]:
        """All scenes of a record.

        Raises:
          DamagedError: the record is unreadable or corrupted; names shard and record.
        """
        reader = self._reader(shard)
        try:
            return format.unpack(reader.read(record, record + 1)[0], self._num_streams)
        except (DamagedError, IndexError, ValueError, RuntimeError) as error:
            raise DamagedError(f"{self.record_name(shard, record)}: damaged: {error}") from error

    def grids(
        self, entries: Shaped[np.ndarray, " n"], positions: Int[np.ndarray, " n"], codes_per_image: int
    ) -> UInt16[np.ndarray, "n {codes_per_image}"]:
        """Single grids; each block is read once.

        Args:
          entries: `ENTRY_DTYPE`, the scene of each grid.
          positions: index of each grid in its record.
          codes_per_image: N.

        Raises:
          DamagedError: a block is corrupted, or a position is past the record's end; names shard and record.
        """
        if not len(entries):
            return np.zeros((0, codes_per_image), np.uint16)
        if (beyond := positions >= entries["grids"]).any():
            self._raise_damaged(entries[np.argmax(beyond)])
        stride = format.blocks_size(format.BLOCK_SIZE, codes_per_image)
        block_offsets = positions // format.BLOCK_SIZE * stride  # in the record's blocks, in bytes
        remaining = format.blocks_size(entries["grids"].astype(np.int64), codes_per_image) - block_offsets
        records = entries["shard"].astype(np.int64) * _MAX_SHARD_SIZE + entries["start"]
        blocks, of_block, inverse = np.unique(records + block_offsets, return_index=True, return_inverse=True)
        sizes = np.minimum(remaining[of_block], stride)
        # Blocks of one record that are close together are one read.
        is_start = np.diff(records[of_block], prepend=-1) != 0
        is_start |= np.diff(blocks, prepend=0) > stride + _MAX_GAP
        firsts, reads = np.flatnonzero(is_start), np.cumsum(is_start) - 1
        lasts = np.append(firsts[1:], len(blocks)) - 1
        lengths = blocks[lasts] + sizes[lasts] - blocks[firsts]
        shards, offsets = np.divmod(blocks[firsts], _MAX_SHARD_SIZE)
        content = read_ranges([self._descriptor(shard) for shard in shards.tolist()], offsets, lengths)
        starts = (np.cumsum(lengths) - lengths - blocks[firsts])[reads] + blocks  # of blocks, in the content
        ends = (starts + sizes).tolist()
        damaged = format.first_damaged_block(
            [content[start:end] for start, end in zip(starts.tolist(), ends, strict=True)]
        )
        if damaged is not None:
            self._raise_damaged(entries[of_block[damaged]])
        in_block = positions % format.BLOCK_SIZE * 2 * codes_per_image
        return format.gather_grids(content, starts[inverse] + in_block, codes_per_image)

    def _raise_damaged(self, entry: np.void) -> NoReturn:
        """Raises DamagedError for a scene's record, with the message of `page` if that fails too."""
        shard, record = int(entry["shard"]), int(entry["record"])
        name, cause = self.record_name(shard, record), ""
        try:
            self.page(shard, record)
        except DamagedError as error:
            if str(error).startswith(name):
                raise
            cause = f"; {error}"  # about the shard: damaged records are still counted one by one
        raise DamagedError(f"{name}: damaged: {format.CHECKSUM_MISMATCH}{cause}")

    def check_opens(self, shard: int) -> None:
        """Raises DamagedError, naming the shard, if its records can't be located; UserError like `index`."""
        self._reader(shard)

    def _descriptor(self, shard: int) -> int:
        file = self._files.get(shard)
        if file is None:
            # If two threads open it, the first file stays and the other is closed with its last reference.
            path = self._local_path(shard, RECORDS_SUFFIX)
            with _too_many_files(path):
                opened = open(path, "rb")  # noqa: SIM115 (kept open)
            file = self._files.setdefault(shard, opened)
        return file.fileno()

    def _reader(self, shard: int) -> Any:
        if shard not in self._readers:
            entry, path = self._entries[shard], self._local_path(shard, RECORDS_SUFFIX)
            name = f"{self.path / entry['name']}{RECORDS_SUFFIX}"
            try:
                reader = array_record_module.ArrayRecordReader(os.fspath(path), _OPTIONS)
                count = reader.num_records()
            except (ValueError, RuntimeError) as error:
                raise DamagedError(f"{name}: damaged: can't be opened: {error}") from error
            if count != entry["records"]:
                raise DamagedError(f"{name}: damaged: has {count} records, the manifest {entry['records']}")
            self._readers[shard] = reader
        return self._readers[shard]

    def _staging_folder(self) -> epath.Path:
        return epath.Path(self._stage_to) / self._identity()[:16]

    def _local_path(self, shard: int, suffix: str) -> epath.Path:
        """A shard's file on local disk, staged first if need be."""
        name = self._entries[shard]["name"] + suffix
        path, expected = self.path / name, self._entries[shard]["files"][name]
        if self._stage_to:
            return staging.stage(path, expected, self._staging_folder())
        if files.is_remote(path):
            raise UserError(
                f"{self.path}: shards are read from local disk; set --config.data.stage_to (or --stage_to) to a "
                "folder to copy them to"
            )
        check_size(path, expected)
        return path


@functools.cache
def _raise_open_file_limit() -> None:
    """Raises this process's limit of open files to the hard limit: a shard takes two, the default is often 1024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(ValueError, OSError):  # some systems report "unlimited" and refuse it
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


@contextlib.contextmanager
def _too_many_files(path: epath.Path) -> Iterator[None]:
    """Turns the error for too many open files into a UserError."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.EMFILE, errno.ENFILE):
            raise
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        raise UserError(
            f"{path}: {error.strerror}: a shard takes two, this process may open {soft}; raise ulimit -n"
        ) from error


def check_size(path: epath.Path, expected: Mapping[str, Any]) -> None:
    """Raises UserError if a file is missing, or its size is not the {"bytes"} that the manifest has."""
    size = files.file_size(path)
    if size != expected["bytes"]:
        actual = "is missing" if size is None else f"has {size} bytes"
        raise UserError(f"{path}: {actual}, the manifest says {expected['bytes']}; encode it again")
