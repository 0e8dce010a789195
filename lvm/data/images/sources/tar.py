"""Scenes from tar files named as WebDataset names them: the members of one key are the streams of one scene."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import hashlib
import pathlib
import re
import tarfile
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, NamedTuple

from lvm.common import files
from lvm.common.config import from_config_dict, to_json
from lvm.common.errors import UserError
from lvm.data.images.preprocess import Preprocess
from lvm.data.images.sources.base import Failure, SceneImages, SceneInfo
from lvm.data.images.sources.image_file import IMAGE_SUFFIXES, ImageFile
from lvm.data.images.sources.listing import (
    NOT_UTF8,
    check_index,
    find_files,
    hash_files,
    printable,
    read_range,
)
from lvm.data.images.sources.readers import STREAMS, FrameReader, declared_streams, make_readers
from lvm.data.streams.codecs import Codec

CLASS = "cls"  # the suffix of a member that holds its scene's class
_INDEX_VERSION = 1


class Member(NamedTuple):
    """A file in a tar."""

    name: str
    offset: int
    size: int


class Sample(NamedTuple):
    """A scene: the tar that it is in, and its members by stream."""

    info: SceneInfo
    tar: str
    members: Mapping[str, Member]


@dataclasses.dataclass(frozen=True)
class TarConfig:
    """The parameters of tar files.

    Attributes:
      path: a tar file, a folder of them, or a pattern such as "shards/*.tar".
      streams: the suffix of each stream's members, several separated by ";", such as {"rgb": "jpg;png", "depth":
        "depth.png"}. By default "jpg" and the other suffixes of pictures are rgb, and "depth.png" is depth.
    """

    kind: ClassVar[str] = "tar"
    path: str = ""
    streams: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.streams and "rgb" not in self.streams:
            raise UserError(
                f"streams: {sorted(self.streams)} lack rgb; name the suffix of every stream that is wanted"
            )


class TarSource:
    """An `ImageSource` of uncompressed tar files, read by random access: nothing is unpacked.

    A member's key is its path up to the first dot of its name, and what follows is its suffix: "a/7.jpg",
    "a/7.depth.png" and "a/7.cls" are the rgb, the depth and the class name of the scene "TAR/a/7", where TAR is the
    path of the tar, so that tars may repeat each other's keys. A scene is its own group. What annotations hold is as
    in `FolderSource`; `classes.json` and `streams.json` lie beside the tars.

    The first time, a tar is read through by its headers, and an index is left beside it ("TAR.index.json") if the
    folder can be written to.

    Args:
      preprocess: how pictures become images.
      **parameters: the fields of `TarConfig`.

    Raises:
      UserError: there is no tar, one is compressed or none, or no member of them is of stream rgb.
    """

    def __init__(self, preprocess: Preprocess, **parameters: Any) -> None:
        self.config: TarConfig = from_config_dict(TarConfig, parameters, "tar")
        skipped: list[Failure] = []
        self._root, self._tars = find_files(self.config.path, (".tar",), skipped)
        self._streams = (*STREAMS, *declared_streams(self._root))
        self._streams += tuple(s for s in self.config.streams if s not in self._streams)
        self._samples = [sample for tar in self._tars for sample in self._group(tar, skipped)]
        if not self._samples:
            first = f" ({skipped[0].key}: {skipped[0].reason})" if skipped else ""
            raise UserError(
                f"{self.config.path}: no member of its tars is of stream rgb{first}; expected names such as "
                '0001.jpg, or the parameter streams={"rgb": SUFFIX}'
            )
        self.name = self._root.resolve().name
        self.skipped = tuple(skipped)
        self.stream_sets: tuple[tuple[str, ...], ...] = tuple(sorted({s.info.streams for s in self._samples}))
        self.classes = tuple(sorted({s.info.class_name for s in self._samples} - {""}))
        used = {stream for streams in self.stream_sets for stream in streams}
        blobs = {stream: self._blobs(stream) for stream in self._streams if stream in used}
        self._frames = FrameReader(make_readers(self._root, blobs), preprocess)
        self.streams: Mapping[str, Codec] = self._frames.streams

    def __len__(self) -> int:
        return len(self._samples)

    def info(self, index: int) -> SceneInfo:
        """See `ImageSource.info`."""
        check_index(index, len(self))
        return self._samples[index].info

    def load(self, index: int) -> SceneImages:
        """See `ImageSource.load`."""
        info = self.info(index)
        sample = self._samples[index]
        return self._frames.load(info, [{stream: self._blob(sample, stream) for stream in info.streams}])

    def describe(self) -> dict[str, Any]:
        """See `ImageSource.describe`."""
        members = hashlib.sha256()
        for sample in self._samples:
            members.update(f"{sample.info} {sorted(sample.members.items())}\n".encode())
        return {
            "kind": self.config.kind,
            "streams": {stream: codec.to_json() for stream, codec in self.streams.items()},
            "suffixes": to_json(self.config.streams),
            "num_scenes": len(self),
            "listing": hash_files(self._root, self._tars),
            "members": members.hexdigest(),
        }

    def _blob(self, sample: Sample, stream: str) -> ImageFile:
        member = sample.members[stream]
        read = functools.partial(read_range, self._root / sample.tar, member.offset, member.size)
        return ImageFile(f"{sample.tar}/{member.name}", read)

    def _blobs(self, stream: str) -> Iterator[ImageFile]:
        return (self._blob(sample, stream) for sample in self._samples if stream in sample.members)

    def _group(self, tar: str, skipped: list[Failure]) -> Iterator[Sample]:
        """The scenes of one tar, in the order of their first members; `skipped` gets what is not used."""
        by_key: dict[str, dict[str, Member]] = {}
        unused: collections.Counter[str] = collections.Counter()
        try:
            members, problems = _index(self._root / tar)
        except OSError as error:
            members, problems = [], [("", f"can't be read: {error.strerror}")]
        skipped += [Failure(f"{tar}/{name}" if name else tar, reason) for name, reason in problems]
        for member in members:
            key, suffix = _split(member.name)
            stream = self._stream(suffix)
            if not key or stream is None:
                unused[suffix] += 1
            elif (taken := by_key.setdefault(key, {}).setdefault(stream, member)) is not member:
                reason = f"its key and stream are those of {taken.name}, which is used"
                skipped.append(Failure(f"{tar}/{member.name}", reason))
        for suffix, count in sorted(unused.items()):
            what = f"{count} members, .{suffix}" if suffix else f"{count} members without a suffix"
            skipped.append(Failure(tar, f"{what}: of no stream"))
        for key, found in by_key.items():
            if "rgb" not in found:
                skipped.append(Failure(f"{tar}/{key}", f"has {', '.join(sorted(found))} but no rgb"))
                continue
            name = f"{tar}/{key}"
            class_name = self._class_name(tar, found.pop(CLASS, None), skipped)
            streams = tuple(stream for stream in self._streams if stream in found)
            yield Sample(SceneInfo(name, name, class_name, 1, streams), tar, found)

    def _stream(self, suffix: str) -> str | None:
        """The stream of members of a suffix, `CLASS`, or None."""
        if suffix == CLASS:
            return CLASS
        if self.config.streams:
            fits = (name for name, wanted in self.config.streams.items() if suffix in wanted.split(";"))
            return next(fits, None)
        stream, _, picture = suffix.rpartition(".")
        if f".{picture}" not in IMAGE_SUFFIXES or (stream and stream not in self._streams):
            return None
        return stream or "rgb"

    def _class_name(self, tar: str, member: Member | None, skipped: list[Failure]) -> str:
        if member is None:
            return ""
        try:
            return read_range(self._root / tar, member.offset, member.size).decode().strip()
        except (OSError, UnicodeDecodeError) as error:
            skipped.append(Failure(f"{tar}/{member.name}", f"no class name: {error}"))
            return ""


def _split(name: str) -> tuple[str, str]:
    """A member's key and its suffix, in lower case; hidden files have no key."""
    folder, slash, file = name.rpartition("/")
    stem, _, suffix = file.partition(".")
    return (folder + slash + stem if stem else ""), suffix.lower()


def _index(path: pathlib.Path) -> tuple[list[Member], list[tuple[str, str]]]:
    """The members of a tar, and names of others with the reason; from the index beside it, if there is one."""
    index_path = path.with_name(f"{path.name}.index.json")
    status = path.stat()
    stamp = {"version": _INDEX_VERSION, "bytes": status.st_size, "modified": status.st_mtime_ns}
    if index_path.exists():
        with contextlib.suppress(UserError, KeyError, TypeError):  # a file of something else: written anew
            found = files.read_json(index_path)
            if found["stamp"] == stamp:
                return [Member(*member) for member in found["members"]], [tuple(p) for p in found["problems"]]
    members, problems = _scan(path, status.st_size)
    if members:
        with contextlib.suppress(
            OSError
        ):  # where the folder can't be written to, it is read through each time
            files.write_json(index_path, {"stamp": stamp, "members": members, "problems": problems})
    return members, problems


def _scan(path: pathlib.Path, size: int) -> tuple[list[Member], list[tuple[str, str]]]:
    members: list[Member] = []
    problems: list[tuple[str, str]] = []
    try:
        with tarfile.open(path, "r:") as tar:
            while (header := _next(tar, problems)) is not None:
                reason = _refusal(header, size)
                if reason:
                    problems.append((printable(header.name), reason))
                elif header.isfile():
                    members.append(Member(header.name.removeprefix("./"), header.offset_data, header.size))
                vars(tar)["members"].clear()  # or it keeps all headers
            if reason := _bad_end(path, tar.offset):
                problems.append(("", reason))
    except tarfile.ReadError as error:
        with open(path, "rb") as file:
            start = file.read(6)
        packed = start[:2] == b"\x1f\x8b" or start[:3] == b"BZh" or start == b"\xfd7zXZ\x00"
        found = "is compressed, and has no random access; unpack it to a plain .tar" if packed else str(error)
        problems.append(("", f"not a tar that can be read: {found}"))
    return members, problems


def _next(tar: tarfile.TarFile, problems: list[tuple[str, str]]) -> tarfile.TarInfo | None:
    try:
        return tar.next()
    except (tarfile.TarError, OSError, EOFError) as error:
        problems.append(("", f"damaged: {error}; what follows is not used"))
        return None


def _bad_end(path: pathlib.Path, offset: int) -> str:
    """What is wrong with where `tarfile` saw no further header, or ""; it takes a damaged one for the end."""
    with open(path, "rb") as file:
        file.seek(offset)
        block = file.read(tarfile.BLOCKSIZE)
    if not block:
        return "ends without an end mark: it may have been cut short"
    return f"damaged: no header at byte {offset}; what follows is not used" if block.strip(b"\0") else ""


def _refusal(header: tarfile.TarInfo, size: int) -> str:
    """Why a member is not used, or ""."""
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
