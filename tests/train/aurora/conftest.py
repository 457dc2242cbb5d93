"""A recipe small enough for seconds: a BLIP of width 16 that has hardly been pretrained."""

import pytest
import yaml

from mmadapt.train import check_recipe, find_recipe, load_recipe

# What the answer decoder knows must be worth adapting; retrieval of this size stays near chance.
MODEL = {
    "retrieval": {"vision_steps": 2, "word_steps": 2, "task_steps": 2, "hidden_size": 16},
    "vqa": {"vision_steps": 30, "word_steps": 1, "task_steps": 80, "hidden_size": 32},
}
DATA = {"retrieval": {"train": 12, "test": 12}, "vqa": {"train": 24, "test": 12, "questions": 2}}


def inline(value):
    return yaml.safe_dump(value, default_flow_style=True).strip()


@pytest.fixture
def recipe(tmp_path):
    """`recipe(task, *overrides)`: the shipped recipe of a task, made small, under tmp_path."""

    def make(task, *overrides):
        small = [
            f"out={tmp_path}/run",
            f"model.make_args={inline(MODEL[task] | {'num_layers': 1})}",
            f"data.make_args={inline(DATA[task])}",
            "train.per_device_train_batch_size=8",
            "train.num_train_epochs=2",
            "train.logging_steps=1",
            "train.save_steps=4",
            "train.report_to=none",
            "methods.aurora.rank=4",
            "methods.full.lr=0.003",
            "methods.lora.lr=0.03",
            "methods.aurora.lr=0.03",
        ]
        if task == "retrieval":
            small += ["objective.queue_size=16", "eval.k_test=8"]
        path = find_recipe(f"aurora_digits_{task}")
        return load_recipe(path, [*small, *overrides])

    return make


@pytest.fixture
def check():
    return check_recipe
