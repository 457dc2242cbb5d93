"""The demo's frozen parts, made from nothing: an image encoder and a language model.

No pretrained weights can be assumed to be there, so the digits recipe makes its own: a small ViT
and Q-Former that have seen training scans only, and a small Llama that has read text only.
"""

from mmadapt.train.digits.backbone import make_digits_backbone
from mmadapt.train.digits.blip import make_digits_blip
from mmadapt.train.digits.corpus import PROMPT, SYSTEM

__all__ = ["PROMPT", "SYSTEM", "make_digits_backbone", "make_digits_blip"]
