"""LoRA of equal size in place of the adapter: what trains, what stays CROME's, what comes back."""

import torch

from mmadapt.eval import RunResults
from mmadapt.models import crome_components
from mmadapt.train import Console, train
from mmadapt.train.crome.build import prepare_crome
from mmadapt.train.crome.lora import clear_lora
from tests.train.crome.test_recipe import saved

LORA = {"method__task_trains": ["lora"]}


def test_it_is_as_large_as_the_adapter_and_nothing_at_first(crome_recipe):
    _, plain = prepare_crome(crome_recipe(eval=None))
    _, model = prepare_crome(crome_recipe(eval=None, **LORA))
    parts = crome_components(model)
    sizes = {name: sum(p.numel() for _, p in parts[name]) for name in ("adapter", "lora")}
    one_rank = sizes["lora"] // parts["lora"][0][1].shape[0]
    assert abs(sizes["lora"] - sizes["adapter"]) <= max(one_rank / 2, one_rank - sizes["adapter"])
    assert not any(".lm_head." in name for name, _ in parts["lora"])
    ids = torch.arange(5)[None]
    expected = plain.language_model(input_ids=ids).logits
    assert torch.equal(model.language_model(input_ids=ids).logits, expected)
    for name, parameter in parts["lora"]:
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter)
    assert not torch.equal(model.language_model(input_ids=ids).logits, expected)
    clear_lora(model)
    assert torch.equal(model.language_model(input_ids=ids).logits, expected)


def test_the_task_trains_lora_alone(crome_recipe):
    recipe = crome_recipe(**LORA)
    outcome = train(recipe, console=Console(quiet=True))
    before, task = saved(outcome.run_dir, "instruct"), saved(outcome.run_dir, "task")
    assert not any(".lora_" in name for name in before)
    assert task and all(name.startswith("language_model.") and ".lora_" in name for name in task)
    assert any(value.any() for name, value in task.items() if ".lora_B." in name)
    results = RunResults.from_json((outcome.run_dir / "metrics.json").read_text())
    transfer = results.transfer
    assert transfer.restored == {skill: pair[0] for skill, pair in transfer.source.items()}
    assert transfer.drift.divergence > 0
    # Unlike the adapter in front of it, LoRA changes what the language model makes of text alone.
    assert results.forgetting.before.perplexity != results.forgetting.after.perplexity
