"""What `scripts.benchmark_generate` measures ours against: transformers' `generate`, with each of its caches."""

from __future__ import annotations

import time
import warnings
from typing import Any

import numpy as np
import torch
import transformers

from scripts.benchmark_generate import Marks, Write, measure
from scripts.contenders import Report, one_line


def run(job: dict[str, Any], report: Report) -> None:
    """Reports a row for each cache and batch size.

    Args:
      job: as `scripts.benchmark_generate` passes it.
      report: takes a row.
    """
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    on_gpu = job["machine"]["platform"] == "gpu"
    if on_gpu and not torch.cuda.is_available():
        report({"failed": "not run: this torch has no gpu"})
        return
    report({"libraries": f"torch {torch.__version__}, transformers {transformers.__version__}"})
    device = "cuda" if on_gpu else "cpu"
    dtype = getattr(torch, job["machine"]["dtype"])
    model = transformers.AutoModelForCausalLM.from_pretrained(job["folder"], dtype=dtype).to(device).eval()
    # The answer has its full length, and ids beyond the codes are drawn by neither.
    model.generation_config.eos_token_id = None
    for cache in job["caches"]:
        for rows in job["batch_sizes"]:
            try:
                report(measure(f"{cache} cache", job, rows, _writer(model, cache, device)))
            except Exception as error:  # the next one may do
                print(f"{cache}, {rows}: {one_line(str(error))}")
                report({"failed": f"{cache} cache, {rows} rows: {one_line(str(error))}"})


class _Clock:
    """What `generate` shows its tokens to: the prompt first, then one a row at a time."""

    def __init__(self) -> None:
        self.marks: Marks = []
        self._shown = 0

    def put(self, _: Any) -> None:
        """Notes the time, but of the prompt."""
        if self._shown:
            self.marks.append((self._shown, time.perf_counter()))
        self._shown += 1

    def end(self) -> None:
        """Nothing is left to do."""


def _writer(model: Any, cache: str, device: str) -> Write:
    def write(given: np.ndarray, tokens: int) -> tuple[np.ndarray, Marks]:
        prompt, clock = torch.from_numpy(given).long().to(device), _Clock()
        with torch.inference_mode():
            whole = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=tokens,
                do_sample=False,
                cache_implementation=None if cache == "dynamic" else cache,
                streamer=clock,  # waits for each token, as whoever shows them does
            )
        return whole[:, given.shape[1] :].cpu().numpy(), clock.marks

    return write
