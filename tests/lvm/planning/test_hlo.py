"""HLO text: trip counts, collectives and HBM traffic of small programs."""

import pytest

from lvm.planning.collectives import PADDING, collective_bytes
from lvm.planning.hlo import HloArray, Program
from lvm.planning.roofline import hbm_bytes

LOOP = """\
HloModule jit_step, is_scheduled=true

%sum (a: bf16[], b: bf16[]) -> bf16[] {
  %a = bf16[] parameter(0)
  %b = bf16[] parameter(1)
  ROOT %add = bf16[] add(%a, %b)
}

%scatter (input: bf16[64,32]) -> bf16[16,32] {
  %input = bf16[64,32]{1,0:T(8,128)(2,1)} parameter(0)
  %all-reduce.1 = bf16[64,32]{1,0:T(8,128)(2,1)} all-reduce(%input), replica_groups={{0,1,2,3}}, to_apply=%sum
  %id = u32[] partition-id()
  ROOT %slice = bf16[16,32]{1,0} dynamic-slice(%all-reduce.1, %id, %id), dynamic_slice_sizes={16,32}
}

%start (p: bf16[8,32]) -> bf16[32,32] {
  %p = bf16[8,32]{1,0} parameter(0)
  ROOT %ag = bf16[32,32]{1,0} all-gather(%p), replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0'}, \
dimensions={0}, frontend_attributes={chain_id="0"}
}

%beside (q: bf16[8,32], w: bf16[32,32]) -> (bf16[32,32], bf16[8,32]) {
  %q = bf16[8,32]{1,0} parameter(0)
  %w = bf16[32,32]{1,0} parameter(1)
  %ag.1 = bf16[32,32]{1,0} all-gather(%q), replica_groups=[2,4]<=[8], dimensions={0}, \
frontend_attributes={chain_id="0"}
  %product = bf16[8,32]{1,0} convolution(%q, %w), dim_labels=bf_io->bf
  ROOT %both = (bf16[32,32]{1,0}, bf16[8,32]{1,0}) tuple(%ag.1, %product)
}

%body (state: (s32[], bf16[8,32], bf16[64,32])) -> (s32[], bf16[8,32], bf16[64,32]) {
  %state = (s32[], bf16[8,32]{1,0}, /*index=2*/bf16[64,32]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %x = bf16[8,32]{1,0} get-tuple-element(%state), index=1
  %g = bf16[64,32]{1,0} get-tuple-element(%state), index=2
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %started = bf16[32,32]{1,0} fusion(%x), kind=kCustom, calls=%start
  %while_multiplying = (bf16[32,32]{1,0}, bf16[8,32]{1,0}) fusion(%x, %started), kind=kOutput, calls=%beside
  %y = bf16[8,32]{1,0} get-tuple-element(%while_multiplying), index=1
  %part = bf16[16,32]{1,0} fusion(%g), kind=kCustom, calls=%scatter
  ROOT %out = (s32[], bf16[8,32]{1,0}, bf16[64,32]{1,0}) tuple(%next, %y, %g)
}

%condition (state: (s32[], bf16[8,32], bf16[64,32])) -> pred[] {
  %state.1 = (s32[], bf16[8,32]{1,0}, bf16[64,32]{1,0}) parameter(0)
  %j = s32[] get-tuple-element(%state.1), index=0
  %end = s32[] constant(6)
  ROOT %less = pred[] compare(%j, %end), direction=LT
}

ENTRY %main (x0: bf16[8,32], g0: bf16[64,32]) -> bf16[8,32] {
  %x0 = bf16[8,32]{1,0} parameter(0)
  %g0 = bf16[64,32]{1,0} parameter(1)
  %first = s32[] constant(FIRST)
  %init = (s32[], bf16[8,32]{1,0}, bf16[64,32]{1,0}) tuple(%first, %x0, %g0)
  %loop = (s32[], bf16[8,32]{1,0}, bf16[64,32]{1,0}) while(%init), condition=%condition, body=%body
  %x1 = bf16[8,32]{1,0} get-tuple-element(%loop), index=1
  %norm = f32[10]{0} all-reduce(%x1), replica_groups={}, to_apply=%sum
  ROOT %result = bf16[8,32]{1,0} copy(%x1)
}
"""


def collectives(text, weights):
    return {c.kind: c for c in collective_bytes(Program(text), weights, chips=8)}


@pytest.mark.parametrize(("first", "trips"), [(0, 6), (2, 4)])
def test_program_trip_count(first, trips):
    program = Program(LOOP.replace("FIRST", str(first)))
    loop = program.computations[program.entry]["loop"]
    assert program.trip_count(loop, program.computations["main"]) == trips
    assert {run.count for run in program.executions() if run.scope == "body"} == {trips}
    assert program.unknown_trip_counts == []


def test_program_unknown_trip_count_is_reported():
    program = Program(LOOP.replace("constant(6)", "get-tuple-element(%state.1), index=0"))
    assert len(list(program.executions())) > 10
    assert program.unknown_trip_counts == ["loop"]


def test_program_parses_instructions():
    program = Program(LOOP)
    state = program.computations["body"]["state"]
    assert state.arrays == (
        HloArray("s32", ()),
        HloArray("bf16", (8, 32), "{1,0}"),
        HloArray("bf16", (64, 32), "{1,0}"),
    )
    assert state.bytes == 4 + 2 * 8 * 32 + 2 * 64 * 32
    assert HloArray("pred", (3,)).bytes == 3
    assert not HloArray("bf16", (8,), "{0:T(8)(2,1)S(1)}").in_hbm


def test_collective_bytes_of_a_loop():
    received = collectives(LOOP.replace("FIRST", "0"), [(32, 32), (64, 32)])
    assert set(received) == {"all-gather", "reduce-scatter", "all-reduce"}
    gather, scatter, reduce = (received[kind] for kind in ("all-gather", "reduce-scatter", "all-reduce"))
    # One gather per iteration, although two fusions contain it; it overlaps with compute.
    size = 6 * 2 * 32 * 32 * 3 / 4
    assert (gather.count, gather.bytes, gather.overlapped_bytes) == (6, size, size)
    # An all-reduce whose result each chip slices.
    assert (scatter.count, scatter.bytes, scatter.overlapped_bytes) == (6, 6 * 2 * 64 * 32 * 3 / 4, 0)
    assert (reduce.count, reduce.bytes) == (1, 2 * 4 * 10 * 7 / 8)


def test_collective_bytes_separates_padding():
    # 60 rows over 4 chips: 15 each, padded to 16.
    permute = "%moved = bf16[16,32]{1,0} collective-permute(%part), source_target_pairs={{0,1},{1,0}}"
    text = LOOP.replace("FIRST", "0").replace("  ROOT %out = (s32[]", f"  {permute}\n  ROOT %out = (s32[]")
    received = collectives(text, [(60, 32)])
    assert received["reduce-scatter"].bytes == 6 * 2 * 60 * 32 * 3 / 4
    assert received[PADDING].bytes == 6 * (2 * 4 * 32 * 3 / 4 + 2 * 16 * 32)
    assert received[PADDING].count == 6  # permutes; padded scatters count as scatters
    assert "collective-permute" not in received


@pytest.mark.parametrize(
    ("sent", "kind"),
    [
        ("g", "all-gather"),  # loop-carried, unchanged
        ("x", "reduce-scatter"),  # computed in the previous iteration
        ("part", "reduce-scatter"),
    ],
)
def test_collective_bytes_of_permutes(sent, kind):
    permute = f"%moved = bf16[16,32]{{1,0}} collective-permute(%{sent}), source_target_pairs={{{{0,1}},{{1,0}}}}"
    plain = LOOP.replace("FIRST", "0")
    text = plain.replace("  ROOT %out = (s32[]", f"  {permute}\n  ROOT %out = (s32[]")
    without, received = (collectives(t, [(64, 32)]) for t in (plain, text))
    assert received[kind].count == without[kind].count + 6
    assert received[kind].bytes == without[kind].bytes + 6 * 2 * 16 * 32


def test_hbm_bytes_of_fusions():
    text = """\
HloModule m, is_scheduled=true

%inner (whole: f32[4,100], i: s32[]) -> f32[1,100] {
  %whole = f32[4,100]{1,0} parameter(0)
  %i = s32[] parameter(1)
  ROOT %slice = f32[1,100]{1,0} dynamic-slice(%whole, %i), dynamic_slice_sizes={1,100}
}

%outer (stack: f32[4,100], result: f32[4,100], j: s32[]) -> f32[4,100] {
  %stack = f32[4,100]{1,0} parameter(0)
  %result = f32[4,100]{1,0} parameter(1)
  %j = s32[] parameter(2)
  %part = f32[1,100]{1,0} fusion(%stack, %j), kind=kLoop, calls=%inner
  ROOT %update = f32[4,100]{1,0} dynamic-update-slice(%result, %part, %j, %j)
}

ENTRY %main (a: f32[4,100], b: f32[4,100], k: s32[]) -> f32[4,100] {
  %a = f32[4,100]{1,0} parameter(0)
  %b = f32[4,100]{1,0} parameter(1)
  %k = s32[]{:S(6)} parameter(2)
  %near = f32[4,100]{1,0:S(1)} copy(%a)
  %far = f32[4,100]{1,0} copy(%near)
  ROOT %sliced = f32[4,100]{1,0} fusion(%far, %b, %k), kind=kLoop, calls=%outer
}
"""
    # The first copy reads 1600 bytes, the second writes 1600; the fusion reads one row of an array and writes one.
    assert hbm_bytes(Program(text)) == 1600 + 1600 + 400 + 400
