"""Backends in Triton: one module per contract, between the operators and `mmadapt.kernels`.

They check what the kernels can serve, choose tiles and launch. Importing one needs triton.
"""
