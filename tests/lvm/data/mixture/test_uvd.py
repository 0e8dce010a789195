"""configs/data_uvd_v1.py: every component has a recipe, a share and an origin; missing stores are reported together."""

import numpy as np
import pytest

from configs import data_uvd_v1
from lvm.common.config import from_config_dict
from lvm.common.errors import UserError
from lvm.data.mixture.mixture import Mixture
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
    for _, name, _ in data_uvd_v1.COMPONENTS:
        assert f"{name} (no store" in str(error.value)


def test_present_components_share_the_mixture(config, make_store):
    config.data.components.laion.store = make_store([(1, 0)] * 40)
    config.data.components.coco_segmentation.store = make_store([(1, 1)] * 40, "coco")
    config.data.allow_missing = True
    mixture = Mixture(from_config_dict(TrainConfig, config).data, 0)
    assert [component.name for component in mixture.components] == ["coco_segmentation", "laion"]
    assert sum(mixture.shares) == 1
    in_codes = mixture.shares * [16, 1]
    annotated = sum(family == "annotated_images" for family, *_ in data_uvd_v1.COMPONENTS)
    expected = np.array([0.072 / annotated, 0.885])
    np.testing.assert_allclose(in_codes / in_codes.sum(), expected / expected.sum(), rtol=1e-4)
