"""The objectives over Aurora's tuner: what trains, what the momentum sees, what is shared."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from mmadapt.eval.reranking import rerank
from mmadapt.models.aurora import (
    RetrievalObjective,
    VQAObjective,
    encode_questions,
    generate_answers,
    rank_answers,
)
from mmadapt.peft import AuroraConfig


def aurora(model, **options):
    options = {"rank": 3, "branch_dropout": 0.0, "mlp_layout": "clean"} | options
    torch.manual_seed(0)
    return get_peft_model(model, AuroraConfig(init_weights=False, **options))


HEADS = ["vision_proj", "itm_head"]


def objective_of(tiny, model, **options):
    torch.manual_seed(1)
    options = {"queue_size": 8} | options
    return RetrievalObjective(model, enc_token_id=tiny.ENC, **options).train()


@pytest.mark.parametrize("core", ["dense", "diagonal"])
def test_every_trained_tensor_learns_and_nothing_else_moves(core, tiny):
    model = aurora(tiny.make_retrieval(), core=core, modules_to_save=HEADS)
    objective = objective_of(tiny, model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = objective(**tiny.make_batch()).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name
    assert not any("text_proj" in n for n, p in model.named_parameters() if p.requires_grad)


def test_momentum_uses_live_factors_and_averaged_modes(tiny):
    """As released: the same encoders with their own mode vectors and the live U, V, C."""
    model = aurora(tiny.make_retrieval(), modules_to_save=HEADS)
    objective = objective_of(tiny, model)
    batch = tiny.make_batch()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    modes = {n: p for n, p in objective.blip.named_parameters() if "aurora_mode" in n}
    averages = {name: p.detach().clone() for name, p in modes.items()}
    for _ in range(3):
        optimizer.zero_grad()
        objective(**batch).loss.backward()
        optimizer.step()
        for name, parameter in modes.items():
            averages[name].lerp_(parameter.detach(), 0.005)
    objective.momentum.update()
    inputs = batch["pixel_values"], batch["input_ids"], batch["attention_mask"]
    with torch.no_grad():
        image, text = objective._momentum_features(*inputs)
        online = {name: p.detach().clone() for name, p in modes.items()}
        heads = {n: p for n, p in objective.blip.named_parameters() if n.startswith("vision_proj")}
        for name, parameter in {**modes, **heads}.items():
            parameter.copy_(averages[name] if name in averages else objective.momentum.value(name))
        again = objective_of(tiny, model)  # a fresh one: its averages are the present values
        expected_image, expected_text = again._momentum_features(*inputs)
    torch.testing.assert_close(image, expected_image)
    torch.testing.assert_close(text, expected_text)
    assert not all(torch.equal(online[n], averages[n]) for n in online)


def test_averaged_factors_differ_from_live_ones(tiny):
    stored = {}
    for factors in ("live", "ema"):
        model = aurora(tiny.make_retrieval())
        stored[factors] = objective_of(tiny, model, momentum_factors=factors).momentum.stored()
    trained = sum(p.numel() for p in aurora(tiny.make_retrieval()).parameters() if p.requires_grad)
    assert stored["live"] < stored["ema"] == trained


def test_branch_dropout_decides_about_sharing(tiny):
    with_dropout = objective_of(tiny, aurora(tiny.make_retrieval(), branch_dropout=0.1))
    assert not with_dropout._shares()
    with_dropout.eval()
    assert with_dropout._shares()
    assert objective_of(tiny, aurora(tiny.make_retrieval()))._shares()
    lora = LoraConfig(r=2, target_modules=["key", "value"], lora_dropout=0.1)
    assert not objective_of(tiny, get_peft_model(tiny.make_retrieval(), lora))._shares()
    lora = LoraConfig(r=2, target_modules=["query", "qkv"], lora_dropout=0.1)
    assert objective_of(tiny, get_peft_model(tiny.make_retrieval(), lora))._shares()


@pytest.mark.parametrize("frames", [0, 2])
def test_sharing_with_adapted_keys_changes_nothing(frames, tiny):
    results = []
    for share in (True, False):
        model = aurora(tiny.make_retrieval(), modules_to_save=HEADS)
        objective = objective_of(
            tiny, model, share_image_states=share, frame_aware=bool(frames), alpha=0.0
        )
        torch.manual_seed(2)
        out = objective(**tiny.make_batch(frames=frames))
        out.loss.backward()
        grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        results.append((out.loss.detach(), torch.cat(grads)))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-5, atol=0)
    error = (results[0][1] - results[1][1]).norm() / results[1][1].norm()
    assert error <= 1e-5


def test_reranking_with_cached_states_equals_hugging_face(tiny):
    model = aurora(tiny.make_retrieval()).eval()
    pixels = torch.randn(4, 3, 8, 8)
    ids, mask = tiny.make_texts(4)
    found = rerank(model, pixels, ids, mask, enc_token_id=tiny.ENC, k_test=4)
    ids = ids.clone()
    ids[:, 0] = tiny.ENC
    with torch.no_grad():
        for image in range(4):
            shown = pixels[image].expand(4, -1, -1, -1)
            scores = model(input_ids=ids, pixel_values=shown, attention_mask=mask).itm_score
            torch.testing.assert_close(found.i2t[image], scores[:, 1], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_answers_with_cached_adapted_states(tiny):
    """The released cache lacks the update of keys and values; this one has it."""
    model = aurora(tiny.make_vqa()).eval()
    blip = model.get_base_model()
    ids, mask = tiny.make_texts(64, first=tiny.ENC)
    states = encode_questions(blip, tiny.make_batch(64)["pixel_values"], ids, mask)
    options = {"dec_token_id": tiny.DEC, "sep_token_id": tiny.SEP, "pad_token_id": tiny.PAD}
    cached = generate_answers(blip, states, **options)
    assert torch.equal(cached, generate_answers(blip, states, use_cache=False, **options))
    answers, answer_mask = tiny.make_texts(6, seed=1, first=tiny.DEC)
    few = states._replace(hidden=states.hidden[:4], mask=states.mask[:4])
    ranked = rank_answers(blip, few, answers, answer_mask, k_test=6)
    for row in range(4):
        seen = states.hidden[row, None, : int(mask[row].sum())]
        scores = []
        for ids_, mask_ in zip(answers, answer_mask, strict=True):
            ids_ = ids_[None, : int(mask_.sum())]
            logits = blip.text_decoder(ids_, encoder_hidden_states=seen).logits[0, :-1]
            scores.append(logits.log_softmax(-1).gather(1, ids_[0, 1:, None]).sum())
        assert int(ranked[row]) == int(torch.stack(scores).argmax())


def test_vqa_trains_the_decoder_too(tiny):
    model = aurora(tiny.make_vqa())
    objective = VQAObjective(model).train()
    ids, mask = tiny.make_texts(3, first=tiny.ENC)
    answers, answer_mask = tiny.make_texts(3, seed=1, first=tiny.DEC)
    pixels = tiny.make_batch(3)["pixel_values"]
    objective(
        pixels, ids, mask, answers, answer_mask, torch.ones(3), torch.ones(3, dtype=torch.int64)
    ).loss.backward()
    silent = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    # the last decoder layer is all used; nothing of the adapter is without a gradient
    assert silent == []
