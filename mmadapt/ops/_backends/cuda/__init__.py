"""Backends in CUDA C++ (csrc/cuda): one module per contract, between the operators and `_C.cuda`.

They check what the kernels can serve, allocate, and launch on torch's current stream. Importing one
needs an extension that was built with nvcc; a GPU only the calls need.
"""
