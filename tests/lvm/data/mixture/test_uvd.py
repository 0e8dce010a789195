"""configs/data_uvd_v1.py: every component has a recipe, a share and an origin; missing stores are reported together."""

import dataclasses

import numpy as np
import pytest

from configs import data_uvd_v1
from lvm.common.config import from_config_dict
from lvm.common.errors import UserError
from lvm.data.mixture.mixture import BLOCK, Mixture
from lvm.data.mixture.rows import Rows
from lvm.data.mixture.split import group_hash
from lvm.data.store import writer
from lvm.data.store.format import Scene
from lvm.data.streams.codecs import Image
from lvm.model.vocabulary import Vocabulary
from lvm.training.config import TrainConfig


@pytest.fixture
def config():
    return data_uvd_v1.get_config()


def test_families_have_the_papers_shares(config):
    data = from_config_dict(TrainConfig, config).data
    assert data.weigh_by == "codes"
    weights = dict.fromkeys(data_uvd_v1.SHARES, 0.0)
    for family, name, recipe in data_uvd_v1.COMPONENTS:
        weights[family] += data.components[name].weight
        assert data.components[name].recipe == recipe
    assert weights == pytest.approx(data_uvd_v1.SHARES)
    assert sum(weights.values()) == pytest.approx(1, abs=1e-3)
    assert len(data.components) == len(data_uvd_v1.COMPONENTS)
    assert all(data_uvd_v1.COMPONENTS.values())


def test_missing_stores_are_all_named(config):
    with pytest.raises(UserError) as error:
        Mixture(from_config_dict(TrainConfig, config).data, 0)
    names = ", ".join(sorted(name for _, name, _ in data_uvd_v1.COMPONENTS))
    assert f"missing: {names} (no store" in str(error.value)


def test_present_components_share_the_mixture(config, make_store):
    config.data.components.laion.store = (make_store([(1, 0)] * 40),)
    config.data.components.coco_segmentation.store = (make_store([(1, 1)] * 40, "coco"),)
    config.data.allow_missing = True
    mixture = Mixture(from_config_dict(TrainConfig, config).data, 0)
    assert [component.name for component in mixture.components] == ["coco_segmentation", "laion"]
    assert sum(mixture.shares) == 1
    in_codes = mixture.shares * [16, 1]
    annotated = sum(family == "annotated_images" for family, *_ in data_uvd_v1.COMPONENTS)
    expected = np.array([0.072 / annotated, 0.885])
    np.testing.assert_allclose(in_codes / in_codes.sum(), expected / expected.sum(), rtol=1e-4)


@pytest.fixture
def tiny_stores(tmp_path):
    """Component → the path of a store with scenes for its recipe: 4 codes an image, 16 codes."""
    rng, paths = np.random.default_rng(0), {}
    for _, name, recipe in data_uvd_v1.COMPONENTS:
        (tmp_path / name).mkdir()
        shape = (max(recipe.min_frames, 1), len(recipe.streams), 4)
        scenes = [
            Scene(f"{i}", "cat", recipe.streams, rng.integers(0, 16, shape, dtype=np.uint16), group_hash(f"{name} {i}"))
            for i in range(max(2 * recipe.num_scenes, 32))  # an epoch of few sentences would cost most of the time
        ]
        writer.write_shard(tmp_path / name, 0, 1, scenes, 16)
        header = {
            "tokenizer": {"weights": "a", "hash": "a", "grid": [2, 2], "num_codes": 16},
            "streams": {stream: Image().to_json() for stream in recipe.streams},
        }
        assert not writer.write_manifest(tmp_path / name, header, 1)
        paths[name] = str(tmp_path / name)
    return paths


@pytest.mark.parametrize("packing", ["concat", "whole"])
def test_paper_mixture_makes_batches(config, tiny_stores, packing):
    for name, path in tiny_stores.items():
        config.data.components[name].store = (path,)
        config.data.components[name].max_repetitions = 0.0
    data = dataclasses.replace(from_config_dict(TrainConfig, config).data, packing=packing, heldout_fraction=0.0)
    mixture = Mixture(data, 0)
    assert len(mixture.components) == 33
    rows = Rows(mixture, Vocabulary.for_codes(16), context=100, batch_size=16)
    tokens = np.zeros(33)
    for step in range(201):
        ids = rows.batch(step)["component_ids"]
        tokens += np.bincount(ids[ids >= 0], minlength=33)
    names = [component.name for component in mixture.components]
    assert tokens[names.index("laion")] / tokens.sum() > 0.8


def test_paper_mixture_reads_each_sentence_once_an_epoch(config, tiny_stores):
    for name, path in tiny_stores.items():
        config.data.components[name].store = (path,)
    mixture = Mixture(from_config_dict(TrainConfig, config).data, 0)
    sentences = [set() for _ in mixture.components]
    last = 400
    for block in range(last):
        for component, index in zip(*(ids.tolist() for ids in mixture.block(block)), strict=True):
            assert index not in sentences[component]
            sentences[component].add(index)
    assert [len(indices) for indices in sentences] == mixture.sentences_before(last)
    assert all(indices == set(range(len(indices))) for indices in sentences)
    assert sum(map(len, sentences)) == last * BLOCK
