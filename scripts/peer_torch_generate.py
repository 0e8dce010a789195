"""Peer of `scripts.benchmark_generate`: transformers' `generate` with each of its caches."""

import time
import warnings
from typing import Any

import numpy as np
import torch
import transformers

from scripts.benchmark_generate import Generate, Marks, measure
from scripts.contenders import Report, one_line


def run(job: dict[str, Any], report: Report) -> None:
    """Reports a row for each cache and batch size.

    Args:
      job: of `scripts.benchmark_generate`.
      report: receives each row.
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
    # Answers have full length; neither contender samples ids beyond the codes.
    model.generation_config.eos_token_id = None
    for cache in job["caches"]:
        for rows in job["batch_sizes"]:
            try:
                report(measure(f"{cache} cache", job, rows, _generate(model, cache, device)))
            except Exception as error:  # the next one may succeed
                print(f"{cache}, {rows}: {one_line(str(error))}")
                report({"failed": f"{cache} cache, {rows} rows: {one_line(str(error))}"})


class _Clock:
    """Streamer that records when tokens arrive: the prompt first, then one token per row at a time."""

    def __init__(self) -> None:
        self.marks: Marks = []
        self._num_puts = 0

    def put(self, _: Any) -> None:
        """Records the time of each token after the prompt."""
        if self._num_puts:
            self.marks.append((self._num_puts, time.perf_counter()))
        self._num_puts += 1

    def end(self) -> None:
        """Part of the streamer interface; nothing to do."""


def _generate(model: Any, cache: str, device: str) -> Generate:
    def generate(prompts: np.ndarray, tokens: int) -> tuple[np.ndarray, Marks]:
        prompt, clock = torch.from_numpy(prompts).long().to(device), _Clock()
        with torch.inference_mode():
            output = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=tokens,
                do_sample=False,
                cache_implementation=None if cache == "dynamic" else cache,
                streamer=clock,  # synchronizes after each token, like any streaming client
            )
        return output[:, prompts.shape[1] :].cpu().numpy(), clock.marks

    return generate
