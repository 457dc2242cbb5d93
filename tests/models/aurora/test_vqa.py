"""Answers: the weighted loss, ranking against the plain way, generation with a cache."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from mmadapt.models.aurora import (
    VQAObjective,
    encode_questions,
    generate_answers,
    rank_answers,
)


def questions_of(tiny, model, count, seed=0):
    ids, mask = tiny.make_texts(count, seed, first=tiny.ENC)
    pixels = tiny.make_batch(count, seed=seed)["pixel_values"]
    return pixels, ids, mask, encode_questions(model, pixels, ids, mask)


@pytest.mark.parametrize("frames", [0, 3])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_is_the_weighted_sum_over_frames(frames, smoothing, tiny, tiny_vqa):
    ids, mask = tiny.make_texts(2, first=tiny.ENC)
    answers, answer_mask = tiny.make_texts(3, seed=1, first=tiny.DEC)
    pixels = tiny.make_batch(2, frames=frames)["pixel_values"]
    weights, counts = torch.tensor([0.3, 0.7, 1.0]), torch.tensor([2, 1])
    objective = VQAObjective(tiny_vqa, label_smoothing=smoothing)
    loss = objective(pixels, ids, mask, answers, answer_mask, weights, counts).loss

    total = 0.0
    for answer, question in enumerate([0, 0, 1]):
        length = int(answer_mask[answer].sum())
        shown = pixels[question : question + 1]
        hidden = tiny_vqa.vision_model(shown.flatten(0, 1) if frames else shown).last_hidden_state
        hidden = hidden.flatten(0, 1)[None]
        valid = int(mask[question].sum())
        state = tiny_vqa.text_encoder(ids[question, None, :valid], encoder_hidden_states=hidden)
        row = answers[answer, None, :length]
        logits = tiny_vqa.text_decoder(row, encoder_hidden_states=state.last_hidden_state).logits
        nll = cross_entropy(logits[0, :-1], row[0, 1:], reduction="sum", label_smoothing=smoothing)
        total += float(weights[answer] * nll)
    assert abs(float(loss) - total / (2 * max(frames, 1))) <= 1e-5 * abs(total)


def naive_rank(model, questions, answers, mask, k):
    """Every candidate alone, no padding, no cache; the first-token cut as the paper states it."""
    best = []
    for row in range(len(questions.hidden)):
        seen = questions.hidden[row, : int(questions.mask[row].sum())][None]
        start = model.text_decoder(answers[:1, :1], encoder_hidden_states=seen).logits[0, -1]
        first = start.softmax(-1)[answers[:, 1]]
        bound = first.sort(descending=True).values[k - 1]
        scores = torch.full((len(answers),), -torch.inf)
        for candidate in range(len(answers)):
            if first[candidate] < bound:
                continue
            ids = answers[candidate, None, : int(mask[candidate].sum())]
            logits = model.text_decoder(ids, encoder_hidden_states=seen).logits[0, :-1]
            scores[candidate] = logits.log_softmax(-1).gather(1, ids[0, 1:, None]).sum()
        best.append(int(scores.argmax()))
    return best


def candidates(tiny):
    """Seven answers, four of which begin alike; two of those differ in their last token only."""
    rows = [[10, 11], [12], [10, 11, 13], [14], [10], [15, 16, 17], [10, 11, 18]]
    ids = torch.zeros(7, 6, dtype=torch.int64)
    for row, tokens in enumerate(rows):
        tokens = [tiny.DEC, *tokens, tiny.SEP]
        ids[row, : len(tokens)] = torch.tensor(tokens)
    return ids, (ids != tiny.PAD).long()


@torch.no_grad()
@pytest.mark.parametrize("k_test", [1, 2, 5, 7])
def test_ranking_equals_the_plain_way(k_test, tiny, tiny_vqa):
    *_, states = questions_of(tiny, tiny_vqa, 8)
    ids, mask = candidates(tiny)
    found = rank_answers(tiny_vqa, states, ids, mask, k_test=k_test)
    assert found.tolist() == naive_rank(tiny_vqa, states, ids, mask, k_test)


@torch.no_grad()
def test_candidates_that_share_a_first_token_survive_together(tiny, tiny_vqa):
    """With k = 1 all four answers that begin with the likeliest token are scored."""
    ids, mask = candidates(tiny)
    *_, states = questions_of(tiny, tiny_vqa, 2)
    with torch.no_grad():
        tiny_vqa.text_decoder.cls.predictions.bias[10] += 50  # what [DEC] is followed by
        tiny_vqa.text_decoder.cls.predictions.decoder.bias = (
            tiny_vqa.text_decoder.cls.predictions.bias
        )
    found = rank_answers(tiny_vqa, states, ids, mask, k_test=1)
    everything = rank_answers(tiny_vqa, states, ids, mask, k_test=7)
    assert found.tolist() == everything.tolist()
    assert set(found.tolist()) <= {0, 2, 4, 6}


@torch.no_grad()
def test_padding_of_candidates_does_not_count(tiny, tiny_vqa):
    *_, states = questions_of(tiny, tiny_vqa, 6)
    ids, mask = candidates(tiny)
    wide = torch.cat([ids, torch.full((7, 3), 9)], 1)  # padding of another value, masked
    wide_mask = torch.cat([mask, torch.zeros(7, 3, dtype=torch.int64)], 1)
    assert torch.equal(
        rank_answers(tiny_vqa, states, ids, mask, k_test=5),
        rank_answers(tiny_vqa, states, wide, wide_mask, k_test=5),
    )


def test_k_test_must_fit(tiny, tiny_vqa):
    *_, states = questions_of(tiny, tiny_vqa, 1)
    with pytest.raises(ValueError, match=r"k_test: expected 1\.\.7 .* got 8"):
        rank_answers(tiny_vqa, states, *candidates(tiny), k_test=8)


@torch.no_grad()
def test_cached_decoding_equals_recomputation_on_256_questions(tiny, tiny_vqa):
    *_, states = questions_of(tiny, tiny_vqa, 256)
    options = {"dec_token_id": tiny.DEC, "sep_token_id": tiny.SEP, "pad_token_id": tiny.PAD}
    cached = generate_answers(tiny_vqa, states, **options)
    plain = generate_answers(tiny_vqa, states, use_cache=False, **options)
    assert torch.equal(cached, plain)
    assert cached.shape[1] <= 10 and bool((cached[:, 0] == tiny.DEC).all())


@torch.no_grad()
def test_generation_equals_hugging_face(tiny, tiny_vqa):
    pixels, ids, mask, states = questions_of(tiny, tiny_vqa, 16)
    options = {"max_length": 10, "min_length": 1, "num_beams": 1, "do_sample": False}
    theirs = tiny_vqa.generate(ids, pixels, attention_mask=mask, **options)
    ours = generate_answers(
        tiny_vqa, states, dec_token_id=tiny.DEC, sep_token_id=tiny.SEP, pad_token_id=tiny.PAD
    )
    assert torch.equal(ours, theirs)


@torch.no_grad()
def test_the_questions_padding_is_masked_when_asked(tiny, tiny_vqa):
    """transformers' BLIP drops this mask; the block of `cross_masks` brings it back."""
    *_, states = questions_of(tiny, tiny_vqa, 12)
    options = {"dec_token_id": tiny.DEC, "sep_token_id": tiny.SEP, "pad_token_id": tiny.PAD}
    masked = generate_answers(tiny_vqa, states, attend_padding=False, **options)
    for row in range(12):
        valid = int(states.mask[row].sum())
        alone = states._replace(
            hidden=states.hidden[row, None, :valid], mask=states.mask[row, None, :valid]
        )
        expected = generate_answers(tiny_vqa, alone, **options)[0]
        assert torch.equal(masked[row, : len(expected)], expected)
