"""A model that is a table: the probability of every text is written down, and all conditionals follow from it."""

from collections.abc import Iterator, Sequence
from itertools import combinations, permutations

import torch
from torch import Tensor

from dllm.models.diffusion.config import DiffusionConfig
from dllm.models.diffusion.protocol import DiffusionLM

WORDS, PLACES = 3, 4
MASK = WORDS


class TableModel(DiffusionLM):
    """Responses of four tokens out of three words, after a prompt of one token that says nothing.

    sharpness: 1 keeps the conditionals those of one table; otherwise they are sharpened the more is known, and no
    table has them all.
    """

    prompt_blocks = False
    mask_token_id = MASK
    head_VD = torch.eye(WORDS + 1, dtype=torch.float64)

    def __init__(self, seed: int, sharpness: float = 1.0) -> None:
        torch.nn.Module.__init__(self)
        generator = torch.Generator().manual_seed(seed)
        scores = torch.randn(WORDS**PLACES, generator=generator, dtype=torch.float64)
        self.table = scores.softmax(0).reshape([WORDS] * PLACES)
        self.sharpness = sharpness
        self.config = DiffusionConfig("mdlm", MASK)

    def conditional(self, known: dict[int, int], place: int) -> Tensor:
        """Return the log-probabilities of a position's words, given some others."""
        chosen = self.table[tuple(known.get(i, slice(None)) for i in range(PLACES))]
        others = [n for n, i in enumerate(i for i in range(PLACES) if i not in known) if i != place]
        chances = chosen.sum(others) if others else chosen
        return (chances.log() * (1 + (self.sharpness - 1) * len(known))).log_softmax(0)

    @classmethod
    def recognises(cls, config) -> bool:
        return False

    def causal_hidden(self, ids_BS: Tensor, valid_BS: Tensor | None = None) -> Tensor:
        raise NotImplementedError

    def hidden(self, ids_BS: Tensor, valid_BS: Tensor | None = None, **_) -> Tensor:
        found = torch.full((*ids_BS.shape, WORDS + 1), -1e9, dtype=torch.float64)
        for row, ids in enumerate(ids_BS[:, 1:].tolist()):
            known = {place: token for place, token in enumerate(ids) if token != MASK}
            for place in set(range(PLACES)) - set(known):
                found[row, place + 1, :WORDS] = self.conditional(known, place)
        return found

    def logits(self, hidden: Tensor) -> Tensor:
        return hidden @ self.head_VD.T

    def losses(self, text: Sequence[int]) -> Iterator[tuple[int, float]]:
        """Yield of each mask how many positions it has, and their cross-entropy."""
        for k in range(1, PLACES + 1):
            for masked in combinations(range(PLACES), k):
                known = {i: text[i] for i in range(PLACES) if i not in masked}
                yield k, -sum(float(self.conditional(known, i)[text[i]]) for i in masked)

    def orders(self, text: Sequence[int]) -> list[float]:
        """Return the text's log-probability in each order of generation."""
        found = []
        for order in permutations(range(PLACES)):
            steps = [({i: text[i] for i in order[:n]}, place) for n, place in enumerate(order)]
            found.append(sum(float(self.conditional(known, place)[text[place]]) for known, place in steps))
        return found
