"""Momentum encoders without a second model: copies of what trains, a formula for the rest.

An exponential moving average m_t = mu m_{t-1} + (1 - mu) w_t of a frozen weight w_t = W is
m_t = W + mu^t (m_0 - W). So only trained weights need a copy that is updated every step. A frozen
weight is its own average when it starts as one (m_0 = W), which costs nothing; when a checkpoint
brings other momentum weights, the offset m_0 - W is kept and scaled at use.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class MomentumWeights(nn.Module):
    """The averages of `parameters`, put in their place by `with weights.in_place():`.

    Args:
        parameters: name -> parameter of the online encoders. Those that require a gradient now
            are averaged; the others are frozen.
        momentum: mu, the share of the old average (BLIP: 0.995).
        initial: name -> m_0 where it differs from the parameter (a checkpoint's `*_m` tensors).

    Raises:
        ValueError: momentum outside [0, 1), an initial tensor of unknown name or other shape.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        *,
        momentum: float = 0.995,
        initial: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum: expected a number in [0, 1), got {momentum}")
        initial = dict(initial or {})
        for name, tensor in initial.items():
            if name not in parameters:
                raise ValueError(f"initial: {name!r} names no parameter")
            if tensor.shape != parameters[name].shape:
                raise ValueError(
                    f"initial[{name!r}]: expected {list(parameters[name].shape)}, "
                    f"got {list(tensor.shape)}"
                )
        self.momentum = momentum
        self._online = dict(parameters)  # a plain dict: the parameters stay the model's
        self._copies: dict[str, str] = {}
        self._offsets: dict[str, str] = {}
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        for name, parameter in parameters.items():
            start = initial.get(name)
            if parameter.requires_grad:
                copy = (parameter if start is None else start).detach().clone().to(parameter)
                self._copies[name] = self._store("copy", name, copy)
            elif start is not None:
                offset = start.to(parameter) - parameter.detach()
                if offset.count_nonzero():
                    self._offsets[name] = self._store("offset", name, offset)

    def _store(self, kind: str, name: str, tensor: Tensor) -> str:
        key = f"{kind}/{name.replace('.', '/')}"  # a buffer's name holds no dots
        self.register_buffer(key, tensor)
        return key

    @torch.no_grad()
    def update(self) -> None:
        """One step of the average towards the parameters' present values."""
        self.steps += 1
        if self._copies:
            copies = [getattr(self, key) for key in self._copies.values()]
            online = [self._online[name].detach() for name in self._copies]
            torch._foreach_lerp_(copies, online, 1 - self.momentum)

    @torch.no_grad()
    def value(self, name: str) -> Tensor:
        """The average of one parameter now."""
        if name in self._copies:
            return getattr(self, self._copies[name])
        online = self._online[name].detach()
        if name in self._offsets:
            decay = torch.pow(self.momentum, self.steps.double()).to(online.dtype)
            return online + decay * getattr(self, self._offsets[name])
        return online

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The online modules compute with the averages inside this block.

        Enter it before the step's online forward: a graph that holds the parameters must not see
        other values in them.
        """
        names = [*self._copies, *self._offsets]
        kept = {name: self._online[name].data for name in names}
        try:
            for name in names:
                self._online[name].data = self.value(name)
            yield
        finally:
            for name in names:
                self._online[name].data = kept[name]

    def stored(self) -> int:
        """Numbers kept for the momentum encoders beside the online ones."""
        keys = [*self._copies.values(), *self._offsets.values()]
        return sum(getattr(self, key).numel() for key in keys)
