"""Parameter counts at the real sizes, on the meta device; no weight is made."""

import pytest
import torch
from transformers import LlamaConfig, T5Config

from mmadapt.models import CromeForConditionalGeneration, CromeModelConfig, crome_components
from mmadapt.models import set_crome_stage as set_stage

SEVEN_B = {"hidden_size": 4096, "num_hidden_layers": 1, "num_attention_heads": 32}
THIRTEEN_B = {"hidden_size": 5120, "num_hidden_layers": 1, "num_attention_heads": 40}


def real(text, **options):
    """Everything in its real size but the depth of the language model."""
    with torch.device("meta"):
        return CromeForConditionalGeneration(CromeModelConfig(text_config=text, **options))


@pytest.fixture(scope="module")
def seven_b():
    return real(LlamaConfig(**SEVEN_B))


def count(parameters):
    return sum(parameter.numel() for parameter in parameters)


@pytest.mark.parametrize(
    ("dim", "rank", "plain", "with_biases"),
    [
        (4096, 256, 5_242_880, 5_248_000),
        (4096, 244, 4_997_120, 4_997_120 + 4 * 244 + 4096),
        (5120, 192, 4_915_200, 4_921_088),
        (5120, 196, 5_017_600, 5_017_600 + 4 * 196 + 5120),
        (5120, 256, 6_553_600, 6_553_600 + 4 * 256 + 5120),
    ],
)
def test_adapter(dim, rank, plain, with_biases):
    from mmadapt.nn import CrossModalAdapter

    for bias, expected in ((False, plain), (True, with_biases)):
        adapter = CrossModalAdapter(dim, rank, bias=bias, device="meta")
        assert count(adapter.parameters()) == expected


def test_ablations_of_the_adapter():
    from mmadapt.nn import CrossModalAdapter

    d, m = 64, 16
    sizes = {
        "gated": {"gated": False},
        "share_up": {"share_up": False},
        "share_input": {"share_input": True},
    }
    counted = {
        name: count(CrossModalAdapter(d, m, **option).parameters())
        for name, option in sizes.items()
    }
    assert counted == {"gated": 3 * d * m, "share_up": 6 * d * m, "share_input": 3 * d * m}


@pytest.mark.parametrize(
    ("text", "rank", "image", "query"),
    [
        (LlamaConfig(**SEVEN_B), 256, 5_771_264, 3_149_824),
        (LlamaConfig(**THIRTEEN_B), 192, 7_214_080, 3_937_280),
        (T5Config(d_model=4096, num_layers=1, num_heads=64, d_ff=10240), 256, 5_771_264, 3_149_824),
    ],
    ids=["7b", "13b", "t5-xxl"],
)
def test_projections_and_default_rank(text, rank, image, query):
    model = real(text)
    assert model.config.adapter_rank == rank
    assert count(model.image_projection.parameters()) == image
    assert count(model.text_projection.parameters()) == query
    assert count(model.adapter.parameters()) == 5 * text.hidden_size * rank


def test_qformer(seven_b):
    embeddings = count(seven_b.qformer.embeddings.parameters())
    assert embeddings == 23_836_416
    assert count(seven_b.qformer.parameters()) - embeddings == 161_823_744
    assert seven_b.query_tokens.numel() == 24_576


def test_vision_tower(seven_b):
    """The reported count has no bias on keys, which is a row of zeros here, and no LayerNorm."""
    vision = seven_b.vision_model
    blocks, norm = vision.encoder.layers, count(vision.post_layernorm.parameters())
    assert len(blocks) == 39
    assert count(blocks[0].parameters()) - 1408 == 25_248_768
    assert count(vision.parameters()) - norm - 39 * 1408 == 985_894_528
    assert norm == 2 * 1408


def test_stages(seven_b):
    expected = {"align": 14_163_968, "instruct": 14_163_968 + 185_684_736, "task": 5_242_880}
    for stage, number in expected.items():
        set_stage(seven_b, stage)
        assert count(p for p in seven_b.parameters() if p.requires_grad) == number
    set_stage(seven_b, "align", adapter_in_align=False)
    trained = {n for n, g in crome_components(seven_b).items() for _, p in g if p.requires_grad}
    assert trained == {"projector"}


def test_prefix_lengths(seven_b):
    assert seven_b.config.num_image_tokens == 288
    assert CromeModelConfig(keep_cls=True).num_image_tokens == 289
    assert CromeModelConfig(order=["text", "instruction"]).num_image_tokens == 32
    assert CromeModelConfig(order=["text", "instruction", "visual"]).image_tokens == (32, 256)
    assert CromeModelConfig(reading="R2").num_image_tokens == 288


def test_taps(seven_b):
    assert (seven_b.config.tap("qformer"), seven_b.config.tap("patch")) == (39, 39)
    assert CromeModelConfig(patch_tap="bliva").tap("patch") == 38
