"""What `scripts.benchmark_train` measures ours against: transformers' Llama, trained by torch as well as it can be.

Parameters, gradients and AdamW's state are float32, as ours are. Compute is by autocast to bfloat16, with the residual
stream in bfloat16 too (autocast alone would leave it in float32: slower, and not what ours does). The forward
and backward passes are compiled, AdamW is the fused one, the global norm is clipped to the same value, weights are
decayed alike, and the learning rate warms up alike.
"""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import transformers
from torch.nn.attention import SDPBackend, sdpa_kernel

from lvm.console import say
from lvm.model import SIZES
from lvm.training.optimizer import OptimizerConfig
from scripts import benchmark_train

_ATTENTION = "plain_causal"


def run(
    job: dict[str, Any],
    tokens: Callable[[int, int, int], np.ndarray],
    report: Callable[[dict[str, Any]], None],
) -> None:
    """Each attention backend on a GPU, compiled; on a CPU, without and with compilation.

    Args:
      job: as `scripts.benchmark_train` passes it.
      tokens: (step, rows, context) → int32 [rows, context + 1].
      report: takes a row.
    """
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    on_gpu = job["platform"] == "gpu"
    if job["platform"] not in ("cpu", "gpu"):
        report({"failed": f"not run: no torch for {job['platform']} here"})
        return
    if on_gpu and not torch.cuda.is_available():
        report({"failed": "not run: this torch sees no GPU"})
        return
    report({"libraries": _libraries(on_gpu), "platform": job["platform"]})
    for name, backend, compiled in _variants(on_gpu, job["compile"]):
        try:
            with _only(backend):
                report(_measured(name, job, on_gpu, compiled, tokens))
        except Exception as error:  # the next one may do
            say(f"{name}: {error}")
            report({"variant": name, "failed": benchmark_train._one_line(f"{error}")})
        torch._dynamo.reset()
        if on_gpu:
            torch.cuda.empty_cache()
