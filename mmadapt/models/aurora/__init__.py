"""Aurora's objectives on Hugging Face's BLIP: retrieval and question answering.

The modules wrap a `BlipForImageTextRetrieval` or `BlipForQuestionAnswering`, bare or with any
PEFT adapter inside, and return losses; scoring and metrics are in `mmadapt.eval`.
"""

from mmadapt.models.aurora.cross_states import CrossStates
from mmadapt.models.aurora.encoders import (
    Text,
    Visual,
    blip_of,
    encode_pairs,
    encode_text,
    encode_visual,
    with_first_token,
)
from mmadapt.models.aurora.frame_attention import frame_aware, frame_weights, token_scale
from mmadapt.models.aurora.gather import alone, gather, gather_with_gradient, rank, world_size
from mmadapt.models.aurora.ice import ICE_MODES, InformativeContext
from mmadapt.models.aurora.itc import contrastive_loss, hard_targets, ramped_alpha
from mmadapt.models.aurora.itm import matching_loss
from mmadapt.models.aurora.momentum import MomentumWeights
from mmadapt.models.aurora.negatives import Negatives, sample_negatives
from mmadapt.models.aurora.queue import FeatureQueue
from mmadapt.models.aurora.retrieval import RetrievalLoss, RetrievalObjective
from mmadapt.models.aurora.vqa import (
    QuestionStates,
    VQALoss,
    VQAObjective,
    answer_losses,
    encode_questions,
    generate_answers,
    rank_answers,
)

__all__ = [
    "ICE_MODES",
    "CrossStates",
    "FeatureQueue",
    "InformativeContext",
    "MomentumWeights",
    "Negatives",
    "QuestionStates",
    "RetrievalLoss",
    "RetrievalObjective",
    "Text",
    "VQALoss",
    "VQAObjective",
    "Visual",
    "alone",
    "answer_losses",
    "blip_of",
    "contrastive_loss",
    "encode_pairs",
    "encode_questions",
    "encode_text",
    "encode_visual",
    "frame_aware",
    "frame_weights",
    "gather",
    "gather_with_gradient",
    "generate_answers",
    "hard_targets",
    "matching_loss",
    "ramped_alpha",
    "rank",
    "rank_answers",
    "sample_negatives",
    "token_scale",
    "with_first_token",
    "world_size",
]
