"""Which norm feeds a sublayer of a decoder layer, and whether the fused op computes that norm.

Nothing is assumed from names. The layer's source must show that the norm's output is the argument
of the sublayer and of nothing else, and the norm must give the numbers of LLaMA's RMSNorm on a
probe. Gemma's ``1 + weight`` and `torch.nn.RMSNorm`, which rounds once, do not.
"""

import ast
import copy
import functools
import inspect
import itertools
import textwrap

import torch
from torch import Tensor, nn

_EPS_NAMES = ("variance_epsilon", "eps")


class UnfusableError(Exception):
    """Why a norm is left as it is."""


def feeding_norm(layer: nn.Module, sublayer: str) -> tuple[str, nn.Module]:
    """Name and module of the norm whose output is read by `layer`'s `sublayer` and nothing else.

    Raises:
        UnfusableError: there is none, or it is not the RMSNorm that the fused op computes.
    """
    kind = type(layer).__name__
    if "forward" in layer.__dict__:
        raise UnfusableError(f"the forward of this {kind} was replaced")
    name = _norm_before(type(layer).forward, sublayer)
    norm = layer._modules.get(name) if name else None
    if norm is None:
        raise UnfusableError(
            f"{kind}.forward has no statement `h = self.<norm>(...)` directly before `self."
            f"{sublayer}(h)` that alone reads h"
        )
    check_rms_norm(norm)
    return name, norm


def norm_eps(norm: nn.Module) -> float | None:
    """The epsilon of an RMSNorm, under either of its usual names."""
    found = (getattr(norm, name, None) for name in _EPS_NAMES)
    return next((float(eps) for eps in found if isinstance(eps, float)), None)


def check_rms_norm(norm: nn.Module) -> None:
    """Raise UnfusableError unless `norm` is LLaMA's: fp32 statistics, rounding, then the weight."""
    kind = type(norm).__name__
    if "forward" in norm.__dict__:
        raise UnfusableError(f"the forward of this {kind} was replaced")
    parameters = [name for name, _ in norm.named_parameters()]
    eps = norm_eps(norm)
    if "RMSNorm" not in kind or parameters != ["weight"] or norm.weight.ndim != 1 or eps is None:
        raise UnfusableError(
            f"{kind} is not an RMSNorm with one weight vector and an epsilon in "
            f"{' or '.join(_EPS_NAMES)}"
        )
    try:
        same = all(_agrees(norm, eps, dtype) for dtype in (torch.float32, torch.bfloat16))
    except Exception as error:  # whatever a norm of another kind does with the probe
        raise UnfusableError(f"{kind} fails on the probe: {error}") from error
    if not same:
        raise UnfusableError(f"{kind} does not compute what LLaMA's RMSNorm does")


@torch.no_grad()
def _agrees(norm: nn.Module, eps: float, dtype: torch.dtype) -> bool:
    """Whether a stand-in of `norm` with other weights follows LLaMA's formula on fixed numbers."""
    # Explicitly on the CPU: the model, and the default device, may be "meta".
    dim = norm.weight.shape[0]
    ramp = torch.arange(4 * dim, dtype=torch.float32, device="cpu")
    x = (ramp * 1.7).sin().view(4, dim)
    x[0] *= eps**0.5  # so small that eps counts
    x, weight = x.to(dtype), (1.5 * (ramp[:dim] + 1).cos()).to(dtype)
    stand_in = copy.copy(norm)
    stand_in._parameters = {"weight": nn.Parameter(weight, requires_grad=False)}
    found = type(norm).forward(stand_in, x)
    wide = x.float()
    unit = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    expected = weight * unit.to(dtype)
    if not isinstance(found, Tensor) or found.dtype != dtype or found.shape != x.shape:
        return False
    if dtype == torch.bfloat16:  # tells the orders of rounding apart
        return torch.equal(found, expected)
    return torch.allclose(found, expected, rtol=1e-6, atol=0)


@functools.cache
def _norm_before(forward, sublayer: str) -> str | None:
    """Name of the child in ``h = self.<name>(...)`` directly before ``h[, ...] = self.sublayer(h)``

    Directly before, and h overwritten by the result: so nobody else can read the norm's output.
    """
    try:
        source = inspect.getsource(inspect.unwrap(forward))
        function = ast.parse(textwrap.dedent(source)).body[0]
    except (OSError, TypeError, SyntaxError):  # no source, as in a frozen application
        return None
    children = [
        node.attr
        for node in ast.walk(function)
        if isinstance(node, ast.Attribute) and _is_name(node.value, "self")
    ]
    for before, statement in itertools.pairwise(getattr(function, "body", ())):
        norm, output = _called_child(before)
        reader, overwritten = _called_child(statement)
        if norm is None or reader != sublayer or output != overwritten:
            continue
        alone = children.count(norm) == children.count(sublayer) == 1
        if alone and _is_plain(before.value) and _reads_once(statement.value, output):
            return norm
    return None


def _called_child(statement: ast.stmt) -> tuple[str | None, str | None]:
    """Of ``h, ... = self.child(...)``: the names of the child and of h."""
    if not isinstance(statement, ast.Assign) or len(statement.targets) != 1:
        return None, None
    target, call = statement.targets[0], statement.value
    if isinstance(target, ast.Tuple) and target.elts:
        target = target.elts[0]
    if not (isinstance(target, ast.Name) and isinstance(call, ast.Call)):
        return None, None
    function = call.func
    if isinstance(function, ast.Attribute) and _is_name(function.value, "self"):
        return function.attr, target.id
    return None, None


def _is_plain(call: ast.Call) -> bool:
    return len(call.args) == 1 and not call.keywords and not isinstance(call.args[0], ast.Starred)


def _reads_once(call: ast.Call, name: str) -> bool:
    """Whether the first argument, or `hidden_states`, is `name`, and no other mentions it."""
    mentions = sum(_is_name(node, name) for node in ast.walk(call))
    named = [keyword.value for keyword in call.keywords if keyword.arg == "hidden_states"]
    return mentions == 1 and any(_is_name(node, name) for node in (*call.args[:1], *named))


def _is_name(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name
