"""Parametrizations: initialization and optimizer settings as functions of a model's width and depth.

With muP (Tensor Programs V, arXiv 2203.03466) the hyperparameters of a narrow base model hold at every width; with
CompleteP (arXiv 2505.01618, α = 1) at every depth too. With m = width / base width and l = depth / base depth, AdamW's
settings of the base model and the constant factors of the forward pass become

| parameter                  | initial std | multiplier        | learning rate | weight decay | epsilon |
|----------------------------|-------------|-------------------|---------------|--------------|---------|
| embedding, head            | 1           | 1                 | 1             | 1            | 1/m     |
| query                      | 1/√m        | √(base d / d)     | 1/m           | m            | 1/(m·l) |
| key, value, gate, up       | 1/√m        | 1                 | 1/m           | m            | 1/(m·l) |
| attention's out, MLP's down | 1/√m       | 1/l               | 1/m           | m            | 1/(m·l) |
| norms of layers            | 1           | 1                 | 1             | 1            | 1/(m·l) |
| final norm                 | 1           | 1/m               | 1             | 1            | 1/m     |

relative to the standard parametrization; l = 1 with muP. The multipliers are those of the attention scores, 1/d instead
of 1/√d for heads of d; of each residual branch; and of the logits.

They are folded into the parameters, so that the forward pass, and every checkpoint and export, is that of a plain
model: a parameter is initialized as multiplier × published value, and the optimizer multiplies its gradient and its
update by the multiplier, which is the same training (`lvm.training.optimizer`).
"""

import dataclasses

from lvm.common.errors import UserError
from lvm.common.validation import check_choice, check_non_negative

_BASE_SIZES = {"standard": (), "mup": ("base_width",), "completep": ("base_width", "base_depth")}
_LAYER_MATRICES = (*(f"attention/{name}" for name in ("query", "key", "value")), "mlp/gate", "mlp/up")
RESIDUAL = ("attention/out", "mlp/down")  # projections back to the residual stream


@dataclasses.dataclass(frozen=True)
class ParametrizationConfig:
    """A parametrization and the base model, the one whose hyperparameters are configured.

    `mlp_size` and the number of heads should grow in proportion to the width.

    Attributes:
      name: "standard", "mup" or "completep".
      base_width: `hidden_size` of the base model; 0 with standard.
      base_depth: `num_layers` of the base model, for completep alone; 0 with others.
      base_head_dim: head dim of the base model; 0 if it is the same, as is usual.
    """

    name: str = "standard"
    base_width: int = 0
    base_depth: int = 0
    base_head_dim: int = 0

    def __post_init__(self) -> None:
        check_choice(self, "name", tuple(_BASE_SIZES))
        check_non_negative(self, "base_width", "base_depth", "base_head_dim")
        for name in ("base_width", "base_depth", "base_head_dim"):
            value, is_used = getattr(self, name), name in _BASE_SIZES[self.name]
            if is_used and not value:
                raise UserError(f"{name}=0; {self.name} needs that of the base model, which has the hyperparameters")
            if value and not is_used and (name != "base_head_dim" or self.name == "standard"):
                raise UserError(f"{name}={value} has no effect with name={self.name}; leave it at 0")


@dataclasses.dataclass(frozen=True)
class ParameterScale:
    """A parameter's row of the table above, without weight decay.

    Every optimizer shrinks parameters by learning rate × weight decay, of which the scales cancel.
    """

    init_std: float = 1.0
    multiplier: float = 1.0
    learning_rate: float = 1.0
    epsilon: float = 1.0


def parameter_scales(config: ParametrizationConfig, width: int, depth: int, head_dim: int) -> dict[str, ParameterScale]:
    """The scales of a transformer's parameters by name, `attention/query` for those of any layer."""
    m = width / config.base_width if config.base_width else 1.0
    l = depth / config.base_depth if config.base_depth else 1.0  # noqa: E741
    matrix = ParameterScale(m**-0.5, 1.0, 1 / m, 1 / (m * l))
    attention = (config.base_head_dim / head_dim) ** 0.5 if config.base_head_dim else 1.0
    layer = {
        **dict.fromkeys(_LAYER_MATRICES, matrix),
        "attention/query": dataclasses.replace(matrix, multiplier=attention),
        **dict.fromkeys(RESIDUAL, dataclasses.replace(matrix, multiplier=1 / l)),
        **dict.fromkeys(("attention_norm/scale", "mlp_norm/scale"), ParameterScale(epsilon=1 / (m * l))),
    }
    ends = dict.fromkeys(("embedding", "head"), ParameterScale(epsilon=1 / m))
    return {**layer, **ends, "norm/scale": ParameterScale(multiplier=1 / m, epsilon=1 / m)}
