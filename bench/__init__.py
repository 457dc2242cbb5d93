"""Microbenchmarks: `python -m bench`. Records go to bench/results/, readings to bench/NOTES.md."""

import mmadapt  # noqa: F401  (hides the folder kernels/ from libraries that probe for that name)
