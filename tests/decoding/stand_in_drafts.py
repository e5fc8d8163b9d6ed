"""Scripted drafts: they reach every path of acceptance, which a random draft never does."""

from collections.abc import Callable

import torch
from torch import Tensor

from dllm.models.drafts.config import DFlashConfig
from dllm.models.drafts.context_cache import ContextCache
from dllm.models.drafts.proposal import Proposal, Sampling
from dllm.models.drafts.protocol import Draft, TargetIO
from dllm.models.drafts.sizing import for_target


def config(model, block_size: int, mask_token_id: int = 3, **more) -> DFlashConfig:
    sizes = dict(num_hidden_layers=1, block_size=block_size, mask_token_id=mask_token_id, taps=3)
    return for_target(model.config, **{**sizes, **more})


class ScriptedDraft(Draft):
    """Proposes `say(position)` at every slot. Records its inputs, and refuses what breaks the contract of `propose`."""

    architectures = ("ScriptedDraft",)

    def __init__(self, config: DFlashConfig, say: Callable[[int], int], limit: int) -> None:
        super().__init__(config)
        self.config, self.say, self.limit = config, say, limit
        self.calls: list[tuple[int, int, Tensor, int]] = []

    @classmethod
    def read_config(cls, raw, where):
        return DFlashConfig.from_json(raw, where)

    @classmethod
    def config_for(cls, target_config, settings, *, block_size, mask_token_id):
        return for_target(target_config, num_hidden_layers=1, block_size=block_size, mask_token_id=mask_token_id)

    def reset_parameters(self, seed: int) -> None:
        pass

    def forward(self, embeds_BNLD: Tensor, features_BSF: Tensor, anchor_BN: Tensor, keep_BN: Tensor) -> Tensor:
        return embeds_BNLD[:, :, 1:]

    def new_cache(self) -> ContextCache:
        self.calls.clear()
        return ContextCache(0)

    def propose(
        self,
        anchor_id: int,
        num_tokens: int,
        features_BSF: Tensor,
        start: int,
        cache: ContextCache,
        target: TargetIO,
        sampling: Sampling | None = None,
    ) -> Proposal:
        cache.length += features_BSF.shape[1]
        assert cache.length == start, "the context is exactly what stands before the anchor"
        assert start + 1 + num_tokens <= self.limit, "a position past the target's last"
        assert 1 <= num_tokens < self.config.block_size
        self.calls.append((anchor_id, num_tokens, features_BSF.clone(), start))
        return Proposal(torch.tensor([self.say(start + slot) for slot in range(1, num_tokens + 1)]))


def oracle(model, prompt: list[int], truth: list[int], block_size: int, wrong=lambda position: False, mask=3):
    """Propose the true continuation, except where `wrong(position)`."""

    def say(position: int) -> int:
        index = position - len(prompt)
        token = truth[index] if 0 <= index < len(truth) else 0
        return (token + 1) % model.config.vocab_size if wrong(position) else token

    return ScriptedDraft(config(model, block_size, mask), say, model.config.max_position_embeddings)
