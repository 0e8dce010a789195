"""Minimal writer of stores of version 3, as `lvm.data.store.version3` describes them."""

import pathlib
import struct

import google_crc32c
import numpy as np
from array_record.python import array_record_module

from lvm.common import files


def write_store(folder, header, shards, failures=()):
    """Writes a finished store: `shards` are lists of scenes, `failures` those of the first shard."""
    folder = pathlib.Path(folder)
    folder.mkdir()
    header = {"version": 3, **header, "num_shards": len(shards)}
    files.write_json(folder / "header.json", header)
    num_codes = header["tokenizer"]["num_codes"]
    for number, scenes in enumerate(shards):
        name = f"shard-{number:05d}-of-{len(shards):05d}"
        indexed = _write_records(folder, name, scenes, header)
        images = {}
        for scene in scenes:
            stream_set = ids(scene, header)[0]
            images[stream_set] = images.get(stream_set, 0) + scene.codes.shape[0] * scene.codes.shape[1]
        codes = np.concatenate([np.zeros(0, np.int64), *(scene.codes.ravel() for scene in scenes)])
        groups = [scene.group for scene in scenes] + [7] * (number == 0 and bool(failures))
        entry = {
            "name": name,
            "scenes": len(scenes),
            "images": sum(images.values()),
            "images_by_stream_set": {str(i): count for i, count in sorted(images.items())},
            "histogram": np.bincount(codes, minlength=num_codes).tolist(),
            "records": indexed,
            "group_hashes": [min(groups), max(groups)] if groups else [],
            "failures": list(failures) if number == 0 else [],
            "versions": {"lvm": "0.0.9"},
            "files": {
                path.name: {"bytes": path.stat().st_size, "sha256": files.sha256(path)}
                for path in (folder / f"{name}.array_record", folder / f"{name}.index")
            },
        }
        files.write_json(folder / f"{name}.json", entry)
    files.write_json(folder / "manifest.json", {"version": 3})  # the conversion reads the header and the entries


def ids(scene, header):
    """The ids of a scene's stream set and class."""
    class_id = header["classes"].index(scene.class_name) if scene.class_name else -1
    return header["stream_sets"].index(list(scene.streams)), class_id


def _write_records(folder, name, scenes, header):
    """Writes pages of single images and records of longer scenes, and their index; returns the number of records."""
    writer = array_record_module.ArrayRecordWriter(str(folder / f"{name}.array_record"), "group_size:1,uncompressed")
    pages, index, count = {}, [], 0

    def write(page):
        nonlocal count
        writer.write(pack(page, header))
        index.extend((count, len(s.codes), slot, *ids(s, header), s.group) for slot, s in enumerate(page))
        count += 1

    for scene in scenes:
        if scene.codes.shape[:2] != (1, 1):
            write([scene])
            continue
        page = pages.setdefault(stream_set := ids(scene, header)[0], [])
        page.append(scene)
        if len(page) == 64:
            write(pages.pop(stream_set))
    for stream_set in sorted(pages):
        write(pages[stream_set])
    writer.close()
    data = np.array(index, "<u4, <u2, u1, u1, <i4, <u8").tobytes()
    (folder / f"{name}.index").write_bytes(data + bytes(12 * count))  # without the offsets of the records
    return count


def pack(scenes, header):
    """A record of one scene, or of several of one image."""
    T, _, N = scenes[0].codes.shape
    keys = [scene.key.encode() for scene in scenes]
    metadata = struct.pack("<III", T, ids(scenes[0], header)[0], N)
    metadata += np.array([ids(scene, header)[1] for scene in scenes], "<i4").tobytes()
    metadata += np.array([*map(len, keys)], "<u2").tobytes() + b"".join(keys)
    head = struct.pack("<4sHH", b"LVMS", 2, len(scenes))
    grids = np.concatenate([scene.codes.reshape(-1, N) for scene in scenes]).astype("<u2")
    blocks = [grids[start : start + 4].tobytes() for start in range(0, len(grids), 4)]
    checked = b"".join(block + struct.pack("<I", google_crc32c.value(block)) for block in blocks)
    return head + struct.pack("<I", google_crc32c.value(head + metadata)) + metadata + checked
