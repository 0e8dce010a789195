"""`lvm evaluate`: weights of the mixture's loss, and stores that were named relative to another folder."""

import numpy as np
import pytest

from lvm import evaluate
from lvm.data.mixture.mixture import ComponentConfig, MixtureConfig
from lvm.data.mixture.recipes import Pairs, Single, Video
from lvm.data.store.reader import Store
from tests.lvm.evaluation.test_likelihood import Bigram, K


@pytest.mark.parametrize(("weigh_by", "share"), [("codes", 0.75), ("sentences", 3 / (3 + 4))])
def test_mixture_loss_weighs_components_as_training_does(weigh_by, share):
    """A code is weighed as often as training shows it: a sentence of pairs has four grids."""
    components = {
        "single": ComponentConfig(Single(), 3.0),
        "pairs": ComponentConfig(Pairs(target="edges", shots=2), 1.0),
    }
    grids = {name: component.recipe.num_grids for name, component in components.items()}
    rng = np.random.default_rng(0)
    sentences = {name: rng.integers(0, K, (8, count, 4)) for name, count in grids.items()}
    mixture = MixtureConfig(components, weigh_by=weigh_by)
    metrics = evaluate._likelihood(Bigram(), mixture, None, sentences)["mixture"]
    expected = np.average(list(metrics["by_component"].values()), weights=[share, 1 - share])
    assert metrics["by_component"].keys() == components.keys()
    assert metrics["loss"] == pytest.approx(expected)


def test_videos_of_store_named_from_another_folder(make_store, tmp_path, monkeypatch, caplog):
    store = Store(make_store([(3, 0), (4, 1), (1, 0)]))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    record = {"folder": str(tmp_path), "stores": [store.identity()]}
    for path in ("store", "../store", str(tmp_path / "store")):
        videos = evaluate._videos(Video(frames=3, strides=(1,)), [path], None, record)
        assert [len(video) for video in videos] == [3, 4]
    assert "not the training store" not in caplog.text
