"""Published tokenizer checkpoints: names, axes and config fields of their tensors.

A `Layout` is one file format of one of `VARIANTS`. It names modules by templates: our path of a module, such as
`("encoder", "stages", "0", "blocks", "1", "conv1")`, selects a template, whose fields are

- `half`: encoder or decoder; `way`: down or up;
- `i`, `j`: stage and block in the order that they run; `i1`, `j1`: the same counted from 1;
- `r`: stage from the highest resolution on;
- `n`: block among all of its half, in the order that they run;
- `stages`: number of stages.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

from flax.traverse_util import flatten_dict

from lvm.model.nnx_utils import Params, abstract_module
from tokenizer import layout_fields
from tokenizer.layout_fields import Fields, from_variant_fields, to_variant_fields
from tokenizer.network import VQGAN, VQGANConfig

Path = tuple[str, ...]

_TORCH_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias"}


@dataclasses.dataclass(frozen=True)
class Layout:
    """A file format of a variant.

    Attributes:
      templates: names of "block", "middle" (blocks), "resample", "conv_in", "conv_out" and "norm_out"; our own path if
        missing. Keys may begin with "encoder." or "decoder.".
    """

    variant: str  # a key of `VARIANTS`
    kind: str  # "torch", "diffusers" or "maskgit", the value of `tokenizer convert --to`
    codebook: str  # name of the codebook's tensor
    aliases: Mapping[str, str]  # names in a residual block that differ, ours → theirs
    templates: Mapping[str, str]
    to_fields: Callable[[VQGANConfig], dict[str, Any]]  # network → fields of config.json
    from_fields: Callable[[Fields, str], VQGANConfig]  # and back; raises UserError naming the file and the field

    def tensors(self, config: VQGANConfig) -> dict[str, tuple[Path, tuple[int, ...]]]:
        """Maps each tensor's name to our parameter's path and the shape in the file."""
        return {
            self._name(path, config): (path, tuple(leaf.shape[i] for i in self.axes(leaf.ndim)))
            for path, leaf in flatten_dict(param_shapes(config)).items()
        }

    def axes(self, ndim: int) -> tuple[int, ...]:
        """Transposition from our axes to those in the file: torch kernels are [out, in, H, W]."""
        return (3, 2, 0, 1) if ndim == 4 and self.kind != "maskgit" else tuple(range(ndim))

    def _name(self, path: Path, config: VQGANConfig) -> str:
        if path == ("codebook",):
            return self.codebook
        *module, leaf = path
        leaf = leaf if self.kind == "maskgit" else _TORCH_LEAVES[leaf]
        half, stages, i, j, n, suffix = module[0], len(config.widths), 0, 0, 0, ""
        encoder = half == "encoder"
        match module[1:]:
            case ["stages", stage, "blocks", block, name]:
                key, i, j, suffix = "block", int(stage), int(block), f".{self.aliases.get(name, name)}"
                n = i * config.encoder_blocks + j if encoder else config.middle_blocks + i * config.decoder_blocks + j
            case ["middle", "blocks", block, name]:
                key, j, suffix = "middle", int(block), f".{self.aliases.get(name, name)}"
                n = stages * config.encoder_blocks + j if encoder else j
            case ["stages", stage, "resample", "conv"]:
                key, i = "resample", int(stage)
            case rest:
                key = ".".join(rest)
        default = self.templates.get(key, ".".join(module))
        template = self.templates.get(f"{half}.{key}", default)
        r, way = (i, "down") if encoder else (stages - 1 - i, "up")
        name = template.format(half=half, way=way, i=i, j=j, i1=i + 1, j1=j + 1, r=r, n=n, stages=stages)
        return f"{name}{suffix}.{leaf}"


@functools.lru_cache(maxsize=8)
def param_shapes(config: VQGANConfig) -> Params:
    """ShapeDtypeStructs of a network's parameters."""
    return abstract_module(lambda rngs: VQGAN(config, rngs))[1]


def find_layout(variant: str | None, kind: str) -> Layout | None:
    return next((layout for layout in LAYOUTS if (layout.variant, layout.kind) == (variant, kind)), None)


def layout_kinds(variant: str | None) -> list[str]:
    """Kinds of published layouts that a variant has."""
    return [layout.kind for layout in LAYOUTS if layout.variant == variant]


_LVM_TORCH = {
    "block": "{half}.{way}.{r}.block.{j}",
    "middle": "{half}.mid.block_{j1}",
    "resample": "{half}.{way}.{r}.{way}sample.conv",
}
_LVM_DIFFUSERS = {
    "block": "{half}.{way}_blocks.{i}.resnets.{j}",
    "middle": "{half}.mid_block.resnets.{j}",
    "resample": "{half}.{way}_blocks.{i}.{way}samplers.0.conv",
    "norm_out": "{half}.conv_norm_out",
}
_MASKGIT_TORCH = _LVM_TORCH | {"middle": "{half}.mid.{j}", "resample": "{half}.up.{r}.upsample_conv"}
_MASKGIT_FLAX = {
    "block": "{half}.ResBlock_{n}",
    "middle": "{half}.ResBlock_{n}",
    "resample": "{half}.Conv_{i1}",
    "conv_in": "{half}.Conv_0",
    "encoder.conv_out": "encoder.Conv_1",
    "decoder.conv_out": "decoder.Conv_{stages}",
    "norm_out": "{half}.GroupNorm_0",
}
_LVM_OLD_TORCH = {
    "block": "{half}.blocks.{n}",
    "middle": "{half}.blocks.{n}",
    "resample": "{half}.up_convs.{i}",
    "conv_in": "{half}.conv1",
    "encoder.conv_out": "encoder.conv2",
    "decoder.conv_out": "decoder.conv6",
    "norm_out": "{half}.norm1",
}
_FLAX_ALIASES = {
    "norm1": "GroupNorm_0", "conv1": "Conv_0", "norm2": "GroupNorm_1", "conv2": "Conv_1", "shortcut": "Conv_2",
}  # fmt: skip
_VARIANT_FIELDS = (to_variant_fields, from_variant_fields)
_MUSE_FIELDS = (layout_fields.to_muse, layout_fields.from_muse)
_DIFFUSERS_FIELDS = (layout_fields.to_diffusers, layout_fields.from_diffusers)
_CODEBOOK, _NIN = "quantize.embedding.weight", {"shortcut": "nin_shortcut"}
_OLD_CODEBOOK, _OLD = "quantizer.embedding.weight", {"shortcut": "conv_out"}
LAYOUTS = (
    Layout("maskgit", "torch", _CODEBOOK, _NIN, _MASKGIT_TORCH, *_MUSE_FIELDS),
    Layout("maskgit", "maskgit", "quantizer.codebook", _FLAX_ALIASES, _MASKGIT_FLAX, *_VARIANT_FIELDS),
    Layout("lvm_old", "torch", _OLD_CODEBOOK, _OLD, _LVM_OLD_TORCH, *_VARIANT_FIELDS),
    Layout("lvm", "torch", _CODEBOOK, _NIN, _LVM_TORCH, *_MUSE_FIELDS),
    Layout("lvm", "diffusers", _CODEBOOK, {"shortcut": "conv_shortcut"}, _LVM_DIFFUSERS, *_DIFFUSERS_FIELDS),
)
