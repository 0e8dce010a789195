"""The one count of floating-point operations: what every MFU and every plan is computed from.

A multiplication with an addition is two. Counted are the matrix products of a training step, as a model needs
them: what rematerialisation repeats, padding, norms, softmax and the optimizer aren't. A backward pass is two
forward passes. The convention is that of PaLM (arXiv 2204.02311, appendix B), in two variants:

- `causal`: a query attends to half of the context on average, and only that half is counted;
- `whole`: the T × T products are counted as if nothing were masked, as many papers do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lvm.model.transformer import ModelConfig

CONVENTIONS = ("causal", "whole")


def forward_flops_per_token(config: ModelConfig, length: int, convention: str) -> float:
    """Operations a token of a forward pass over rows of `length` tokens, the output projection included.

    Args:
      config: the model, its vocabulary size set.
      length: tokens a row.
      convention: "causal" or "whole", see above.

    Raises:
      ValueError: another convention.
    """
    if convention not in CONVENTIONS:
        raise ValueError(f"convention: {convention!r} is not one of {', '.join(CONVENTIONS)}")
    D, F, d = config.hidden_size, config.mlp_size, config.head_dim
    projections = D * d * (2 * config.num_heads + 2 * config.kv_heads)  # query and out, key and value
    weights = config.num_layers * (projections + 3 * D * F) + D * config.vocabulary_size
    attended = length / 2 if convention == "causal" else length
    scores_and_sums = config.num_layers * 2 * config.num_heads * d * attended
    return 2.0 * (weights + scores_and_sums)


def train_flops_per_token(config: ModelConfig, length: int, convention: str) -> float:
    """Operations a token of a training step: a forward pass and its backward pass. Same arguments."""
    return 3.0 * forward_flops_per_token(config, length, convention)
