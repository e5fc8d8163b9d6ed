"""What works with a target, by how it decodes with a draft: reported, or refused, before anything is generated."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from dllm.errors import ConfigError
from dllm.methods.dflash.settings import Walk

if TYPE_CHECKING:
    from dllm.config.params import Evaluate

Decoded = Literal["together", "alone", "none"]
"""How: several prompts together; one at a time, as a layer has other than full attention; or not at all, as a recurrent
state cannot take back rejected tokens."""

ABILITIES: dict[Decoded, str] = {
    "together": "a draft can be trained for it, and decodes several prompts together",
    "alone": "a draft can be trained for it, and decodes one prompt at a time: not all layers have full attention",
    "none": "it keeps a recurrent state, which cannot take back rejected tokens: a draft can be trained for it, and "
    "its acceptance counted without decoding; evaluate measures no speed, and generate refuses the draft",
}


def check_evaluation(decoded: Decoded, settings: Evaluate, where: str) -> None:
    """Refuse what evaluate could not measure.

    Raises:
        ConfigError: a setting that needs decoding, with a target that cannot be decoded with a draft.
    """
    if decoded != "none":
        return
    if not (getattr(settings, "walk", None) or Walk()).prompts:
        what = "evaluate.walk.prompts is 0, and this target keeps a recurrent state"
        raise ConfigError(f"{what}: only a walk measures its draft", where=where)
    if settings.temperature:
        what = f"evaluate.temperature is {settings.temperature:g}, and this target keeps a recurrent state"
        raise ConfigError(f"{what}: sampled acceptance is that of decoding", where=where, hint="leave it null")
