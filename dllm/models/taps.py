"""Target hidden states at the tapped layers, captured by hooks.

A feature is the OUTPUT of a decoder layer (before the model's final norm), taps concatenated in rising order.

Shape suffixes: B batch, S sequence, D hidden, F tapped features (taps * D).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class Tap:
    """What the hooks saw in the last forward pass."""

    def __init__(self, layers: int) -> None:
        self.outputs: list[Tensor | None] = [None] * layers

    def read(self) -> Tensor:
        """Return the features of the last forward. Shapes: (B, S, F)."""
        seen = [output for output in self.outputs if output is not None]
        assert len(seen) == len(self.outputs), "read() before a forward pass"
        return torch.cat(seen, -1)


@contextmanager
def capture(model: Any, layer_ids: Sequence[int]) -> Iterator[Tap]:
    """Hook the outputs of 0-based decoder layers of a transformers causal model."""
    tap = Tap(len(layer_ids))

    def keep(slot: int) -> Callable[[Any, Any, Any], None]:
        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            tap.outputs[slot] = output[0] if isinstance(output, tuple) else output

        return hook

    layers = model.get_decoder().layers
    handles = [layers[layer].register_forward_hook(keep(slot)) for slot, layer in enumerate(layer_ids)]
    try:
        yield tap
    finally:
        for handle in handles:
            handle.remove()


def compute(
    model: Any, layer_ids: Sequence[int], rows: Sequence[Sequence[int]], with_last: bool = False
) -> list[Tensor]:
    """Run the target over rows of token ids and return each row's features.

    Rows are padded on the right: attention is causal, so padding changes nothing before it and needs no mask.
    Shapes: returns one (S, F) tensor a row in the model's dtype; with_last, what the model feeds its head follows,
        (S, F + D).
    """
    width = max(len(row) for row in rows)
    ids_BS = torch.zeros(len(rows), width, dtype=torch.int64, device=model.device)
    for index, row in enumerate(rows):
        ids_BS[index, : len(row)] = torch.tensor(row)
    with torch.inference_mode(), capture(model, layer_ids) as tap:
        last_BSD = model.get_decoder()(input_ids=ids_BS, use_cache=False).last_hidden_state
        features_BSF = torch.cat([tap.read(), last_BSD], -1) if with_last else tap.read()
    return [features_BSF[index, : len(row)] for index, row in enumerate(rows)]
