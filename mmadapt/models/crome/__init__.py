"""CROME: a gated cross-modal adapter in front of a frozen language model (arXiv 2408.06610).

Importing this package registers the model with transformers' Auto classes.
"""

from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText

from mmadapt.models.crome.adapter_file import (
    crome_adapter_state,
    load_crome_adapter,
    load_crome_adapter_state,
    save_crome_adapter,
)
from mmadapt.models.crome.build import crome_from_blip
from mmadapt.models.crome.config import CromeModelConfig
from mmadapt.models.crome.modeling import CromeForConditionalGeneration
from mmadapt.models.crome.stages import crome_components, set_crome_stage

__all__ = [
    "CromeForConditionalGeneration",
    "CromeModelConfig",
    "crome_adapter_state",
    "crome_components",
    "crome_from_blip",
    "load_crome_adapter",
    "load_crome_adapter_state",
    "save_crome_adapter",
    "set_crome_stage",
]

AutoConfig.register(CromeModelConfig.model_type, CromeModelConfig, exist_ok=True)
AutoModel.register(CromeModelConfig, CromeForConditionalGeneration, exist_ok=True)
AutoModelForImageTextToText.register(CromeModelConfig, CromeForConditionalGeneration, exist_ok=True)
