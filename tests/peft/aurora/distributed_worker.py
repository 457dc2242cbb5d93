"""Run by test_distributed.py on every rank: train tiny models in the parallel modes asked for."""

import importlib.util
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from peft import get_peft_model_state_dict
from torch.nn.parallel import DistributedDataParallel

_spec = importlib.util.spec_from_file_location("tiny", Path(__file__).with_name("conftest.py"))
tiny = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tiny)


def model_for(kind, checkpointing=False):
    model = tiny.make_aurora(kind).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def batches(kind):
    return [tiny.make_batch(kind, seed=seed) for seed in (1, 2)]


def optimizer_of(model):
    # Fused, as the trainer's default: it changes parameters without moving version counters.
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=0.05, fused=True)


def expected_gradients(kind, steps):
    """Gradients of the last of `steps` steps over the mean loss of both ranks' batches."""
    model = model_for(kind)
    optimizer = optimizer_of(model)
    for _ in range(steps):
        optimizer.zero_grad()
        losses = [tiny.loss_of(kind, model, batch) for batch in batches(kind)]
        (sum(losses) / 2).backward()
        gradients = tiny.gradients(model)
        optimizer.step()
    return gradients, get_peft_model_state_dict(model)


def shard(model, mode):
    from torch.distributed.fsdp import fully_shard

    base = model.get_base_model()
    if mode == "layers":
        stacks = [m for m in base.modules() if isinstance(m, torch.nn.ModuleList) and len(m)]
        for layer in (layer for stack in stacks for layer in stack):
            fully_shard(layer)
    return fully_shard(model)  # "root": everything in one unit


def check(mode, kind, rank, steps=3):
    expected, weights = expected_gradients(kind, steps)
    model = model_for(kind, checkpointing=mode == "layers")
    parallel = DistributedDataParallel(model) if mode == "ddp" else shard(model, mode)
    optimizer = optimizer_of(model)
    batch = batches(kind)[rank]
    for _ in range(steps):
        optimizer.zero_grad()
        tiny.loss_of(kind, parallel, batch).backward()
        found = tiny.gradients(model)
        optimizer.step()
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(
            whole(gradient), expected[name], rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )
    saved = {name: whole(tensor) for name, tensor in get_peft_model_state_dict(model).items()}
    assert saved.keys() == weights.keys()
    for name, tensor in weights.items():
        assert saved[name].shape == tensor.shape, name


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


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
