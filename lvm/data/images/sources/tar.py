"""Image source of tar files in WebDataset's naming: the members of one key are the streams of one scene."""

import collections
import contextlib
import dataclasses
import functools
import pathlib
import re
import tarfile
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO, NamedTuple

from lvm.common import files
from lvm.common.config import to_json
from lvm.common.errors import UserError
from lvm.data.images.sources.base import ImageFileSource, PathConfig
from lvm.data.images.sources.image_file import ImageFile
from lvm.data.images.sources.listing import (
    COMPRESSED,
    IMAGE_SUFFIXES,
    NOT_UTF8,
    failure_reason,
    printable,
    read_range,
    suffix_of,
)
from lvm.data.images.sources.scene import SceneInfo

CLASS = "cls"  # suffix of the member that holds its scene's class name
_INDEX_VERSION = 2
_COMPRESSED_MAGIC = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\x00", b"\x28\xb5\x2f\xfd", b"\x04\x22\x4d\x18", b"PK\x03\x04")


class Member(NamedTuple):
    """A file in a tar."""

    name: str
    offset: int
    size: int


Sample = tuple[str, Mapping[str, Member]]  # a scene's tar, and its members by stream


@dataclasses.dataclass(frozen=True)
class TarConfig(PathConfig):
    """Parameters of a tar source.

    Attributes:
      streams: suffixes of each stream's members, separated by ";", such as {"rgb": "jpg;png", "depth": "depth.png"};
        in any case, with or without their first dot.
        By default "jpg" and the other image suffixes are rgb, and "depth.png" is depth.
    """

    streams: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        suffixes = collections.Counter(suffix for ends in self.streams.values() for suffix in _suffixes(ends))
        if repeated := [suffix for suffix, count in suffixes.items() if count > 1]:
            raise UserError(f"streams: {dict(self.streams)} repeat {repeated[0]!r}; expected each suffix once")


class TarSource(ImageFileSource[Sample]):
    """An `ImageSource` of uncompressed tar files, read by random access without unpacking.

    A member's key is its path up to the first dot of its name; the rest is its suffix: "a/7.jpg", "a/7.depth.png" and
    "a/7.cls" are the rgb, the depth and the class name of the scene "TAR/a/7", where TAR is the path of the tar, so
    that tars may repeat each other's keys. A scene is its own group. Annotations are as in `FolderSource`;
    `classes.json` and `streams.json` are read from the tars' folder.

    The first time that a source is listed as a whole, its tars' headers are read, and an index is written beside each
    ("TAR.index.json") if the folder is writable. Encoding reads each tar once, and writes none.
    """

    kind = "tar"
    config_class = TarConfig
    scene_noun = 'rgb member, such as 0001.jpg; give its suffix in streams={"rgb": SUFFIX} if it has another name'

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"suffixes": to_json(self.config.streams)}

    def _open_scene(self, index: int) -> tuple[SceneInfo, list[dict[str, ImageFile]]]:
        info, (tar, members) = self._scene(index)
        read = lambda m: functools.partial(self._read, tar, m)  # noqa: E731
        return info, [{stream: ImageFile(f"{tar}/{m.name}", read(m)) for stream, m in members.items()}]

    def _read(self, tar: str, member: Member) -> bytes:
        return read_range(self._folder.local(tar), member.offset, member.size)

    def _list_file(self, tar: str) -> Iterator[tuple[SceneInfo, Sample]]:
        """Yields a tar's scenes in the order of their first members."""
        by_key: dict[str, dict[str, Member]] = {}
        unused: collections.Counter[str] = collections.Counter()
        try:
            members, problems = _load_index(self._folder.local(tar), keeps=not self._is_part)
        except OSError as error:
            members, problems = [], [("", f"can't be read: {failure_reason(self._root, error)}")]
        for name, reason in problems:
            self._skip(f"{tar}/{name}" if name else tar, reason)
        for member in members:
            key, suffix = _split(member.name)
            stream = self._stream(suffix)
            if not key or stream is None:
                unused[suffix] += 1
            elif (first := by_key.setdefault(key, {}).setdefault(stream, member)) is not member:
                self._skip(f"{tar}/{member.name}", f"its key and stream are those of {first.name}, which is used")
        for suffix, count in sorted(unused.items()):
            self._skip(tar, f"{count} members{f', .{suffix}' if suffix else ' without a suffix'}: of no stream")
        for key, by_stream in by_key.items():
            name = f"{tar}/{key}"
            if "rgb" not in by_stream:
                self._skip(name, f"has {', '.join(sorted(by_stream))} but no rgb")
                continue
            class_name = self._class_name(tar, by_stream.pop(CLASS)) if CLASS in by_stream else ""
            streams = tuple(stream for stream in self._stream_names if stream in by_stream)
            yield SceneInfo(name, name, class_name, 1, streams), (tar, by_stream)

    def _stream(self, suffix: str) -> str | None:
        """Returns the stream of members with this suffix, `CLASS`, or None."""
        if suffix == CLASS:
            return CLASS
        if self.config.streams:
            return next((s for s, ends in self.config.streams.items() if suffix in _suffixes(ends)), None)
        stream = suffix.rpartition(".")[0]
        if suffix_of(f"a.{suffix}") not in IMAGE_SUFFIXES or (stream and stream not in self._stream_names):
            return None
        return stream or "rgb"

    def _class_name(self, tar: str, member: Member) -> str:
        try:
            return self._read(tar, member).decode().strip()
        except (OSError, UnicodeDecodeError) as error:
            self._skip(f"{tar}/{member.name}", f"no class name: {failure_reason(self._root, error)}")
            return ""


def _suffixes(ends: str) -> list[str]:
    return [end.strip().lstrip(".") for end in ends.lower().split(";")]


def _split(name: str) -> tuple[str, str]:
    """Splits a member's name into key and lower-case suffix; hidden files and those in hidden folders have no key."""
    folder, slash, file = name.rpartition("/")
    stem, _, suffix = file.partition(".")
    is_hidden = any(part.startswith(".") for part in name.split("/"))
    return ("" if is_hidden else folder + slash + stem), suffix.lower()


def _load_index(path: pathlib.Path, keeps: bool) -> tuple[list[Member], list[tuple[str, str]]]:
    """Returns a tar's members, and (name, reason) of what is not used, from the index beside it if it is current.

    Args:
      path: of the tar.
      keeps: writes an index if there is no current one.
    """
    index_path = path.with_name(f"{path.name}.index.json")
    status = path.stat()
    stamp = {"version": _INDEX_VERSION, "bytes": status.st_size, "modified": status.st_mtime_ns}
    if index_path.exists():
        with contextlib.suppress(UserError, KeyError, TypeError):  # another file's format: rebuilt
            index = files.read_json(index_path)
            if index["stamp"] == stamp:
                return [Member(*member) for member in index["members"]], [tuple(p) for p in index["problems"]]
    members, problems = _scan(path, status.st_size)
    if members and keeps:
        with contextlib.suppress(OSError):  # in a read-only folder it is rebuilt each time
            files.write_json(index_path, {"stamp": stamp, "members": members, "problems": problems})
    return members, problems


def _scan(path: pathlib.Path, size: int) -> tuple[list[Member], list[tuple[str, str]]]:
    """Reads all headers, also after the zeros that end a tar: tars may be joined, and a file may have a hole."""
    members: list[Member] = []
    problems: list[tuple[str, str]] = []
    start = end = 0
    gap = ""
    with open(path, "rb") as file:
        while True:
            try:
                for header, following in _headers(file, start, size):
                    end = following
                    if reason := _member_problem(header, size):
                        problems.append((printable(header.name), reason))
                    elif header.isfile():
                        members.append(Member(header.name.removeprefix("./"), header.offset_data, header.size))
            except OSError:
                raise
            except Exception as error:  # tarfile raises errors of any type on damaged headers
                problems.append(("", _damage(file, end, error)))
                break
            start = _skip_zeros(file, end) if end < size else end
            if start == end:
                reason = f"damaged: no header at byte {end}; what follows is not used"
                problems.append(("", reason if end < size else "ends without an end mark: it may have been cut short"))
                break
            if start >= size:
                break
            gap = gap or f"zeros from byte {end} to {start}: tars were joined, or it has a hole"
            end = start
    return members, problems + [("", gap)] * bool(gap)


def _headers(file: BinaryIO, start: int, size: int) -> Iterator[tuple[tarfile.TarInfo, int]]:
    """Yields each header from `start` to what is no header, with the offset of its member's end."""
    file.seek(start)
    with tarfile.open(fileobj=file, mode="r:") as tar:
        for header in iter(tar.next, None):
            if header.size < 0:  # the next header would be before it
                raise tarfile.ReadError(f"a member has the size {header.size}")
            yield header, tar.offset
            if tar.offset > size:
                return
            vars(tar)["members"].clear()  # or tarfile keeps all headers in memory


def _damage(file: BinaryIO, offset: int, error: Exception) -> str:
    if offset:
        return f"damaged at byte {offset}: {error}; what follows is not used"
    file.seek(0)
    is_compressed = file.read(6).startswith(_COMPRESSED_MAGIC)
    return COMPRESSED if is_compressed else f"not a tar that can be read: {error}"


def _skip_zeros(file: BinaryIO, offset: int) -> int:
    """Returns the offset of the first byte from `offset` on that is not zero, or the file's size."""
    file.seek(offset)
    while chunk := file.read(1 << 20):
        if data := chunk.lstrip(b"\0"):
            return file.tell() - len(data)
    return file.tell()


def _member_problem(header: tarfile.TarInfo, size: int) -> str:
    """Returns why a member is not used, or ""."""
    if header.name.startswith("/") or ".." in re.split(r"[/\\]", header.name):
        return "its name leaves the archive"
    if printable(header.name) != header.name:
        return NOT_UTF8
    if header.isdir():
        return ""
    if not header.isfile() or header.issparse():
        return "not a plain file"
    if header.offset_data + header.size > size:
        return "truncated: the archive ends early"
    return ""
