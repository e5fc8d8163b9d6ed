"""A model that records its passes, and strategies that draw settings of unmasking."""

import torch
from hypothesis import strategies as st

from dllm.decoding.settings import Settings
from dllm.models.diffusion.config import DiffusionConfig
from dllm.models.diffusion.protocol import DiffusionLM
from tests.models.small_models import MASK, small_model

CONFIGS = {
    "full": DiffusionConfig("mdlm", MASK),
    "block": DiffusionConfig("mdlm", MASK, 4),
    "causal": DiffusionConfig("hybrid", MASK, 4),
}
PROMPT = st.lists(st.integers(10, 400), min_size=1, max_size=9)


class Watched:
    """A model without end tokens, and the ids that each of its passes was shown."""

    def __init__(self, context: str = "full", seed: int = 7, scale: float = 0.4) -> None:
        self.model: DiffusionLM = small_model(config=CONFIGS[context], seed=seed, scale=scale)
        self.model.eos_ids = set()
        self.shown: list[torch.Tensor] = []
        embedding = self.model.model.get_input_embeddings()
        embedding.register_forward_pre_hook(lambda module, given: self.shown.append(given[0].clone()))

    def canvases(self, width: int) -> list[list[int]]:
        """Return what a single row's passes were shown, with masks for columns that were left out."""
        return [[*ids[0].tolist(), *[MASK] * (width - ids.shape[1])] for ids in self.shown]


@st.composite
def wishes(draw, temperatures=(0.0, 0.9)) -> Settings:
    """Ask for anything that one sampler of masked canvases takes."""
    rule = draw(st.sampled_from(["plan", "threshold", "factor", "entropy_bound"]))
    orders = {
        "plan": ["low_confidence", "margin", "entropy", "random"],
        "threshold": ["low_confidence", "margin"],
        "factor": ["low_confidence", "margin"],
        "entropy_bound": ["entropy"],
    }[rule]
    return Settings(
        max_new_tokens=draw(st.integers(1, 12)),
        steps=draw(st.none() | st.integers(1, 14)) if rule in ("plan", "threshold") else None,
        schedule=draw(st.sampled_from(["even", "cosine"])) if rule == "plan" else "even",
        block_size=draw(st.integers(1, 6)),
        temperature=draw(st.sampled_from(temperatures)),
        remasking=draw(st.sampled_from(orders)),
        threshold=draw(st.floats(0, 1)) if rule == "threshold" else None,
        factor=draw(st.floats(0.1, 3)) if rule == "factor" else None,
        entropy_bound=draw(st.floats(0, 20)) if rule == "entropy_bound" else None,
        seed=draw(st.integers(0, 99)),
    )
