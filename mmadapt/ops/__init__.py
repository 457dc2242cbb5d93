"""The kernels' public functions: checked, differentiable, compiled and dispatched to a backend."""

from mmadapt.ops import _flops
from mmadapt.ops._backends import BackendError, Choice, backends
from mmadapt.ops._cp_linear import cp_linear, cp_linear_group
from mmadapt.ops._explain import explain
from mmadapt.ops._modality_gate import modality_gate
from mmadapt.ops._projected_modality_gate import projected_modality_gate
from mmadapt.ops._swiglu_adapter import swiglu_adapter

__all__ = [
    "BackendError",
    "Choice",
    "backends",
    "cp_linear",
    "cp_linear_group",
    "explain",
    "modality_gate",
    "projected_modality_gate",
    "swiglu_adapter",
]

_flops.register_on_import()
