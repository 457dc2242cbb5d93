"""Sweeps over settings of single kernels, run by hand on a GPU."""
