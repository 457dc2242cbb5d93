"""What Aurora's wrappers have in common, and what they share."""

from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from mmadapt.peft.aurora.config import AuroraConfig
from mmadapt.peft.aurora.contraction import Contraction
from mmadapt.peft.aurora.factors import AuroraFactors

PREFIX = "mmadapt_aurora_"
FACTORS = PREFIX + "factors"
MODE = PREFIX + "mode"


class Shared:
    """What the wrappers of one tuner share. No module: the tuner alone owns the factors.

    Attributes:
        factors: `AuroraFactors` by adapter; a child of the tuner.
        layers: the wrappers with mode vectors, in the order of the model.
        contraction: the contracted modes.
    """

    def __init__(self, factors: nn.ModuleDict) -> None:
        self.factors = factors
        self.layers: list[Any] = []
        self.contraction = Contraction()

    def add(self, adapter: str, config: AuroraConfig, shape: torch.Size) -> AuroraFactors:
        """The factors of an adapter, with those that weights of `shape` [out, in] need."""
        if adapter not in self.factors:
            self.factors[adapter] = AuroraFactors(config)
        self.factors[adapter].add(shape[1], shape[0])
        return self.factors[adapter]


class AuroraLayer(nn.Module, BaseTunerLayer):
    """Wraps one module of the frozen model, under `base_layer`.

    Adapter parameters sit in `nn.ParameterDict`s keyed by adapter name, whose attribute names start
    with `mmadapt_aurora_`.
    """

    other_param_names = ("mmadapt_aurora_config",)

    def __init__(self, base_layer: nn.Module, shared: Shared) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.training = base_layer.training  # adapters may be added after model.eval()
        self.shared = shared
        self.mmadapt_aurora_config: dict[str, AuroraConfig] = {}
        for name in self.adapter_layer_names:
            self.add_module(name, nn.ParameterDict())
        self._disable_adapters = False
        self._active_adapter: list[str] = []
        self.merged_adapters: list[str] = []

    def update_layer(
        self, adapter_name: str, config: AuroraConfig, active: list[str], inference: bool
    ) -> None:
        """Add the adapter `adapter_name`, on the device and in the dtype of the base layer."""
        self.mmadapt_aurora_config[adapter_name] = config
        for name, parameter in self.new_parameters(config).items():
            getattr(self, name)[adapter_name] = parameter
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(active, inference_mode=inference)

    def new_parameters(self, config: AuroraConfig) -> dict[str, nn.Parameter]:
        """Fresh parameters of one adapter, by the name of the part."""
        raise NotImplementedError

    def has(self, adapter: str) -> bool:
        """Whether the adapter has a part in this layer."""
        return adapter in self.mmadapt_aurora_config

    @property
    def current(self) -> list[str]:
        """Names of the active adapters that have a part in this layer, if they are enabled."""
        if self._disable_adapters:
            return []
        return [name for name in self.active_adapters if name in self.mmadapt_aurora_config]

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self.shared.contraction.clear()


def aurora_layers(model: nn.Module) -> Iterator[tuple[str, AuroraLayer]]:
    """The wrappers of a model by path, in order."""
    for name, module in model.named_modules():
        if isinstance(module, AuroraLayer):
            yield name, module
