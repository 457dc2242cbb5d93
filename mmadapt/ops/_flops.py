"""FLOP formulas of the operators for `torch.utils.flop_counter`.

That module imports triton where it is installed, which `import mmadapt.ops` must not, so the
formulas are registered when somebody else imports it. Products count 2 FLOPs per multiply-add, as
in torch's own formulas; elementwise work is left out. A routed token counts once, whatever its
expert; a gate counts every token, because the number of masked ones is data.
"""

import importlib.abc
import importlib.util
import math
import sys

import torch

_COUNTER = "torch.utils.flop_counter"


def _swiglu_forward(x, gate, *args, out_shape=None, **kwargs) -> int:
    (tokens, dim), rank = x, gate[-2]
    return 6 * tokens * dim * rank


def _swiglu_backward(dy, x, gate, *args, out_shape=None, **kwargs) -> int:
    (tokens, dim), rank = x, gate[-2]
    of_x, of_gate, of_down, of_up, of_norm = args[10]
    # dy @ up is due for everything but the gradient of `up` itself.
    hidden = of_x or of_gate or of_down or of_norm
    through = 2 * (of_x or of_norm)
    return 2 * tokens * dim * rank * (hidden + through + of_gate + of_down + of_up)


def _cp_forward(
    x, weights, biases, factor_in, factor_out, modes, *args, out_shape=None, **kwargs
) -> int:
    tokens, dim_in = x
    rank = factor_in[0]
    total = 2 * tokens * dim_in * rank
    for (dim_out, _), mode in zip(weights, modes, strict=True):
        total += 2 * tokens * (dim_in * dim_out + rank * dim_out + _core(mode, rank))
    return total


def _cp_backward(
    dys, x, weights, biases, factor_in, factor_out, modes, *args, out_shape=None, **kwargs
) -> int:
    (tokens, dim_in), rank = x, factor_in[0]
    (of_x, of_in, of_out), of_modes = args[5], args[6]
    total = 2 * tokens * dim_in * rank * (of_x + of_in)
    for (dim_out, _), mode, of_mode in zip(weights, modes, of_modes, strict=True):
        total += 2 * tokens * dim_in * dim_out * of_x
        total += 2 * tokens * (rank * dim_out + _core(mode, rank)) * of_out
        total += 2 * tokens * rank * dim_out * (of_x or of_in or of_mode)
        total += 2 * tokens * _core(mode, rank) * ((of_x or of_in) + of_mode)
    return total


def _core(mode, rank: int) -> int:
    return rank * rank if len(mode) == 2 else 0


def _gate(*args, out_shape=None, **kwargs) -> int:
    return 0


def _projected_forward(value, hidden, weight, mask, *args, out_shape=None, **kwargs) -> int:
    return 2 * math.prod(hidden) * weight[0]


def _projected_backward(
    dy, value, hidden, weight, mask, gate, needs, *args, out_shape=None, **kwargs
) -> int:
    return 2 * math.prod(hidden) * weight[0] * (needs[1] + needs[2])


_FORMULAS = {
    "swiglu_adapter_fwd": _swiglu_forward,
    "swiglu_adapter_bwd": _swiglu_backward,
    "cp_linear_fwd": _cp_forward,
    "cp_linear_bwd": _cp_backward,
    "modality_gate_fwd": _gate,
    "modality_gate_bwd": _gate,
    "projected_modality_gate_fwd": _projected_forward,
    "projected_modality_gate_bwd": _projected_backward,
    "modality_gate_inplace": _gate,
    "projected_modality_gate_inplace": _projected_forward,
}


def _register() -> None:
    register_flop_formula = sys.modules[_COUNTER].register_flop_formula
    for name, formula in _FORMULAS.items():
        register_flop_formula(getattr(torch.ops.mmadapt, name))(formula)


class _RegisterAfterImport(importlib.abc.MetaPathFinder):
    """Finds torch's counter as usual, once, and registers the formulas after it has loaded."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname != _COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        execute = spec.loader.exec_module

        def execute_and_register(module):
            execute(module)
            _register()

        spec.loader.exec_module = execute_and_register
        return spec


def register_on_import() -> None:
    """Register the formulas now if torch's counter is loaded, otherwise right after it loads."""
    if _COUNTER in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _RegisterAfterImport())
