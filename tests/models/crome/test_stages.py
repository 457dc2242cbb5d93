"""Stages: what trains, what a step changes, what stays as it is to the last bit."""

import hashlib

import pytest
import torch

from mmadapt.models import crome_components, set_crome_stage

TRAINED = {
    "align": {"projector", "adapter"},
    "instruct": {"projector", "adapter", "qformer"},
    "task": {"adapter"},
}


def digest(parameter):
    return hashlib.sha256(parameter.detach().numpy().tobytes()).hexdigest()


def train(model, batch, steps):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()


@pytest.mark.parametrize("stage", TRAINED)
def test_requires_grad_changed_and_frozen_agree(tiny, stage):
    model = tiny.model()
    set_crome_stage(model, stage)
    parts = crome_components(model)
    expected = {name for part in TRAINED[stage] for name, _ in parts[part]}
    assert {n for n, p in model.named_parameters() if p.requires_grad} == expected
    before = {n: digest(p) for n, p in model.named_parameters()}
    train(model, tiny.batch(model), 1)
    changed = {n for n, p in model.named_parameters() if digest(p) != before[n]}
    assert changed == expected
    assert all(p.grad is None for n, p in model.named_parameters() if n not in expected)
    train(model, tiny.batch(model), 10)
    after = {n: digest(p) for n, p in model.named_parameters()}
    assert {n for n in after if after[n] != before[n]} == expected


def test_the_language_model_answers_text_as_before(tiny, kind):
    model = tiny.model(kind)
    text, images = tiny.batch(model, images=(0, 0)), tiny.batch(model)
    with torch.no_grad():
        before = model(**text).loss
    losses = []
    for stage in TRAINED:
        set_crome_stage(model, stage)
        losses.append(model.eval()(**images).loss.item())
        train(model, images, 4)
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(**text).loss, before)
        assert model(**images).loss < losses[0]


def test_fresh_adapters_move_their_output_first(tiny):
    model = tiny.model(identity=True)
    set_crome_stage(model, "task")
    model(**tiny.batch(model)).loss.backward()
    assert model.adapter.up.grad.any()
    assert not model.adapter.gate.grad.any() and not model.adapter.down.grad.any()


def test_parts_that_nothing_reads_stay_frozen(tiny):
    blind = tiny.model(instruction_aware=False)
    set_crome_stage(blind, "instruct")
    blind(**tiny.batch(blind)).loss.backward()
    trained = {n: p for n, p in blind.named_parameters() if p.requires_grad}
    assert all(p.grad is not None for p in trained.values())
    assert not any("word_embeddings" in name or ".intermediate.dense" in name for name in trained)
    patches = tiny.model(order=["visual", "instruction"])
    set_crome_stage(patches, "instruct")
    parts = {n for n, g in crome_components(patches).items() for _, p in g if p.requires_grad}
    assert parts == {"projector", "adapter"}


def test_activation_checkpointing(tiny):
    """Recomputed blocks of the frozen language model pass the same gradients back."""
    gradients = []
    for checkpointed in (False, True):
        model = tiny.model()
        set_crome_stage(model, "task")
        model.train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(**tiny.batch(model)).loss.backward()
        gradients.append([p.grad for p in model.adapter.parameters()])
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, again)


def test_autocast_beside_half_precision_parts(tiny, tmp_path):
    from mmadapt.models import CromeForConditionalGeneration

    tiny.model().save_pretrained(tmp_path)
    model = CromeForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16)
    set_crome_stage(model, "instruct")
    model.train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**tiny.batch(model)).loss
    loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in trained)


def test_stages_that_train_nothing(tiny):
    with pytest.raises(ValueError, match="stage is one of"):
        set_crome_stage(tiny.model(), "pretrain")
    with pytest.raises(ValueError, match="stage='task' would train nothing"):
        set_crome_stage(tiny.model(adapter_branches=[]), "task")
