"""The contracts inside the published modules: outputs and gradients of released code, fp32."""

import pytest
import torch
from torch.nn.functional import gelu

from mmadapt.ops import cp_linear, cp_linear_group, swiglu_adapter

OUTPUT, GRADIENT = 2e-6, 2e-5
HEADS = 4


@pytest.fixture
def compare(golden, assert_close):
    """Run ``function(params, inputs)``; compare its output and the gradients named in `check`."""

    def run(name, function, check):
        params, inputs, grads, input_grads, output, grad_output = golden(name)
        leaves = {n: params[n].requires_grad_() for n in check}
        leaves |= {n: inputs[n].requires_grad_() for n in input_grads}
        y = function(params, inputs)
        assert_close(y, output, OUTPUT)
        ours = torch.autograd.grad(y, list(leaves.values()), grad_output)
        for key, grad in zip(leaves, ours, strict=True):
            assert_close(grad, {**grads, **input_grads}[key], GRADIENT)

    return run


def test_pill_adapter(compare, backend):
    names = ["down_sampler_gate.weight", "down_sampler.weight", "up_sampler.weight"]

    def function(params, inputs):
        weights = [params[n] for n in names]
        return swiglu_adapter(inputs["x"], *weights, residual="none", backend=backend)

    compare("pill_glu_adapter", function, names)


SHARED = ["shared.CP_U.weight", "shared.CP_V.weight", "shared.CP_C"]


def factors(params):
    return params["shared.CP_U.weight"], params["shared.CP_V.weight"], params["shared.CP_C"]


def attention(q, k, v, mask=None):
    q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in (q, k, v))
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    probabilities = (scores if mask is None else scores + mask).softmax(-1)
    return (probabilities @ v).transpose(1, 2).flatten(2)


def test_aurora_vit_attention(compare):
    def function(params, inputs):
        u, v, core = factors(params)
        *qkv, proj = (core @ p for p in params["mod.CP_attention"].t())
        weights, biases = params["mod.qkv.weight"].chunk(3), params["mod.qkv.bias"].chunk(3)
        mixed = attention(*cp_linear_group(inputs["x"], weights, biases, u, v, qkv))
        return cp_linear(mixed, params["mod.proj.weight"], params["mod.proj.bias"], u, v, proj)

    compare("aurora_vit_attention", function, [*SHARED, "mod.CP_attention"])


def test_aurora_vit_mlp(compare):
    def function(params, inputs):
        u, v, core = factors(params)
        rank = core.shape[0]
        modes = torch.einsum("abr,rj->abj", core, params["mod.mlp_CP"])
        # The released code flattens (core column, mode index) and re-reads it as 4 groups of R.
        first, second = (modes[..., j : j + 4].reshape(rank, 4, rank).unbind(1) for j in (0, 4))
        weights, biases = params["mod.fc1.weight"].chunk(4), params["mod.fc1.bias"].chunk(4)
        hidden = [gelu(h) for h in cp_linear_group(inputs["x"], weights, biases, u, v, first)]
        columns = params["mod.fc2.weight"].chunk(4, dim=1)
        parts = zip(hidden, columns, second, strict=True)
        chunks = [cp_linear(h, w, None, u, v, g.t()) for h, w, g in parts]
        return sum(chunks) + params["mod.fc2.bias"]

    compare("aurora_vit_mlp", function, [*SHARED, "mod.mlp_CP"])


BERT_MODES = ["mod.q_CP", "mod.k_CP", "mod.v_CP"]
BERT_LAYERS = ["mod.query", "mod.key", "mod.value"]


def bert_operands(params):
    u, v, core = factors(params)
    modes = [core @ params[n].squeeze(1) for n in BERT_MODES]
    weights = [params[f"{n}.weight"] for n in BERT_LAYERS]
    return weights, [params[f"{n}.bias"] for n in BERT_LAYERS], u, v, modes


def test_aurora_bert_self_attention(compare):
    def function(params, inputs):
        weights, biases, u, v, modes = bert_operands(params)
        qkv = cp_linear_group(inputs["x"], weights, biases, u, v, modes)
        return attention(*qkv, inputs["attention_mask"])

    compare("aurora_bert_self_attention", function, [*SHARED, *BERT_MODES])


def test_aurora_bert_cross_attention(compare):
    def function(params, inputs):
        weights, biases, u, v, modes = bert_operands(params)
        query = cp_linear(inputs["x"], weights[0], biases[0], u, v, modes[0])
        states = inputs["encoder"]
        key, value = cp_linear_group(states, weights[1:], biases[1:], u, v, modes[1:])
        return attention(query, key, value, inputs["encoder_attention_mask"])

    compare("aurora_bert_cross_attention", function, [*SHARED, *BERT_MODES])
