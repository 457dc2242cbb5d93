"""Read a frozen ViT at inner blocks."""

from collections.abc import Collection

from torch import Tensor, nn


def block_outputs(
    vision: nn.Module, pixel_values: Tensor, blocks: Collection[int]
) -> dict[int, Tensor]:
    """Outputs ``[n, 1 + patches, width]`` of the blocks with these numbers, counted from 1.

    Blocks behind the last wanted one are not run, and the tower's final LayerNorm is not applied.

    Args:
        vision: a `Blip2VisionModel` or `InstructBlipVisionModel`.
        pixel_values: ``[n, 3, H, W]``.
    """
    hidden = vision.embeddings(pixel_values)
    outputs = {}
    for number, layer in enumerate(vision.encoder.layers[: max(blocks)], start=1):
        hidden = layer(hidden)
        if number in blocks:
            outputs[number] = hidden
    return outputs
