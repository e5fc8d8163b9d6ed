"""Drafts of families that are not read here: how their files are recognised, and what each is."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

SPECULATORS = "its config nests the layers' and the verifier's, and its vocabulary may be a part of the target's"
FAMILIES = {
    "dspark": ("DSpark", "a slot predicts the token after it, and a Markov head corrects by the token before"),
    "domino": ("Domino", "a causal head corrects the base logits of a block"),
    "lilicorr": ("LiLiCorr", "a corrector adds to the logits of a block"),
    "peagle": (
        "P-EAGLE",
        "one layer drafts in parallel, with hidden states of its own for masks",
    ),
    "eagle": ("EAGLE", "one layer drafts token by token from the target's features"),
    "medusa": ("Medusa", "heads on the target's last hidden state, one an offset"),
    "hydra": ("Hydra", "heads on the target's last hidden state, each fed the tokens before"),
    "mlpspeculator": ("MLP speculator", "an MLP drafts token by token from the target's last hidden state"),
    "nextn": ("multi-token prediction (MTP)", "layers of the target itself that draft token by token"),
    "mtp": ("multi-token prediction (MTP)", "layers of the target itself that draft token by token"),
    "speculator": ("speculators", SPECULATORS),
}
"""A part of the architecture's name, in lower case: the family's name, and what tells it from DFlash."""
TENSORS = {
    "d2t": "ids of a reduced vocabulary",
    "t2d": "ids of a reduced vocabulary",
    "sink": "attention sinks",
    "mask_embed": "an embedding of its own for masks",
    "markov": "DSpark's Markov head",
    "confidence": "a confidence head",
    "selector": "DFlash 2's candidate selector",
    "conv": "DFlash 2's convolutions",
    "midlayer": "EAGLE's layer",
    "embed_tokens": "an embedding of another shape than the target's",
    "lm_head": "a head of another shape than the target's",
    ".bias": "biases that its config does not announce",
}
"""A part of a tensor's name: what such a tensor is."""


def foreign_family(raw: Mapping[str, Any]) -> str | None:
    """Name the draft family that a config.json belongs to, and say what it is; None if it is of none of these."""
    if kind := raw.get("speculators_model_type"):
        return f"speculators ({str(kind)[:40]}), which is not supported: {SPECULATORS}"
    names = raw.get("architectures")
    names = [str(name).lower().replace("_", "") for name in names] if isinstance(names, list) else []
    for part, (family, what) in FAMILIES.items():
        if any(part in name for name in names):
            return f"{family}, which is not supported: {what}"
    return None


def describe_tensors(names: Collection[str]) -> str | None:
    """Say what tensors are that no family here has, as far as their names tell."""
    found = dict.fromkeys(what for part, what in TENSORS.items() if any(part in name for name in names))
    return "; ".join(found) or None
