"""What the tuner tells about itself."""

import torch

from mmadapt.peft import components, explain


def by_path(model):
    return {report.path: report for report in model.explain()}


def test_one_operator_for_siblings(tiny):
    reports = by_path(tiny.aurora("retrieval"))
    assert len(reports) == 2 * (4 + 6)
    where = "text_encoder.encoder.layer.0.attention.self"
    query = reports[f"{where}.query"]
    assert query.fused and query.reason is None and query.backend
    assert query.together == (f"{where}.key", f"{where}.value")
    assert str(query) == f"{where}.query: {query.backend}, one operator with key, value"
    fc1 = reports["vision_model.encoder.layers.1.mlp.fc1"]
    assert fc1.fused and not fc1.together and str(fc1).endswith(", one operator")


def test_why_not(tiny):
    model = tiny.aurora("retrieval")
    layer = model.get_base_model().vision_model.encoder.layers[0]
    layer.self_attn.qkv.base_layer.register_forward_hook(lambda *args: None)
    layer.mlp.fc1.base_layer.weight.requires_grad_()
    reports = by_path(model)
    cross = reports["text_encoder.encoder.layer.1.crossattention.self.key"]
    assert not cross.fused and "share one projection" in str(cross)
    where = "vision_model.encoder.layers.0"
    assert reports[f"{where}.self_attn.qkv"].reason == "the base layer has hooks"
    assert reports[f"{where}.mlp.fc1"].reason == "the base layer's weight is trained"
    with model.disable_adapter():
        assert {r.reason for r in model.explain()} == {"no adapter is active here"}
    model.merge_adapter()
    assert {r.reason for r in model.explain()} == {"it is merged"}


def test_it_does_what_it_says(tiny):
    """Layers that are not one operator give the same as those that are."""
    batch = tiny.batch("retrieval")
    model = tiny.aurora("retrieval")
    expected = tiny.scores("retrieval", model, batch)
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda *args: None)
    assert not any(report.fused for report in model.explain())
    torch.testing.assert_close(tiny.scores("retrieval", model, batch), expected)


def test_the_function_and_the_method_agree(tiny, kind):
    model = tiny.aurora(kind)
    reports = [str(report) for report in model.explain()]
    assert reports and reports == [str(report) for report in explain(model.get_base_model())]


def test_components(tiny):
    model = tiny.aurora("retrieval", modules_to_save=["itm_head"])
    groups = components(model)
    assert list(groups) == [
        "shared_factors",
        "modes",
        "query_transformation",
        "matching_heads",
        "vision_tower",
        "language_model",
    ]
    assert len(groups["shared_factors"]) == 3
    assert len(groups["modes"]) == 2 * (4 + 6)
    assert len(groups["query_transformation"]) == 2 * 4
    trained = [n for members in groups.values() for n, p in members if p.requires_grad]
    adapter = ("shared_factors", "modes", "query_transformation")
    assert all(p.requires_grad for name in adapter for _, p in groups[name])
    assert len(trained) == sum(len(groups[name]) for name in adapter) + 2
    assert sum(map(len, groups.values())) == len(list(model.parameters()))
