"""Hugging Face's Trainer with its default, fused optimiser."""

import torch
from transformers import Trainer, TrainingArguments


class Rows(torch.utils.data.Dataset):
    def __init__(self, batch):
        self.batch = batch

    def __len__(self):
        return len(self.batch["input_ids"])

    def __getitem__(self, index):
        return {name: values[index] for name, values in self.batch.items()}


def train(tiny, folder, steps=4, resume=None):
    model = tiny.aurora("llama", branch_dropout=0.1)
    arguments = TrainingArguments(
        str(folder),
        max_steps=steps,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        save_steps=2,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    assert "fused" in arguments.optim
    trainer = Trainer(model, arguments, train_dataset=Rows(tiny.batch("llama", rows=16)))
    trainer.train(resume_from_checkpoint=resume)
    # Once for each micro-batch, after whose backward pass somebody might change the weights.
    assert model.base_model.contraction.count == 2 * (steps - (2 if resume else 0))
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def test_resuming_gives_the_same_weights_bitwise(tiny, tmp_path):
    whole = train(tiny, tmp_path)
    resumed = train(tiny, tmp_path, resume=str(tmp_path / "checkpoint-2"))
    assert whole.keys() == resumed.keys() and len(whole) > 8
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
