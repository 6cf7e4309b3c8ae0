"""Kernels: loops over memory. They get pointers and tensors and know nothing of ranks.

Every kernel stands beside its reference in torch (``reference.py``), which defines it and takes its
place where it cannot be built.
"""
