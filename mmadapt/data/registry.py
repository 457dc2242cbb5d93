"""Data sets from recipe entries: `load({"reader": "scienceqa", "path": ..., ...})`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch.utils.data import ConcatDataset, Dataset

from mmadapt.data.answers import MSRVTTQA, VQAv2
from mmadapt.data.captions import KarpathyCaptions, VideoCaptions, flickr30k
from mmadapt.data.llava_json import LlavaJson
from mmadapt.data.sample import Sample
from mmadapt.data.scienceqa import ScienceQA

READERS: dict[str, Callable[..., Dataset[Sample]]] = {
    "scienceqa": ScienceQA,
    "llava_json": LlavaJson,
    "coco_karpathy": KarpathyCaptions,
    "flickr30k": flickr30k,
    "msrvtt": VideoCaptions,
    "didemo": VideoCaptions,
    "vqav2": VQAv2,
    "msrvtt_qa": MSRVTTQA,
}


class Mixture(ConcatDataset[Sample]):
    """Several data sets one after another; shuffling the whole mixes them by size."""

    def set_epoch(self, epoch: int) -> None:
        for dataset in self.datasets:
            if hasattr(dataset, "set_epoch"):
                dataset.set_epoch(epoch)

    def validate(self) -> list[str]:
        """The problems of all members."""
        return [problem for dataset in self.datasets for problem in dataset.validate()]


def load(spec: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> Dataset[Sample]:
    """The data set of a spec `{"reader": name, "path": ..., option: value, ...}`.

    `path` is the folder (scienceqa) or the annotation file (the others); the other keys are the
    reader's keyword arguments. A list of specs gives their Mixture. Raises ValueError for an
    unknown reader or option, DataError for bad data.
    """
    if not isinstance(spec, Mapping):
        if not spec:
            raise ValueError("spec: expected at least one data set, got an empty list")
        return Mixture([load(entry) for entry in spec])
    options = dict(spec)
    name = options.pop("reader", None)
    if name not in READERS:
        raise ValueError(f"reader: expected one of {sorted(READERS)}, got {name!r}")
    if "path" not in options:
        raise ValueError(f"path: missing in the data spec of reader {name!r}")
    path = options.pop("path")
    accepted = list(inspect.signature(READERS[name]).parameters)[1:]
    unknown = sorted(set(options) - set(accepted))
    if unknown:
        raise ValueError(f"{unknown[0]}: no option of reader {name!r}; it takes {accepted}")
    return READERS[name](path, **options)
