"""Tests of PEFT that cannot apply to a method: patterns of file::test, each with the reason."""

MERGE = (
    "PILL depends on which tokens are visual and refuses to merge; see tests/peft/test_switching.py"
)
HUB = "loads a LoRA adapter from the Hugging Face hub, whatever the method"

PROMPT_LEARNING = (
    "is about prompt learning; its cases share the parameter names of the general ones"
)
EVERYWHERE = {
    "test_decoder_models.py::test_prompt_learning_with_gradient_checkpointing": PROMPT_LEARNING,
    "test_config.py::test_from_pretrained": HUB,
    "test_config.py::test_from_pretrained_cache_dir": HUB,
    "test_config.py::test_save_pretrained_with_runtime_config": HUB,
}
NOT_APPLICABLE = {
    "PillConfig": EVERYWHERE
    | {
        "test_decoder_models.py::test_merge_layers*": MERGE,
        "test_config.py::test_config_layers_to_transform_index_zero": (
            "passes layers_pattern, which PILL does not have: it finds the decoder layers by "
            "structure"
        ),
    },
    "AuroraConfig": EVERYWHERE,
}
