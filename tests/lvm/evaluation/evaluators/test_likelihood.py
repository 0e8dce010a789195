"""Weights of the mixture's loss, and the entropy that videos are compared with."""

import types

import numpy as np
import pytest

from lvm.data.images.sources.scene import SceneInfo
from lvm.data.mixture.mixture import ComponentConfig, MixtureConfig
from lvm.data.mixture.recipes import Category, Pairs, Single, Video
from lvm.data.store.reader import Store
from lvm.evaluation import baselines
from lvm.evaluation.evaluators.likelihood import Likelihood, _video_figures
from lvm.evaluation.heldout import HeldoutScene
from tests.lvm.evaluation.test_likelihood import ALTERNATING, Bigram, K


def originals(count, grids):
    """A different one for each grid."""
    return np.arange(count * grids, dtype=np.uint64).reshape(count, grids)


def by_name(figures):
    return {figure.name: figure for figure in figures}


@pytest.mark.parametrize(("weigh_by", "share"), [("codes", 0.75), ("sentences", 3 / (3 + 4))])
def test_likelihood_weighs_components_as_training_does(make_context, weigh_by, share):
    """A code is weighed as often as training shows it: a sentence of pairs has four grids."""
    components = {
        "single": ComponentConfig(Single(), 3.0),
        "pairs": ComponentConfig(Pairs(target="edges", shots=2), 1.0),
    }
    grids = {name: component.recipe.num_grids for name, component in components.items()}
    rng = np.random.default_rng(0)
    context = make_context([], {}, mixture=MixtureConfig(components, weigh_by=weigh_by))
    context.model = Bigram()
    codes = {name: rng.integers(0, K, (8, count, 4)) for name, count in grids.items()}
    context.sentence_cache[8, "None"] = {name: (x, originals(*x.shape[:2])) for name, x in codes.items()}
    figures = by_name(Likelihood(num_sentences=8).run(context)[0])
    losses = [figures[f"loss/{name}"].estimate.value for name in components]
    assert figures["loss"].estimate.value == pytest.approx(np.average(losses, weights=[share, 1 - share]))
    assert figures["loss/pairs"].estimate.interval[0] < losses[1] < figures["loss/pairs"].estimate.interval[1]


def test_likelihood_counts_answers_alone_as_training_does(make_context):
    components = {
        "pairs": ComponentConfig(Pairs(shots=2), 1.0),
        "category": ComponentConfig(Category(images=3), 2.0),
    }
    context = make_context([], {}, mixture=MixtureConfig(components, weigh_by="codes", loss="answers"))
    grids = {"pairs": [9.0, 1.0, 9.0, 2.0], "category": [9.0, 3.0, 4.0]}  # loss of each grid
    losses = {name: np.tile(np.array(values)[:, None], (8, 1, 4)) for name, values in grids.items()}
    context.cache["losses", 8, "None"] = losses
    context.sentence_cache[8, "None"] = {
        name: (np.zeros(x.shape, int), originals(*x.shape[:2])) for name, x in losses.items()
    }
    figures = by_name(Likelihood(num_sentences=8).run(context)[0])
    assert figures["loss/pairs"].estimate.value == 1.5
    assert figures["loss/category"].estimate.value == 3.5
    # Of the codes of pairs a half are answers, of those of categories two thirds.
    assert figures["loss"].estimate.value == pytest.approx((1 * 1.5 / 2 + 2 * 3.5 * 2 / 3) / (1 / 2 + 4 / 3))


@pytest.mark.parametrize(("strides", "entropy"), [((1, 2), np.log(2)), ((2, 1), np.log(2)), ((2,), 0.0)])
def test_conditional_entropy_is_at_the_smallest_stride(make_context, strides, entropy, caplog):
    images, info = np.zeros((6, 1, 1, 1, 3), np.uint8), SceneInfo("", "", "", 6, ("rgb",))
    scenes = [HeldoutScene(info, images, codes[:, None]) for codes in ALTERNATING]
    recipe = Video(frames=3, strides=strides)
    context = make_context(scenes, {}, mixture=MixtureConfig({"clips": ComponentConfig(recipe)}, ("/no/store",)))
    figures = by_name(_video_figures(context, "clips", recipe, np.ones((2, 3, 1)), originals(2, 3)))
    plug_in = figures["video_loss/clips"].baselines["its plug-in estimate"].value
    assert plug_in == pytest.approx(entropy, abs=1e-12)
    assert "/no/store: not the training store" in caplog.text


def test_training_stores_named_from_another_folder(make_store, tmp_path, monkeypatch):
    store = Store(make_store([(3, 0), (4, 1), (1, 0)]))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    record = {"folder": str(tmp_path), "stores": [store.identity()]}
    context = types.SimpleNamespace(model=types.SimpleNamespace(record=record), mixture=MixtureConfig())
    for path in ("store", "../store", str(tmp_path / "store")):
        (opened,) = baselines.training_stores(context, [path])
        assert [len(video) for video in opened.videos("rgb", 3, 9)] == [3, 4]
    record["stores"] = ["another"]
    assert baselines.training_stores(context, ["store"]) == []
