"""The manifest of a store: totals of all shards' entries as JSON, and two binary tables beside it.

    manifest.json      header, totals, the classes and stream sets of all shards, sorted, and the tables' sections
    manifest.index     sections "shards" (`SHARD_DTYPE` each) and "runs" (`RUN_DTYPE`), which opening a store reads
    manifest.heldout   `HELDOUT_DTYPE`, sorted: the scenes that any held-out share up to `LISTED_SHARE` selects

Runs tell the class, frames and stream set of each scene of a shard without its index: consecutive scenes that are
equal in all three. A shard of more than `MAX_RUNS` runs has none here; its index tells.
"""

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Shaped

from lvm.common import files
from lvm.common.errors import UserError
from lvm.data.store import failures, format
from lvm.data.store.format import CODES_SUFFIX, INDEX_SUFFIX, SECTIONS, VERSION, shard_name

HEADER, MANIFEST, TABLES, HELDOUT = "header.json", "manifest.json", "manifest.index", "manifest.heldout"
MAX_RUNS = 32  # of a shard
LISTED_SHARE = 2**-9  # of the groups; larger held-out shares need the shards' indexes
RUN_DTYPE = np.dtype(
    [("shard", "<u4"), ("first_scene", "<u4"), ("class_id", "<i4"), ("frames", "<u2"), ("stream_set", "<u2")]
)
HELDOUT_DTYPE = np.dtype([("group", "<u8"), ("scene", "<u8")])  # `group_hash`, number in the store
SHARD_DTYPE = np.dtype(
    [
        ("scenes", "<u4"),
        ("images", "<u4"),
        ("section_bytes", "<u8", len(SECTIONS)),
        ("section_crc32c", "<u4", len(SECTIONS)),
        ("sha256", "u1", (2, 32)),  # of the codes and the index
    ]
)
_TABLE_DTYPES = {"shards": SHARD_DTYPE, "runs": RUN_DTYPE}


class _Names:
    """Provisional ids of names in the order in which shards bring them, and their ids once all are known."""

    def __init__(self) -> None:
        self._ids: dict[Any, int] = {}

    def ids(self, names: Iterable[Any]) -> np.ndarray:
        """Provisional ids, and -1 at the end."""
        return np.array([*(self._ids.setdefault(name, len(self._ids)) for name in names), -1], np.int64)

    def final(self) -> tuple[list[Any], np.ndarray]:
        """All names, sorted, and the final id of each provisional one; -1 remains."""
        names = sorted(self._ids)
        ranks = {name: rank for rank, name in enumerate(names)}
        return names, np.array([*(ranks[name] for name in self._ids), -1], np.int64)


def build(folder: epath.PathLike, header: Mapping[str, Any], entries: Iterable[Mapping[str, Any]]) -> dict[str, bytes]:
    """The content of the manifest's files, manifest.json last; one entry is in memory at a time.

    Args:
      folder: the store, for messages.
      header: as in header.json, without its version.
      entries: of all shards, in order.

    Raises:
      UserError: two shards have different codecs for a stream, a stream has none, or there are too many stream sets.
    """
    merged = _Merged(folder, header)
    for entry in entries:
        merged.add(entry)
    classes, class_ids = merged.classes.final()
    stream_sets, stream_set_ids = merged.stream_sets.final()
    if len(stream_sets) > format.MAX_STREAM_SETS:
        raise UserError(f"{folder}: {len(stream_sets)} stream sets, the limit is {format.MAX_STREAM_SETS}")
    runs = np.concatenate([np.zeros(0, RUN_DTYPE), *merged.runs])
    runs["class_id"], runs["stream_set"] = class_ids[runs["class_id"]], stream_set_ids[runs["stream_set"]]
    tables, sections = format.pack_sections({"shards": b"".join(merged.shards), "runs": runs.tobytes()})
    contents = {TABLES: tables, HELDOUT: merged.heldout()}
    manifest = {
        "version": VERSION,
        **header,
        "streams": merged.codecs(stream_sets),
        "classes": classes,
        "stream_sets": stream_sets,
        **merged.totals(),
        "sections": sections,
        "files": {
            name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in contents.items()
        },
    }
    return contents | {MANIFEST: files.json_bytes(manifest)}


class _Merged:
    """Sums and tables of the entries so far."""

    def __init__(self, folder: epath.PathLike, header: Mapping[str, Any]):
        self._folder = folder
        self._codecs = {stream: (codec, HEADER) for stream, codec in header.get("streams", {}).items()}
        self.classes, self.stream_sets = _Names(), _Names()
        self.shards: list[bytes] = []  # `SHARD_DTYPE` each
        self.runs: list[np.ndarray] = []
        self._heldout = bytearray()
        self._counts = Counter[str]()
        self._images, self._failures = Counter[str](), Counter[str]()
        self._group_hashes: list[int] = []
        self._codes_used = np.zeros(0, np.uint8)
        self._versions: dict[str, set[str]] = {}

    def add(self, entry: Mapping[str, Any]) -> None:
        """Adds the next shard."""
        number = len(self.shards)
        self.shards.append(_pack(entry))
        class_ids = self.classes.ids(entry["classes"])
        stream_set_ids = self.stream_sets.ids(tuple(names) for names in entry["stream_sets"])
        if entry["runs"]:
            runs = np.array([(number, *run) for run in entry["runs"]], RUN_DTYPE)
            runs["class_id"] = class_ids[runs["class_id"]]
            runs["stream_set"] = stream_set_ids[runs["stream_set"]]
            self.runs.append(runs)
        heldout = np.empty(len(entry["heldout"]["groups"]), HELDOUT_DTYPE)
        heldout["group"] = entry["heldout"]["groups"]
        heldout["scene"] = np.array(entry["heldout"]["scenes"], np.uint64) + np.uint64(self._counts["scenes"])
        self._heldout += heldout.tobytes()
        self._counts.update({"scenes": entry["scenes"], "images": entry["images"]})
        self._images.update(entry["images_by_stream"])
        self._failures.update(entry["failures"])
        self._group_hashes = extremes([*self._group_hashes, *entry["group_hashes"]])
        used = np.frombuffer(bytes.fromhex(entry["codes_used"]), np.uint8)
        self._codes_used = used | (self._codes_used if number else used)
        for name, version in entry["versions"].items():
            self._versions.setdefault(name, set()).add(version)
        for stream, codec in entry["streams"].items():
            other, where = self._codecs.setdefault(stream, (codec, entry["name"]))
            if codec != other:
                raise UserError(
                    f"{self._folder}: {where} and {entry['name']} have different codecs for stream {stream!r}; encode "
                    "both with the same settings"
                )

    def codecs(self, stream_sets: Iterable[Sequence[str]]) -> dict[str, Any]:
        """The codec of every stream of these sets."""
        streams = sorted({stream for names in stream_sets for stream in names})
        if unknown := [stream for stream in streams if stream not in self._codecs]:
            raise UserError(f"{self._folder}: stream {unknown[0]!r} has a codec neither in {HEADER} nor in an entry")
        return {stream: self._codecs[stream][0] for stream in streams}

    def heldout(self) -> bytes:
        """`HELDOUT_DTYPE`, by group and scene. Ends the collection: of 1e9 scenes, each copy takes 64 MB."""
        rows = np.frombuffer(self._heldout, HELDOUT_DTYPE)
        rows = rows[np.argsort(rows["group"], kind="stable")]
        self._heldout.clear()
        return rows.tobytes()

    def totals(self) -> dict[str, Any]:
        return {
            **{key: self._counts[key] for key in ("scenes", "images")},
            "images_by_stream": dict(self._images),
            "codes_used": int(np.bitwise_count(self._codes_used).sum()),
            "group_hashes": self._group_hashes,
            "failures": failures.most_common(self._failures),
            "versions": {name: sorted(versions - {""}) for name, versions in self._versions.items()},
            "num_shards": len(self.shards),
        }


def same_codes(tokenizer: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """True if two tokenizers give equal codes, by their identities: their decoders may differ.

    Identities of earlier versions have no `codes`; then the tokenizers must be equal.
    """
    key = "codes" if tokenizer.get("codes") and other.get("codes") else "hash"
    return tokenizer.get(key) == other.get(key)


def all_same_codes(tokenizers: Sequence[Mapping[str, Any]]) -> bool:
    """True if tokenizers give equal codes, pair by pair or by way of others of them, since some may lack `codes`."""
    reached = [0] if tokenizers else []
    for number in reached:  # which grows
        equal = (i for i, each in enumerate(tokenizers) if same_codes(each, tokenizers[number]))
        reached += [i for i in equal if i not in reached]
    return len(reached) == len(tokenizers)


def reference_tokenizer(tokenizers: Iterable[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The one to compare others with: the first that has `codes`, or else a `hash`, or else the first."""
    return max(tokenizers, key=lambda each: (bool(each.get("codes")), bool(each["hash"])))


def extremes(hashes: Sequence[int]) -> list[int]:
    """The lowest and the highest; [] of none."""
    return [min(hashes), max(hashes)] if hashes else []


def _pack(entry: Mapping[str, Any]) -> bytes:
    """`SHARD_DTYPE` of an entry."""
    sections = [entry["sections"][name] for name in SECTIONS]
    names = (f"{entry['name']}{suffix}" for suffix in (CODES_SUFFIX, INDEX_SUFFIX))
    row = (
        entry["scenes"],
        entry["images"],
        [section["bytes"] for section in sections],
        [section["crc32c"] for section in sections],
        [list(bytes.fromhex(entry["files"][name]["sha256"])) for name in names],
    )
    return np.array(row, SHARD_DTYPE).tobytes()


class ShardEntries(Sequence[dict[str, Any]]):
    """The part of each shard's entry that readers need, unpacked on access: "name", "scenes", "images", "sections",
    "files".

    Args:
      table: of the shards.
      codes_per_image: N.
    """  # fmt: skip

    def __init__(self, table: Shaped[np.ndarray, " shards"], codes_per_image: int):
        self.table, self._N = table, codes_per_image

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, number: Any) -> Any:
        number = range(len(self))[number]
        name, row = shard_name(number, len(self)), self.table[number]
        sizes, checksums = row["section_bytes"].tolist(), row["section_crc32c"].tolist()
        *offsets, index_size = format.section_offsets(sizes)
        located = zip(SECTIONS, offsets, sizes, checksums, strict=True)
        codes_size = int(row["images"]) * format.grid_bytes(self._N)
        return {
            "name": name,
            "scenes": int(row["scenes"]),
            "images": int(row["images"]),
            "sections": {s: {"offset": start, "bytes": size, "crc32c": crc} for s, start, size, crc in located},
            "files": {
                f"{name}{suffix}": {"bytes": size, "sha256": row["sha256"][i].tobytes().hex()}
                for i, (suffix, size) in enumerate([(CODES_SUFFIX, codes_size), (INDEX_SUFFIX, index_size)])
            },
        }


@dataclasses.dataclass(frozen=True)
class Tables:
    """The content of manifest.index: `SHARD_DTYPE` [shards], `RUN_DTYPE` [runs] by shard and first scene."""

    shards: Shaped[np.ndarray, " shards"]
    runs: Shaped[np.ndarray, " runs"]


def read_tables(folder: epath.Path, manifest: Mapping[str, Any]) -> Tables:
    """Reads manifest.index. Raises UserError if it is missing or corrupted."""
    data = _read(folder, TABLES, manifest)
    return Tables(
        **{
            name: format.unpack_section(
                data[located["offset"] :][: located["bytes"]], name, _TABLE_DTYPES[name], located["crc32c"], None
            )
            for name, located in manifest["sections"].items()
        }
    )


def read_heldout(folder: epath.Path, manifest: Mapping[str, Any]) -> Shaped[np.ndarray, " scenes"]:
    """Reads manifest.heldout: `HELDOUT_DTYPE`, by group. Raises UserError if it is missing or corrupted."""
    return _read(folder, HELDOUT, manifest).view(HELDOUT_DTYPE)


def _read(folder: epath.Path, name: str, manifest: Mapping[str, Any]) -> np.ndarray:
    path, expected = folder / name, manifest["files"][name]
    try:
        data = files.read_bytes(path)
    except FileNotFoundError as error:
        raise UserError(f"{path}: is missing; write it again: tokenizer.encode --finish --out={folder}") from error
    if hashlib.sha256(data).hexdigest() != expected["sha256"]:
        raise UserError(f"{path}: damaged; write it again: tokenizer.encode --finish --out={folder}")
    return np.frombuffer(data, np.uint8)
