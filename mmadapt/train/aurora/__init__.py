"""Runs that adapt one BLIP by several methods and put them side by side.

A recipe with `task: retrieval` or `task: vqa` names its methods (full fine-tuning, LoRA, Aurora);
each is trained from the same weights on the same batches, evaluated, timed and measured.
"""

from mmadapt.train.aurora.config import AuroraRecipe
from mmadapt.train.aurora.run import evaluate, train

__all__ = ["AuroraRecipe", "evaluate", "train"]
