"""Names in messages."""

from lvm.interop.tensors import format_names


def test_format_names_counts_those_left_out():
    names = [f"layer {i}" for i in range(10)]
    assert format_names(names[:2]) == "layer 0; layer 1"
    assert format_names(names[:8]).endswith("; layer 7")
    assert format_names(names) == f"{format_names(names[:8])}; and 2 more"
