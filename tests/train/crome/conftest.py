"""A CROME recipe of three short stages over the tiny random backbone."""

import pytest

from mmadapt.data.digits_turned import write_turned_digits
from mmadapt.train import check_recipe


@pytest.fixture(scope="session")
def turned_dir(digits_dir):
    return write_turned_digits(digits_dir, digits_dir.with_name("digits_turned"))


@pytest.fixture
def crome_recipe(blip2_dir, digits_dir, turned_dir, tmp_path):
    """`build(out, **changes)` -> a checked recipe; dotted paths with `__` change it."""

    def build(out="run", **changes):
        questions = {"reader": "scienceqa", "prompt": "QCM-A", "system": "", "split": "train"}
        captions = {"reader": "llava_json", "path": f"{digits_dir}/captions/chat.json"}
        train = {
            "max_steps": 3,
            "per_device_train_batch_size": 4,
            "logging_steps": 1,
            "save_steps": 1,
            "adam_beta2": 0.999,
            "weight_decay": 0.05,
            "report_to": [],
        }
        rates = {"default": 0.01, "schedule": "per_step", "warmup_steps": 1}
        upright = {**questions, "path": str(digits_dir)}
        turned = {**questions, "path": str(turned_dir)}
        values = {
            "model": {"name": str(blip2_dir)},
            "method": {"type": "crome", "rank": 4, "crop": True, "flip": False},
            "out": str(tmp_path / out),
            "seed": 1,
            "data": {"root": str(digits_dir)},
            "stages": {
                "align": {"data": [captions], "lr": rates, "train": dict(train)},
                "instruct": {
                    "data": [upright, captions],
                    "sampling": "sqrt",
                    "lr": {**rates, "qformer": 0.001},
                    "train": dict(train),
                },
                "task": {"data": [turned], "lr": rates, "train": dict(train)},
            },
            "eval": {"max_new_tokens": 6, "batch_size": 8},
            "launch": {"cpu": True},
        }
        for path, value in changes.items():
            *parents, leaf = path.split("__")
            target = values
            for parent in parents:
                target = target[parent]
            target[leaf] = value
        return check_recipe(values)

    return build
