"""Backbones: Hugging Face vision-language models with what is needed to feed them.

>>> from mmadapt.models import load_pretrained
>>> backbone = load_pretrained("path/to/a/blip2-or-llava")
>>> backbone.model, backbone.tokenizer, backbone.image_processor
"""

from mmadapt.models.loading import IMAGE_STATISTICS, Pretrained, load_pretrained, num_image_tokens

__all__ = ["IMAGE_STATISTICS", "Pretrained", "load_pretrained", "num_image_tokens"]
