"""Greedy generation: what comes back belongs to the right prompt, however it was batched."""

from __future__ import annotations

import pytest
import torch

from mmadapt.eval import blank_pixels, evaluate_scienceqa, generate_answers, sample_answers


def generate(model, toy, collator, dataset, **kwargs):
    kwargs = {"batch_size": 3, "max_new_tokens": 6} | kwargs
    return generate_answers(model, toy.Tokenizer(), collator, dataset, **kwargs)


def greedy_by_forward(model, toy, collator, sample, steps):
    """One full forward per token, no cache, no padding: the definition of greedy decoding."""
    batch = collator([sample])
    if "Llava" in type(model).__name__ and not (batch["input_ids"] == 3).any():
        del batch["pixel_values"]
    tokens = []
    with torch.no_grad():
        for _ in range(steps):
            token = model(**batch).logits[0, -1].argmax()
            if token == toy.Tokenizer.eos_token_id:
                break
            tokens.append(int(token))
            batch["input_ids"] = torch.cat([batch["input_ids"], token[None, None]], 1)
            batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    return toy.Tokenizer().decode(tokens)


@pytest.mark.parametrize("batch_size", [1, 3, 7])
def test_batched_is_greedy_per_sample_in_order(model, toy, prompts, dataset, batch_size):
    texts = generate(model, toy, prompts, dataset, batch_size=batch_size)
    assert texts == [greedy_by_forward(model, toy, prompts, s, 6) for s in dataset]
    assert len(set(texts)) > 3  # otherwise the order would not be tested


def test_generated_part_only_even_when_shorter_than_the_prompt(model, toy, prompts, dataset):
    texts = generate(model, toy, prompts, dataset, max_new_tokens=1)
    assert all(len(text.split()) <= 1 for text in texts)


def test_stops_at_eos(toy, prompts, dataset):
    model = toy.blip2()
    plain = generate(model, toy, prompts, dataset)
    head = model.get_output_embeddings()
    with torch.no_grad():  # EOS becomes the twin of the second word of a text, and wins the tie
        text = next(t for t in plain if len(set(t.split()[:2])) == 2)
        head.weight[2] = 1.01 * head.weight[4 + toy.WORDS.index(text.split()[1])]
    stopped = generate(model, toy, prompts, dataset)
    assert stopped[plain.index(text)] == text.split()[0]


def test_blank_images_change_visual_answers_alone(model, toy, prompts, dataset):
    seen = generate(model, toy, prompts, dataset)
    blank = generate(model, toy, prompts, dataset, blank_images=True)
    has_image = [sample.record["image"] is not None for sample in dataset]
    assert [s for s, im in zip(seen, has_image, strict=True) if not im] == [
        b for b, im in zip(blank, has_image, strict=True) if not im
    ]
    assert any(s != b for s, b, im in zip(seen, blank, has_image, strict=True) if im)


def test_blank_images_hide_which_image_it_was(toy, prompts):
    same = [toy.sample(str(i), "w1 w2", [i]) for i in range(5)]
    model = toy.blip2()
    assert len(set(generate(model, toy, prompts, same))) > 1
    assert len(set(generate(model, toy, prompts, same, blank_images=True))) == 1


def test_blank_pixels_are_processed_black(prompts):
    pixels = torch.rand(3, 3, 8, 8, dtype=torch.bfloat16)
    blank = blank_pixels(prompts.pixels.image_processor, pixels)
    assert blank.shape == pixels.shape
    assert blank.dtype == pixels.dtype
    assert torch.equal(blank, torch.full_like(pixels, -1))


def lora(model):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=r".*language_model.*\.v_proj", init_lora_weights=False)
    return peft.get_peft_model(model, config)


def pill(model):
    peft = pytest.importorskip("peft")
    from mmadapt.peft import PillConfig

    tuned = peft.get_peft_model(model, PillConfig(rank=4, stage="instruct"))
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3)
    return tuned


@pytest.mark.parametrize("adapt", [lora, pill])
def test_peft_model(toy, prompts, dataset, adapt):
    plain = generate(toy.blip2(), toy, prompts, dataset)
    torch.manual_seed(0)
    model = adapt(toy.blip2())
    tuned = generate(model, toy, prompts, dataset, batch_size=4)
    assert tuned != plain
    assert tuned == generate(model, toy, prompts, dataset, batch_size=1)
    assert tuned == [greedy_by_forward(model, toy, prompts, s, 6) for s in dataset]
    with model.disable_adapter():
        assert generate(model, toy, prompts, dataset) == plain


def test_model_state_is_restored(toy, prompts, dataset):
    model = toy.blip2().train()
    model.qformer.eval()
    model.config.use_cache = False
    modes = {name: module.training for name, module in model.named_modules()}
    generate(model, toy, prompts, dataset[:2])
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert model.config.use_cache is False


def test_state_is_restored_after_an_error(toy, prompts, dataset):
    model = toy.blip2().train()

    def broken(samples):
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        generate(model, toy, broken, dataset)
    assert all(module.training for module in model.modules())


def test_a_backward_works_after_generation(toy, prompts, dataset):
    model = toy.blip2()
    generate(model, toy, prompts, dataset[:3])
    model(**prompts(dataset[:1])).logits.sum().backward()
    assert model.language_projection.weight.grad.abs().sum() > 0


def test_progress_reaches_the_total(toy, prompts, dataset):
    calls = []
    generate(toy.blip2(), toy, prompts, dataset, progress=lambda *done: calls.append(done))
    assert calls == [(3, 7), (6, 7), (7, 7)]


def test_empty_dataset(toy, prompts):
    assert generate(toy.blip2(), toy, prompts, []) == []


def test_bad_arguments(toy, prompts, dataset):
    model = toy.blip2()
    with pytest.raises(ValueError, match="with_labels=False"):
        generate(model, toy, toy.Collator(with_labels=True, pad_side="left"), dataset)
    with pytest.raises(ValueError, match="left padding"):
        generate(model, toy, toy.Collator(with_labels=False, pad_side="right"), dataset)
    with pytest.raises(ValueError, match="batch_size: got 0"):
        generate(model, toy, prompts, dataset, batch_size=0)
    with pytest.raises(ValueError, match="max_new_tokens: got 0"):
        generate(model, toy, prompts, dataset, max_new_tokens=0)
    tokenizer = toy.Tokenizer()
    tokenizer.eos_token_id = None
    with pytest.raises(ValueError, match="no eos_token"):
        generate_answers(model, tokenizer, prompts, dataset)


class Scripted(torch.nn.Module):
    """Answers from the last prompt word: w0 -> "The answer is A.", w1 -> B., w2 -> nonsense."""

    def __init__(self, toy):
        super().__init__()
        self.anchor = torch.nn.Parameter(torch.zeros(1))
        encode = toy.Tokenizer().encode
        self.replies = {
            encode("w0")[0]: encode("The answer is A. w5"),
            encode("w1")[0]: encode("The answer is B. w5"),
            encode("w2")[0]: encode("w5 w5 w5 w5 w5"),
        }

    def generate(self, input_ids, **kwargs):
        replies = torch.tensor([self.replies[int(row[-1])] for row in input_ids])
        return torch.cat([input_ids, replies], 1)


@pytest.fixture
def scored(toy):
    return [
        toy.sample("a", "w9 w0", [0], reply="", skill="digit"),
        toy.sample("b", "w1", [1], skill="digit"),
        toy.sample("c", "w7 w7 w1", skill="sum", answer=1, choices=["1", "2", "3"]),
        toy.sample("d", "w2", skill="sum", hint="count"),
    ]


def test_evaluate_scienceqa(toy, prompts, scored, tmp_path):
    result = evaluate_scienceqa(Scripted(toy), toy.Tokenizer(), prompts, scored, batch_size=3)
    assert result.predictions == {"a": 0, "b": 1, "c": 1, "d": None}
    assert result.texts["a"].startswith("The answer is A.")
    assert result.failures == 1
    assert result.table["AVG"] == 50
    assert {s: (a.correct, a.total) for s, a in result.by_skill.items()} == {
        "digit": (1, 2),
        "sum": (1, 2),
    }
    assert (result.visual.percent, result.text_only.percent) == (50, 50)
    result.save(tmp_path / "out")
    assert (tmp_path / "out" / "preds.json").read_text().count(":") == 4

    samples = sample_answers(scored, result, blanked=result, count=3)
    assert len(samples) == 3
    assert {s.skill for s in samples[:2]} == {"digit", "sum"}
    assert sample_answers(scored, result, count=3, blanked=result) == samples
    by_id = {s.id: s for s in sample_answers(scored, result, count=99)}
    assert by_id["a"].images == ["0"]
    assert (by_id["d"].prediction, by_id["d"].correct) == (None, False)


def test_repeated_ids_are_refused(toy, prompts, scored):
    with pytest.raises(ValueError, match="id 'a' occurs twice"):
        evaluate_scienceqa(Scripted(toy), toy.Tokenizer(), prompts, [scored[0], scored[0]])
