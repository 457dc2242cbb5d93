"""Tiny random BLIPs and batches for them."""

import torch

PAD, CLS, SEP, DEC, ENC = 0, 1, 2, 3, 4
VOCAB, WIDTH, LENGTH = 32, 16, 7


def blip_config(dropout=0.0):
    from transformers import BlipConfig

    sizes = {
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "initializer_range": 0.3,
    }
    return BlipConfig(
        vision_config={**sizes, "image_size": 8, "patch_size": 4},
        text_config={
            **sizes,
            "encoder_hidden_size": WIDTH,
            "vocab_size": VOCAB,
            "max_position_embeddings": 16,
            "hidden_dropout_prob": dropout,
            "attention_probs_dropout_prob": dropout,
            "pad_token_id": PAD,
            "bos_token_id": DEC,
            "eos_token_id": SEP,
            "sep_token_id": SEP,
            "is_decoder": True,
        },
        image_text_hidden_size=8,
        initializer_range=0.3,
    )


def make_retrieval(dropout=0.0, seed=0):
    from transformers import BlipForImageTextRetrieval

    torch.manual_seed(seed)
    return BlipForImageTextRetrieval(blip_config(dropout))


def make_vqa(dropout=0.0, seed=0):
    from transformers import BlipForQuestionAnswering

    torch.manual_seed(seed)
    return BlipForQuestionAnswering(blip_config(dropout)).eval()


def make_texts(count, seed=0, first=CLS):
    """Ids and mask `[count, LENGTH]` of random texts of different lengths, padded."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, VOCAB, (count, LENGTH), generator=generator)
    ids[:, 0] = first
    mask = torch.ones_like(ids)
    for row in range(count):
        end = 3 + row % (LENGTH - 3)
        ids[row, end] = SEP
        ids[row, end + 1 :] = PAD
        mask[row, end + 1 :] = 0
    return ids, mask


def make_batch(count=4, frames=0, seed=0, image_ids=None):
    generator = torch.Generator().manual_seed(seed)
    shape = (count, frames, 3, 8, 8) if frames else (count, 3, 8, 8)
    ids, mask = make_texts(count, seed)
    return {
        "pixel_values": torch.randn(shape, generator=generator),
        "input_ids": ids,
        "attention_mask": mask,
        "image_ids": torch.arange(count) if image_ids is None else torch.tensor(image_ids),
    }
