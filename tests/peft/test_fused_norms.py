"""Norm, adapter and skip as one operator: the same numbers, and where it is not done."""

import copy
import json
import pickle
import re

import pytest
import torch
import transformers
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama import modeling_llama

from mmadapt.peft import PillConfig, explain, set_stage
from mmadapt.peft.pill.deferred_norm import DeferredNorm

WRAPPERS = 4  # self_attn and mlp of two layers


def decoder(name):
    """A tiny language model of another family, such as Mistral."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(
        vocab_size=60,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


def reweight_norms(model):
    """Norm weights that are not all one, so that they count."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.copy_(torch.linspace(0.5, 1.5, parameter.numel()))
    return model


def pair(tiny, make_base, **options):
    """The same model with fused norms and without."""
    return [
        tiny.pill("llama", reweight_norms(make_base()), fuse_norms=fuse, **options)
        for fuse in (True, False)
    ]


def fused(model):
    return [report.fused for report in explain(model)]


def reasons(model):
    return [report.reason for report in explain(model)]


def gradients(tiny, model, batch, norms=True):
    """Logits and gradients of everything that trains, and of all norm weights."""
    if norms:
        for name, parameter in model.named_parameters():
            if "layernorm" in name:
                parameter.requires_grad_()
    model.zero_grad()
    output = model(**batch)
    output.logits.square().mean().backward()
    return output.logits.detach(), tiny.gradients(model)


def assert_same(found, expected, tolerance):
    def close(a, b, name):
        error = (a - b).norm() / b.norm().clamp_min(1e-30)
        assert error <= tolerance or torch.equal(a, b), (name, error)

    close(found[0], expected[0], "logits")
    assert found[1].keys() == expected[1].keys()
    for name in expected[1]:
        close(found[1][name], expected[1][name], name)


@pytest.fixture
def norm_calls(monkeypatch):
    """Outputs of every LLaMA norm that computes something itself."""
    calls = []
    forward = modeling_llama.LlamaRMSNorm.forward

    def counted(self, x):
        calls.append(forward(self, x))
        return calls[-1]

    monkeypatch.setattr(modeling_llama.LlamaRMSNorm, "forward", counted)
    return calls


OPTIONS = [
    {},
    {"stage": "align"},
    {"experts": "shared"},
    {"gate": "static"},
    {"attention_adapter": False},
    {"target_modules": ["mlp"]},
    {"gate": "none", "decode_modality": "image"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("training", [False, True])
def test_fused_is_unfused(tiny, options, training):
    batch = tiny.batch("llama", images=(True, False))
    models = pair(tiny, lambda: tiny.base("llama"), **options)
    found, expected = (gradients(tiny, model.train(training), batch) for model in models)
    assert any(fused(models[0])) and not any(fused(models[1]))
    assert_same(found, expected, 1e-5)


@pytest.mark.parametrize("inner", ["blip2", "llava"])
def test_fused_is_unfused_inside(tiny, inner):
    models = [
        tiny.pill(inner, reweight_norms(tiny.base(inner)), fuse_norms=f) for f in (True, False)
    ]
    found, expected = (gradients(tiny, m.train(), tiny.batch(inner)) for m in models)
    assert fused(models[0]) == [True] * WRAPPERS
    assert_same(found, expected, 1e-5)


@pytest.mark.parametrize("family", ["Mistral", "Qwen2", "Qwen3", "Phi3", "Granite"])
def test_other_families(tiny, family):
    options = {"gate": "none"} if family == "Phi3" else {}
    models = pair(tiny, lambda: decoder(family), **options)
    found, expected = (gradients(tiny, m.train(), tiny.batch("llama")) for m in models)
    assert fused(models[0]) == [True] * WRAPPERS, reasons(models[0])
    assert_same(found, expected, 1e-5)


@pytest.mark.parametrize("options", OPTIONS[:3], ids=str)
def test_fused_is_unfused_in_double_precision(tiny, options, monkeypatch):
    def exact(self, x):  # Hugging Face's drops to fp32 inside
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))

    models = pair(tiny, lambda: tiny.base("llama").double(), **options)
    assert {p.dtype for p in models[0].parameters()} == {torch.float64}
    monkeypatch.setattr(modeling_llama.LlamaRMSNorm, "forward", exact)
    found, expected = (gradients(tiny, m.train(), tiny.batch("llama")) for m in models)
    assert_same(found, expected, 1e-12)


def test_half_precision_rounds_as_llama(tiny):
    models = pair(tiny, lambda: tiny.base("llama").bfloat16())
    exact = pair(tiny, lambda: tiny.base("llama"))[1]
    batch = tiny.batch("llama")
    outputs = [gradients(tiny, m.train(), batch) for m in (*models, exact)]
    found, unfused, expected = ((logits, *grads.values()) for logits, grads in outputs)
    assert fused(models[0]) == [True] * WRAPPERS

    def rms_error(tensors):
        # Over all tensors together: what one small tensor loses behind two layers of bf16 is luck,
        # 0.4 to 2.4 times the unfused model's, and differs between processors.
        relative = [
            (a.float() - c).norm() / c.norm() for a, c in zip(tensors, expected, strict=True)
        ]
        return torch.stack(relative).square().mean().sqrt()

    assert rms_error(found) <= 2 * rms_error(unfused) + 2**-8


@pytest.mark.parametrize(
    "family, where, reason",
    [
        ("Gemma", "self_attn", "GemmaRMSNorm does not compute what LLaMA's RMSNorm does"),
        ("Gemma", "mlp", "GemmaRMSNorm does not compute"),
        ("Gemma2", "mlp", "Gemma2RMSNorm does not compute"),
        ("Gemma3", "self_attn", "Gemma3RMSNorm does not compute"),
        ("Cohere", "mlp", r"no statement .*self.mlp"),
        ("Cohere", "self_attn", r"no statement .*self.self_attn"),
        ("Olmo2", "mlp", r"no statement .*self.mlp"),
        ("Starcoder2", "mlp", "LayerNorm is not an RMSNorm"),
    ],
)
def test_unknown_layers_and_norms_fall_back(tiny, family, where, reason):
    kind = "Gemma3Text" if family == "Gemma3" else family
    batch = tiny.batch("llama")
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, pad_token_id=0,
    )  # fmt: skip
    base = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    unfused = tiny.pill("llama", copy.deepcopy(base), fuse_norms=False)
    model = tiny.pill("llama", base)
    found = {report.path.rpartition(".")[2]: report.reason for report in explain(model)}
    assert found.keys() == {"self_attn", "mlp"} and not any(fused(model))
    assert re.search(reason, found[where]), found
    assert torch.equal(model(**batch).logits, unfused(**batch).logits)


def replace_norms(base, make):
    for layer in base.model.layers:
        layer.input_layernorm, layer.post_attention_layernorm = make(), make()
    return base


class Scaled(modeling_llama.LlamaRMSNorm):
    def forward(self, x):
        return 2 * super().forward(x)


class Biased(modeling_llama.LlamaRMSNorm):
    def __init__(self, size):
        super().__init__(size)
        self.bias = nn.Parameter(torch.ones(size))


class BreaksRMSNorm(modeling_llama.LlamaRMSNorm):
    def forward(self, x):
        return x.view(2, 10, 32)


@pytest.mark.parametrize(
    "make, reason",
    [
        (lambda: nn.RMSNorm(32, eps=1e-6), "does not compute what LLaMA's"),  # rounds once
        (lambda: nn.LayerNorm(32), "is not an RMSNorm"),
        (lambda: nn.RMSNorm(32, elementwise_affine=False), "is not an RMSNorm"),
        (lambda: GemmaRMSNorm(32), "does not compute what LLaMA's"),
        (lambda: nn.Identity(), "is not an RMSNorm"),
        (lambda: Scaled(32), "is not an RMSNorm"),
        (lambda: Biased(32), "is not an RMSNorm"),
        (lambda: BreaksRMSNorm(32), "fails on the probe"),
    ],
)
def test_unrecognised_norms_fall_back(tiny, make, reason):
    model = tiny.pill("llama", replace_norms(tiny.base("llama"), make))
    assert all(reason in text for text in reasons(model)), reasons(model)


class RereadingLayer(modeling_llama.LlamaDecoderLayer):
    """Somebody else reads the norm's output."""

    def forward(self, hidden_states, **kwargs):
        residual = hidden_states
        hidden_states = self.input_layernorm(hidden_states)
        residual = residual + hidden_states
        hidden_states, _ = self.self_attn(hidden_states=hidden_states, **kwargs)
        hidden_states = residual + hidden_states
        normed = self.post_attention_layernorm(hidden_states)
        mixed = self.mlp(normed)
        return hidden_states + mixed + normed


def test_a_second_reader_of_the_norm_is_noticed(tiny):
    base = tiny.base("llama")
    for layer in base.model.layers:
        layer.__class__ = RereadingLayer
    model = tiny.pill("llama", base)
    assert all("RereadingLayer.forward has no statement" in text for text in reasons(model))


def test_replaced_forwards_are_left_alone(tiny):
    base = tiny.base("llama")
    layer = base.model.layers[0]
    replaced = layer.input_layernorm.forward = lambda x: 2 * x
    base.model.layers[1].forward = base.model.layers[1].forward
    model = tiny.pill("llama", base)
    assert "LlamaRMSNorm was replaced" in reasons(model)[0]
    assert ["LlamaDecoderLayer was replaced" in text for text in reasons(model)[2:]] == [True] * 2
    assert fused(model) == [False, True, False, False]
    model.unload()
    assert layer.input_layernorm.forward is replaced


@pytest.mark.parametrize(
    "options, plain, expected",
    [
        ({}, 0, [None] * 4),
        ({"fuse_norms": False}, 4, ["PillConfig.fuse_norms is False"] * 4),
        ({"adapter": "linear"}, 4, ["the fused op has no linear adapter"] * 4),
        ({"attention_adapter": False}, 2, ["no adapter is active here", None] * 2),
        ({"target_modules": ["mlp"]}, 2, ["no adapter is active here", None] * 2),
        ({"layers_to_transform": [1]}, 2, [None] * 2),
    ],
)
def test_norms_run_where_no_fused_op_does(tiny, norm_calls, options, plain, expected):
    model = tiny.pill("llama", **options)
    norm_calls.clear()  # the probes
    model(**tiny.batch("llama"))
    assert len(norm_calls) == plain + 1  # and the one after the last layer
    assert reasons(model) == expected


def test_disabled_and_deleted_adapters_leave_the_norm_to_the_layer(tiny, norm_calls):
    batch = tiny.batch("llama")
    base = tiny.base("llama")
    expected = base(**{k: v for k, v in batch.items() if k != "modality_ids"}).logits
    model = tiny.pill("llama", base)
    with model.disable_adapter():
        norm_calls.clear()
        assert torch.equal(model(**batch).logits, expected)
        assert len(norm_calls) == WRAPPERS + 1
        assert set(reasons(model)) == {"no adapter is active here"}
    model.add_adapter("other", PillConfig(rank=3, fuse_norms=False, init_weights=False))
    for name, count in (("default", 0), ("other", WRAPPERS), ("default", 0)):
        model.set_adapter(name)
        norm_calls.clear()
        model(**batch)
        assert len(norm_calls) == count + 1
    model.delete_adapter("other")
    model.delete_adapter("default")
    norm_calls.clear()
    assert torch.equal(model.base_model(**batch).logits, expected)
    assert len(norm_calls) == WRAPPERS + 1


def test_a_later_adapter_may_ask_for_it(tiny):
    model = tiny.pill("llama", fuse_norms=False)
    model.add_adapter("other", PillConfig(rank=3, init_weights=False))
    assert not any(fused(model))
    model.set_adapter("other")
    assert fused(model) == [True] * WRAPPERS


def test_unload_gives_the_norms_their_forward_back(tiny):
    base = tiny.base("llama")
    keys = list(base.state_dict())
    model = tiny.pill("llama", base)
    assert [k for k in model.state_dict() if "norm" in k] == [
        "base_model.model." + k for k in keys if "norm" in k
    ]
    assert sum("forward" in module.__dict__ for module in base.modules()) == WRAPPERS
    restored = model.unload()
    assert list(restored.state_dict()) == keys
    assert not any("forward" in module.__dict__ for module in restored.modules())
    assert fused(tiny.pill("llama", restored)) == [True] * WRAPPERS


def test_stages_share_the_op(tiny, norm_calls):
    model = tiny.pill("llama").train()
    for stage in ("align", "instruct"):
        set_stage(model, stage)
        norm_calls.clear()
        model(**tiny.batch("llama")).loss.backward()
        assert len(norm_calls) == 1


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_decides_as_the_forward_did(tiny, norm_calls, reentrant):
    model = tiny.pill("llama").train()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    norm_calls.clear()
    model(**tiny.batch("llama")).loss.backward()
    assert len(norm_calls) == 1


def layer_of(model, index=0):
    return model.get_base_model().model.layers[index]


def test_hooks_see_what_the_norm_would_compute(tiny):
    model, batch = tiny.pill("llama"), tiny.batch("llama")
    layer, seen = layer_of(model), []
    expected = model(**batch).logits
    norm, wrapper = layer.input_layernorm, layer.self_attn

    def behind(module, args, output):
        seen.append((args[0], output))

    def before(module, args, kwargs):
        seen.append((None, kwargs["hidden_states"]))

    for register in (
        lambda: norm.register_forward_hook(behind),
        lambda: wrapper.register_forward_pre_hook(before, with_kwargs=True),
    ):
        handle = register()
        torch.testing.assert_close(model(**batch).logits, expected, rtol=1e-5, atol=1e-5)
        assert fused(model) == [False, True, True, True]
        handle.remove()
    (x, output), (_, given) = seen
    assert torch.equal(output, type(norm).forward(norm, x)) and torch.equal(given, output)
    assert fused(model) == [True] * WRAPPERS
    with nn.modules.module.register_module_forward_hook(lambda *_: None):
        assert set(reasons(model)) == {"hooks see the output of the norm"}
    wrapper.register_full_backward_hook(lambda *_: None)
    assert fused(model) == [False, True, True, True]
    model(**batch).loss.backward()


def test_a_wrapper_called_alone_takes_its_input_as_it_is(tiny):
    model = tiny.pill("llama")
    layer = layer_of(model)
    norm, wrapper = layer.post_attention_layernorm, layer.mlp
    x = torch.randn(2, 5, 32)
    normed = type(norm).forward(norm, x)
    alone = wrapper(normed)
    torch.testing.assert_close(wrapper(norm(x)), alone, rtol=1e-5, atol=1e-6)
    assert torch.equal(wrapper(normed), alone)  # nothing is left of the call before
    norm(x)
    with pytest.raises(RuntimeError, match="post_attention_layernorm left its work to mlp"):
        wrapper(normed)
    assert torch.equal(wrapper(normed), alone)


def test_parts_replaced_later_are_noticed(tiny, norm_calls):
    batch = tiny.batch("llama")
    model, unfused = pair(tiny, lambda: tiny.base("llama"))
    expected = unfused(**batch).logits

    def check(*found):
        assert tuple(fused(model)) == found, reasons(model)
        torch.testing.assert_close(model(**batch).logits, expected, rtol=1e-5, atol=1e-5)

    first, second = layer_of(model), layer_of(model, 1)
    check(True, True, True, True)
    norm = first.input_layernorm
    first.input_layernorm = nn.Sequential(norm)
    check(False, True, True, True)
    first.input_layernorm = norm
    norm.forward = type(norm).forward.__get__(norm)
    check(False, True, True, True)
    second.mlp = torch.distributed.algorithms._checkpoint.checkpoint_wrapper.checkpoint_wrapper(
        second.mlp
    )
    check(False, True, True, False)


def test_norms_of_another_dtype_run_themselves(tiny, norm_calls):
    def base():
        model = tiny.base("llama").bfloat16()
        for layer in model.model.layers:
            layer.input_layernorm.float()
        return model

    outputs, batch = [], tiny.batch("llama")
    with torch.autocast("cpu", torch.bfloat16):
        for model in pair(tiny, base):
            norm_calls.clear()
            outputs.append(model(**batch).logits)
            outputs.append(len(norm_calls))
    assert (outputs[1], outputs[3]) == (3, 5)
    torch.testing.assert_close(outputs[0], outputs[2], rtol=0.05, atol=0.05)


@pytest.mark.parametrize("dtype, plain", [(torch.float32, 4), (torch.bfloat16, 0)])
def test_autocast(tiny, norm_calls, dtype, plain):
    """An fp32 stream is not rounded before its norm; one in autocast's dtype is rounded already."""
    models, batch = pair(tiny, lambda: tiny.base("llama").to(dtype)), tiny.batch("llama")
    with torch.autocast("cpu", torch.bfloat16):
        assert fused(models[0]) == [not plain] * WRAPPERS
        norm_calls.clear()
        found = models[0](**batch).logits
        assert len(norm_calls) == plain + 1
        expected = models[1](**batch).logits
    if plain:
        assert torch.equal(found, expected)
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)


def test_trained_copies_of_norms(tiny, tmp_path):
    """`modules_to_save` replaces the norm, so that it runs by itself and trains."""
    batch = tiny.batch("llama")
    models = pair(tiny, lambda: tiny.base("llama"), modules_to_save=["input_layernorm"])
    assert fused(models[0]) == [False, True] * 2
    assert "ModulesToSaveWrapper is not an RMSNorm" in reasons(models[0])[0]
    found, expected = (gradients(tiny, m.train(), batch, norms=False) for m in models)
    assert sum("layernorm.modules_to_save" in name for name in found[1]) == 2
    assert_same(found, expected, 1e-5)
    with torch.no_grad():
        for name, parameter in models[0].named_parameters():
            if "modules_to_save" in name:
                parameter.mul_(1.1)
    trained = models[0].eval()(**batch).logits
    models[0].save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(reweight_norms(tiny.base("llama")), tmp_path)
    assert torch.equal(loaded(**batch).logits, trained)


def test_a_later_adapter_may_train_norms(tiny):
    model, unfused = pair(tiny, lambda: tiny.base("llama"))
    batch, outputs = tiny.batch("llama"), {}
    for each in (model, unfused):
        torch.manual_seed(5)
        saved = ["input_layernorm", "post_attention_layernorm"]
        config = PillConfig(rank=3, modules_to_save=saved, init_weights=False)
        each.add_adapter("other", config)
        with torch.no_grad():
            for name, parameter in each.named_parameters():
                if "modules_to_save" in name:
                    parameter.mul_(-1.1)
        for name in ("default", "other", "default"):
            each.set_adapter(name)
            outputs[name, each is model] = each(**batch).logits
            assert not any(fused(each))
    for name in ("default", "other"):
        torch.testing.assert_close(outputs[name, True], outputs[name, False])
    assert not torch.allclose(outputs["default", True], outputs["other", True])


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_clones_defer_to_their_own_wrappers(tiny, norm_calls, clone):
    batch = tiny.batch("llama")
    model = tiny.pill("llama")
    other = clone(model)
    norm_calls.clear()
    expected = model(**batch).logits
    assert torch.equal(other(**batch).logits, expected) and len(norm_calls) == 2
    layer, copied = layer_of(model), layer_of(other)
    assert copied.mlp.deferred_norm.layer is copied
    assert copied.post_attention_layernorm.forward is copied.mlp.deferred_norm
    with torch.no_grad():
        copied.post_attention_layernorm.weight.mul_(2)
    assert torch.equal(model(**batch).logits, expected)
    assert not torch.allclose(other(**batch).logits, expected)
    alone = copy.deepcopy(layer)
    assert alone.mlp.deferred_norm.layer is alone
    assert alone.input_layernorm.forward is alone.self_attn.deferred_norm


def test_a_norm_copied_alone_is_a_norm(tiny):
    layer = layer_of(tiny.pill("llama"))
    norm, x = layer.input_layernorm, torch.randn(2, 3, 32)
    alone = copy.deepcopy(norm)
    expected = type(norm).forward(norm, x)
    assert isinstance(alone.forward, DeferredNorm) and alone.forward.norm is alone
    assert torch.equal(alone(x), expected)
    wrapper = copy.deepcopy(layer.mlp)
    normed = type(norm).forward(norm, x)
    assert torch.equal(wrapper(normed), layer.mlp(normed))


def test_old_configurations_load(tiny, tmp_path):
    tiny.pill("llama").save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    saved = json.loads(file.read_text())
    assert saved.pop("fuse_norms") is True
    file.write_text(json.dumps(saved))
    assert PeftConfig.from_pretrained(tmp_path).fuse_norms is True
    loaded = PeftModel.from_pretrained(tiny.base("llama"), tmp_path)
    assert fused(loaded) == [True] * WRAPPERS
    tiny.pill("llama", fuse_norms=False).save_pretrained(tmp_path)
    assert PeftConfig.from_pretrained(tmp_path).fuse_norms is False


def test_explain(tiny):
    model = tiny.pill("blip2", attention_adapter=False)
    lines = [str(report) for report in model.explain()]
    assert [line.partition(":")[0] for line in lines] == [
        f"language_model.model.layers.{i}.{name}" for i in range(2) for name in ("self_attn", "mlp")
    ]
    assert lines[0].endswith("no operator, norm not fused: no adapter is active here")
    assert lines[1].endswith(f"{explain(model)[1].backend}, norm fused")
    base = tiny.base("llama")
    base.add_adapter(PillConfig(rank=3))
    assert fused(base) == [True] * WRAPPERS
    linear = tiny.pill("llama", adapter="linear").explain()
    assert {report.backend for report in linear} == {None}
    with torch.device("meta"):
        meta = get_peft_model(transformers.LlamaForCausalLM(base.config), PillConfig())
    assert fused(meta) == [True] * WRAPPERS


def test_compiled_layers_need_no_more_graphs(tiny):
    """Compiled layer by layer, deferring costs no recompilation and no graph break."""
    counts = []
    for model in pair(tiny, lambda: tiny.base("llama")):
        batch = tiny.batch("llama")
        expected, wanted = gradients(tiny, model.train(), batch)
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        for layer in model.get_base_model().model.layers:
            layer.compile(fullgraph=True, backend="aot_eager")
        found, grads = gradients(tiny, model, batch)
        assert_same((found, grads), (expected, wanted), 1e-5)
        counts.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert counts[0] == counts[1]
