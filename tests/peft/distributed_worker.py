"""Run by test_distributed.py on every rank: train tiny models in the parallel modes asked for."""

import importlib.util
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from mmadapt.peft import explain

_spec = importlib.util.spec_from_file_location("tiny", Path(__file__).with_name("conftest.py"))
tiny = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tiny)

KIND = {
    "ddp": "blip2",
    "ddp_without_pixels": "llava",
    "fsdp2": "blip2",
    "fsdp2_norms": "blip2",  # norms train and are sharded one by one
    "fsdp2_norms_by_layer": "blip2",  # norms train and are sharded with their layer
}


def batches(kind):
    """Rank 0 has images; rank 1 has text alone."""
    return [
        tiny.make_batch(kind, images=(True, True)),
        tiny.make_batch(kind, images=(False, False)),
    ]


def model_for(mode, stage, checkpointing=False):
    model = tiny.make_pill(KIND[mode], stage=stage).train()
    if "norms" in mode:
        for name, parameter in model.named_parameters():
            if "layernorm" in name and ".language_model." in name:
                parameter.requires_grad_()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def expected_gradients(mode, stage, steps):
    """Gradients of the last of `steps` SGD steps over the mean loss of both ranks' batches."""
    model = model_for(mode, stage)
    for _ in range(steps):
        model.zero_grad()
        (sum(model(**batch).loss for batch in batches(KIND[mode])) / 2).backward()
        grads = tiny.gradients(model)
        step(model)
    return grads


def step(model):
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.sub_(parameter.grad, alpha=0.1)


def shard(model, leaves):
    from torch.distributed.fsdp import fully_shard

    # As Trainer's policy for PEFT: leaves with a trained weight, then layers.
    for module in list(model.modules()) if leaves else ():
        weight = getattr(module, "weight", None)
        leaf = isinstance(weight, torch.nn.Parameter) and not list(module.children())
        if leaf and weight.requires_grad:
            fully_shard(module)
    for layer in model.get_base_model().language_model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    return model


def check(mode, stage, rank, steps=2):
    expected = expected_gradients(mode, stage, steps)
    sharded = mode.startswith("fsdp2")
    model = model_for(mode, stage, checkpointing=sharded)
    leaves = mode != "fsdp2_norms_by_layer"
    parallel = shard(model, leaves) if sharded else DistributedDataParallel(model)
    fused = {report.fused for report in explain(model)}
    assert fused == {mode != "fsdp2_norms"}, explain(model)
    batch = batches(KIND[mode])[rank]
    for _ in range(steps):
        parallel.zero_grad()
        parallel(**batch).loss.backward()
        found = tiny.gradients(model)
        step(model)
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    for name, gradient in found.items():
        full = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
        torch.testing.assert_close(full, expected[name], rtol=1e-4, atol=1e-6, msg=name)


def main(rank, folder, *cases):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    for case in cases:
        print("rank", rank, case, flush=True)
        check(*case.split(":"), rank)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
