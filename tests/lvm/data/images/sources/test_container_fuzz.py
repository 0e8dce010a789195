"""Damaged tars, COCO JSON and Parquet footers: only listed failures and one-line errors, in bounded time."""

import copy
import io
import json
import pathlib
import tarfile
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lvm.data.images.preprocess import Preprocess
from lvm.data.images.sources import ImageSource, open_source
from lvm.data.images.sources.coco import CocoSource
from lvm.data.images.sources.parquet import ParquetSource
from tests.fuzz import check_mutations, mutate
from tests.image_files import encode_image, photo

small = Preprocess(8)
RGB, IDS = encode_image(photo(8, 8)), encode_image(np.full((8, 8), 3, np.uint8))
WIDTH, HEIGHT = 80, 40


def read_all(source: ImageSource) -> None:
    assert source.describe()
    failures = [*source.skipped, *(failure for i in range(len(source)) for failure in source.load(i).failures)]
    for failure in failures:
        assert len(failure.reason.splitlines()) == 1, failure


def tar_file(format: int) -> bytes:
    file = io.BytesIO()
    names = ["1.png", "1.segmentation.png", "1.cls", f"{'x' * 120}/2.png", f"{'d/' * 60}{'y' * 90}.png", "3é.png"]
    with tarfile.open(fileobj=file, mode="w", format=format) as tar:
        for name in names:
            header = tarfile.TarInfo(name)
            header.mtime = 1.5  # has a header of its own in pax
            header.size = len(content := b"cat" if name.endswith("cls") else RGB if "seg" not in name else IDS)
            tar.addfile(header, io.BytesIO(content))
    return file.getvalue()


def mutate_tar(content: bytes, seed: int, count: int) -> Iterator[bytes]:
    """Yields copies as `mutate`, a quarter of them with a hole of zero blocks before the last header instead."""
    rng, last = np.random.default_rng(seed), content.rindex(b"ustar") // 512
    for mutated in mutate(content, seed, count):
        if rng.random() < 0.25:
            start = int(rng.integers(last))
            end = min(start + int(rng.integers(1, 8)), last)
            mutated = content[: 512 * start] + bytes(512 * (end - start)) + content[512 * end :]
        yield mutated


def check_tars(folder: pathlib.Path, format: int, count: int) -> int:
    def read(content: bytes) -> None:
        (folder / "a.tar.index.json").unlink(missing_ok=True)  # would hide the changes
        (folder / "a.tar").write_bytes(content)
        read_all(source := open_source(str(folder / "a.tar"), small))
        assert len(source) == 4 or source.skipped, "a scene is lost without a word"

    return check_mutations(tar_file(format), read, seed=format, count=count, mutations=mutate_tar)


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_damaged_tars_are_listed(tmp_path, format) -> None:
    assert 0 < check_tars(tmp_path, format, count=80) < 80


@pytest.mark.slow
@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_thousands_of_damaged_tars_are_listed(tmp_path, format) -> None:
    check_tars(tmp_path, format, count=1000)


def coco_file() -> bytes:
    polygon, joints = [1, 2, 30, 2, 30, 30], [5, 5, 2, 9, 9, 1, 0, 0, 0]
    box = {"bbox": [8, 4, 16, 8.5], "area": 128, "iscrowd": 0}
    masks = [{"size": [HEIGHT, WIDTH], "counts": counts} for counts in ([100, 50, HEIGHT * WIDTH - 150], "T3Te2")]
    annotations = [
        {"id": 1, "image_id": 1, "category_id": 1, "segmentation": [polygon], "keypoints": joints, **box},
        *({"id": 2 + i, "image_id": 1 + i, "category_id": 7, "segmentation": mask} for i, mask in enumerate(masks)),
    ]
    person = {"id": 1, "name": "person", "keypoints": ["nose", "left_eye", "right_eye"], "skeleton": [[1, 2], [1, 3]]}
    images = [{"id": i, "file_name": f"{i}.png", "width": WIDTH, "height": HEIGHT} for i in (1, 2)]
    content = {"images": images, "annotations": annotations, "categories": [person, {"id": 7, "name": "train"}]}
    return json.dumps(content).encode()


VALUES = [
    None, "", "abc", "1", "../a", "\0", "\ud800",
    "x" * 999, [], [[]], [None], ["a"], [1], [[1, 2]], [0] * 9999, {}, {"a": 1},
    True, 0, -1, 0.5, 1e8, 2**31, -(2**63), 1e300, -1e300, 10**400, float("nan"), float("inf"), [[float("nan")] * 6],
]  # fmt: skip


def places(node: Any) -> Iterator[tuple[Any, Any]]:
    """Yields every value of a JSON tree as its container and key."""
    for key, child in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        yield node, key
        yield from places(child)


def mutate_json(content: bytes, seed: int, count: int) -> Iterator[bytes]:
    """Yields copies with one to three values replaced or removed."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        tree = json.loads(content)
        for _ in range(rng.choice([1, 1, 2, 3])):
            choices = list(places(tree))
            node, key = choices[rng.integers(len(choices))] if choices else ({}, "")
            node[key] = copy.deepcopy(VALUES[rng.integers(len(VALUES))])
            if rng.random() < 0.1:
                del node[key]
        yield json.dumps(tree).encode()


def check_coco(folder: pathlib.Path, seed: int, count: int) -> int:
    for i in (1, 2):
        (folder / f"{i}.png").write_bytes(encode_image(photo(WIDTH, HEIGHT)))

    def read(content: bytes) -> None:
        (folder / "a.json").write_bytes(content)
        read_all(CocoSource(small, annotations=str(folder / "a.json"), images=str(folder)))

    return check_mutations(coco_file(), read, seed=seed, count=count, mutations=mutate_json)


def test_malformed_coco_values_are_listed(tmp_path) -> None:
    assert 0 < check_coco(tmp_path, seed=0, count=200) < 200


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_thousands_of_malformed_coco_files_are_listed(tmp_path, seed) -> None:
    check_coco(tmp_path, seed, count=2000)


WRITERS = [
    {"compression": "snappy"},
    {"compression": "zstd", "store_schema": False, "use_dictionary": False},
    {"compression": "none", "write_page_index": True, "data_page_version": "2.0"},
]


def parquet_file(options: dict[str, Any]) -> bytes:
    file, image = io.BytesIO(), {"bytes": RGB, "path": "a.png"}
    columns = {
        "rgb": pa.array([image] * 4, pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
        "segmentation": pa.array([IDS, None, IDS, None]),
        "id": pa.array(["a", "b", "c", "d"]),
        "kind": pa.array(["cat", "dog", None, "cat"]).dictionary_encode(),
        "group": pa.array([1, 2, 3, 4]),
    }
    pq.write_table(pa.table(columns), file, row_group_size=2, **options)
    return file.getvalue()


def check_footers(folder: pathlib.Path, options: dict[str, Any], count: int) -> int:
    content = parquet_file(options)
    size = int.from_bytes(content[-8:-4], "little") + 8

    def read(footer: bytes) -> None:
        (folder / "a.parquet").write_bytes(content[:-size] + footer)
        columns = {"key": "id", "class_name": "kind", "group": "group"}
        read_all(ParquetSource(small, path=str(folder / "a.parquet"), **columns))

    return check_mutations(content[-size:], read, count=count)


@pytest.mark.parametrize("options", WRITERS)
def test_damaged_parquet_footers_are_listed(tmp_path, options) -> None:
    assert 0 < check_footers(tmp_path, options, count=60) < 60


@pytest.mark.slow
@pytest.mark.parametrize("options", WRITERS)
def test_thousands_of_damaged_footers_are_listed(tmp_path, options) -> None:
    check_footers(tmp_path, options, count=1000)
