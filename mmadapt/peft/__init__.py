"""Real PEFT tuners for frozen multimodal models; importing this package registers them."""

from mmadapt.peft._register import register_tuner
from mmadapt.peft.components import components
from mmadapt.peft.crome.config import CROME, CromeConfig
from mmadapt.peft.crome.explain import CromeReport
from mmadapt.peft.crome.model import CromeModel
from mmadapt.peft.explain import explain
from mmadapt.peft.pill.config import PILL, PillConfig
from mmadapt.peft.pill.explain import WrapperReport
from mmadapt.peft.pill.gate_profile import GateProfile, gate_profile
from mmadapt.peft.pill.meta_llama import convert_meta_llama
from mmadapt.peft.pill.model import PillModel
from mmadapt.peft.pill.released import from_released, to_released
from mmadapt.peft.pill.stage import set_stage

__all__ = [
    "CromeConfig",
    "CromeModel",
    "CromeReport",
    "GateProfile",
    "PillConfig",
    "PillModel",
    "WrapperReport",
    "components",
    "convert_meta_llama",
    "explain",
    "from_released",
    "gate_profile",
    "set_stage",
    "to_released",
]

register_tuner(CROME, CromeConfig, CromeModel)
register_tuner(PILL, PillConfig, PillModel)
