"""Real PEFT tuners for frozen multimodal models; importing this package registers them."""

from mmadapt.peft._register import register_tuner
from mmadapt.peft.aurora.config import AURORA, AuroraConfig
from mmadapt.peft.aurora.explain import AuroraReport
from mmadapt.peft.aurora.model import AuroraModel
from mmadapt.peft.aurora.released import aurora_from_released, aurora_to_released
from mmadapt.peft.components import components
from mmadapt.peft.explain import explain
from mmadapt.peft.pill.config import PILL, PillConfig
from mmadapt.peft.pill.explain import WrapperReport
from mmadapt.peft.pill.gate_profile import GateProfile, gate_profile
from mmadapt.peft.pill.meta_llama import convert_meta_llama
from mmadapt.peft.pill.model import PillModel
from mmadapt.peft.pill.released import from_released, to_released
from mmadapt.peft.pill.stage import set_stage

__all__ = [
    "AuroraConfig",
    "AuroraModel",
    "AuroraReport",
    "GateProfile",
    "PillConfig",
    "PillModel",
    "WrapperReport",
    "aurora_from_released",
    "aurora_to_released",
    "components",
    "convert_meta_llama",
    "explain",
    "from_released",
    "gate_profile",
    "set_stage",
    "to_released",
]

register_tuner(AURORA, AuroraConfig, AuroraModel)
register_tuner(PILL, PillConfig, PillModel)
