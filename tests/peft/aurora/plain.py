"""Aurora in plain torch, weight by weight, as the specification of the released code has it.

Run on an unwrapped Hugging Face model: updates are added to its weights, the query transformation
is written out in its text layers. Nothing of mmadapt computes here.
"""

import torch
from torch.func import functional_call

MODE = "mmadapt_aurora_mode"


def parameters_of(model):
    """The adapter's parameters by name without the adapter's."""
    return {
        n.removeprefix("base_model.").replace(".default", ""): p
        for n, p in model.named_parameters()
        if "mmadapt_aurora_" in n
    }


def matrices(core, vectors):
    """``M_k [R, R]`` of mode vectors [K, R]."""
    if core.ndim == 1:
        return torch.stack([torch.diag(core * p) for p in vectors])
    return torch.einsum("abr,kr->kab", core, vectors)


def released_groups(n):
    """``F_g[a, b'] = N^(j)[a, b]`` with ``m b + j = R g + b'`` from ``N [m, R, R]``."""
    chunks, rank = n.shape[:2]
    return [
        torch.stack(
            [n[(rank * g + w) % chunks, :, (rank * g + w) // chunks] for w in range(rank)], dim=1
        )
        for g in range(chunks)
    ]


def update(path, weight, core, vectors, factors, scale, layout):
    """``Delta W`` of one linear layer."""
    modes = list(matrices(core, vectors))
    if path.endswith(("fc1", "fc2")) and layout == "released":
        modes = released_groups(torch.stack(modes))
        if path.endswith("fc2"):
            modes = [m.t() for m in modes]
    out_features, in_features = weight.shape
    if path.endswith("fc2") and len(modes) > 1:
        width = in_features // len(modes)
        u, v = factors[f"factor_in_{width}"], factors[f"factor_out_{out_features}"]
        return scale * torch.cat([v @ m.t() @ u for m in modes], dim=1)
    width = out_features // len(modes)
    u, v = factors[f"factor_in_{in_features}"], factors[f"factor_out_{width}"]
    return scale * torch.cat([v @ m.t() @ u for m in modes], dim=0)


def transformed_forward(layer, scale_self, shift_self, scale_cross, shift_cross, factor):
    def forward(hidden_states, encoder_hidden_states=None, **kwargs):
        cache = kwargs.get("past_key_values")
        a, _ = layer.attention(
            hidden_states, attention_mask=kwargs.get("attention_mask"), past_key_values=cache
        )
        if encoder_hidden_states is None:
            return layer.feed_forward_chunk(a)
        c, _ = layer.crossattention(
            a,
            attention_mask=kwargs.get("encoder_attention_mask"),
            encoder_hidden_states=encoder_hidden_states,
            past_key_values=cache,
        )
        y = layer.output(layer.intermediate(c), c)
        return y + factor * (a * scale_self + shift_self) + factor * (c * scale_cross + shift_cross)

    return forward


def run(base, parameters, config, batch):
    """Output of the plain model `base` with these adapter parameters, differentiable in them."""
    factors = {
        n.rpartition(".")[2]: p for n, p in parameters.items() if "mmadapt_aurora_factors" in n
    }
    weights = {}
    for name, vectors in parameters.items():
        if name.endswith("." + MODE):
            path = name.removeprefix("model.").removesuffix("." + MODE)
            weight = base.get_submodule(path).weight
            delta = update(
                path, weight, factors["core"], vectors, factors, config.scale, config.layout
            )
            weights[f"{path}.weight"] = weight.detach() + delta
        elif name.endswith("mmadapt_aurora_scale_self"):
            where = name.removesuffix("scale_self")
            parts = [
                parameters[where + part]
                for part in ("scale_self", "shift_self", "scale_cross", "shift_cross")
            ]
            layer = base.get_submodule(where.removeprefix("model.").rpartition(".output.")[0])
            layer.forward = transformed_forward(layer, *parts, config.gqt_factor)
    return functional_call(base, weights, kwargs=batch)
