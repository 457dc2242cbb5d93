"""Guard rails and details of StageTrainer on a real tiny model."""

import pytest
import torch

from mmadapt.train import GuardError, load_recipe
from mmadapt.train.arguments import build_arguments
from mmadapt.train.build import add_adapter, collator, load_backbone, stage_dataset
from mmadapt.train.trainer import StageTrainer


@pytest.fixture
def make_trainer(write_recipe, tmp_path):
    from mmadapt.peft import components, set_stage

    def make(stage="instruct", change=None, **overrides):
        recipe = load_recipe(write_recipe(**overrides))
        pretrained = load_backbone(recipe.model)
        model = add_adapter(pretrained.model, recipe)
        set_stage(model, stage)
        if change is not None:
            change(model)
        config = recipe.stages[stage]
        arguments = build_arguments(
            config.train,
            output_dir=str(tmp_path / stage),
            learning_rate=config.lr.default,
            seed=recipe.seed,
            use_cpu=True,
            quiet=True,
        )
        return StageTrainer(
            model,
            arguments,
            name=stage,
            stage=config,
            components=components(model),
            dataset=stage_dataset(recipe, stage),
            collator=collator(pretrained, max_length=config.max_length, with_labels=True),
            image_token_id=pretrained.image_token_id,
        )

    return make


def test_a_disconnected_component_stops_the_run(make_trainer):
    def cut(model):
        for module in model.modules():
            if type(module).__name__ == "PillMlp":
                module.forward = module.base_layer.forward

    with pytest.raises(GuardError, match="no gradient reached vision_expert, text_expert"):
        make_trainer(change=cut).train()


def test_images_that_never_arrive_stop_the_run(make_trainer):
    trainer = make_trainer("align", stages__align__max_length=6)  # no room for an image
    with pytest.raises(GuardError, match="stage align: no visual token in the first 2 samples"):
        trainer.train()


def test_first_align_step_moves_what_pill_says(make_trainer):
    # PILL's first step: gradients in up-projections of the vision experts and the projector only
    trainer = make_trainer("align", stages__align__train={"max_steps": 1, "report_to": []})
    seen = {}

    def record(model, inputs, *args, **kwargs):
        loss = StageTrainer.training_step(trainer, model, inputs, *args, **kwargs)
        for name, parameter in model.named_parameters():
            if parameter.grad is not None and parameter.grad.count_nonzero():
                seen[name] = parameter
        return loss

    trainer.training_step = record
    trainer.train()
    owner = {key: part for part, items in trainer.components.items() for key, _ in items}
    assert {owner[name] for name in seen} == {"projector", "vision_expert"}
    experts = {name for name in seen if owner[name] == "vision_expert"}
    assert experts == {key for key in experts if ".up" in key}


def test_optimizer_follows_recipe_and_paper(make_trainer):
    optimizer = make_trainer().create_optimizer()
    assert isinstance(optimizer, torch.optim.AdamW)
    assert optimizer.defaults["betas"] == (0.9, 0.95)
    rates = {g["component"]: g["lr"] for g in optimizer.param_groups}
    assert rates["gate"] == 0.05
    assert rates["projector"] == rates["text_expert"] == 0.01
    decays = {p.ndim >= 2: g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert decays[True] == 0.02


def test_frozen_image_encoder_stays_in_eval_mode(make_trainer):
    trainer = make_trainer(stages__instruct__train={"max_steps": 1, "report_to": []})
    modes = {}

    def look(module, args, kwargs):
        base = trainer.model.get_base_model()
        modes.update(
            {name: m.training for name, m in base.named_modules() if isinstance(m, torch.nn.Module)}
        )

    trainer.model.register_forward_pre_hook(look, with_kwargs=True)
    trainer.train()
    qformer = [training for name, training in modes.items() if ".qformer." in f".{name}."]
    layers = [t for name, t in modes.items() if "language_model" in name and "layers" in name]
    assert qformer
    assert not any(qformer)
    assert all(layers)


def test_wrong_answers_follow_the_epoch(make_trainer):
    trainer = make_trainer(
        stages__instruct__train={
            "num_train_epochs": 2,
            "report_to": [],
            "per_device_train_batch_size": 2,
        }
    )
    epochs = []
    dataset = trainer.train_dataset
    original = dataset.set_epoch
    dataset.set_epoch = lambda epoch: (epochs.append(epoch), original(epoch))
    trainer.train()
    # accelerate's loader announces the epoch too; every announcement must be the right one
    assert epochs == sorted(epochs)
    assert set(epochs) == {0, 1}
