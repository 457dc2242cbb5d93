"""Convert LLaMA weights from Meta's layout to Hugging Face's."""

from torch import Tensor

_LAYER = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w3": "mlp.up_proj",
    "feed_forward.w2": "mlp.down_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_MODEL = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}


def convert_meta_llama(
    state_dict: dict[str, Tensor], num_heads: int, num_key_value_heads: int | None = None
) -> dict[str, Tensor]:
    """State dict of `LlamaForCausalLM` from a consolidated checkpoint of LLaMA.

    Meta rotates adjacent pairs of each head's channels, Hugging Face the two halves; the rows of
    `wq` and `wk` are reordered so that attention is the same. Names that are no LLaMA weights
    (adapters, `rope.freqs`) are left out.

    Args:
        state_dict: `layers.0.attention.wq.weight`, `tok_embeddings.weight`, ...
        num_heads: number of query heads.
        num_key_value_heads: number of key and value heads; `num_heads` by default.
    """
    heads = {"attention.wq": num_heads, "attention.wk": num_key_value_heads or num_heads}
    converted = {}
    for name, tensor in state_dict.items():
        if name in _MODEL:
            converted[_MODEL[name]] = tensor
        elif name.startswith("layers."):
            _, index, rest = name.split(".", 2)
            source = rest.removesuffix(".weight")
            if source in heads:
                tensor = _halves(tensor, heads[source])
            if source in _LAYER:
                converted[f"model.layers.{index}.{_LAYER[source]}.weight"] = tensor
    return converted


def _halves(weight: Tensor, heads: int) -> Tensor:
    """Rows (pair, member) of every head become rows (member, pair)."""
    rows, columns = weight.shape
    pairs = weight.view(heads, rows // heads // 2, 2, columns)
    return pairs.transpose(1, 2).reshape(rows, columns)
