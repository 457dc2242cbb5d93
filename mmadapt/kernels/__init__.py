"""The op contracts' formulas and device kernels, one package per contract.

Their sources stand in the top-level folder `kernels/`; a build copies them here. In a checkout they
are found where they are. The top-level folder has no `__init__.py` on purpose: Hugging Face has a
distribution called `kernels`, and ours must not answer to that name (see `mmadapt/_checkout.py`).
"""

from mmadapt._checkout import ROOT

if ROOT is not None:
    __path__ = [str(ROOT / "kernels")]
