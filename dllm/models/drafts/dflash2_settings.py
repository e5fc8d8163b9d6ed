"""Settings of DFlash 2: the section `train.dflash.draft.dflash2` of params.yaml. Nothing here imports torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from dllm.config.section import Section, Size

MOST_TAPS = 64


class DFlash2Settings(Section):
    """What a DFlash 2 draft has beyond a DFlash draft. The first four size a new draft; a published one has its own."""

    conv_kernel_size: Annotated[int, Field(ge=1, le=MOST_TAPS)] = 2
    """Taps of the convolutions over the slots of a block."""
    conv_group_size: Size = 16
    """Channels that share a dynamic tap; must divide the hidden size."""
    selector_rank: Size = 256
    """Width of the codebooks."""
    selector_top_k: Annotated[int, Field(ge=2, le=4096)] = 16
    """Candidates of a slot."""
    selector_loss_weight: Annotated[float, Field(ge=0, le=1e3)] = 1.0
    """Weight of the cross-entropy over the candidates, beside the loss of DFlash."""
    missing_label: Literal["skip", "insert"] = "skip"
    """A true token that is not among the candidates: `skip` leaves the slot out of the selector's loss, `insert` puts
    the token in the place of the least probable candidate."""
    codebook_lr_factor: Annotated[float, Field(gt=0, le=1e3)] = 10.0
    """The codebooks learn at this multiple of AdamW's rate, also beside Muon."""
