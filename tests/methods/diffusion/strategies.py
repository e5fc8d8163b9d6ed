"""Masked strategies as the methods build them, with a class mixed in where a test interferes."""

from collections.abc import Mapping, Sequence

from dllm.config.params import Train
from dllm.methods.diffusion.hybrid import HybridStrategy
from dllm.methods.diffusion.masked import MaskedStrategy
from dllm.methods.diffusion.mdlm import MdlmStrategy
from dllm.models.diffusion.protocol import DiffusionLM
from dllm.training.batches import Example

KINDS = {kind.mode: kind for kind in (MdlmStrategy, HybridStrategy)}


def strategy_of(
    model: DiffusionLM, splits: Mapping[str, Sequence[Example]], settings: Train, mixin: type = object
) -> MaskedStrategy:
    """Build the strategy of the mode that trains."""
    kind = KINDS[settings.mode]
    return (kind if mixin is object else type(mixin.__name__, (mixin, kind), {}))(model, splits, settings)
