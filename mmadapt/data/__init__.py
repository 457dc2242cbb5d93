"""Data: readers to Hugging Face chat messages, PILL's prompts and batches, digits-vqa.

>>> from mmadapt import data
>>> root = data.write_digits_vqa("digits")
>>> questions = data.load({"reader": "scienceqa", "path": root, "split": "train"})
>>> captions = data.load({"reader": "llava_json", "path": root / "captions" / "chat.json"})
"""

from mmadapt.data.answers import MSRVTTQA, AnswerSample, VQAv2
from mmadapt.data.balance import BalancedSampler, balanced_probabilities
from mmadapt.data.blip_collate import AnswerCollator, RetrievalCollator, VisualLoader
from mmadapt.data.captions import CaptionSample, KarpathyCaptions, VideoCaptions
from mmadapt.data.collate import PillCollator
from mmadapt.data.crome_collate import CromeCollator, PlainTemplate
from mmadapt.data.crome_images import CromeImageProcessor
from mmadapt.data.digit_scene_files import write_digit_scenes
from mmadapt.data.digits_vqa import write_digits_vqa
from mmadapt.data.errors import DataError
from mmadapt.data.llava_json import LlavaJson
from mmadapt.data.prompts import DEFAULT_SYSTEM, PROMPT_FORMATS
from mmadapt.data.registry import READERS, Mixture, load
from mmadapt.data.sample import Sample
from mmadapt.data.scienceqa import ScienceQA
from mmadapt.data.template import PillTemplate
from mmadapt.data.wrong_answers import WrongAnswers

__all__ = [
    "DEFAULT_SYSTEM",
    "MSRVTTQA",
    "PROMPT_FORMATS",
    "READERS",
    "AnswerCollator",
    "AnswerSample",
    "BalancedSampler",
    "CaptionSample",
    "CromeCollator",
    "CromeImageProcessor",
    "DataError",
    "KarpathyCaptions",
    "LlavaJson",
    "Mixture",
    "PillCollator",
    "PillTemplate",
    "PlainTemplate",
    "RetrievalCollator",
    "Sample",
    "ScienceQA",
    "VQAv2",
    "VideoCaptions",
    "VisualLoader",
    "WrongAnswers",
    "balanced_probabilities",
    "load",
    "write_digit_scenes",
    "write_digits_vqa",
]
