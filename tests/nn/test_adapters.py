"""SwiGLUAdapter, LinearAdapter, ModalityExperts, CrossModalAdapter."""

import math

import pytest
import torch

from mmadapt import nn
from mmadapt.kernels.swiglu_adapter import reference

DIM, RANK = 12, 3
TEXT, IMAGE = 0, 1


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def randomise(module):
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return module


ADAPTERS = {
    "swiglu": lambda **kw: nn.SwiGLUAdapter(DIM, RANK, **kw),
    "linear": lambda **kw: nn.LinearAdapter(DIM, RANK, **kw),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ADAPTERS)
def test_a_fresh_adapter_is_the_identity(name, dtype):
    x = torch.randn(2, 5, DIM).to(dtype)
    assert torch.equal(ADAPTERS[name]()(x), x)
    assert (ADAPTERS[name](residual="none")(x) == 0).all()


def test_fresh_experts_are_the_identity():
    x, modality = torch.randn(2, 5, DIM), torch.randint(-1, 2, (2, 5))
    assert torch.equal(nn.ModalityExperts(DIM, RANK)(x, modality), x)
    visual, text = torch.randn(2, 4, DIM), torch.randn(2, 3, DIM)
    y_visual, y_text = nn.CrossModalAdapter(DIM, RANK)(visual, text)
    assert torch.equal(y_visual, visual) and torch.equal(y_text, text)


def test_residuals_and_norm():
    x = torch.randn(2, 5, DIM, dtype=torch.float64)
    for residual in ("input", "norm", "none"):
        module = randomise(
            nn.SwiGLUAdapter(
                DIM, RANK, residual=residual, norm_eps=1e-5, scale=0.5, dtype=torch.float64
            )
        )
        expected = reference.swiglu_adapter(
            x.view(10, DIM),
            module.gate[None],
            module.down[None],
            module.up[None],
            norm=(module.norm_weight, 1e-5),
            residual=residual,
            scale=0.5,
        )
        torch.testing.assert_close(module(x).view(10, DIM), expected)


def test_linear_adapter_formula():
    module, x = randomise(nn.LinearAdapter(DIM, RANK)), torch.randn(5, DIM)
    torch.testing.assert_close(module(x), x + x @ module.down.t() @ module.up.t())


def test_linear_adapter_in_16_bit_with_fp32_weights():
    module, x = randomise(nn.LinearAdapter(DIM, RANK)), torch.randn(5, DIM).bfloat16()
    y = module(x)
    y.sum().backward()
    assert y.dtype == torch.bfloat16
    assert module.up.grad.dtype == torch.float32


@pytest.mark.parametrize("share_up", [False, True])
def test_experts_equal_one_adapter_per_token(share_up):
    module = randomise(nn.ModalityExperts(DIM, RANK, num_experts=3, share_up=share_up))
    x, modality = torch.randn(2, 7, DIM), torch.randint(-1, 3, (2, 7))
    y = module(x, modality)
    for b in range(2):
        for t in range(7):
            e = int(modality[b, t])
            alone = x[b, t]
            if e >= 0:
                single = nn.SwiGLUAdapter(DIM, RANK)
                single.gate, single.down, single.up = (
                    torch.nn.Parameter(p.detach()[e % p.shape[0]])
                    for p in (module.gate, module.down, module.up)
                )
                alone = single(alone)
            torch.testing.assert_close(y[b, t], alone)


def test_experts_accept_a_bool_mask():
    module = randomise(nn.ModalityExperts(DIM, RANK))
    x, is_image = torch.randn(2, 7, DIM), torch.rand(2, 7) < 0.5
    assert torch.equal(module(x, is_image), module(x, is_image.long()))


def test_locality_of_experts():
    """Changing one modality's expert alters no token of the other, bitwise."""
    module = randomise(nn.ModalityExperts(DIM, RANK))
    x, modality = torch.randn(2, 7, DIM), torch.randint(0, 2, (2, 7))
    before = module(x, modality)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter[IMAGE] += 1
    after = module(x, modality)
    assert torch.equal(after[modality == TEXT], before[modality == TEXT])
    assert not torch.equal(after[modality == IMAGE], before[modality == IMAGE])


def test_a_text_only_batch_gives_zero_gradients_to_the_image_expert():
    module = randomise(nn.ModalityExperts(DIM, RANK))
    module(torch.randn(2, 7, DIM), torch.zeros(2, 7, dtype=torch.long)).sum().backward()
    for parameter in module.parameters():
        assert torch.equal(parameter.grad[IMAGE], torch.zeros_like(parameter.grad[IMAGE]))
        assert parameter.grad[TEXT].abs().sum() > 0


def test_the_first_step_moves_up_alone():
    for module, inputs in (
        (nn.SwiGLUAdapter(DIM, RANK), [torch.randn(4, DIM)]),
        (nn.ModalityExperts(DIM, RANK), [torch.randn(4, DIM), torch.tensor([0, 1, 0, 1])]),
    ):
        module(*inputs).square().sum().backward()
        assert (module.gate.grad == 0).all() and (module.down.grad == 0).all()
        assert module.up.grad.abs().min() > 0


def test_initialisation_is_the_published_one():
    dim, rank = 400, 64
    for module in (nn.SwiGLUAdapter(dim, rank), nn.ModalityExperts(dim, rank)):
        assert module.gate.abs().max() <= 1 / math.sqrt(dim)
        assert module.gate.std().item() == pytest.approx(1 / math.sqrt(3 * dim), rel=0.02)
        assert module.down.std().item() == pytest.approx(0.02, rel=0.02)
        assert (module.up == 0).all()
    assert nn.LinearAdapter(dim, rank).down.std().item() == pytest.approx(0.02, rel=0.02)
    cross = nn.CrossModalAdapter(dim, rank)
    assert cross.gate.std().item() == pytest.approx(0.02, rel=0.02)
    assert (cross.up == 0).all()
    randomise(cross).reset_parameters()
    assert (cross.up == 0).all()


@pytest.mark.parametrize(("dim", "rank", "count"), [(4096, 256, 5_242_880), (5120, 192, 4_915_200)])
def test_cross_modal_parameter_counts(dim, rank, count):
    module = nn.CrossModalAdapter(dim, rank, device="meta")
    assert sum(p.numel() for p in module.parameters()) == count


def test_pill_parameter_counts():
    """LLaMA-2-7B: one adapter 393,216, per layer three of them and the gate."""
    parts = [
        nn.SwiGLUAdapter(4096, 32, device="meta"),
        nn.ModalityExperts(4096, 32, device="meta"),
        nn.ModalityGate(4096, 32, device="meta"),
    ]
    assert [sum(p.numel() for p in m.parameters()) for m in parts] == [393_216, 786_432, 131_072]


def test_cross_modal_branches():
    module = randomise(nn.CrossModalAdapter(DIM, RANK))
    visual, text = torch.randn(2, 4, DIM), torch.randn(2, 3, DIM)
    y_visual, y_text = module(visual, text)
    for y, x, k in ((y_visual, visual, 0), (y_text, text, 1)):
        hidden = torch.nn.functional.silu(x @ module.gate[k].t()) * (x @ module.down[k].t())
        torch.testing.assert_close(y, x + hidden @ module.up.t())


def test_cross_modal_sharing():
    """The gradient of `up` is the sum of the branches'; a branch does not touch the other's."""
    module = randomise(nn.CrossModalAdapter(DIM, RANK))
    visual, text = torch.randn(4, DIM), torch.randn(3, DIM)

    def gradients(*outputs):
        module.zero_grad()
        sum(y.square().sum() for y in outputs).backward()
        return module.up.grad.clone(), module.gate.grad.clone()

    both, _ = gradients(*module(visual, text))
    first, _ = gradients(module(visual, text)[0])
    second, of_gate = gradients(module(visual, text)[1])
    torch.testing.assert_close(both, first + second)
    assert (of_gate[0] == 0).all() and of_gate[1].abs().sum() > 0


def test_cross_modal_without_visual_tokens():
    module = randomise(nn.CrossModalAdapter(DIM, RANK))
    y_visual, _ = module(torch.randn(2, 0, DIM), torch.randn(2, 3, DIM))
    assert y_visual.shape == (2, 0, DIM)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: nn.SwiGLUAdapter(0, 4), "dim and rank must be positive, got dim=0, rank=4"),
        (lambda: nn.SwiGLUAdapter(4, 4, residual="x"), "residual must be .* got 'x'"),
        (lambda: nn.SwiGLUAdapter(4, 4, residual="norm"), "needs norm_eps, got norm_eps=None"),
        (lambda: nn.ModalityExperts(4, 4, 0), "num_experts must be positive, got 0"),
        (lambda: nn.LinearAdapter(4, 4, residual="norm"), "residual must be 'input' or 'none'"),
        (lambda: nn.CrossModalAdapter(4, -1), "dim and rank must be positive"),
        (lambda: nn.ModalityGate(4, 2, "soft"), "kind must be 'token' or 'static', got 'soft'"),
        (lambda: nn.ModalityGate(4, 0), "dim and num_heads must be positive"),
        (lambda: nn.CPFactors(4, 4, 0), "rank must be positive, got 4, 4 and 0"),
        (lambda: nn.CPFactors(4, 4, 2, "sparse"), "core must be 'diagonal' or 'dense'"),
        (
            lambda: nn.CPLinear(torch.nn.Linear(4, 6), nn.CPFactors(4, 4, 2)),
            r"base.weight has shape \[6, 4\], expected \[4, 4\] like the factors",
        ),
    ],
)
def test_wrong_settings(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize(
    ("module", "text"),
    [
        (nn.SwiGLUAdapter(8, 2, norm_eps=1e-5), "dim=8, rank=2, residual='input', norm_eps=1e-05"),
        (nn.ModalityExperts(8, 2, share_up=True), "num_experts=2, share_up=True"),
        (nn.LinearAdapter(8, 2), "LinearAdapter(dim=8, rank=2, residual='input')"),
        (nn.CrossModalAdapter(8, 2), "CrossModalAdapter(dim=8, rank=2)"),
        (nn.ModalityGate(8, 2), "ModalityGate(dim=8, num_heads=2, kind='token')"),
        (
            nn.CPFactors(8, 6, 2, "dense"),
            "in_features=8, out_features=6, rank=2, core='dense'",
        ),
    ],
)
def test_repr(module, text):
    assert text in repr(module)


def test_parameters_are_bare_and_none_is_called_weight():
    modules = [
        nn.SwiGLUAdapter(8, 2, norm_eps=1e-5),
        nn.ModalityExperts(8, 2),
        nn.LinearAdapter(8, 2),
        nn.CrossModalAdapter(8, 2),
        nn.ModalityGate(8, 2),
        nn.CPFactors(8, 8, 2),
    ]
    for module in modules:
        assert not list(module.children())
        assert not hasattr(module, "weight")
