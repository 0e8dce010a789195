"""Shapes of models by width: depth, heads and MLP, in multiples that kernels and meshes divide."""

import dataclasses
import math

from lvm.common.validation import check_choice, check_positive
from lvm.model.transformer import ModelConfig


@dataclasses.dataclass(frozen=True)
class ShapeConfig:
    """Rule from a width to a shape.

    Attributes:
      depth: "log": width / (55 + 4·log2 width) layers, as in Marin's sweeps; "aspect": width / `aspect`.
      head_dim: of every head; a multiple of 128 suits TPU kernels.
      mlp_ratio: MLP size relative to the width, before it is rounded up to a multiple.
      multiple: that width and MLP size are rounded to; of all axes of the mesh, and of 128 for TPU kernels.
    """

    depth: str = "log"
    aspect: float = 64.0
    head_dim: int = 128
    mlp_ratio: float = 8 / 3
    multiple: int = 128

    def __post_init__(self) -> None:
        check_choice(self, "depth", ("log", "aspect"))
        check_positive(self, "aspect", "head_dim", "mlp_ratio", "multiple")

    def num_layers(self, width: int) -> int:
        """Depth of a width, at least 1."""
        ratio = 64 + 4 * math.log2(width) - 9 if self.depth == "log" else self.aspect
        return max(1, round(width / ratio))


def make_shape(
    base: ModelConfig, config: ShapeConfig, width: int, num_layers: int = 0, num_heads: int = 0, mlp_size: int = 0
) -> ModelConfig:
    """`base` in the shape of a width; what is 0 follows from the rule. A shape that is listed as a whole is kept.

    Raises:
      UserError: heads don't divide the width.
    """
    if not (num_layers and num_heads and mlp_size):
        unit = math.lcm(config.head_dim, config.multiple)
        width = max(1, round(width / unit)) * unit
    return dataclasses.replace(
        base,
        hidden_size=width,
        num_layers=num_layers or config.num_layers(width),
        num_heads=num_heads or width // config.head_dim,
        mlp_size=mlp_size or math.ceil(config.mlp_ratio * width / config.multiple) * config.multiple,
    )
