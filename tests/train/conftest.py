"""Tiny random backbones on disk, a small digits-vqa set, and a recipe over both."""

import string
from pathlib import Path

import pytest
import torch
import yaml

IMAGE_ID, IMAGE_TOKENS = 3, 4


def make_tokenizer():
    """One token per printable character."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>", "<image>", "<unk>"]
    vocab = {token: i for i, token in enumerate([*special, *string.printable])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
    )


def llama_config(vocab_size, layers):
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )


def make_blip2(vocab_size, layers=2):
    from transformers import (
        Blip2Config,
        Blip2ForConditionalGeneration,
        Blip2QFormerConfig,
        Blip2VisionConfig,
    )

    small = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    config = Blip2Config(
        vision_config=Blip2VisionConfig(
            **small, num_hidden_layers=1, image_size=8, patch_size=4
        ).to_dict(),
        qformer_config=Blip2QFormerConfig(
            **small, num_hidden_layers=1, encoder_hidden_size=16, vocab_size=8
        ).to_dict(),
        text_config=llama_config(vocab_size, layers).to_dict(),
        num_query_tokens=IMAGE_TOKENS,
        image_token_id=IMAGE_ID,
    )
    return Blip2ForConditionalGeneration(config)


def make_llava(vocab_size, layers=2):
    from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=8,
            patch_size=4,
        ),
        text_config=llama_config(vocab_size, layers),
        image_token_id=IMAGE_ID,
        image_seq_length=IMAGE_TOKENS,
        vision_feature_select_strategy="default",
    )
    return LlavaForConditionalGeneration(config)


def save_backbone(folder: Path, maker) -> Path:
    from transformers import BlipImageProcessor, CLIPImageProcessor

    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    model = maker(len(tokenizer))
    size = {"height": 8, "width": 8}
    if maker is make_llava:
        processor = CLIPImageProcessor(size=size, crop_size=size, do_center_crop=False)
    else:
        processor = BlipImageProcessor(size=size)
    for part in (model, tokenizer, processor):
        part.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def blip2_dir(tmp_path_factory):
    return save_backbone(tmp_path_factory.mktemp("backbones") / "blip2", make_blip2)


@pytest.fixture(scope="session")
def llava_dir(tmp_path_factory):
    return save_backbone(tmp_path_factory.mktemp("backbones") / "llava", make_llava)


@pytest.fixture(scope="session")
def digits_dir(tmp_path_factory):
    from mmadapt.data import write_digits_vqa

    root = tmp_path_factory.mktemp("data") / "digits"
    return write_digits_vqa(root, train=40, val=4, test=16, captions=24)


def recipe_values(backbone: Path, digits: Path, out: Path) -> dict:
    """Two stages of four steps each: three checkpoints per stage, an epoch border inside."""
    question = {"reader": "scienceqa", "path": str(digits), "split": "train", "prompt": "QCM-A"}
    question |= {"system": "Q", "limit": 10, "wrong_answers": {"rate": 0.5}}
    captions = {"reader": "llava_json", "path": f"{digits}/captions/chat.json", "limit": 8}
    train = {
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "logging_steps": 1,
        "save_steps": 1,
        "report_to": [],
    }
    return {
        "model": {"name": str(backbone)},
        "method": {"type": "pill", "rank": 4},
        "out": str(out),
        "seed": 1,
        "data": {"root": str(digits)},
        "stages": {
            "align": {"data": [captions], "lr": {"default": 0.01}, "train": dict(train)},
            "instruct": {
                "data": [question],
                "lr": {"default": 0.01, "gate": 0.05},
                "train": dict(train),
            },
        },
        "eval": None,
        "launch": {"cpu": True},
    }


@pytest.fixture
def write_recipe(blip2_dir, digits_dir, tmp_path):
    """Writes a tiny recipe; dotted overrides change it. Returns its path."""

    def write(name="recipe", *, backbone=None, **changes):
        values = recipe_values(backbone or blip2_dir, digits_dir, tmp_path / "run")
        for path, value in changes.items():
            *parents, leaf = path.split("__")
            target = values
            for parent in parents:
                target = target[parent]
            target[leaf] = value
        file = tmp_path / f"{name}.yaml"
        file.write_text(yaml.safe_dump(values, sort_keys=False))
        return file

    return write


@pytest.fixture
def adapter_weights():
    """Reads the adapter tensors a stage left behind."""
    from safetensors.torch import load_file

    def read(run_dir, stage="instruct"):
        return load_file(Path(run_dir) / stage / "adapter" / "adapter_model.safetensors")

    return read


@pytest.fixture
def assert_same_weights():
    def check(a, b):
        assert a.keys() == b.keys()
        different = [key for key in a if not torch.equal(a[key], b[key])]
        assert not different, f"{len(different)} of {len(a)} tensors differ: {different[:3]}"

    return check
