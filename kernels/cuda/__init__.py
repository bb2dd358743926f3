"""CUDA C++ kernels: compiled at first use, launched through the driver's interface."""
