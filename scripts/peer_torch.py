"""Peer of `scripts.benchmark_train`: transformers' Llama, trained by torch as fast as it can.

Parameters, gradients and AdamW state are float32, as in ours. Compute is bfloat16 by autocast, including the residual
stream (which autocast alone leaves in float32, slower). Forward and backward are compiled, AdamW is fused; clipping,
weight decay and learning rates are ours.
"""

import contextlib
import gc
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch.nn.attention import SDPBackend, sdpa_kernel

from lvm.model.transformer import SIZES
from lvm.training.optimizer import OptimizerConfig
from scripts.benchmark_train import VOCABULARY, measure, random_tokens
from scripts.contenders import one_line


def run(job: dict[str, Any], report: Callable[[dict[str, Any]], None]) -> None:
    """Reports a row for each attention backend on a GPU; on a CPU, eager and compiled.

    Args:
      job: of `scripts.benchmark_train`.
      report: receives each row.
    """
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    on_gpu = job["platform"] == "gpu"
    if job["platform"] not in ("cpu", "gpu") or (on_gpu and not torch.cuda.is_available()):
        report({"failed": f"not run: this torch has no {job['platform']}"})
        return
    libraries = f"torch {torch.__version__}, transformers {transformers.__version__}"
    if on_gpu:
        libraries += f" (CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()})"
        torch.set_float32_matmul_precision("high")  # as XLA does for float32
    report({"libraries": libraries})
    transformers.AttentionInterface.register("plain_causal", _attend)
    for name, backend, compiled in _variants(on_gpu, job["compile"]):
        try:
            with sdpa_kernel([backend]) if backend else contextlib.nullcontext():
                report(_measured(name, job, "cuda" if on_gpu else "cpu", compiled))
        except Exception as error:  # the next one may succeed
            print(f"{name}: {one_line(str(error))}")
            report({"variant": name, "failed": one_line(str(error))})
        torch.compiler.reset()
        gc.collect()
        if on_gpu:
            torch.cuda.empty_cache()


def _variants(on_gpu: bool, compiled: bool) -> list[tuple[str, SDPBackend | None, bool]]:
    suffix = ", compiled" if compiled else ""
    if on_gpu:
        kernels = {"flash": SDPBackend.FLASH_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION}
        return [(f"{name} attention{suffix}", backend, compiled) for name, backend in kernels.items()]
    return [("eager", None, False), *([("compiled", None, True)] if compiled else [])]


def _attend(
    module: Any, query: Any, key: Any, value: Any, attention_mask: Any, scaling: float, **_: Any
) -> tuple[Any, None]:
    # Transformers' own `sdpa` builds a mask when compiled (torch before 2.14), which flash and cuDNN reject.
    assert attention_mask is None
    out = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
    return out.transpose(1, 2), None


def _measured(name: str, job: dict[str, Any], device: str, compiled: bool) -> dict[str, Any]:
    model = _llama(job, device)
    bfloat16 = job["dtype"] == "bfloat16"

    def loss_of(inputs: Any, targets: Any) -> Any:
        with torch.autocast(device, torch.bfloat16, enabled=bfloat16):
            embedded = model.model.embed_tokens(inputs)
            embedded = embedded.to(torch.bfloat16) if bfloat16 else embedded
            logits = model(inputs_embeds=embedded, use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())

    loss_of = torch.compile(loss_of, dynamic=False) if compiled else loss_of
    settings = OptimizerConfig()
    decayed = {n: p.ndim > 1 and "embed_tokens" not in n for n, p in model.named_parameters()}
    groups = [
        {"params": [p for n, p in model.named_parameters() if decayed[n] is which], "weight_decay": decay}
        for which, decay in ((True, settings.weight_decay), (False, 0.0))
    ]
    adamw = torch.optim.AdamW(groups, betas=(settings.b1, settings.b2), eps=settings.epsilon, fused=True)

    def run(step: int) -> tuple[float, float]:
        rows = torch.from_numpy(random_tokens(step, job["batch_size"], job["context"])).long().to(device)
        inputs, targets = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
        _wait(device)
        start = time.perf_counter()
        for group in adamw.param_groups:
            group["lr"] = settings.learning_rate * step / settings.warmup_steps
        loss = loss_of(inputs, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm)
        adamw.step()
        adamw.zero_grad(set_to_none=True)
        _wait(device)
        return time.perf_counter() - start, float(loss)

    measured = measure(name, job, run)
    if device == "cuda":
        measured["memory"] = torch.cuda.max_memory_allocated()
    return measured


def _llama(job: dict[str, Any], device: str) -> Any:
    size = SIZES[job["size"]]
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=size.hidden_size,
        intermediate_size=size.mlp_size,
        num_hidden_layers=size.num_layers,
        num_attention_heads=size.num_heads,
        num_key_value_heads=size.kv_heads,
        max_position_embeddings=job["context"],
        rms_norm_eps=size.norm_epsilon,
        rope_parameters={"rope_type": "default", "rope_theta": size.rope_theta},
        initializer_range=size.init_std,
        tie_word_embeddings=size.tie_embeddings,
        bos_token_id=None,
        eos_token_id=None,
    )
    config._attn_implementation = "plain_causal"
    with torch.device(device):
        return transformers.LlamaForCausalLM(config).train()


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
