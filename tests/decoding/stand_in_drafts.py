"""Drafts that know what to say: they reach every path of acceptance, which a random draft never does."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from dllm.models.drafts.config import DraftConfig, for_target
from dllm.models.drafts.dflash import ContextCache


def config(model, block_size: int, mask_token_id: int = 3) -> DraftConfig:
    return for_target(model.config, num_hidden_layers=1, block_size=block_size, mask_token_id=mask_token_id, taps=3)


class ScriptedDraft(nn.Module):
    """Proposes `say(position)` at every slot: the target's embedding of an id is the hidden state its head reads as
    that id. Notes what it was fed, and refuses what breaks the decoding loop's promises."""

    def __init__(self, config: DraftConfig, embedding_VD: Tensor, say: Callable[[int], int], limit: int) -> None:
        super().__init__()
        self.config, self.say, self.limit = config, say, limit
        self.embedding_VD = embedding_VD
        self.calls: list[tuple[Tensor, Tensor, int]] = []

    def new_cache(self) -> ContextCache:
        self.calls.clear()
        return ContextCache(0)

    def propose(self, embeds_BLD: Tensor, features_BSF: Tensor, start: int, cache: ContextCache) -> Tensor:
        cache.length += features_BSF.shape[1]
        assert cache.length == start, "the context is exactly what stands before the anchor"
        slots = embeds_BLD.shape[1]
        assert start + slots <= self.limit, "a position past the target's last"
        masks = embeds_BLD[0, 1:] == self.embedding_VD[self.config.mask_token_id]
        assert masks.all(), "slots after the anchor are masks"
        self.calls.append((embeds_BLD.clone(), features_BSF.clone(), start))
        ids = torch.tensor([self.say(start + slot) for slot in range(slots)])
        return self.embedding_VD[ids][None]


def oracle(model, prompt: list[int], truth: list[int], block_size: int, wrong=lambda position: False, mask=3):
    """Say the true continuation, except where `wrong(position)`."""

    def say(position: int) -> int:
        index = position - len(prompt)
        token = truth[index] if 0 <= index < len(truth) else 0
        return (token + 1) % model.config.vocab_size if wrong(position) else token

    embedding_VD = model.get_input_embeddings().weight.detach()
    return ScriptedDraft(config(model, block_size, mask), embedding_VD, say, model.config.max_position_embeddings)
