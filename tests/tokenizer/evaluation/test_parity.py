"""FID and LPIPS against torch-fidelity and the lpips package, with random weights in files that both read.

`make test-parity` has neither: both need torchvision, which other packages of the environment would begin to use. With
`pip install torch-fidelity lpips` in it they are compared; without, features are compared with recorded ones.
"""

import importlib

import jax
import numpy as np
import pytest

from tests.tokenizer.evaluation.inception_weights import images, random_tensors
from tokenizer.evaluation import inception
from tokenizer.evaluation.fid import FeatureStatistics, frechet_distance
from tokenizer.perceptual.lpips import LPIPS

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.parity


@pytest.fixture
def load_package(monkeypatch):
    """Imports a package that imports torchvision, which asks a CPU build of torch for operators that it lacks."""
    register = torch.library.register_fake

    def register_if_known(name, *arguments, **options):
        decorate = register(name, *arguments, **options)

        def decorate_if_known(function):
            try:
                return decorate(function)
            except RuntimeError:
                return function

        return decorate_if_known

    monkeypatch.setattr(torch.library, "register_fake", register_if_known)

    def load(package, module):
        pytest.importorskip(package)
        return importlib.import_module(module)

    return load


@pytest.fixture(scope="module")
def features():
    params = inception.to_params(random_tensors())
    return np.asarray(jax.jit(inception.features)(params, images(4)))


def test_features_equal_recorded_of_torch_fidelity(features):
    """Of torch-fidelity 0.4.0, the first five of the first two images, whose size it doesn't change."""
    recorded = [
        [19.584099, 17.829088, 6.734192, 0.9930545, 2.595934],
        [19.606707, 17.899055, 6.917983, 1.0944734, 2.4088168],
    ]
    np.testing.assert_allclose(features[:2, :5], recorded, rtol=1e-5)


def test_features_and_fid_equal_torch_fidelity(features, load_package, tmp_path):
    network = load_package("torch_fidelity", "torch_fidelity.feature_extractor_inceptionv3")
    metric = load_package("torch_fidelity", "torch_fidelity.metric_fid")
    tensors = {name: torch.from_numpy(x) for name, x in random_tensors().items()}
    tensors |= {"fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}
    path = str(tmp_path / "inception.pth")
    torch.save(tensors, path)
    extractor = network.FeatureExtractorInceptionV3("features", ["2048"], feature_extractor_weights_path=path)
    expected = extractor(torch.from_numpy(images(4).transpose(0, 3, 1, 2)))[0].numpy()
    np.testing.assert_allclose(features, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())
    loaded = inception.load(path, "--inception_weights")
    np.testing.assert_array_equal(
        loaded["Mixed_7c"]["branch_pool"]["bn"]["bias"], tensors["Mixed_7c.branch_pool.bn.bias"]
    )
    a, b = np.random.default_rng(0).standard_normal((2, 300, 40)) * [[[1]], [[1.5]]]
    statistics = [FeatureStatistics(40), FeatureStatistics(40)]
    for each, x in zip(statistics, (a, b), strict=True):
        each.add(x)
    theirs = [metric.fid_features_to_statistics(torch.from_numpy(x)) for x in (a, b)]
    expected = metric.fid_statistics_to_metric(*theirs, verbose=False)[metric.KEY_METRIC_FID]
    assert frechet_distance(*statistics) == pytest.approx(expected, rel=1e-9)


def test_lpips_equals_the_lpips_package(load_package, tmp_path):
    module = load_package("lpips", "lpips").LPIPS(net="vgg", pnet_rand=True, verbose=False)  # with its published heads
    state = module.state_dict()
    names = {name: f"features.{name.split('.')[2]}.{name.split('.')[3]}" for name in state if name.startswith("net.")}
    torch.save({ours: state[theirs] for theirs, ours in names.items()}, tmp_path / "vgg.pth")
    torch.save({name: x for name, x in state.items() if name.startswith("lin")}, tmp_path / "heads.pth")
    network = LPIPS(weights=str(tmp_path / "vgg.pth"), heads=str(tmp_path / "heads.pth"))
    a, b = np.random.default_rng(0).random((2, 3, 64, 64, 3), np.float32)
    expected = module(*(torch.from_numpy(x.transpose(0, 3, 1, 2)) for x in (a, b)), normalize=True).detach().numpy()
    distances = jax.jit(lambda *x: network.distances(*x, "float32"))(network.load(), a, b)
    np.testing.assert_allclose(distances, expected.ravel(), rtol=1e-4)
