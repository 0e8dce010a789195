"""FLOPs of the model: the one count behind every MFU and every plan.

A multiply-add is two FLOPs; a backward pass is two forward passes. Only the model's matrix products count, not
rematerialization, padding, norms, softmax or the optimizer (PaLM, arXiv 2204.02311, appendix B). Two conventions:

- `causal`: a query attends to half of the context on average, and only that half counts;
- `whole`: the full T × T products count, masked or not, as in many papers.
"""

from lvm.model.transformer import ModelConfig

CONVENTIONS = ("causal", "whole")


def forward_flops_per_token(config: ModelConfig, length: int, convention: str) -> float:
    """FLOPs per token of a forward pass over rows of `length` tokens, including the output projection.

    The vocabulary size must be set.

    Raises:
      ValueError: `convention` is not in `CONVENTIONS`.
    """
    if convention not in CONVENTIONS:
        raise ValueError(f"convention={convention!r} must be one of {', '.join(CONVENTIONS)}")
    D, F, d = config.hidden_size, config.mlp_size, config.head_dim
    projections = D * d * (2 * config.num_heads + 2 * config.kv_heads)  # query and out, key and value
    weights = config.num_layers * (projections + 3 * D * F) + D * config.vocabulary_size
    num_keys = length / 2 if convention == "causal" else length
    attention = config.num_layers * 2 * config.num_heads * d * num_keys  # scores and weighted sums
    return 2.0 * (weights + attention)


def train_flops_per_token(config: ModelConfig, length: int, convention: str) -> float:
    """FLOPs per token of a training step (forward and backward). Same arguments."""
    return 3.0 * forward_flops_per_token(config, length, convention)
