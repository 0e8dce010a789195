"""The report: figures against their definitions, side by side, and inputs that it refuses."""

import io
import json

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from lvm.data.images.sources import open_source
from tests.tokenizer.networks import random_weights, small
from tokenizer import Tokenizer, report, weights
from tokenizer.evaluation import inception
from tokenizer.evaluation.fid import FeatureStatistics, frechet_distance

SIDE, NUM_SCENES = 16, 11
SOURCE = """
from ml_collections import ConfigDict


def get_config():
    return ConfigDict({"kind": "generated", "num_scenes": 11, "num_frames": 1, "streams": ("rgb", "depth")})
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A source of two streams, two tokenizers, and files that stand for weights."""
    folder = tmp_path_factory.mktemp("report")
    (folder / "source.py").write_text(SOURCE)
    (folder / "inception.pth").write_bytes(b"read by mean_features")
    sizes = {"encoder_blocks": 1, "decoder_blocks": 1, "middle_blocks": 1, "channel_multipliers": (1,)}
    for seed, name in enumerate(("first", "second")):
        config = small("maskgit", resolution=SIDE, codebook_size=64, **sizes)
        weights.write(folder / name, random_weights(config, seed), "torch")
    return folder


@pytest.fixture
def mean_features(monkeypatch):
    """Features that are quick: mean, deviation and corner of each channel."""

    def features(params, images):
        x = images.astype(jnp.float32)
        return jnp.concatenate([x.mean((1, 2)), x.std((1, 2)), x[:, 0, 0]], -1) * params["scale"]

    monkeypatch.setattr(inception, "features", features)
    monkeypatch.setattr(inception, "NUM_FEATURES", 9)
    monkeypatch.setattr(inception, "load", lambda path, key: {"scale": jnp.ones(())})


def make_report(folder, out, *flags):
    arguments = [f"--tokenizer={folder / 'first'}", f"--source={folder / 'source.py'}", f"--out={out}"]
    arguments += [f"--inception_weights={folder / 'inception.pth'}", "--batch_size=1", "--workers=0", "--examples=3"]
    assert report.main([*arguments, *flags]) == 0
    return json.loads((out / "report.json").read_text())


def images_of(folder, stream):
    source = open_source(str(folder / "source.py"), Tokenizer.load(folder / "first").preprocess)
    index = source.info(0).streams.index(stream)
    return np.stack([source.load(i).images[0, index] for i in range(NUM_SCENES)])


def test_report_figures_by_definition(folder, tmp_path, mean_features, monkeypatch):
    load, loaded = FeatureStatistics.load, []
    monkeypatch.setattr(FeatureStatistics, "load", lambda path: loaded.append(path) or load(path))
    results = make_report(folder, tmp_path / "out", f"--compare={folder / 'second'}")
    figures = {name: of["first"]["value"] for name, of in results["figures"].items()}
    tokenizer, rough = (Tokenizer.load(folder / "first", dtype) for dtype in ("float32", "bfloat16"))
    images = np.concatenate([images_of(folder, "rgb"), images_of(folder, "depth")])
    codes = tokenizer.encode(images)
    decoded = tokenizer.decode(codes)
    pairs = list(zip(images, decoded, strict=True))
    options = {"channel_axis": -1, "gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    psnr = np.array([peak_signal_noise_ratio(image, other) for image, other in pairs])
    ssim = [structural_similarity(image, other, data_range=255, **options) for image, other in pairs]
    for i, stream in enumerate(("rgb", "depth")):
        rows = slice(i * NUM_SCENES, (i + 1) * NUM_SCENES)
        assert figures[f"psnr/{stream}"] == pytest.approx(np.mean(psnr[rows]), abs=1e-3)
        assert figures[f"ssim/{stream}"] == pytest.approx(np.mean(ssim[rows]), abs=1e-4)
        assert figures[f"codebook_usage/{stream}"] == len(np.unique(codes[rows])) / 64
    assert figures["codebook_usage"] == len(np.unique(codes)) / 64
    assert figures["bfloat16_flips"] == np.mean(codes != rough.encode(images))
    features = [FeatureStatistics(9), FeatureStatistics(9)]
    for each, x in zip(features, (images, decoded), strict=True):
        each.add(np.asarray(inception.features({"scale": 1}, x[:NUM_SCENES])))
    assert figures["rfid/rgb"] == pytest.approx(frechet_distance(*features), rel=1e-3)
    described = results["tokenizers"]["first"]
    assert described["images"] == {"rgb": NUM_SCENES, "depth": NUM_SCENES}
    assert [example["psnr"] for example in described["worst"]] == pytest.approx(np.sort(psnr)[:3], abs=1e-3)
    assert [example["psnr"] for example in described["best"]] == pytest.approx(np.sort(psnr)[:-4:-1], abs=1e-3)
    first, second = results["figures"]["psnr/rgb"].values()
    assert second["difference"]["value"] == pytest.approx(second["value"] - first["value"])
    page = (tmp_path / "out" / "index.html").read_text()
    assert "LPIPS needs --lpips_weights and --lpips_heads." in page
    assert page.count("<img ") == 2 + 2 * 2
    # Both tokenizers preprocess alike: the second one's features of the images are those of the first.
    assert list((tmp_path / "out" / "feature_statistics").iterdir()) == loaded


def test_report_does_not_depend_on_batch_size(folder, tmp_path, monkeypatch):
    measured = {}
    monkeypatch.setattr(report, "write_report", lambda out, request, each: measured.update({len(measured): each}))
    for size in (1, 20):
        flags = [f"--tokenizer={folder / 'first'}", f"--source={folder / 'source.py'}", f"--out={tmp_path}"]
        assert report.main([*flags, f"--batch_size={size}", "--workers=0", "--examples=3"]) == 0
    one, other = (measurements["first"] for measurements in measured.values())
    assert one.is_paired(other)
    for figure, same in zip(one.figures(), other.figures(), strict=True):
        assert same.estimate.value == pytest.approx(figure.estimate.value, rel=1e-5)
        if figure.estimate.interval:
            assert same.estimate.interval == pytest.approx(figure.estimate.interval, rel=1e-5)
    for kind in ("sample", "best", "worst"):
        keys = [[(x.stream, x.key) for x in getattr(each.examples, kind)] for each in (one, other)]
        assert keys[0] == keys[1]


def test_report_pairs_only_equal_preprocessing(folder, tmp_path):
    """Images of the same names, but other pixels: smaller ones."""
    config = small("maskgit", resolution=8, codebook_size=64, channel_multipliers=(1,))
    weights.write(tmp_path / "third", random_weights(config, 0), "torch")
    (tmp_path / "rgb.py").write_text(SOURCE.replace('"rgb", "depth"', '"depth",'))
    arguments = [f"--tokenizer={folder / 'first'}", f"--compare={folder / 'second'},{tmp_path / 'third'}"]
    arguments += [f"--source={tmp_path / 'rgb.py'}", f"--out={tmp_path}", "--workers=0", "--max_images=2"]
    assert report.main(arguments) == 0
    results = json.loads((tmp_path / "report.json").read_text())
    psnr = results["figures"]["psnr/depth"]
    assert ["difference" in psnr[name] for name in ("first", "second", "third")] == [False, True, False]
    assert [of["skipped"] for of in results["tokenizers"].values()] == [0, 0, 0]
    page = (tmp_path / "index.html").read_text()
    assert page.count("LPIPS needs --lpips_weights") == 1
    assert "Of other images, and not paired: third." in page
    assert "third: SSIM needs images of 11 × 11 pixels; these have 8 × 8." in page


def test_report_refuses_bad_inputs(folder, tmp_path, capsys):
    (tmp_path / "bad").mkdir()
    image = io.BytesIO()
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(image, "PNG")
    (tmp_path / "bad" / "x.png").write_bytes(image.getvalue()[:60])
    source = f"--source={folder / 'source.py'}"
    for flags, message in (
        ([source, f"--compare={folder / 'first'}"], "names a folder twice"),
        ([f"--source={tmp_path / 'bad'}"], f"--source={tmp_path / 'bad'}: none of its images could be read"),
        ([source, "--lpips_weights=nowhere.pth"], "error: --lpips_weights=nowhere.pth: no such file; https://"),
    ):
        arguments = [f"--tokenizer={folder / 'first'}", f"--out={tmp_path / 'out'}", "--workers=0", *flags]
        assert report.main(arguments) == 2
        assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()
