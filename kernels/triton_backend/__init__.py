"""Kernels in Triton: the portable second choice on GPUs."""
