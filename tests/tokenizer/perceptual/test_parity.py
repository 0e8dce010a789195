"""Perceptual losses against torch and transformers, with random weights in files of torchvision's names."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokenizer.perceptual.base import normalize_colors
from tokenizer.perceptual.convnext import ConvNeXtSmall
from tokenizer.perceptual.lpips import LPIPS
from tokenizer.perceptual.resnet import ResNet50

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.parity

RESNET = [
    (r"resnet\.embedder\.embedder\.convolution", "conv1"),
    (r"resnet\.embedder\.embedder\.normalization", "bn1"),
    (r"resnet\.encoder\.stages\.(\d)\.layers\.(\d)\.shortcut\.convolution", r"layer\1.\2.downsample.0"),
    (r"resnet\.encoder\.stages\.(\d)\.layers\.(\d)\.shortcut\.normalization", r"layer\1.\2.downsample.1"),
    (r"resnet\.encoder\.stages\.(\d)\.layers\.(\d)\.layer\.(\d)\.convolution", r"layer\1.\2.conv\3"),
    (r"resnet\.encoder\.stages\.(\d)\.layers\.(\d)\.layer\.(\d)\.normalization", r"layer\1.\2.bn\3"),
    (r"classifier\.1", "fc"),
]
CONVNEXT = [
    (r"convnext\.embeddings\.patch_embeddings", "features.0.0"),
    (r"convnext\.embeddings\.layernorm", "features.0.1"),
    (r"convnext\.encoder\.stages\.(\d)\.downsampling_layer\.", r"features.even\1."),
    (r"convnext\.encoder\.stages\.(\d)\.layers\.(\d+)\.dwconv", r"features.odd\1.\2.block.0"),
    (r"convnext\.encoder\.stages\.(\d)\.layers\.(\d+)\.layernorm", r"features.odd\1.\2.block.2"),
    (r"convnext\.encoder\.stages\.(\d)\.layers\.(\d+)\.pwconv1", r"features.odd\1.\2.block.3"),
    (r"convnext\.encoder\.stages\.(\d)\.layers\.(\d+)\.pwconv2", r"features.odd\1.\2.block.5"),
    (r"convnext\.encoder\.stages\.(\d)\.layers\.(\d+)\.layer_scale_parameter", r"features.odd\1.\2.layer_scale"),
    (r"convnext\.layernorm", "classifier.0"),
    (r"^classifier(?=\.[wb])", "classifier.2"),
]


def images(side, seed):
    return np.random.default_rng(seed).random((2, side, side, 3), np.float32)


def to_torch(images):
    return torch.from_numpy(images.transpose(0, 3, 1, 2))


def randomize(module):
    generator = torch.Generator().manual_seed(0)
    for name, tensor in module.state_dict().items():
        if tensor.dtype == torch.float32:
            noise = torch.randn(tensor.shape, generator=generator)
            if tensor.ndim > 1 and "layer_scale" not in name:
                tensor.copy_(noise * (2 / tensor[0].numel()) ** 0.5)
            else:
                tensor.copy_((0.1 * noise + float("bias" not in name and "mean" not in name)).abs() + 0.01)
    return module.eval()


def renamed(module, names, stage_offset):
    def shift(match):
        stage = int(match[2])
        return str(2 * stage if match[1] == "even" else 2 * stage + 1)

    state = {}
    for name, tensor in module.state_dict().items():
        for pattern, template in names:
            name = re.sub(pattern, template, name)
        if stage_offset:  # torchvision counts stages and convolutions from 1
            name = re.sub(r"layer(\d)", lambda m: f"layer{int(m[1]) + 1}", name)
            name = re.sub(r"\.(conv|bn)(\d)\.", lambda m: f".{m[1]}{int(m[2]) + 1}.", name)
        name = re.sub(r"(even|odd)(\d)", shift, name)
        state[name] = tensor[:, None, None] if name.endswith("layer_scale") else tensor
    return state


@pytest.mark.parametrize("kind", ["resnet50", "convnext_small"])
def test_logits_of_classifiers_equal_transformers(kind, tmp_path):
    with torch.no_grad():
        if kind == "resnet50":
            config = transformers.ResNetConfig(num_labels=1000)
            module = randomize(transformers.ResNetForImageClassification(config))
            state = renamed(module, RESNET, True)
        else:
            config = transformers.ConvNextConfig(depths=[3, 3, 27, 3], num_labels=1000)
            module = randomize(transformers.ConvNextForImageClassification(config))
            state = renamed(module, CONVNEXT, False)
        torch.save(state, tmp_path / "weights.pth")
        loss = {"resnet50": ResNet50, "convnext_small": ConvNeXtSmall}[kind](weights=str(tmp_path / "weights.pth"))
        params = loss.load()
        a, b = images(224, 0), images(224, 1)
        logits = [module(to_torch(np.asarray(normalize_colors(jnp.asarray(x))))).logits.numpy() for x in (a, b)]
    ours = jax.jit(lambda params, x: loss.logits(params, normalize_colors(x), "float32"))(params, a)
    np.testing.assert_allclose(ours, logits[0], rtol=1e-3, atol=1e-3 * np.abs(logits[0]).max())
    distance = jax.jit(lambda *x: loss.distance(*x, "float32"))(params, a, b)
    np.testing.assert_allclose(distance, np.square(logits[0] - logits[1]).mean(), rtol=1e-2)


@pytest.mark.parametrize("side", [96, 256])
def test_classifier_input_is_resized_as_by_torch(side, monkeypatch):
    loss = ResNet50()
    monkeypatch.setattr(ResNet50, "logits", lambda self, params, images, dtype: images.reshape(len(images), -1))
    a, b = images(side, 0), images(side, 1)
    resized = [
        torch.nn.functional.interpolate(to_torch(x), size=224, mode="bilinear", antialias=True).numpy() for x in (a, b)
    ]
    std = np.array([0.229, 0.224, 0.225])[:, None, None]
    expected = np.square((resized[0] - resized[1]) / std).mean()
    np.testing.assert_allclose(jax.jit(lambda x, y: loss.distance({}, x, y, "float32"))(a, b), expected, rtol=1e-4)


def test_lpips_equals_its_definition_in_torch(tmp_path):
    loss = LPIPS(weights=str(tmp_path / "vgg.pth"), heads=str(tmp_path / "heads.pth"))
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, shape in loss.tensor_shapes().items():
        noise = torch.randn(shape, generator=generator)
        fan_in = 9 * shape[1] if len(shape) == 4 else 576
        state[name] = noise.abs() if name.startswith("lin") else noise * (2 / fan_in) ** 0.5
    torch.save({n: x for n, x in state.items() if n.startswith("features")} | {"classifier.0.bias": torch.ones(3)},
               tmp_path / "vgg.pth")  # fmt: skip
    torch.save({n: x for n, x in state.items() if n.startswith("lin")}, tmp_path / "heads.pth")
    a, b = images(64, 0), images(64, 1)

    def features(x):
        x = (to_torch(2 * x - 1) - torch.tensor([-0.030, -0.088, -0.188])[:, None, None]) / torch.tensor(
            [0.458, 0.448, 0.450]
        )[:, None, None]
        outputs = []
        for number in range(30):  # torchvision's features: convolutions, rectifiers at the next number, poolings
            if number in (4, 9, 16, 23):
                outputs.append(x)
                x = torch.nn.functional.max_pool2d(x, 2)
            elif f"features.{number}.weight" in state:
                x = torch.nn.functional.conv2d(
                    x, state[f"features.{number}.weight"], state[f"features.{number}.bias"], padding=1
                ).relu()
        return [*outputs, x]

    expected = 0.0
    for i, (x, y) in enumerate(zip(features(a), features(b), strict=True)):
        x, y = (z / (z.square().sum(1, keepdim=True).sqrt() + 1e-10) for z in (x, y))
        weighted = torch.nn.functional.conv2d((x - y).square(), state[f"lin{i}.model.1.weight"])
        expected += weighted.mean((2, 3)).mean().item()
    value = jax.jit(lambda *x: loss.distance(*x, "float32"))(loss.load(), a, b)
    np.testing.assert_allclose(value, expected, rtol=1e-4)
