"""The trainable map from visual features to the language model's width (docs/pill.md)."""

from typing import Any

import torch
from torch import Tensor, nn

from mmadapt.peft.pill.config import PillConfig
from mmadapt.peft.pill.layer import PROJECTOR, PillLayer


class ParameterCopy(nn.Module):
    """A trainable copy of a module's parameters, with which that module runs in place of its own.

    The copies have flat names (`linear_1__weight`): PEFT before 0.21 finds the adapter's name in a
    key only directly in front of the last component.
    """

    def __init__(self, source: nn.Module) -> None:
        super().__init__()
        self.names = {name.replace(".", "__"): name for name, _ in source.named_parameters()}
        for flat, name in self.names.items():
            parameter = source.get_parameter(name).detach().clone()
            self.register_parameter(flat, nn.Parameter(parameter))

    def forward(self, source: nn.Module, *args: Any, **kwargs: Any) -> Any:
        parameters = {name: getattr(self, flat) for flat, name in self.names.items()}
        return torch.func.functional_call(source, parameters, args, kwargs)


class PillProjector(PillLayer):
    """Wraps the model's projector; an adapter with its own projector uses that instead.

    Args:
        base_layer: the model's projector.
        path: where it is, for messages.
        dim: width of the language model.
    """

    adapter_layer_names = (PROJECTOR,)

    def __init__(self, base_layer: nn.Module, adapter_name: str, path: str, dim: int) -> None:
        super().__init__(base_layer, adapter_name)
        self.path, self.dim = path, dim

    def new_parts(self, config: PillConfig) -> dict[str, nn.Module]:
        if config.projector == "linear":
            projector = nn.Linear(self.in_features, self.dim, bias=False)
            nn.init.normal_(projector.weight, std=0.02)
            return {PROJECTOR: projector}
        return {PROJECTOR: ParameterCopy(self.base_layer)}

    @property
    def in_features(self) -> int:
        """Width of the visual features: the input of the projector's first linear layer."""
        for module in self.base_layer.modules():
            if isinstance(module, nn.Linear):
                return module.in_features
        raise ValueError(
            f"{self.path} ({type(self.base_layer).__name__}) has no linear layer that tells the "
            "width of the visual features; use projector='full' or 'frozen'"
        )

    def forward(self, features: Tensor, *args: Any, **kwargs: Any):
        own = self.part(PROJECTOR)
        if own is None:
            return self.base_layer(features, *args, **kwargs)
        dtype = next(own.parameters()).dtype
        inputs = (features.to(dtype), *args)
        if isinstance(own, ParameterCopy):
            inputs = (self.base_layer, *inputs)
        return own(*inputs, **kwargs).to(features.dtype)

    def anchor(self) -> Tensor | None:
        """A scalar zero that depends on the trained projector; None if nothing is trained."""
        own = self.part(PROJECTOR)
        if own is None or not any(p.requires_grad for p in own.parameters()):
            return None
        parameter = next(own.parameters())
        features = torch.zeros(
            1, 1, self.in_features, dtype=parameter.dtype, device=parameter.device
        )
        # Through forward, not over the parameters: under FSDP2 only forward sees them whole.
        return self(features).sum() * 0
