"""The same numbers on cheaper roads: packed rows, chosen rows only, cached features."""

import copy

import torch
from torch.nn.functional import cross_entropy


def token_losses(logits, ids):
    return cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")


def test_packed_samples_equal_samples_alone(tiny):
    """Two samples in one row, with restarted positions and a block-diagonal causal mask."""
    model = tiny.pill("llama")
    batch = tiny.batch("llama", images=(True, False))
    ids, modality = batch["input_ids"], batch["modality_ids"]
    count, length = ids.shape
    with torch.no_grad():
        alone = [
            model(input_ids=ids[i : i + 1], modality_ids=modality[i : i + 1]).logits
            for i in range(count)
        ]
        block = torch.ones(length, length, dtype=torch.bool).tril()
        packed = model(
            input_ids=ids.reshape(1, -1),
            modality_ids=modality.reshape(1, -1),
            position_ids=torch.arange(length).repeat(count)[None],
            attention_mask=torch.block_diag(*[block] * count).bool()[None, None],
        ).logits
    expected = torch.cat([token_losses(a, ids[i : i + 1]) for i, a in enumerate(alone)]).mean()
    rows = packed.view(count, length, -1)
    assert abs(token_losses(rows, ids).mean() - expected) <= 1e-6


def test_labelled_rows_alone_give_the_full_loss_and_gradients(tiny):
    """A head that computes labelled rows only (transformers' `logits_to_keep`)."""
    model = tiny.pill("llama")
    batch = tiny.batch("llama", images=(True, True))
    ids, labelled = batch["input_ids"], torch.tensor([6, 7, 8])  # predict tokens 7, 8 and 9
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    losses, grads = [], []
    for keep in (0, labelled):
        model.zero_grad()
        logits = model(**inputs, logits_to_keep=keep).logits
        rows = logits if keep is labelled else logits[:, labelled]
        loss = cross_entropy(rows.flatten(0, 1), ids[:, labelled + 1].flatten())
        loss.backward()
        losses.append(loss.item())
        grads.append(tiny.gradients(model))
    assert abs(losses[0] - losses[1]) <= 1e-6
    for name, full in grads[0].items():
        assert (full - grads[1][name]).norm() <= 1e-5 * full.norm() + 1e-12, name


def test_cached_visual_features(tiny):
    """Q-Former features kept in fp32 change nothing, in fp16 at most 2e-3."""
    model = tiny.pill("blip2")
    batch = tiny.batch("blip2")
    qformer = model.get_base_model().qformer
    kept = []
    hook = qformer.register_forward_hook(lambda module, args, output: kept.append(output))
    with torch.no_grad():
        live = model(**batch).logits
        hook.remove()
        errors = {}
        for dtype in (torch.float32, torch.float16):
            cached = copy.copy(kept[0])
            cached["last_hidden_state"] = kept[0][0].to(dtype).float()
            hook = qformer.register_forward_hook(lambda *_, cached=cached: cached)
            pixels = torch.zeros_like(batch["pixel_values"])  # what is cached is not looked at
            again = model(**(batch | {"pixel_values": pixels})).logits
            hook.remove()
            errors[dtype] = ((again - live).norm() / live.norm()).item()
    assert errors[torch.float32] == 0
    assert 0 < errors[torch.float16] <= 2e-3
