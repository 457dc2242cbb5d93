"""Register tuners with PEFT from outside its source tree.

PEFT has no plug-in point: `register_peft_method` only takes names that are already members of the
`PeftType` enumeration. So the enumeration is extended at run time, once per process.
"""

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import PeftType, register_peft_method

_TUNERS: dict[str, type[BaseTuner]] = {}


def _extend_peft_type(name: str) -> PeftType:
    """Return the member `name` of `PeftType`, adding it first where PEFT does not know it."""
    if name in PeftType.__members__:
        return PeftType[name]
    member = str.__new__(PeftType, name)
    member._name_ = member._value_ = name
    member._sort_order_ = len(PeftType._member_names_)
    type.__setattr__(PeftType, name, member)  # EnumType.__setattr__ refuses new members
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    if hasattr(PeftType, "_hashable_values_"):  # CPython 3.12 and later
        PeftType._hashable_values_.append(name)
    return member


def register_tuner(name: str, config_cls: type[PeftConfig], model_cls: type[BaseTuner]) -> None:
    """Make `name` a PEFT method with these classes. Registering the same class twice does nothing.

    Raises:
        RuntimeError: another package (or a later PEFT) already registered a method of that name.
    """
    if name in _TUNERS:
        if _TUNERS[name] is not model_cls:
            raise RuntimeError(f"PEFT method {name} is already {_TUNERS[name]!r}")
        return
    _extend_peft_type(name)
    register_peft_method(name=name.lower(), config_cls=config_cls, model_cls=model_cls)
    _TUNERS[name] = model_cls


def peft_type(name: str) -> PeftType:
    """The `PeftType` member of a tuner of this package."""
    return _extend_peft_type(name)
