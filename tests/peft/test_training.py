"""Gradients: which parameters get them, and that recomputation gives the same ones."""

import pytest
import torch

from mmadapt.peft import set_stage


def train_step(model, *batches):
    model.train()
    model.zero_grad()
    sum(model(**batch).loss for batch in batches).backward()


def checkpointed(tiny, kind, reentrant, **config):
    model = tiny.pill(kind, **config)
    if reentrant:
        model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    return model


@pytest.mark.parametrize("stage", ["align", "instruct"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(tiny, kind, reentrant, stage):
    batch = tiny.batch(kind, images=(True, False))
    if kind == "llava":
        batch["pixel_values"] = batch["pixel_values"][:1]
    plain = tiny.pill(kind, stage=stage)
    train_step(plain, batch)
    model = checkpointed(tiny, kind, reentrant, stage=stage)
    train_step(model, batch)
    expected, found = tiny.gradients(plain), tiny.gradients(model)
    assert expected.keys() == found.keys() and expected
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("reentrant", [False, True])
def test_two_forwards_one_backward(tiny, kind, reentrant):
    batches = tiny.batch(kind, seed=1), tiny.batch(kind, images=(True,), seed=5, length=13)
    plain = tiny.pill(kind)
    train_step(plain, *batches)
    model = checkpointed(tiny, kind, reentrant)
    train_step(model, *batches)
    expected, found = tiny.gradients(plain), tiny.gradients(model)
    assert expected.keys() == found.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("stage", ["align", "instruct"])
@pytest.mark.parametrize("adapter", ["swiglu", "linear"])
@pytest.mark.parametrize("gate", ["token", "static"])
def test_text_only_batch_gives_zero_gradients_not_none(tiny, kind, stage, adapter, gate):
    model = tiny.pill(kind, stage=stage, adapter=adapter, gate=gate)
    batch = tiny.batch(kind, images=(False, False))
    if kind == "llama":
        del batch["modality_ids"]
    train_step(model, batch)
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
    grads = tiny.gradients(model)
    last = "layers.1.mlp.mmadapt_pill_vision"
    zero = [n for n in grads if "mmadapt_pill_proj" in n or "mmadapt_pill_gate" in n]
    zero += [n for n in grads if "vision" in n and not (stage == "align" and last in n)]
    assert zero and all(not grads[name].any() for name in zero)
    if stage == "align":
        assert all(grads[n].any() for n in grads if last in n)


def test_frozen_tensors_never_move(tiny, kind):
    model = tiny.pill(kind)
    before = {n: p.clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(10):
        train_step(model, tiny.batch(kind, seed=step))
        optimizer.step()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != ("mmadapt_pill_" in name), name


def test_last_vision_expert_gets_exactly_zero_when_instructing(tiny, kind):
    model = tiny.pill(kind)
    batch = tiny.batch(kind)
    batch["labels"][:, : 1 + 4 + 1] = -100  # as in training: answers alone, which follow the image
    train_step(model, batch)
    grads = tiny.gradients(model)
    last = [n for n in grads if "layers.1.mlp.mmadapt_pill_vision" in n]
    assert len(last) == 3 and not any(grads[n].any() for n in last)
    assert all(grads[n].any() for n in grads if "layers.0.mlp.mmadapt_pill_vision" in n)


def test_first_align_step_from_init(tiny):
    model = tiny.pill("blip2", init_weights=True, stage="align")
    train_step(model, tiny.batch("blip2"))
    moving = {name for name, grad in tiny.gradients(model).items() if grad.any()}
    expected = {n for n in moving if n.endswith("mmadapt_pill_vision.default.up")}
    expected |= {n for n in moving if "mmadapt_pill_proj" in n}
    assert moving == expected and len(moving) == 2 + 2  # up in two layers, projector's two tensors


def test_set_stage_switches_gradients(tiny):
    model = tiny.pill("blip2")
    config = model.peft_config["default"]
    names = {n for n, p in model.named_parameters() if "mmadapt_pill_" in n}
    assert {n for n, p in model.named_parameters() if p.requires_grad} == names
    set_stage(model, "align")
    align = {n for n in names if "_vision." in n or "_proj." in n}
    assert {n for n, p in model.named_parameters() if p.requires_grad} == align
    with model.disable_adapter():
        assert not any(p.requires_grad for p in model.parameters())
    assert {n for n, p in model.named_parameters() if p.requires_grad} == align
    set_stage(model, "instruct")
    assert {n for n, p in model.named_parameters() if p.requires_grad} == names
    assert model.peft_config["default"].stage == "instruct" and config.stage == "instruct"


def test_set_stage_leaves_other_models_alone(tiny):
    from peft import get_peft_model

    from mmadapt.peft import PillConfig

    config = PillConfig(rank=4)
    first = get_peft_model(tiny.base("llama"), config)
    second = get_peft_model(tiny.base("llama"), config)
    set_stage(first, "align")
    assert first.peft_config["default"].stage == "align"
    assert second.peft_config["default"].stage == "instruct"


def test_set_stage_names_its_mistakes(tiny):
    model = tiny.pill("llama")
    with pytest.raises(ValueError, match="stage is one of"):
        set_stage(model, "both")
    with pytest.raises(ValueError, match=r"adapter_name='x'.*default"):
        set_stage(model, "align", "x")
    with pytest.raises(ValueError, match="no PILL adapter"):
        set_stage(tiny.base("llama"), "align")


def test_frozen_encoders_stay_in_eval_mode(tiny):
    model = tiny.pill("blip2").train()
    base = model.get_base_model()
    assert not any(m.training for m in (*base.qformer.modules(), *base.vision_model.modules()))
    assert base.language_model.model.layers[0].mlp.training and base.language_projection.training
    assert torch.equal(*(model(**tiny.batch("blip2")).loss for _ in range(2)))
    assert not any(module.training for module in model.eval().modules())


def test_half_precision_base_keeps_fp32_adapters(tiny, kind):
    base = tiny.base(kind).to(torch.bfloat16)
    model = tiny.pill(kind, base)
    assert {p.dtype for n, p in model.named_parameters() if "mmadapt_pill_" in n} == {torch.float32}
    batch = tiny.batch(kind)
    if "pixel_values" in batch:
        batch["pixel_values"] = batch["pixel_values"].to(torch.bfloat16)
    train_step(model, batch)
    assert all(g.dtype == torch.float32 for g in tiny.gradients(model).values())


def test_autocast(tiny, kind):
    model, batch = tiny.pill(kind), tiny.batch(kind)
    exact = model(**batch).logits
    with torch.autocast("cpu", torch.bfloat16):
        output = model(**batch)
    output.loss.backward()
    torch.testing.assert_close(output.logits.float(), exact, rtol=0.1, atol=0.15)
