"""GPU kernels in Triton: one file for each operation, and `registry.OPS`, the table of them.

Importing needs no GPU and no driver. A launcher takes tensors of one CUDA device and raises ``ValueError``
where a shape, type or device does not fit; values (ids, slots, positions) are trusted.
"""
