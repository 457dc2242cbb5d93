from mmadapt.ops._modality_gate import modality_gate
from mmadapt.ops._projected_modality_gate import projected_modality_gate
from mmadapt.ops._swiglu_adapter import swiglu_adapter

__all__ = ["modality_gate", "projected_modality_gate", "swiglu_adapter"]
