"""Pretrain the small ViT and Q-Former on training scans."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import affine_grid, cross_entropy, grid_sample

from mmadapt.data import LlavaJson
from mmadapt.data.images import open_image


@dataclass(frozen=True)
class VisionSettings:
    """Size of the encoder and length of its training."""

    hidden_size: int = 96
    num_layers: int = 2
    num_heads: int = 4
    patch_size: int = 8
    num_queries: int = 4
    epochs: int = 22
    batch_size: int = 32
    lr: float = 1.5e-3
    distortion: float = 0.7
    """Range of the random rotations (radians), shears, scales and shifts, halved."""


def pretrain_vision(
    model: Any,
    image_processor: Any,
    data_root: Path,
    settings: VisionSettings,
    *,
    seed: int,
    progress: Callable[[], None],
) -> None:
    """Train the vision tower, Q-Former and queries of `model` (BLIP-2) in place.

    Each query learns to tell the captions of single training scans apart, through a linear
    head that is thrown away. `progress()` is called after each epoch.
    """
    pixels, labels = _captioned_scans(image_processor, data_root)
    classes = int(labels.max()) + 1
    head = nn.Linear(model.config.qformer_config.hidden_size, classes)
    parts = [model.vision_model, model.qformer, head]
    parameters = [model.query_tokens, *(p for part in parts for p in part.parameters())]
    optimizer = torch.optim.AdamW(parameters, lr=settings.lr, betas=(0.9, 0.95), weight_decay=0.05)
    steps = settings.epochs * -(-len(labels) // settings.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, settings.lr, total_steps=steps)
    generator = torch.Generator().manual_seed(seed)
    for part in parts:
        part.train()
    for _ in range(settings.epochs):
        order = torch.randperm(len(labels), generator=generator)
        for rows in order.split(settings.batch_size):
            images = _distort(pixels[rows], settings.distortion, generator)
            logits = head(query_features(model, images))
            targets = labels[rows, None].expand(-1, logits.shape[1])
            cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        progress()
    for part in parts:
        part.eval()


def query_features(model: Any, pixels: Tensor) -> Tensor:
    """Q-Former output [B, queries, hidden] of `pixels` [B, 3, H, W]."""
    seen = model.vision_model(pixel_values=pixels).last_hidden_state
    queries = model.query_tokens.expand(len(pixels), -1, -1)
    return model.qformer(query_embeds=queries, encoder_hidden_states=seen).last_hidden_state


def _captioned_scans(image_processor: Any, data_root: Path) -> tuple[Tensor, Tensor]:
    """Pixels [N, 3, H, W] of the captioned single scans, and the number of each caption."""
    captions = LlavaJson(data_root / "captions" / "chat.json")
    images, names = [], []
    for sample in captions:
        paths = list(sample.image_paths())
        if len(paths) == 1:
            images.append(open_image(paths[0], sample.id))
            names.append(sample.messages[-1]["content"][0]["text"])
    numbers = {name: number for number, name in enumerate(sorted(set(names)))}
    pixels = image_processor(images=images, return_tensors="pt")["pixel_values"]
    return pixels, torch.tensor([numbers[name] for name in names])


def _distort(pixels: Tensor, amount: float, generator: torch.Generator) -> Tensor:
    """Random rotation, shear, scale and shift of each image; what comes in is edge-coloured."""

    def draw(width: float, *shape: int) -> Tensor:
        return (torch.rand(*shape, generator=generator) - 0.5) * width * amount

    count = len(pixels)
    angle, scale, shear = draw(0.5, count), 1 + draw(0.3, count), draw(0.4, count)
    theta = torch.stack(
        [
            torch.stack([angle.cos() * scale, shear - angle.sin() * scale], dim=1),
            torch.stack([angle.sin() * scale, angle.cos() * scale], dim=1),
        ],
        dim=1,
    )
    theta = torch.cat([theta, draw(0.3, count, 2, 1)], dim=2)
    grid = affine_grid(theta, list(pixels.shape), align_corners=False)
    return grid_sample(pixels, grid, padding_mode="border", align_corners=False)
