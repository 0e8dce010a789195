"""The published checkpoints of tokenizers: what their tensors are called and how they lie.

A `Layout` is one way of writing one of `VARIANTS`. It names tensors module by module: our path of a module, such as
`("encoder", "stages", "0", "blocks", "1", "conv1")`, becomes theirs. `lvm`'s decoder counts its stages from the
highest resolution, ours from the one that runs first.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

from lvm.model.nnx_utils import Params, abstract_module
from tokenizer.layout_fields import (
    Fields,
    from_diffusers,
    from_muse,
    from_variant_fields,
    to_diffusers,
    to_muse,
    to_variant_fields,
)
from tokenizer.network import VQGAN, VQGANConfig

Path = tuple[str, ...]

_TORCH_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias"}


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a kind of folder writes a variant.

    Attributes:
      variant: a key of `VARIANTS`.
      kind: "torch", "diffusers" or "maskgit": what `tokenizer.convert --to` calls it.
      codebook: the name of the codebook's tensor.
      parts: our names of a residual block's parts → theirs, where they differ.
      rename: path of a module → its name.
      to_fields: what is written to config.json.
      from_fields: the network of such a config.json; it names the field that is wrong.
    """

    variant: str
    kind: str
    codebook: str
    parts: Mapping[str, str]
    rename: Callable[[Path, VQGANConfig], str]
    to_fields: Callable[[VQGANConfig], dict[str, Any]]
    from_fields: Callable[[Fields, str], VQGANConfig]

    def tensors(self, config: VQGANConfig) -> dict[str, tuple[Path, tuple[int, ...]]]:
        """Each tensor's name → the path of our parameter, and the shape that it has in the file."""
        return {
            self._name(path, config): (path, tuple(leaf.shape[i] for i in self.axes(leaf.ndim)))
            for path, leaf in flatten(param_shapes(config)).items()
        }

    def axes(self, ndim: int) -> tuple[int, ...]:
        """Which of our axes each axis in the file is: torch's kernels are [out, in, H, W]."""
        return (3, 2, 0, 1) if ndim == 4 and self.kind != "maskgit" else tuple(range(ndim))

    def _name(self, path: Path, config: VQGANConfig) -> str:
        if path == ("codebook",):
            return self.codebook
        *module, leaf = path
        name = self.rename(tuple(self.parts.get(part, part) for part in module), config)
        return f"{name}.{leaf if self.kind == 'maskgit' else _TORCH_LEAVES[leaf]}"


@functools.lru_cache(maxsize=8)
def param_shapes(config: VQGANConfig) -> Params:
    """The shapes and dtypes of a network's parameters."""
    return abstract_module(lambda rngs: VQGAN(config, rngs))[1]


def flatten(tree: Params, prefix: Path = ()) -> dict[Path, Any]:
    """A nested dict as {path: leaf}."""
    if not isinstance(tree, Mapping):
        return {prefix: tree}
    flat: dict[Path, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, (*prefix, key))
    return flat


def unflatten(flat: Mapping[Path, Any]) -> Params:
    """The inverse of `flatten`."""
    tree: Params = {}
    for path, leaf in flat.items():
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = leaf
    return tree


def find_layout(variant: str | None, kind: str) -> Layout | None:
    """The layout of that kind, or None where there is none."""
    return next((item for item in LAYOUTS if (item.variant, item.kind) == (variant, kind)), None)


def layout_kinds(variant: str | None) -> list[str]:
    """The kinds of layout that a variant has beside our own."""
    return [item.kind for item in LAYOUTS if item.variant == variant]


# --- Names ----------------------------------------------------------------------------------------------------


def _lvm_torch(path: Path, config: VQGANConfig) -> str:
    last = len(config.widths) - 1
    match path:
        case ("encoder", "stages", i, "blocks", j, part):
            return f"encoder.down.{i}.block.{j}.{part}"
        case ("encoder", "stages", i, "resample", "conv"):
            return f"encoder.down.{i}.downsample.conv"
        case ("decoder", "stages", i, "blocks", j, part):
            return f"decoder.up.{last - int(i)}.block.{j}.{part}"
        case ("decoder", "stages", i, "resample", "conv"):
            return f"decoder.up.{last - int(i)}.upsample.conv"
        case (half, "middle", "blocks", j, part):
            return f"{half}.mid.block_{int(j) + 1}.{part}"
    return ".".join(path)


def _lvm_diffusers(path: Path, config: VQGANConfig) -> str:
    way = "down" if path[0] == "encoder" else "up"
    match path:
        case (half, "stages", i, "blocks", j, part):
            return f"{half}.{way}_blocks.{i}.resnets.{j}.{part}"
        case (half, "stages", i, "resample", "conv"):
            return f"{half}.{way}_blocks.{i}.{way}samplers.0.conv"
        case (half, "middle", "blocks", j, part):
            return f"{half}.mid_block.resnets.{j}.{part}"
        case (half, "norm_out"):
            return f"{half}.conv_norm_out"
    return ".".join(path)


def _maskgit_torch(path: Path, config: VQGANConfig) -> str:
    match path:
        case (half, "middle", "blocks", j, part):
            return f"{half}.mid.{j}.{part}"
        case ("decoder", "stages", i, "resample", "conv"):
            return f"decoder.up.{len(config.widths) - 1 - int(i)}.upsample_conv"
    return _lvm_torch(path, config)


def _maskgit_flax(path: Path, config: VQGANConfig) -> str:
    match path:
        case (half, "stages" | "middle", *_, part) if part != "conv":
            return f"{half}.ResBlock_{_block(path, config)}.{part}"
        case ("decoder", "stages", i, "resample", "conv"):
            return f"decoder.Conv_{int(i) + 1}"
        case (half, "conv_in"):
            return f"{half}.Conv_0"
        case (half, "conv_out"):
            return f"{half}.Conv_{1 if half == 'encoder' else len(config.widths)}"
        case (half, "norm_out"):
            return f"{half}.GroupNorm_0"
    raise ValueError(path)


def _lvm_old_torch(path: Path, config: VQGANConfig) -> str:
    match path:
        case (half, "stages" | "middle", *_, part) if part != "conv":
            return f"{half}.blocks.{_block(path, config)}.{part}"
        case ("decoder", "stages", i, "resample", "conv"):
            return f"decoder.up_convs.{i}"
        case (half, "conv_in"):
            return f"{half}.conv1"
        case (half, "conv_out"):
            return f"{half}.{'conv2' if half == 'encoder' else 'conv6'}"
        case (half, "norm_out"):
            return f"{half}.norm1"
    raise ValueError(path)


def _block(path: Path, config: VQGANConfig) -> int:
    """The number of a residual block where all of a half are counted in the order that they run."""
    match path:
        case ("encoder", "stages", i, "blocks", j, _):
            return int(i) * config.encoder_blocks + int(j)
        case ("encoder", "middle", "blocks", j, _):
            return len(config.widths) * config.encoder_blocks + int(j)
        case ("decoder", "stages", i, "blocks", j, _):
            return config.middle_blocks + int(i) * config.decoder_blocks + int(j)
        case ("decoder", "middle", "blocks", j, _):
            return int(j)
    raise ValueError(path)


_FLAX_PARTS = {
    "norm1": "GroupNorm_0",
    "conv1": "Conv_0",
    "norm2": "GroupNorm_1",
    "conv2": "Conv_1",
    "shortcut": "Conv_2",
}
LAYOUTS = (
    Layout(
        "maskgit", "torch", "quantize.embedding.weight", {"shortcut": "nin_shortcut"},
        _maskgit_torch, to_variant_fields, from_variant_fields,
    ),
    Layout(
        "maskgit", "maskgit", "quantizer.codebook", _FLAX_PARTS,
        _maskgit_flax, to_variant_fields, from_variant_fields,
    ),
    Layout(
        "lvm_old", "torch", "quantizer.embedding.weight", {"shortcut": "conv_out"},
        _lvm_old_torch, to_variant_fields, from_variant_fields,
    ),
    Layout(
        "lvm", "torch", "quantize.embedding.weight", {"shortcut": "nin_shortcut"},
        _lvm_torch, to_muse, from_muse,
    ),
    Layout(
        "lvm", "diffusers", "quantize.embedding.weight", {"shortcut": "conv_shortcut"},
        _lvm_diffusers, to_diffusers, from_diffusers,
    ),
)  # fmt: skip
