"""Drop-in `torch.nn` modules that own their parameters and call `mmadapt.ops`."""

from mmadapt.nn._adapters import LinearAdapter, ModalityExperts, SwiGLUAdapter
from mmadapt.nn._cp import CPFactors, CPLinear
from mmadapt.nn._cross_modal import CrossModalAdapter
from mmadapt.nn._modality_gate import ModalityGate

__all__ = [
    "CPFactors",
    "CPLinear",
    "CrossModalAdapter",
    "LinearAdapter",
    "ModalityExperts",
    "ModalityGate",
    "SwiGLUAdapter",
]
