"""CROME on the tiny models of tests/peft, an InstructBLIP among them."""

import pytest
import torch
from peft import get_peft_model
from transformers import InstructBlipConfig, InstructBlipForConditionalGeneration

from mmadapt.peft import CromeConfig

SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}


def make_instructblip(text_config, image):
    config = InstructBlipConfig(
        vision_config={**SMALL, "num_hidden_layers": 1, "image_size": 8, "patch_size": 4},
        qformer_config={**SMALL, "num_hidden_layers": 1, "vocab_size": 60},
        text_config=text_config,
        num_query_tokens=4,
        image_token_index=image,
    )
    torch.manual_seed(0)
    model = InstructBlipForConditionalGeneration(config)
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(parameter, std=0.15)
    return model.eval()


@pytest.fixture
def crome(tiny):
    """Namespace: `base(kind)`, `batch(kind)`, `model(kind, **config)` for four kinds of models."""

    class Crome:
        kinds = ("llava", "blip2", "instructblip", "llama")
        multimodal = kinds[:3]

        @staticmethod
        def base(kind):
            if kind == "instructblip":
                text_config = tiny.base("llama").config.to_dict()
                return make_instructblip(text_config, tiny.image)
            return tiny.base(kind)

        @staticmethod
        def batch(kind, **options):
            batch = tiny.batch("blip2" if kind == "instructblip" else kind, **options)
            if kind == "instructblip":
                generator = torch.Generator().manual_seed(5)
                shape = (len(batch["pixel_values"]), 6)
                batch["qformer_input_ids"] = torch.randint(1, 60, shape, generator=generator)
            return batch

        @classmethod
        def model(cls, kind, base=None, adapter_name="default", seed=2, **config):
            base = cls.base(kind) if base is None else base
            torch.manual_seed(seed)
            options = {"rank": 4, "init_weights": False}
            if kind == "llama":
                options["instruction"] = "always"
            model = get_peft_model(base, CromeConfig(**(options | config)), adapter_name)
            for name, parameter in model.named_parameters():
                if "mmadapt" in name and config.get("init_weights") is not True:
                    torch.nn.init.normal_(parameter, std=0.4)
            return model

    return Crome


@pytest.fixture(params=["llava", "blip2", "instructblip", "llama"])
def crome_kind(request):
    return request.param
