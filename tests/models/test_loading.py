"""load_pretrained: backbones saved to disk come back with what is needed to feed them."""

import pytest
import torch
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    BlipImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from mmadapt.models import load_pretrained, num_image_tokens
from mmadapt.train.digits.tokenizer import train_tokenizer

SMALL = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["a scan of the digit seven ."], vocab_size=300)


def save(folder, model, tokenizer, size):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    BlipImageProcessorPil(size={"height": size, "width": size}).save_pretrained(folder)


@pytest.fixture(scope="module")
def blip2_folder(tmp_path_factory, tokenizer):
    config = Blip2Config(
        vision_config={**SMALL, "image_size": 16, "patch_size": 8, "initializer_range": 0.02},
        qformer_config={**SMALL, "encoder_hidden_size": 16},
        text_config=LlamaConfig(vocab_size=len(tokenizer), **SMALL),
        num_query_tokens=3,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    folder = tmp_path_factory.mktemp("blip2")
    save(folder, Blip2ForConditionalGeneration(config), tokenizer, 16)
    return folder


def llava_config(tokenizer, strategy):
    return LlavaConfig(
        vision_config=CLIPVisionConfig(**SMALL, image_size=16, patch_size=8),
        text_config=LlamaConfig(vocab_size=len(tokenizer), **SMALL),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_select_strategy=strategy,
    )


def test_blip2_from_disk(blip2_folder):
    backbone = load_pretrained(str(blip2_folder))
    assert isinstance(backbone.model, Blip2ForConditionalGeneration)
    assert not backbone.model.training
    assert backbone.num_image_tokens == 3
    assert backbone.tokenizer.convert_ids_to_tokens(backbone.image_token_id) == "<image>"


def test_dtype_is_taken(blip2_folder):
    model = load_pretrained(str(blip2_folder), dtype="bfloat16").model
    assert model.language_model.lm_head.weight.dtype == torch.bfloat16


@pytest.mark.parametrize(("strategy", "expected"), [("default", 4), ("full", 5)])
def test_llava_placeholders_are_what_its_forward_expects(tmp_path, tokenizer, strategy, expected):
    save(tmp_path, LlavaForConditionalGeneration(llava_config(tokenizer, strategy)), tokenizer, 16)
    backbone = load_pretrained(str(tmp_path))
    assert backbone.num_image_tokens == expected
    ids = torch.tensor([[1, *[backbone.image_token_id] * expected, 5]])
    backbone.model(input_ids=ids, pixel_values=torch.zeros(1, 3, 16, 16))


def test_unknown_dtype_is_named(blip2_folder):
    with pytest.raises(ValueError, match=r"dtype: expected one of .* got 'fp8'"):
        load_pretrained(str(blip2_folder), dtype="fp8")


def test_language_model_alone_is_refused():
    with pytest.raises(ValueError, match="'llava' or 'mmadapt_crome', got 'llama'"):
        num_image_tokens(LlamaConfig(**SMALL))


def test_tokenizer_without_the_image_token_is_refused(tmp_path, blip2_folder):
    backbone = load_pretrained(str(blip2_folder))
    backbone.model.config.image_token_index = 9999
    save(tmp_path, backbone.model, backbone.tokenizer, 16)
    with pytest.raises(ValueError, match="image token id 9999"):
        load_pretrained(str(tmp_path))


def test_missing_folder_is_an_os_error(tmp_path):
    with pytest.raises(OSError):
        load_pretrained(str(tmp_path / "nothing"))


def test_image_statistics_replace_the_checkpoints(blip2_folder):
    processor = load_pretrained(str(blip2_folder), image_statistics="imagenet").image_processor
    from PIL import Image

    pixels = processor(images=[Image.new("RGB", (16, 16))], return_tensors="pt")["pixel_values"]
    expected = -torch.tensor([0.485, 0.456, 0.406]) / torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(pixels[0, :, 0, 0], expected)
    with pytest.raises(ValueError, match="image_statistics: expected one of"):
        load_pretrained(str(blip2_folder), image_statistics="none")
