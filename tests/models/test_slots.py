"""The slots' cache against a list of keys for each slot, under any order of its operations."""

from __future__ import annotations

import random

import torch
from hypothesis import given
from hypothesis import strategies as st

from dllm.models.slots import FEWEST_POSITIONS, POSITION_MULTIPLE, SlotCache

HEADS, SIZE = 2, 3
CPU = torch.device("cpu")


def _new(slots: int, length: int, chance: random.Random) -> torch.Tensor:
    generator = torch.Generator().manual_seed(chance.randrange(2**31))
    return torch.randn(slots, HEADS, length, SIZE, generator=generator)


def _check(cache: SlotCache, layer: int, known: list[torch.Tensor]) -> None:
    key_BGTE = cache.keys[layer]
    assert key_BGTE.is_contiguous() and key_BGTE.isfinite().all()
    assert key_BGTE.shape == (len(known), HEADS, cache.positions, SIZE)
    for slot, key_GSE in enumerate(known):
        assert torch.equal(key_BGTE[slot, :, : key_GSE.shape[1]], key_GSE)


@given(st.integers(0, 10**6))
def test_it_holds_what_was_written_and_is_as_long_as_its_longest_row(seed: int) -> None:
    chance, layers = random.Random(seed), 2
    cache = SlotCache(layers, 0)
    known: list[list[torch.Tensor]] = [[] for _ in range(layers)]  # by layer, then slot: (heads, positions, size)
    for _ in range(12):
        lengths = [key_GSE.shape[1] for key_GSE in known[0]]
        do = chance.choice(["widen", "prefill", "decode", "decode", "keep", "reserve"])
        if do == "widen":
            cache.widen(len(lengths) + 1)
            for keys in known:
                keys.append(torch.zeros(HEADS, 0, SIZE))
        elif do == "reserve":
            cache.reserve(chance.randrange(1, 60))
        elif not lengths:
            continue
        elif do == "keep":
            kept = sorted(chance.sample(range(len(lengths)), chance.randrange(1, len(lengths) + 1)))
            cache.keep(kept)
            known = [[keys[slot] for slot in kept] for keys in known]
        elif do == "prefill":
            slot, length = chance.randrange(len(lengths)), chance.randrange(1, 50)
            cache.prefill([([slot], slice(0, length))])
            for layer, keys in enumerate(known):
                key = _new(1, length, chance)
                assert cache.update(key, key, layer)[0] is key
                keys[slot] = key[0]
        else:
            unseen_BLT = cache.decode(torch.tensor(lengths)[:, None], CPU)
            most = max(lengths) + 1
            assert cache.positions == max(FEWEST_POSITIONS, -(-most // POSITION_MULTIPLE) * POSITION_MULTIPLE)
            assert [int((~row).sum()) for row in unseen_BLT[:, 0]] == [length + 1 for length in lengths]
            for layer, keys in enumerate(known):
                key = _new(len(lengths), 1, chance)
                found, _ = cache.update(key, key, layer)
                assert found is cache.keys[layer]
                keys[:] = [torch.cat([old, new], 1) for old, new in zip(keys, key, strict=True)]
        for layer, keys in enumerate(known):
            if len(cache.keys[layer]):
                _check(cache, layer, keys)
