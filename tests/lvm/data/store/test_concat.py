"""Components of several stores: the same sentences as from one store with all scenes, and refused combinations."""

import dataclasses
import itertools
import pathlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lvm.common.errors import UserError
from lvm.data.mixture.mixture import ComponentConfig, Mixture, MixtureConfig
from lvm.data.mixture.recipes import Category, Pairs, Single, Video
from lvm.data.store import writer
from lvm.data.store.concat import ConcatStore
from lvm.data.store.jsonl import JsonlFormat, encode_line
from lvm.data.store.reader import Store
from tests.lvm.conftest import NUM_CODES, header, make_scenes

COMPONENTS = {
    "category": Category(images=2),
    "pairs": Pairs(shots=1),
    "single": Single(),
    "video": Video(frames=2, strides=(1,)),
}
SHAPES = [(1, 0), (3, 0), (1, 1), (2, 1), (1, 0), (1, 1)] * 8
JSONL = JsonlFormat(NUM_CODES, (2, 2))


def components(*stores):
    return {name: ComponentConfig(recipe, store=tuple(stores)) for name, recipe in COMPONENTS.items()}


def write_store(folder, *shards):
    """Writes a store of these shards' scenes; returns its path."""
    folder.mkdir()
    for number, scenes in enumerate(shards):
        skipped = writer.SkippedItems(groups=[0, 2**64 - 1])
        writer.write_shard(folder, number, len(shards), scenes, NUM_CODES, skipped)
    assert not writer.write_manifest(folder, header(), len(shards))
    return str(folder)


@settings(max_examples=5)
@given(cut=st.integers(1, len(SHAPES) - 1), split=st.sampled_from(["train", "heldout"]))
def test_parts_give_the_sentences_of_the_whole(tmp_path_factory, cut, split):
    folder, scenes = tmp_path_factory.mktemp("parts"), make_scenes(SHAPES)
    whole = write_store(folder / "whole", scenes[:cut], scenes[cut:])
    parts = [write_store(folder / "a", scenes[:cut]), write_store(folder / "b", scenes[cut:])]
    expected = Mixture(MixtureConfig(components(whole), (), 0.3), 0, split)
    mixture = Mixture(MixtureConfig(components(*parts), (), 0.3), 0, split)
    for component, reference in zip(mixture.components, expected.components, strict=True):
        indices = np.arange(2 * reference.sentences_per_epoch)
        np.testing.assert_array_equal(component.sentences(indices), reference.sentences(indices))
        groups = [[scenes[i].group for i in grids] for grids in reference.select_grids(indices)[0]]
        assert component.groups(indices).tolist() == reference.groups(indices).tolist() == groups
        assert component.num_scenes == reference.num_scenes > 0
        assert component.num_excluded == reference.num_excluded
        assert component.scenes_per_group == reference.scenes_per_group


def test_order_of_stores_is_part_of_the_identity(make_store):
    parts = [make_store(make_scenes(SHAPES, seed=seed), f"part{seed}") for seed in range(2)]
    identities = {Mixture(MixtureConfig(components(*order)), 0).identity() for order in (parts, parts[::-1])}
    assert len(identities) == 2
    mixture = Mixture(MixtureConfig(components(*parts)), 0)
    assert sorted(store.identity() for store in mixture.stores) == sorted(Store(path).identity() for path in parts)


def test_default_stores_of_a_mixture_are_read_as_one(make_store):
    parts = tuple(make_store(make_scenes(SHAPES, seed=seed), f"part{seed}") for seed in range(2))
    mixture = Mixture(MixtureConfig({"single": ComponentConfig(Single())}, parts, 0.0), 0)
    assert mixture.components[0].sentences_per_epoch == 2 * len(SHAPES)


def test_jsonl_files_are_read_as_one(tmp_path):
    rng, grids = np.random.default_rng(0), {}
    for name in ("a", "b"):
        grids[name] = rng.integers(0, NUM_CODES, (20, 2, 4))
        (tmp_path / f"{name}.jsonl").write_text("".join(encode_line(codes) for codes in grids[name]))
    paths = tuple(str(tmp_path / f"{name}.jsonl") for name in grids)
    config = MixtureConfig({"lines": ComponentConfig(Video(frames=2, strides=(1,)))}, paths, 0.0, jsonl=JSONL)
    component = Mixture(config, 0).components[0]
    assert sorted(component.sentence(i).tolist() for i in range(40)) == sorted(
        np.concatenate([*grids.values()]).tolist()
    )


def test_stores_and_jsonl_files_do_not_mix(make_store, tmp_path):
    (tmp_path / "a.jsonl").write_text(encode_line(np.zeros((1, 4), int)))
    config = MixtureConfig({"single": ComponentConfig(Single())}, (make_store(SHAPES), str(tmp_path / "a.jsonl")))
    with pytest.raises(UserError, match="components of their own"):
        Mixture(dataclasses.replace(config, jsonl=JSONL), 0)


def test_damage_is_named_with_the_rows_that_need_it(make_store):
    scenes = [make_scenes([(2, 0), (3, 0)], seed=seed) for seed in range(2)]
    folders = [make_store(part, f"part{seed}") for seed, part in enumerate(scenes)]
    damaged = scenes[1][1].codes[2, 0].tobytes()
    (file,) = (path for path in pathlib.Path(folders[1]).glob("*.codes") if damaged in path.read_bytes())
    file.write_bytes(file.read_bytes().replace(damaged, damaged[::-1]))
    store = ConcatStore([Store(folder) for folder in folders])
    reads = store.reads(store.entries(np.array([3, 1, 3, 0, 3])), np.array([2, 2, 1, 0, 2]), np.zeros(5, np.int64))
    assert not reads.start()
    codes, damages = reads.finish()
    (message,) = damages
    assert message == f"{file}, scene 'scene 1' frame 2: damaged: checksum mismatch"
    assert damages[message].tolist() == [0, 4]
    expected = [scenes[0][1].codes[2, 0], scenes[1][1].codes[1, 0], scenes[0][0].codes[0, 0]]
    np.testing.assert_array_equal(codes[1:4], expected)


def test_missing_part_is_named(make_store, tmp_path):
    paths = (make_store(SHAPES), str(tmp_path / "gone"))
    with pytest.raises(UserError, match=r"single \(.*gone doesn't exist"):
        Mixture(MixtureConfig({"single": ComponentConfig(Single())}, paths), 0)


def test_part_named_twice_is_refused(make_store):
    path = make_store(SHAPES)
    with pytest.raises(UserError, match="is named twice"):
        Mixture(MixtureConfig({"single": ComponentConfig(Single())}, (path, path)), 0)


def test_parts_of_a_tuned_decoder_are_read_as_one(make_store):
    """In any order, beside one of an earlier version, which the tokenizer before tuning wrote."""
    identities = {"old": {"weights": "a" * 64}, "new": {"weights": "a" * 64, "codes": "c"},
                  "tuned": {"weights": "b" * 64, "codes": "c"}}  # fmt: skip
    for number, order in enumerate(itertools.permutations(identities)):
        paths = tuple(make_store(SHAPES, f"{number}/{i}", **identities[name]) for i, name in enumerate(order))
        mixture = Mixture(MixtureConfig({"a": ComponentConfig(Single())}, paths), 0)
        assert mixture.tokenizer["codes"] == "c"
    half = Mixture(MixtureConfig({"a": ComponentConfig(Single())}, paths[:1]), 0)
    assert mixture.components[0].num_scenes == 3 * half.components[0].num_scenes


def test_parts_of_other_tokenizers_are_refused(make_store):
    paths = (make_store(SHAPES), make_store(SHAPES, "other", weights="b" * 64))
    with pytest.raises(UserError, match="different tokenizers"):
        Mixture(MixtureConfig({"single": ComponentConfig(Single())}, paths), 0)


@pytest.mark.parametrize("config", [MixtureConfig, lambda **fields: ComponentConfig(Single(), **fields)])
def test_string_instead_of_stores_is_refused(config):
    with pytest.raises(UserError, match=r"store='runs/store' must be a tuple; a tuple of one is \('runs/store',\)"):
        config(store="runs/store")
