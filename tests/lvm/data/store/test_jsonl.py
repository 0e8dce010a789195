"""JSONL in LVM's format: as training data, and as an export."""

import base64
import json
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lvm.common.errors import UserError
from lvm.data.mixture.mixture import ComponentConfig, Mixture, MixtureConfig
from lvm.data.mixture.recipes import Single, Video
from lvm.data.mixture.rows import Rows
from lvm.data.mixture.split import heldout_mask
from lvm.data.store.jsonl import JsonlFormat, JsonlStore, decode_line, encode_line
from lvm.export import iter_sentences
from lvm.model.vocabulary import Vocabulary
from tests.commands import run

SMALL = JsonlFormat(num_codes=16, grid=(2, 2))


def write(path, lengths, end="\n"):
    """Writes sentences of `lengths` grids to a file; returns them."""
    rng = np.random.default_rng(0)
    sentences = [rng.integers(0, 16, (length, 4)) for length in lengths]
    path.write_text("".join(encode_line(codes) for codes in sentences).rstrip("\n") + end)
    return sentences


@given(st.lists(st.integers(0, 2**16 - 1), min_size=1))
def test_decode_line_inverts_encode_line(codes):
    line = encode_line(np.array([codes]))
    assert decode_line(line.encode()).tolist() == codes
    # The format is base64 of little-endian int32.
    assert base64.b64decode(json.loads(line)["tokens"]) == np.array(codes, "<i4").tobytes()


@pytest.mark.parametrize("end", ["\n", "", "\n\n"])
def test_video_recipe_reproduces_the_lines(tmp_path, end):
    lines = write(tmp_path / "a.jsonl", [3] * 20, end)
    sources = {"lines": ComponentConfig(Video(frames=3, strides=(1,)))}
    mixture = Mixture(MixtureConfig(sources, (str(tmp_path / "a.jsonl"),), 0.0, jsonl=SMALL), 0)
    component = mixture.components[0]
    assert component.sentences_per_epoch == 20
    sentences = sorted(component.sentence(i).tolist() for i in range(20))
    assert sentences == sorted(codes.tolist() for codes in lines)
    batch = Rows(mixture, Vocabulary.for_codes(16), 24, 3).batch(2)
    assert batch["tokens"].max() == 17


def test_recipes_read_lines_of_any_length(tmp_path):
    lines = write(tmp_path / "a.jsonl", [1, 2, 5, 3])
    path = str(tmp_path / "a.jsonl")
    video = ComponentConfig(Video(frames=3, strides=(1,)))
    component = Mixture(MixtureConfig({"video": video}, (path,), 0.0, jsonl=SMALL), 0).components[0]
    assert (component.sentences_per_epoch, component.num_excluded) == (2, 2)
    singles = Mixture(MixtureConfig({"single": ComponentConfig(Single())}, (path,), 0.0, jsonl=SMALL), 0)
    grids = {grid.tobytes() for codes in lines for grid in codes.astype(np.int32)}
    assert {singles.components[0].sentence(n).tobytes() for n in range(40)} <= grids


def test_index_is_built_once_per_file_content(tmp_path, caplog):
    path = tmp_path / "a.jsonl"
    write(path, [3] * 4)
    first = JsonlStore(path, SMALL)
    assert "scanning it once" in caplog.text
    caplog.clear()
    copy = pickle.loads(pickle.dumps(first))
    assert caplog.text == ""
    assert copy.identity() == first.identity()
    write(path, [3] * 5)
    other = JsonlStore(path, SMALL)
    assert (len(first), len(other)) == (4, 5)
    assert other.identity() != first.identity()
    (tmp_path / "a.jsonl.index.json").write_bytes(b"\0" * 30)
    assert JsonlStore(path, SMALL).identity() == other.identity()


def test_equal_lines_are_in_one_split(tmp_path):
    path = tmp_path / "a.jsonl"
    write(path, [1] * 30)
    path.write_text(path.read_text() * 2)
    store = JsonlStore(path, SMALL)
    mask = heldout_mask(store.indexes[0]["group"], 0.5, store.group_hashes)
    np.testing.assert_array_equal(mask[:30], mask[30:])
    assert 0 < mask.sum() < 60
    np.testing.assert_array_equal(store.groups(np.array([3, 33])), store.indexes[0]["group"][3:4].repeat(2))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "sentence 2: not {'tokens': base64}"),
        ('{"text": "a"}', "sentence 2: not {'tokens': base64}"),
        ('{"tokens": "****"}', "sentence 2: not {'tokens': base64}"),
        ('{"tokens": ""}', "sentence 2: 0 tokens are not a multiple of 4 codes"),
        (encode_line(np.zeros((1, 5))), "sentence 2: 5 tokens"),
        (encode_line(np.full((1, 4), 16)), r"sentence 2: codes are in \[16, 16\], expected \[0, 16\)"),
        (encode_line(np.full((1, 4), -1)), r"sentence 2: codes are in \[-1, -1\]"),
    ],
)
def test_bad_line_is_rejected_with_file_and_line(tmp_path, line, message):
    path = tmp_path / "a.jsonl"
    path.write_text(encode_line(np.zeros((1, 4))) + line)
    with pytest.raises(UserError, match=rf"a\.jsonl, {message}"):
        JsonlStore(path, SMALL)


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"num_codes": 0}, "^num_codes=0"), ({"grid": (4,)}, "^grid="), ({"grid": (0, 4)}, "^grid=")],
)
def test_jsonl_format_rejects_impossible_values(fields, message):
    with pytest.raises(UserError, match=message):
        JsonlFormat(**fields)


def test_mixture_rejects_an_empty_file(tmp_path):
    (tmp_path / "a.jsonl").write_text("")
    with pytest.raises(UserError, match=r"lines \(.* has no scene of ≥ 1 frames of rgb"):
        Mixture(MixtureConfig({"lines": ComponentConfig(Single())}, (str(tmp_path / "a.jsonl"),), jsonl=SMALL), 0)


def test_mixture_rejects_stores_of_two_codebooks(tmp_path, make_store):
    write(tmp_path / "a.jsonl", [1] * 9)
    sources = {
        "lines": ComponentConfig(Single(), store=(str(tmp_path / "a.jsonl"),)),
        "ours": ComponentConfig(Single(), store=(make_store([(1, 0)] * 9),)),
    }
    assert len(Mixture(MixtureConfig(sources, jsonl=SMALL), 0).components) == 2
    (tmp_path / "a.jsonl").write_text(encode_line(np.zeros((1, 4))))
    with pytest.raises(UserError, match=r"different tokenizers .*a\.jsonl: unknown, grid 2×2, 15 codes"):
        Mixture(MixtureConfig(sources, jsonl=JsonlFormat(15, (2, 2))), 0)


def test_export_writes_the_training_order(make_store, tmp_path):
    store = make_store([(4, 0)] * 20)
    out = tmp_path / "out.jsonl"
    off = [f"--config.data.components.{name}.weight=0" for name in ("segmentation", "depth", "edges")]
    flags = ("--config=tests/configs/tiny_lvm.py", f"--config.data.store={store}", *off)
    run("lvm.export", *flags, f"--out={out}", "--sentences=300")
    sources = {"video": ComponentConfig(Video(frames=4, strides=(1,)), 0.4)}
    expected = iter_sentences(Mixture(MixtureConfig(sources, (store,), heldout_fraction=0.25), 0))
    lines = out.read_bytes().splitlines()
    assert len(lines) == 300
    for line in lines:
        assert decode_line(line).tolist() == next(expected).ravel().tolist()
    assert "--out=out.txt must end in .jsonl" in run("lvm.export", *flags, "--out=out.txt", code=2)
