"""Tests of PEFT that cannot apply to a method: patterns of file::test, each with the reason."""

MERGE = (
    "PILL and CROME depend on their input and refuse to merge; see tests/peft/test_switching.py "
    "and tests/peft/crome/test_crome.py"
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
LAYERS_PATTERN = (
    "passes layers_pattern, which PILL and CROME do not have: they find what to wrap by structure"
)
NOT_APPLICABLE = {
    "PillConfig": EVERYWHERE
    | {
        "test_decoder_models.py::test_merge_layers*": MERGE,
        "test_config.py::test_config_layers_to_transform_index_zero": LAYERS_PATTERN,
    },
    "CromeConfig": EVERYWHERE
    | {
        "test_decoder_models.py::test_merge_layers*": MERGE,
        "test_config.py::test_config_layers_to_transform_index_zero": LAYERS_PATTERN,
    },
    "AuroraConfig": EVERYWHERE,
}
