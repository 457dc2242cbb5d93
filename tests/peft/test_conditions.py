"""PILL's pass conditions that small models can show, gate profile, names and compilation."""

import pytest
import torch
from peft import get_peft_model_state_dict

from mmadapt.peft import from_released, gate_profile, to_released
from mmadapt.peft.pill.adapters import apply_adapters, new_adapter


def scramble(model, part):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if part in name:
                parameter.copy_(torch.randn_like(parameter))


def test_zero_gate_erases_image_values_and_keeps_text_bitwise(tiny):
    model = tiny.pill("llama", init_weights=True, attention_adapter=False)
    batch = tiny.batch("llama")
    values = []
    model.get_base_model().model.layers[0].self_attn.v_proj.register_forward_hook(
        lambda module, args, output: values.append(output)
    )
    model(**batch)
    with model.disable_adapter():
        model(**batch)
    image = batch["modality_ids"].bool()
    assert not values[0][image].any()
    assert torch.equal(values[0][~image], values[1][~image])


@pytest.mark.parametrize("part", ["mmadapt_pill_gate", "mmadapt_pill_vision"])
def test_without_images_the_visual_parts_change_nothing(tiny, kind, part):
    model = tiny.pill(kind)
    batch = tiny.batch(kind, images=(False, False))
    before = model(**batch).logits
    scramble(model, part)
    assert torch.equal(model(**batch).logits, before)


def test_text_expert_never_sees_image_tokens(tiny):
    model = tiny.pill("llama")
    batch = tiny.batch("llama")
    mlp = model.get_base_model().model.layers[0].mlp
    inputs = []
    mlp.base_layer.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    model(**batch)
    scramble(mlp, "mmadapt_pill_text")
    model(**batch)
    image = batch["modality_ids"].bool()
    assert torch.equal(inputs[0][image], inputs[1][image])
    assert not torch.allclose(inputs[0][~image], inputs[1][~image])


def test_routing_agrees_with_select_and_split():
    torch.manual_seed(0)
    x, expert = torch.randn(2, 9, 16), torch.tensor([0, 1, 1, 1, 0, 0, 1, 0, 0]).expand(2, 9)
    text, vision = (new_adapter("swiglu", 16, 4, identity=False) for _ in range(2))
    routed = apply_adapters([text, vision], x, expert)
    both = [apply_adapters([a], x, None) for a in (text, vision)]
    select = torch.where(expert[..., None] == 1, both[1], both[0])
    split = x.clone()
    for index, adapter in enumerate((text, vision)):
        split[expert == index] = apply_adapters([adapter], x[expert == index], None)
    assert (routed - select).abs().max() <= 1e-6
    assert (routed - split).abs().max() <= 1e-6


def test_align_inverts_the_last_layer_in_training_alone(tiny):
    model = tiny.pill("llama", stage="align")
    batch = tiny.batch("llama")
    inputs = {}
    for index, layer in enumerate(model.get_base_model().model.layers):
        layer.mlp.base_layer.register_forward_pre_hook(
            lambda module, args, index=index: inputs.__setitem__(index, args[0])
        )

    def changed(index):
        """Rows whose FFN input changes with the vision expert of layer `index`."""
        mlp = model.get_base_model().model.layers[index].mlp
        before = run()[index]
        saved = mlp.state_dict()
        saved = {k: v.clone() for k, v in saved.items()}
        scramble(mlp, "mmadapt_pill_vision")
        after = run()[index]
        mlp.load_state_dict(saved)
        return (before != after).any(-1)

    def run():
        with torch.no_grad():
            model(**batch)
        return dict(inputs)

    image = batch["modality_ids"].bool()
    model.train()
    assert torch.equal(changed(0), image) and torch.equal(changed(1), ~image)
    model.eval()
    assert torch.equal(changed(0), image) and torch.equal(changed(1), image)


@pytest.mark.parametrize("images", [(False, True), (True, True), (False, False)])
def test_batches_with_and_without_images(tiny, kind, images):
    model = tiny.pill(kind).train()
    loss = model(**tiny.batch(kind, images=images)).loss
    loss.backward()
    assert loss.isfinite() and all(g.isfinite().all() for g in tiny.gradients(model).values())


def test_several_and_adjacent_images(tiny):
    model = tiny.pill("blip2")
    batch = tiny.prompt(tiny.batch("blip2", images=(True, True), length=20))
    batch["input_ids"][0, 5:9] = tiny.image  # directly after the first image
    batch["input_ids"][0, 12:16] = tiny.image
    batch["pixel_values"] = torch.randn(4, 3, 8, 8)
    rows = model(**batch).logits
    alone = {k: v[:1] for k, v in batch.items() if k != "pixel_values"}
    first = model(**alone, pixel_values=batch["pixel_values"][:3]).logits
    torch.testing.assert_close(rows[:1], first, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("gate", ["token", "static"])
def test_gate_profile(tiny, kind, gate):
    model = tiny.pill(kind, gate=gate)
    batches = [tiny.batch(kind, seed=s) for s in (1, 2)]
    with gate_profile(model) as profile:
        for batch in batches:
            model(**batch)
        inside = profile.mean_abs()
    model(**batches[0])
    assert profile.mean_abs() == inside and len(inside) == 2
    assert all(0 < value < 1 for value in inside)
    if gate == "static":
        gates = [p for n, p in model.named_parameters() if "mmadapt_pill_gate" in n]
        expected = [p.tanh().abs().mean().item() for p in gates]
        assert inside == pytest.approx(expected, rel=1e-6)
    with pytest.raises(ValueError, match="gate"), gate_profile(tiny.pill(kind, gate="none")):
        pass


def test_released_names_round_trip(tiny):
    model = tiny.pill("blip2", projector="linear")
    state = get_peft_model_state_dict(model)
    released = to_released(state)
    assert {n.split(".", 2)[2] for n in released if n.startswith("layers.1.")} == {
        f"{adapter}.{weight}.weight"
        for adapter in ("adapter_attn", "vis_adapter_ffn", "txt_adapter_ffn")
        for weight in ("down_sampler", "down_sampler_gate", "up_sampler")
    } | {"attention.vis_adapter_gate.weight"}
    assert "vis_adapter_proj.weight" in released
    released["tok_embeddings.weight"] = torch.zeros(1)
    back = from_released({f"module.{k}": v for k, v in released.items()}, model)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)
    with pytest.raises(ValueError, match="no parameter of a released"):
        from_released({"layers.0.adapter_other.weight": torch.zeros(1)}, model)
    with pytest.raises(ValueError, match="no counterpart"):
        to_released(get_peft_model_state_dict(tiny.pill("blip2", projector="full")))


@pytest.mark.parametrize(
    "kind, options",
    [
        ("llama", {}),
        pytest.param("blip2", {"stage": "align"}, marks=pytest.mark.slow),
        *(
            pytest.param(kind, options, marks=pytest.mark.slow)
            for kind in ("llama", "blip2", "llava")
            for options in ({}, {"gate": "static"}, {"adapter": "linear"}, {"gate_heads": "q"})
            if (kind, options) != ("llama", {})
        ),
    ],
)
def test_compiled_without_graph_breaks(tiny, kind, options):
    model = tiny.pill(kind, **options).train()
    batch = tiny.batch(kind)
    inputs = tiny.prompt(batch)
    expected = model(**inputs).logits
    expected.square().mean().backward()
    grads = tiny.gradients(model)
    model.zero_grad()
    torch._dynamo.reset()
    compiled = torch.compile(model.get_base_model(), fullgraph=True, backend="aot_eager")
    found = compiled(**inputs).logits
    found.square().mean().backward()
    torch.testing.assert_close(found, expected)
    for name, grad in tiny.gradients(model).items():
        torch.testing.assert_close(grad, grads[name], rtol=1e-4, atol=1e-6)
