"""The whole of CROME in miniature: three stages on coloured shapes, with a frozen language model.

Language: a description "colour shape place", a question, an answer, one token each. The language
model has read descriptions and knows what each question asks for. Images show a shape in a colour
on one side; captions (a) and questions (b) are about colour and shape; the new task (c) asks for
the side.
"""

import pytest
import torch
from transformers import LlamaConfig

from mmadapt.models import CromeForConditionalGeneration, CromeModelConfig, set_crome_stage

IMAGE, BOS, CAPTION = 3, 1, 4
COLOURS, SHAPES, PLACES = (10, 11, 12, 13), (20, 21, 22), (30, 31)
QUESTIONS = {5: COLOURS, 6: SHAPES, 7: PLACES}
RGB = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0]])


def things(count, generator):
    """Index of colour, shape and place of each thing, [count, 3]."""
    sizes = (len(COLOURS), len(SHAPES), len(PLACES))
    return torch.stack([torch.randint(n, (count,), generator=generator) for n in sizes], 1)


def draw(what, generator):
    """Images [n, 3, 16, 16]: a square, a bar or a frame on the left or right, on noise."""
    pixels = 0.1 * torch.randn(len(what), 3, 16, 16, generator=generator)
    for i, (colour, shape, place) in enumerate(what.tolist()):
        mask = torch.zeros(16, 16)
        left = 8 * place + int(torch.randint(3, (), generator=generator))
        top = int(torch.randint(10, (), generator=generator))
        if shape == 1:
            mask[top + 2 : top + 4, left : left + 6] = 1
        else:
            mask[top : top + 6, left : left + 6] = 1
            if shape == 2:
                mask[top + 2 : top + 4, left + 2 : left + 4] = 0
        pixels[i] += RGB[colour][:, None, None] * mask[:, :16]
    return pixels


def words(what):
    return torch.stack(
        [torch.tensor(t)[what[:, k]] for k, t in enumerate((COLOURS, SHAPES, PLACES))], 1
    )


def text_batch(count, generator):
    """Described things with a question about one word; labels on the answer."""
    what = words(things(count, generator))
    asked = torch.randint(3, (count,), generator=generator)
    order = torch.rand(count, 3, generator=generator).argsort(1)
    ids = torch.cat(
        [
            what.gather(1, order),
            torch.full((count, 1), BOS),
            (asked + 5)[:, None],
            what.gather(1, asked[:, None]),
        ],
        1,
    )
    labels = torch.full_like(ids, -100)
    labels[:, -1] = ids[:, -1]
    return {"input_ids": ids, "labels": labels}


def image_batch(model, count, kind, generator):
    what = things(count, generator)
    named = words(what)
    if kind == "caption":
        question, answer = torch.full((count, 1), CAPTION), named[:, :2]
    else:
        low, high = (0, 2) if kind == "old" else (2, 3)
        asked = torch.randint(low, high, (count, 1), generator=generator)
        question, answer = asked + 5, named.gather(1, asked)
    prefix = torch.full((count, model.config.num_image_tokens), IMAGE)
    ids = torch.cat([prefix, torch.full((count, 1), BOS), question, answer], 1)
    labels = torch.full_like(ids, -100)
    labels[:, -answer.shape[1] :] = answer
    batch = {"input_ids": ids, "labels": labels, "pixel_values": draw(what, generator)}
    return batch | {"qformer_input_ids": question}


def make(**options):
    torch.manual_seed(0)
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    vision |= {"num_hidden_layers": 2, "image_size": 16, "patch_size": 4, "initializer_range": 0.1}
    qformer = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    qformer |= {"num_hidden_layers": 4, "vocab_size": 40, "initializer_range": 0.1}
    text = LlamaConfig(
        vocab_size=40,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.05,
    )
    config = CromeModelConfig(
        vision, qformer, text, num_query_tokens=8, image_token_id=IMAGE, adapter_rank=16, **options
    )
    return CromeForConditionalGeneration(config)


def steps(model, batches, lr):
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.05)
    model.train()
    for number, batch in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (number + 1) / 20)
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    model.eval()


@torch.no_grad()
def loss(model, kind):
    generator = torch.Generator().manual_seed(99)
    return model(**image_batch(model, 256, kind, generator)).loss.item()


def pretrain_language(model):
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.language_model.requires_grad_(True)
    steps(model, (text_batch(64, generator) for _ in range(250)), 3e-3)


def three_stages(model, language):
    model.language_model.load_state_dict(language)
    generator = torch.Generator().manual_seed(2)
    task_before = None
    for stage, kind, count in (
        ("align", "caption", 150),
        ("instruct", "old", 200),
        ("task", "new", 200),
    ):
        if stage == "task":
            task_before = loss(model, "new")
            if model.adapter is None:
                break
        set_crome_stage(model, stage)
        batches = (image_batch(model, 32, kind, generator) for _ in range(count))
        steps(model, batches, 3e-3)
    return task_before, loss(model, "new")


@pytest.mark.slow
def test_three_stages():
    model = make()
    assert sum(p.numel() for p in model.adapter.parameters()) == 5 * 64 * 16 == 5_120
    assert (model.config.num_patch_tokens, model.config.num_query_tokens) == (16, 8)
    pretrain_language(model)
    language = {n: p.clone() for n, p in model.language_model.state_dict().items()}
    text = text_batch(200, torch.Generator().manual_seed(3))
    with torch.no_grad():
        text_before = model(**text).loss
    assert text_before < 0.1

    before, after = three_stages(model, language)
    _, without = three_stages(make(adapter_branches=[]), language)
    _, queries_only = three_stages(make(order=["text", "instruction"]), language)
    print(
        f"new task: {before:.3f} -> {after:.3f}; no adapter {without:.3f}; text {queries_only:.3f}"
    )
    assert after < 0.5 * before
    assert after < without and after < queries_only

    for name, value in model.language_model.state_dict().items():
        assert torch.equal(value, language[name]), name
    with torch.no_grad():
        assert torch.equal(model(**text).loss, text_before)
