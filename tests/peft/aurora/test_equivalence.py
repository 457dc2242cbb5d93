"""The tuned model against the plain one of plain.py: values, gradients, sharing, precision."""

import copy
import importlib.util
from pathlib import Path

import pytest
import torch

_spec = importlib.util.spec_from_file_location("plain", Path(__file__).with_name("plain.py"))
plain = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(plain)

SETTINGS = [
    {"core": "dense"},
    {"core": "dense", "mlp_layout": "clean", "scale": 0.5},
    {"core": "diagonal", "gqt": False},
    {"core": "diagonal", "mlp_layout": "released", "gqt_factor": 0.7},
]


def relative(found, expected):
    return ((found - expected).norm() / expected.norm().clamp_min(1e-30)).item()


def pair(tiny, kind, dtype, **config):
    """A tuned model in eval mode, and the same base without adapters."""
    base = tiny.base(kind, dtype=dtype)
    twin = copy.deepcopy(base)
    return tiny.aurora(kind, base, **config).to(dtype), twin


def as_loss(kind, output):
    return output.itm_score.double().square().mean() if kind == "retrieval" else output.loss


def compare(tiny, kind, dtype, **config):
    """Relative errors of the loss and of every adapter gradient."""
    model, twin = pair(tiny, kind, dtype, **config)
    batch = tiny.batch(kind, dtype=dtype)
    parameters = {
        n: p.detach().clone().requires_grad_() for n, p in plain.parameters_of(model).items()
    }
    expected = as_loss(kind, plain.run(twin, parameters, model.active_peft_config, batch))
    expected.backward()
    found = as_loss(kind, model(**batch))
    found.backward()
    errors = {"loss": relative(found.detach(), expected.detach())}
    for name, parameter in plain.parameters_of(model).items():
        errors[name] = relative(parameter.grad, parameters[name].grad)
        assert parameters[name].grad.any(), name
    return errors


@pytest.mark.parametrize("config", SETTINGS, ids=str)
@pytest.mark.parametrize("kind", ["retrieval", "vqa"])
def test_blip_fp64(tiny, kind, config):
    errors = compare(tiny, kind, torch.float64, **config)
    # Hugging Face masks, and casts labels' losses, in fp32 nowhere here.
    assert errors.pop("loss") <= 1e-12
    assert max(errors.values()) <= 1e-10, errors


@pytest.mark.parametrize("core", ["dense", "diagonal"])
@pytest.mark.parametrize("kind", ["llama", "llava"])
def test_language_models_fp32(tiny, kind, core):
    """Their norms and losses are in fp32 whatever the model's dtype."""
    errors = compare(tiny, kind, torch.float32, core=core)
    assert errors.pop("loss") <= 2e-6
    assert max(errors.values()) <= 5e-5, errors


def test_blip_fp32(tiny):
    errors = compare(tiny, "retrieval", torch.float32)
    assert errors.pop("loss") <= 2e-5
    assert max(errors.values()) <= 5e-5, errors


@pytest.mark.parametrize("core", ["dense", "diagonal"])
def test_widths_may_differ(tiny, core):
    """A wider vision tower, and an FFN of three times the width."""
    base = {"text_dim": 16, "hidden": 96}
    model, twin = [tiny.base("retrieval", dtype=torch.float64, **base) for _ in range(2)]
    model = tiny.aurora("retrieval", model, rank=6, core=core).to(torch.float64)
    batch = tiny.batch("retrieval", dtype=torch.float64)
    expected = plain.run(twin, plain.parameters_of(model), model.active_peft_config, batch)
    torch.testing.assert_close(model(**batch).itm_score, expected.itm_score, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("core", ["dense", pytest.param("diagonal", marks=pytest.mark.slow)])
def test_gradcheck(tiny, core):
    """All of an adapted attention at width 16 and rank 4."""
    model = tiny.aurora("retrieval", tiny.base("retrieval", dim=16), rank=4, core=core).double()
    attention = model.get_base_model().vision_model.encoder.layers[0].self_attn
    factors = model.base_model.factors["default"]
    leaves = [p for p in attention.parameters() if p.requires_grad] + list(factors.parameters())
    x = torch.randn(1, 3, 16, dtype=torch.float64, requires_grad=True)

    def function(x, *ignored):
        model.base_model.contraction.clear()  # gradcheck changes leaves through `.data`
        return attention(x)[0]

    assert torch.autograd.gradcheck(function, (x, *leaves))


def test_bf16(tiny):
    """Beside the error that the frozen model itself has in bf16."""
    exact, _ = pair(tiny, "retrieval", torch.float64)
    exact.train()
    batch = tiny.batch("retrieval", dtype=torch.float64)
    block = exact.get_base_model().vision_model.encoder.layers[0]
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    expected = block(x)
    expected.square().sum().backward()
    gradients = {n: p.grad.clone() for n, p in block.named_parameters() if p.grad is not None}
    factors = exact.base_model.factors["default"]
    gradients |= {n: p.grad.clone() for n, p in factors.named_parameters()}
    exact.zero_grad()
    half = exact.to(torch.bfloat16)
    half.base_model._cast_adapter_dtype("default")
    output = block(x.bfloat16())
    assert relative(output.double(), expected) <= 1e-2
    output.square().sum().backward()
    for module in (block, half.base_model.factors["default"]):
        for name, parameter in module.named_parameters():
            if parameter.grad is not None:
                found, known = parameter.grad.double(), gradients[name]
                assert relative(found, known) <= 3e-2, name
                cosine = torch.cosine_similarity(found.flatten(), known.flatten(), dim=0)
                assert cosine >= 0.999, name
    with torch.no_grad():
        assert torch.isfinite(half(**batch).itm_score).all()


def test_autocast(tiny, kind):
    batch = tiny.batch(kind)
    model = tiny.aurora(kind)
    expected = tiny.scores(kind, model, batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = tiny.loss(kind, model, batch)
        found = tiny.scores(kind, model, batch)
    assert relative(found.float(), expected) <= 5e-2
    loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad.dtype == torch.float32 and parameter.grad.any(), name


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(tiny, kind, reentrant):
    """Also with two forward passes in front of one backward pass, in training with dropout."""

    anchor = torch.zeros((), requires_grad=True)  # reentrant checkpointing wants an input with one

    def gradients(checkpointing):
        model = tiny.aurora(kind, branch_dropout=0.2).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            vision = getattr(model.get_base_model(), "vision_model", None)
            if vision is not None:  # transformers sees to the embeddings of text
                vision.embeddings.register_forward_hook(lambda m, a, output: output + anchor)
        elif reentrant:  # there no layer takes over shared projections in training
            for hook in model.base_model._hooks:
                hook.remove()
        torch.manual_seed(3)
        losses = [tiny.loss(kind, model, tiny.batch(kind, seed=seed)) for seed in (1, 2)]
        sum(losses).backward()
        return tiny.gradients(model)

    expected, found = gradients(False), gradients(True)
    assert found.keys() == expected.keys() and len(found) > 10
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)
