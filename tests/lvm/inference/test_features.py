"""Features of every layer, and their files."""

import json

import jax
import numpy as np
import pyarrow.parquet as pq
import pytest

from lvm import features as command
from lvm.common.errors import UserError
from lvm.data.store.reader import Store
from lvm.hardware.sharding import MeshConfig, make_mesh
from lvm.inference import pretrained
from lvm.inference.feature_files import FeatureWriter
from lvm.inference.pretrained import LVM
from lvm.interop import models
from tests.lvm.small_models import SMALL, small_model

SHAPES = [(3, 0), (1, 1), (2, 2), (1, 0), (4, 1), (1, 2)]


@pytest.fixture(scope="module")
def model():
    checkpoint = small_model()
    return LVM(checkpoint.config, SMALL, checkpoint.load_params(), {"tokenizer": None}, 7)


@pytest.fixture
def codes():
    return np.random.default_rng(0).integers(0, 16, (5, 4))


def test_features_are_the_hidden_states_of_each_layer(model, codes):
    both = model.features(codes, ("codes", "mean", "last"))
    states = both["codes"]  # [B, layers, N, D]
    assert states.shape == (5, 4, 4, 16)
    np.testing.assert_array_equal(states[:, 0], np.asarray(model._params["embedding"])[codes])
    np.testing.assert_allclose(both["mean"], states.mean(2), atol=1e-6)
    np.testing.assert_array_equal(both["last"], states[:, :, -1])
    # Logits are those of the last layer.
    scale, head = np.asarray(model._params["norm"]["scale"]), np.asarray(model._params["head"])
    last = states[:, -1]
    normed = last / np.sqrt((last**2).mean(-1, keepdims=True) + model.config.norm_epsilon) * scale
    tokens = np.pad(codes, ((0, 0), (1, 0)), constant_values=SMALL.bos)
    np.testing.assert_allclose(normed @ head, model.logits(tokens)[:, 1:], atol=1e-5)
    # Later layers alone depend on earlier codes, and none on later ones.
    other = codes.copy()
    other[:, 1] = (other[:, 1] + 1) % 16
    same = np.isclose(model.features(other, ("codes",))["codes"], states, atol=1e-7).all((0, 3))
    assert same.tolist() == [[True, False, True, True], *[[True, False, False, False]] * 3]


def test_features_of_a_second_copy_have_seen_the_image(model, codes):
    first, second = (model.features(codes, ("codes",), (0, 3), copies)["codes"] for copies in (1, 2))
    np.testing.assert_array_equal(second[:, 0], first[:, 0])
    twice = model.features(np.tile(codes, (1, 2)), ("codes",), (0, 3))["codes"]
    np.testing.assert_allclose(second, twice[:, :, 4:], atol=1e-6)
    other = codes.copy()
    other[:, -1] = (other[:, -1] + 1) % 16
    changed = model.features(other, ("codes",), (3,), 2)["codes"]
    assert not np.isclose(changed[:, 0, 0], second[:, 1, 0]).any(-1).all()


@pytest.mark.parametrize("mesh", [MeshConfig(data=4, fsdp=2), MeshConfig(data=2, fsdp=2, sequence=2)])
def test_features_do_not_depend_on_devices_or_batch(model, codes, mesh):
    sharded = LVM(model.config, SMALL, model._params, {}, 0, make_mesh(mesh))
    pools = ("mean", "last", "codes")
    expected, actual = model.features(codes, pools, copies=2), sharded.features(codes, pools, copies=2)
    alone = model.features(codes[3:4], pools, copies=2)
    for pool in pools:
        np.testing.assert_allclose(actual[pool], expected[pool], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(alone[pool][0], expected[pool][3], rtol=1e-5, atol=1e-5)


def test_random_params_are_a_function_of_the_seed(model, codes):
    first, same, other = (model.with_random_params(seed).features(codes)["mean"] for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, same)
    assert not np.isclose(first, other).any(-1).all()
    assert not np.isclose(first, model.features(codes)["mean"]).any(-1).all()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"pools": ("max",)}, "pools='max' must be some of mean, last, codes"),
        ({"layers": (0, 4)}, r"layers=0,4 must be from 0 \(the embedding\) to 3"),
        ({"copies": 8}, "copies=8 of 4 codes don't fit the context of 32; at least 1, at most 7"),
        ({"codes": [[1, 16, 2, 3]]}, "codes: ids from 1 to 16"),
    ],
)
def test_features_reject_what_the_model_lacks(model, codes, options, words):
    with pytest.raises(UserError, match=words):
        model.features(**{"codes": codes, **options})


def write(model, path, out, batch_size=4, pools=("mean", "codes"), dtype="float32", layers=(1, 3)):
    writer = FeatureWriter(model, Store(path), str(out), "rgb", pools, layers, 1, True, dtype, batch_size)
    writer.begin()
    writer.run_queue()
    writer.finish()
    return writer


def read(out, pool):
    return np.concatenate([np.load(path) for path in sorted(out.glob(f"*.{pool}.npy"))])


def test_feature_files_have_the_features_of_each_image(model, make_store, tmp_path):
    path, out = make_store(SHAPES, num_shards=3), tmp_path / "out"
    write(model, path, out)
    scenes = [Store(path).scene(i) for i in range(len(SHAPES))]
    codes = np.concatenate([scene.codes[:, scene.streams.index("rgb")] for scene in scenes]).astype(int)
    expected = model.features(codes, ("mean", "codes"), (1, 3))
    for pool, values in expected.items():
        np.testing.assert_allclose(read(out, pool), values, rtol=1e-5, atol=1e-6)
    assert (read(out, "histogram") == [np.bincount(grid, minlength=16) for grid in codes]).all()
    index = [row for file in sorted(out.glob("*.index.parquet")) for row in pq.read_table(file).to_pylist()]
    rows = [(scene.key, frame, scene.class_name, scene.group) for scene in scenes for frame in range(len(scene.codes))]
    assert [(row["key"], row["frame"], row["class"], row["group"]) for row in index] == rows
    manifest = json.loads((out / "features.json").read_text())
    assert (manifest["rows"], len(manifest["shards"]), manifest["layers"]) == (12, 3, [1, 3])
    assert manifest["arrays"] == {"mean": [2, 16], "codes": [2, 4, 16], "histogram": [16]}
    assert not [*out.glob(".*"), *out.glob("claims")]


def test_feature_files_of_a_stream_skip_other_scenes(model, make_store, tmp_path):
    path = make_store(SHAPES, num_shards=3)
    writer = FeatureWriter(model, Store(path), str(tmp_path / "out"), "edges", ("last",), None, 1, False, "float16", 4)
    writer.begin()
    writer.run(range(3))
    shapes = [np.load(file).shape for file in sorted((tmp_path / "out").glob("*.last.npy"))]
    assert shapes == [(0, 4, 16), (2, 4, 16), (1, 4, 16)]
    codes = Store(path).scene(2).codes[:, 0].astype(int)
    actual = np.load(tmp_path / "out" / "shard-00001-of-00003.last.npy")
    assert actual.dtype == np.float16
    np.testing.assert_allclose(actual, model.features(codes, ("last",))["last"], rtol=1e-3, atol=1e-3)


def test_feature_files_resume_and_refuse_other_settings(model, make_store, tmp_path):
    path, out = make_store(SHAPES, num_shards=3), tmp_path / "out"
    writer = write(model, path, out)
    before = {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in out.glob("*.npy")}
    (out / "shard-00001-of-00003.json").unlink()  # as if killed before the entry
    (out / ".shard-00001-of-00003.0.partial").mkdir()
    assert writer.missing(range(3)) == [1]
    write(model, path, out, batch_size=2)
    after = {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in out.glob("*.npy")}
    assert {name for name in before if before[name][1] != after[name][1]} == {
        f"shard-00001-of-00003.{array}.npy" for array in ("mean", "codes", "histogram")
    }
    assert not list(out.glob(".*.partial"))
    with pytest.raises(UserError, match="has features of another layers, arrays; choose a new folder for --out"):
        write(model, path, out, layers=(1,))
    other = model.with_params(jax.tree.map(lambda x: x + 1e-3, model._params), 7)
    with pytest.raises(UserError, match="has features of another model; choose a new folder for --out"):
        write(other, path, out)
    with pytest.raises(UserError, match="not empty and no folder of features"):
        write(model, path, tmp_path)


def test_weights_hash_is_that_of_the_values(model, monkeypatch):
    expected = model.weights_hash()
    sharded = LVM(model.config, SMALL, model._params, {}, 0, make_mesh(MeshConfig(fsdp=2, tensor=2)))
    monkeypatch.setattr(pretrained, "_HASHED_AT_ONCE", 100)  # a row or few at a time
    assert sharded.weights_hash() == model.weights_hash() == expected
    changed = dict(model._params, embedding=model._params["embedding"].at[-1, -1].add(1e-6))
    assert model.with_params(changed, 7).weights_hash() != expected


def test_feature_files_of_a_paused_process_are_done(model, make_store, tmp_path, monkeypatch):
    path, out = make_store(SHAPES, num_shards=3), tmp_path / "out"
    other = write(model, path, out)
    entry = out / "shard-00001-of-00003.json"
    before, index = entry.read_bytes(), FeatureWriter._index

    def paused(self, *arguments):
        entry.write_bytes(before)
        other.finish()
        return index(self, *arguments)

    entry.unlink()
    monkeypatch.setattr(FeatureWriter, "_index", paused)
    write(model, path, out)
    assert entry.read_bytes() == before


def test_feature_files_refuse_values_beyond_float16(model, make_store, tmp_path):
    large = model.with_params(jax.tree.map(lambda x: x * 1e6, model._params), 7)
    path = make_store(SHAPES)
    with pytest.raises(UserError, match=r"--dtype=float16: a feature is .*, beyond its range; use float32"):
        write(large, path, tmp_path / "out", dtype="float16")
    assert [file.name for file in (tmp_path / "out").iterdir() if file.name != "claims"] == ["header.json"]
    broken = model.with_params(jax.tree.map(lambda x: x * np.nan, model._params), 7)
    with pytest.raises(UserError, match="--model: hidden states of step 7 are NaN or infinite"):
        write(broken, path, tmp_path / "broken")


def test_features_command_shares_shards(make_store, tmp_path, capsys):
    models.write(tmp_path / "model", small_model(), "hf")
    arguments = [f"--model={tmp_path / 'model'}", f"--store={make_store(SHAPES, num_shards=3)}"]
    arguments += [f"--out={tmp_path / 'out'}", "--pools=last", "--layers=0,3", "--batch_size=1"]
    assert command.main([*arguments, "--shard=0/2"]) == 0
    assert len(list((tmp_path / "out").glob("*.last.npy"))) == 1
    assert not (tmp_path / "out" / "features.json").exists()
    assert command.main(arguments) == 0
    assert read(tmp_path / "out", "last").shape == (12, 2, 16)
    assert json.loads((tmp_path / "out" / "features.json").read_text())["rows"] == 12
    for wrong, words in (("--layers=x", "--layers=x must be numbers"), ("--stream=depth", "--stream=depth: ")):
        assert command.main([*arguments, wrong]) == 2
        assert words in capsys.readouterr().err
