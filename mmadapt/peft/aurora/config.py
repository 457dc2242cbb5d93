"""Configuration of the Aurora tuner."""

from dataclasses import dataclass, field
from typing import Any, Literal

from peft import PeftConfig

from mmadapt.peft._register import peft_type
from mmadapt.peft.options import check_pattern

AURORA = "MMADAPT_AURORA"

Component = Literal[
    "vit_qkv", "vit_proj", "vit_mlp", "text_self", "cross", "decoder", "language_model"
]
COMPONENTS: tuple[str, ...] = (
    "vit_qkv",
    "vit_proj",
    "vit_mlp",
    "text_self",
    "cross",
    "decoder",
    "language_model",
)
_CHOICES: dict[str, tuple[Any, ...]] = {
    "core": ("dense", "diagonal"),
    "mlp_layout": (None, "released", "clean"),
}


@dataclass
class AuroraConfig(PeftConfig):
    """Aurora (arXiv 2305.08381): low-rank updates of many weights that share all their factors.

    The update of weight k is ``scale * factor_out M_k^T factor_in``. Factors and core belong to the
    whole model; a weight owns its mode vector p_k alone, of `rank` numbers.

    Without `target_modules` the structure of the model decides: BLIP's vision transformer, text
    encoder and answer decoder as in the released code; of other models the attention of the
    language model (q, k, v and output projections). With `target_modules` exactly those linear
    layers are adapted, whatever they are.

    Args:
        rank: R, of every update.
        core: `"dense"` (released code), ``M_k[a, b] = sum_r core[a, b, r] p_k[r]`` with a core of
            R³ numbers; `"diagonal"` (the paper's CP decomposition), ``M_k = diag(core * p_k)``.
        components: which parts are adapted, a list from `vit_qkv`, `vit_proj`, `vit_mlp`,
            `text_self`, `cross`, `decoder` (the answer decoder's self- and cross-attention) and
            `language_model`; None for all of BLIP, and the language model of other models.
        mlp_layout: how an FFN weight of m times the width is cut into m square ones: `"released"`,
            mode index and core column interleaved, rank divisible by m; `"clean"`, mode g for
            chunk g. None means released for the dense core and clean for the diagonal one.
        scale: factor on all updates.
        branch_dropout: probability of dropping entries of an update's activations in training. As
            released, after the mode in vision transformers and before it in text models.
        gqt: Gated Query Transformation, trained scales and shifts that add the states of self- and
            cross-attention to the output of text layers that have just looked at an image.
        gqt_factor: factor on what it adds.
        target_modules: the linear layers to adapt, as a regular expression for the whole path or a
            list of path endings.
        exclude_modules: as `target_modules`, for what to leave out.
        layers_to_transform: indices of the layers to adapt, in each stack.
        layers_pattern: names of the lists that these indices belong to.
        modules_to_save: further modules that PEFT trains in full and saves; the released code
            trains `["vision_proj", "itm_head"]` for retrieval.
        init_weights: False draws `factor_out` and the query transformation at random, for tests.
    """

    rank: int = 32
    core: Literal["dense", "diagonal"] = "dense"
    components: list[Component] | None = None
    mlp_layout: Literal["released", "clean"] | None = None
    scale: float = 1.0
    branch_dropout: float = 0.1
    gqt: bool = True
    gqt_factor: float = 0.1
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    init_weights: bool = field(default=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = peft_type(AURORA)
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"AuroraConfig.{name} is one of {choices}, got {getattr(self, name)!r}"
                )
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1:
            raise ValueError(f"AuroraConfig.rank is a positive integer, got {self.rank!r}")
        if not 0.0 <= self.branch_dropout < 1.0:
            raise ValueError(
                f"AuroraConfig.branch_dropout lies in [0, 1), got {self.branch_dropout!r}"
            )
        unknown = [name for name in self.components or () if name not in COMPONENTS]
        if unknown or self.components == [] or isinstance(self.components, str):
            raise ValueError(
                f"AuroraConfig.components is None or a list from {COMPONENTS}, got "
                f"{self.components!r}"
            )
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, list | tuple):
                setattr(self, name, set(value))
            elif isinstance(value, str):
                check_pattern(f"AuroraConfig.{name}", value)
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError(
                "AuroraConfig.layers_pattern needs layers_to_transform, the indices in those lists"
            )

    @property
    def layout(self) -> Literal["released", "clean"]:
        """`mlp_layout`, resolved."""
        return self.mlp_layout or ("released" if self.core == "dense" else "clean")
