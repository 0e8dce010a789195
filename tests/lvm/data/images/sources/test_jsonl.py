"""JSONL code source."""

from __future__ import annotations

import numpy as np
import pytest

from lvm.common.errors import UserError
from lvm.data.images.preprocess import Preprocess
from lvm.data.images.sources import open_any_source, open_source
from lvm.data.store import jsonl

small = Preprocess(16)


def test_jsonl_lines_are_scenes_of_codes(tmp_path) -> None:
    rng = np.random.default_rng(0)
    sentences = [rng.integers(0, 16, (frames, 4), dtype=np.uint16) for frames in (3, 1)]
    bad = ["{}\n", "\n", jsonl.encode_line(np.full((1, 4), 16)), jsonl.encode_line(np.zeros((1, 3)))]
    (tmp_path / "a.jsonl").write_text(jsonl.encode_line(sentences[0]) + "".join(bad) + jsonl.encode_line(sentences[1]))
    source = open_any_source(str(tmp_path / "a.jsonl"), small, {"num_codes": 16, "grid": (2, 2)})
    assert [source.info(i).key for i in range(len(source))] == ["a.jsonl/1", "a.jsonl/6"]
    assert [source.info(i).num_frames for i in range(2)] == [3, 1]
    for index, codes in enumerate(sentences):
        scene = source.load_codes(index)
        assert scene.codes.dtype == np.uint16
        np.testing.assert_array_equal(scene.codes[:, 0], codes)
    assert [(failure.key, failure.reason) for failure in source.skipped] == [
        ("a.jsonl/2", "not {'tokens': base64}: 'tokens'"),
        ("a.jsonl/4", "codes are in [16, 16], expected [0, 16) (num_codes)"),
        ("a.jsonl/5", "3 tokens are not a multiple of 4 codes per image (grid)"),
    ]


def test_equal_lines_share_a_group_and_changed_lines_fail(tmp_path) -> None:
    line = jsonl.encode_line(np.zeros((2, 4)))
    path = tmp_path / "a.jsonl"
    path.write_text(line * 2)
    source = open_any_source(str(path), small, {"num_codes": 16, "grid": (2, 2)})
    assert source.info(0).group == source.info(1).group
    assert source.info(0).key != source.info(1).key
    path.write_text("x" * len(line) * 2)
    scene = source.load_codes(1)
    assert scene.codes.shape == (0, 1, 4)
    assert scene.failures[0].key == "a.jsonl/2"


def test_jsonl_is_not_an_image_source(tmp_path) -> None:
    (tmp_path / "a.jsonl").write_text(jsonl.encode_line(np.zeros((1, 256))))
    with pytest.raises(UserError, match="holds ready codes, not images"):
        open_source(str(tmp_path / "a.jsonl"), small)
    with pytest.raises(UserError, match="derived: streams are computed from images"):
        open_any_source(str(tmp_path / "a.jsonl"), small, {"derived": ("gray",)})
    (tmp_path / "a.jsonl").write_text("{}")
    with pytest.raises(UserError, match=r"no usable line of codes \(a\.jsonl/1: not"):
        len(open_any_source(str(tmp_path / "a.jsonl"), small))
