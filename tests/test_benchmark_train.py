"""The benchmark of the training step: the whole command on a tiny size, and how a trace becomes kinds of work."""

import importlib.util

import pytest

from scripts import step_profile
from tests.commands import run

TINY = ("--size=debug", "--context=16", "--batch_size=2", "--steps=1", "--warmup=1", "--notorch_compile")


@pytest.mark.slow
def test_benchmark_train_prints_contenders_and_profile(tmp_path):
    output = run("scripts.benchmark_train", *TINY, "--remat=full", f"--profile={tmp_path}")
    rows = [line for line in output.splitlines() if line.startswith("debug  ")]
    assert "ours, remat full, xla attention" in rows[0]
    assert "2 × 16" in rows[0]
    missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    if missing:
        assert f"{missing[0]} isn't installed" in rows[1]
    else:
        assert "torch, eager" in rows[1]
        assert "ours (remat full, xla attention) at" in output
    assert "no MFU: this device has no known peak" in output
    shares = [line for line in output.splitlines() if line.endswith("%")]
    assert shares[-1].endswith("100.0%")
    assert list(tmp_path.rglob("*.trace.json.gz"))


def test_benchmark_train_fails_without_our_figure():
    output = run("scripts.benchmark_train", *TINY, "--peer=none", "--minutes=0", code=1)
    assert "stopped after its 0 s" in output


def test_benchmark_train_rejects_unknown_size():
    assert "--size: 'huge' is not one of debug" in run("scripts.benchmark_train", "--size=huge", code=2)


HLO = """HloModule jit_step

%fused_computation.1 (p: f32[2,2]) -> f32[2,2] {
  ROOT %dot.1 = f32[2,2]{1,0} dot(%p, %p), metadata={op_name="jit(step)/jvp()/dot_general"}
}

ENTRY %main (p: f32[2,2]) -> f32[2,2] {
  %fusion.1 = f32[2,2] fusion(%p), calls=%fused_computation.1, metadata={op_name="jit(step)/jvp()/dot"}
  %custom-call.2 = f32[2,2] custom-call(), custom_call_target="__cublas$lt$matmul", metadata={op_name="jvp()/attention"}
  %loop_add_fusion.3 = f32[2,2] fusion(%p), calls=%other, metadata={op_name="jit(step)/add"}
  %loop_multiply_fusion = f32[2,2] fusion(%p), calls=%other, metadata={op_name="jit(step)/jvp()/mul"}
  ROOT %all-reduce.4 = f32[2,2] all-reduce(%p), to_apply=%add, metadata={op_name="transpose(jvp())/psum"}
}
"""


@pytest.mark.parametrize(
    ("kernel", "instruction", "wanted"),
    [
        ("fusion_1", "fusion.1", "matmul"),
        ("nvjet_tst_128x256_64x4", "", "matmul"),
        ("nvjet_tst_128x256_64x4", "custom-call.2", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop", "", "attention"),
        ("loop_add_fusion_3", "", "optimizer"),
        ("loop_multiply_fusion", "loop_multiply_fusion", "elementwise and norms"),
        ("loop_exponential_fusion_9", "", "elementwise and norms"),
        ("ncclDevKernel_AllReduce_Sum", "", "collectives"),
        ("MemcpyD2D", "", "other"),
    ],
)
def test_kind_of_event_by_instruction_or_kernel_name(kernel, instruction, wanted):
    event = {"name": kernel, "args": {"hlo_op": instruction} if instruction else {}}
    assert step_profile.kind_of_event(event, step_profile.kinds_of_instructions(HLO)) == wanted


def test_time_by_kind_adds_up_to_whole_trace():
    def row(pid, tid, process, thread):
        yield {"ph": "M", "pid": pid, "name": "process_name", "args": {"name": process}}
        yield {"ph": "M", "pid": pid, "tid": tid, "name": "thread_name", "args": {"name": thread}}

    def span(tid, name, start, end, pid=1):
        return {"ph": "X", "pid": pid, "tid": tid, "name": name, "ts": start, "dur": end - start, "args": {}}

    events = [
        *row(1, 7, "/device:GPU:0 NVIDIA", "Stream #7(Compute)"),
        *row(1, 8, "/device:GPU:0 NVIDIA", "Stream #8(MemcpyD2D)"),
        *row(1, 9, "/device:GPU:0 NVIDIA", "Steps"),
        *row(2, 1, "/host:CPU", "python"),
        span(7, "product", 10.0, 20.0),
        span(7, "sum", 25.0, 30.0),
        span(8, "copy", 28.0, 30.0),
        span(9, "step", 0.0, 100.0),
        span(1, "python", 0.0, 100.0, pid=2),
    ]
    shares = step_profile.time_by_kind(events, lambda event: event["name"])
    assert shares == {"product": 10.0, "idle": 5.0, "sum": 4.0, "copy": 1.0}
    assert not step_profile.time_by_kind([], lambda event: event["name"])
