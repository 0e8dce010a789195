"""The decoder-only transformer, its attention kernels and its vocabulary."""
