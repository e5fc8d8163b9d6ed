"""Masked diffusion as a training strategy: what `mdlm` and `hybrid` share.

Data are not shifted: the logits at a position are scored against the token at the same position.

Shape suffixes: B batch, S sequence, K blocks of a row, D hidden, M scored positions.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Literal, cast

import torch
from torch import Tensor

from dllm.config.params import Train
from dllm.methods.diffusion.noise import Noise, Times, batch_of, noise_generator, padded, uniform_noise
from dllm.methods.diffusion.settings import LEVELS, Masking
from dllm.models.diffusion.config import DiffusionConfig
from dllm.models.diffusion.families import load_checkpoint
from dllm.models.diffusion.protocol import DiffusionLM
from dllm.models.experts import weights_per_token
from dllm.models.precision import compute_dtype
from dllm.models.sharding import is_sharded, shard_like
from dllm.training.batches import Example
from dllm.training.cross_entropy import weighted_cross_entropy
from dllm.training.distributed import one_rank_at_a_time
from dllm.training.strategy import LossSums, Rows, Split


@dataclass(frozen=True)
class Corrupted:
    """A batch with its masks.

    Shapes: ids_BS int64 (clean), maskable_BS and valid_BS bool, block_BS int64; masked_BS bool and prob_BS float32 of
        each view: one, or a mask and its complement.
    """

    ids_BS: Tensor
    maskable_BS: Tensor
    valid_BS: Tensor
    block_BS: Tensor
    views: tuple[tuple[Tensor, Tensor], ...]


class MaskedStrategy:
    """Train a model to restore masked responses.

    Args:
        model: the model, on its device, with float32 weights.
        splits: the examples of each split.
        settings: the train section, whose method settings are of a subclass of `Masking`.
    """

    mode: Literal["mdlm", "hybrid"]
    """How dllm.json names the method: it decides which samplers decode the model."""
    predictions_name = "masked_tokens"
    adamw_rates: Mapping[str, float] = MappingProxyType({})
    shown: tuple[str, ...] = ("loss", "masked_acc", "val_nelbo")
    views = 1
    """Masked versions of each row in a batch."""
    diffusion_weight = 1.0
    """Weight of the diffusion term in the loss."""

    def __init__(self, model: DiffusionLM, splits: Mapping[Split, Sequence[Example]], settings: Train) -> None:
        self.model, self.settings = model, settings
        self.noise = cast(Masking, settings.method_settings)
        block_size = self.noise.block_size if self.noise.attention == "block" else None
        model.config = DiffusionConfig(self.mode, model.mask_token_id, block_size)
        self.device = next(model.parameters()).device
        self.dtype = compute_dtype(settings.compute_dtype, self.device)
        fill = self.noise.eos_padding
        # Where blocks are counted from the first column of the row, the row is padded to whole blocks.
        whole = self.noise.attention == "block" and model.block_origin == "sequence"
        self.splits: dict[Split, list[Example]] = {
            name: [padded_with_eos(example, fill, model.eos_ids, settings.max_length, whole) for example in examples]
            for name, examples in splits.items()
        }
        self.train_rows, self.heldout_rows = _rows(self.splits["train"]), _rows(self.splits["heldout"])
        spread = self.noise.time_sampling == "low_discrepancy"
        self.times: dict[Split, Times] = {
            name: Times([example.id for example in examples], settings.seed, name, spread)
            for name, examples in self.splits.items()
        }
        # Sums of: correct predictions and predictions by noise level, cross-entropy, cross-entropy / p, supervised
        # tokens.
        self.counts = {"correct": LEVELS, "masked": LEVELS, "nll": 1, "weighted": 1, "supervised": 1}
        self._flops_per_token = _flops_per_token(model)

    def corrupt(self, split: Split, rows: Sequence[int], epoch: int) -> Corrupted:
        """Draw the masks of each row, among the tokens of its response, from a seed of its own."""
        examples = [self.splits[split][row] for row in rows]
        ids_BS, maskable_BS, valid_BS = batch_of(examples)
        sides: list[list[Noise]] = [[] for _ in range(self.views)]
        blocks = []
        for index, (row, example) in enumerate(zip(rows, examples, strict=True)):
            # Drawn at the length of the row itself: masks do not depend on the padding of the batch.
            maskable_S = maskable_BS[index, : len(example)]
            blocks.append(self.model.blocks(len(example), example.prompt_length, self._block_size))
            for side, view in zip(sides, self._draw(split, row, epoch, blocks[-1], maskable_S), strict=True):
                side.append(view)
        to = self.device
        return Corrupted(
            ids_BS.to(to),
            maskable_BS.to(to),
            valid_BS.to(to),
            padded(blocks, -1).to(to),
            tuple(
                (padded([n.masked_S for n in side], False).to(to), padded([n.prob_S for n in side], 1.0).to(to))
                for side in sides
            ),
        )

    def terms(self, split: Split, rows: Sequence[int], epoch: int) -> LossSums:
        """Sum cross-entropy / p over the masked tokens, and the terms that a subclass adds."""
        batch = self.corrupt(split, rows, epoch)
        supervised_B = batch.maskable_BS.sum(1)
        numerator, sums, predictions = self.model(lambda: self._score(batch, self._row_weights(supervised_B)))
        counts: dict[str, Tensor | float] = {**sums, "supervised": int(supervised_B.sum()) * len(batch.views)}
        denominator = self._denominator(supervised_B) * len(batch.views)
        tokens = int(batch.valid_BS.sum())
        return LossSums(numerator, denominator, tokens, predictions, self._flops(batch, predictions), counts)

    def _score(self, batch: Corrupted, weight_B: Tensor) -> tuple[Tensor, dict[str, Tensor], int]:
        """Return the loss, the other sums, and the number of scored positions."""
        numerator = torch.zeros((), device=self.device)
        sums = {name: torch.zeros(length, dtype=torch.float64) for name, length in self.counts.items()}
        predictions = 0
        for masked_BS, prob_BS in batch.views:
            hidden_MD, clean_MD = self._hidden(batch, masked_BS)
            inverse_M = 1 / prob_BS[masked_BS]
            weights_M = inverse_M * weight_B[:, None].expand_as(masked_BS)[masked_BS]
            loss, nll_M, hit_M = weighted_cross_entropy(
                hidden_MD, self.model.head_VD, batch.ids_BS[masked_BS], weights_M, self.noise.ce_chunk_size
            )
            numerator = numerator + self.diffusion_weight * loss
            predictions += len(nll_M)
            level_M = (prob_BS[masked_BS] * LEVELS).ceil().long().sub(1).clamp(0, LEVELS - 1).cpu()
            sums["masked"] += torch.bincount(level_M, minlength=LEVELS)
            sums["correct"] += torch.bincount(level_M, hit_M.cpu().double(), minlength=LEVELS)
            sums["nll"] += nll_M.double().sum().cpu()
            sums["weighted"] += (nll_M.double() * inverse_M).sum().cpu()
            if clean_MD is not None:
                loss, scored = self._score_clean(batch, clean_MD, sums)
                numerator, predictions = numerator + loss, predictions + scored
        return numerator, sums, predictions

    def metrics(self, sums: Mapping[str, Sequence[float]]) -> dict[str, float]:
        """Return the bound, the unweighted loss on masked tokens, and their accuracy, over all and by noise level.

        `nelbo` is an unbiased estimate of the negative evidence lower bound per supervised token, and absent where
        positions of a block are masked with unequal probabilities; `masked_acc_p30` is over tokens that were masked
        with a probability above 0.2 and at most 0.3.

        Units: nats per token.
        """
        figures: dict[str, float] = {}
        supervised, masked = sums["supervised"][0], sum(sums["masked"])
        if supervised and self._bounds_likelihood:
            figures["nelbo"] = sums["weighted"][0] / supervised
        if masked:
            figures["masked_ce"] = sums["nll"][0] / masked
            figures["masked_acc"] = sum(sums["correct"]) / masked
        for level, (correct, count) in enumerate(zip(sums["correct"], sums["masked"], strict=True), 1):
            if count:
                figures[f"masked_acc_p{100 * level // LEVELS}"] = correct / count
        return figures

    def score(self, validation: Mapping[str, float]) -> tuple[float, ...]:
        """Prefer the lower held-out loss."""
        return (-validation["val_loss"],)

    def save(self, directory: Path, weights: Mapping[str, Tensor] | None = None) -> None:
        """Write the model as a directory that transformers loads, in float32; with an adapter, the adapter alone."""
        if self.model.adapter is not None:
            self.model.adapter.save(directory)
        else:
            self.model.save(directory, weights)

    def load(self, directory: Path) -> None:
        """Load the weights that `save` wrote, exactly."""
        if self.model.adapter is not None:
            self.model.adapter.load(directory)
        else:
            own = self.model.state_dict()
            with one_rank_at_a_time(self.device) if is_sharded(self.model) else nullcontext():
                whole = self._read(directory, torch.float32).state_dict()
                shards = {name: shard_like(whole.pop(name), own[name]) for name in list(whole)}
            self.model.load_state_dict(shards)

    def export(self, checkpoint: Path, directory: Path, dtype: torch.dtype) -> None:
        """Write what `save` wrote into a checkpoint as a model in `dtype`, with the adapter merged.

        The model cannot be trained afterwards.
        """
        if self.model.adapter is None:
            return self._read(checkpoint, dtype).save(directory)
        self.model.adapter.load(checkpoint)
        self.model.adapter.merge()
        self.model.adapter = None
        self.model.to(dtype).save(directory)

    def _read(self, directory: Path, dtype: torch.dtype) -> DiffusionLM:
        # The code in a checkpoint is that of the target, which the recipe has allowed to run.
        return load_checkpoint(directory, dtype, trust_remote_code=self.model.runs_own_code)

    @property
    def _block_size(self) -> int | None:
        """Tokens per block with a noise level of its own; None: the row is one block."""
        return self.noise.block_size if self.noise.attention == "block" else None

    @property
    def _bounds_likelihood(self) -> bool:
        """Whether cross-entropy / p estimates the likelihood bound."""
        return True

    def _times(self, split: Split, row: int, epoch: int, block_S: Tensor) -> tuple[Tensor, torch.Generator]:
        """Return the noise levels of the blocks of a row, and the generator that its masks are drawn from."""
        generator = noise_generator(self.settings.seed, split, epoch, self.splits[split][row].id)
        return self.times[split].of(row, epoch, max(1, int(block_S.max()) + 1), generator), generator

    def _draw(self, split: Split, row: int, epoch: int, block_S: Tensor, maskable_S: Tensor) -> list[Noise]:
        """Draw the masks of a row, one per view."""
        t_K, generator = self._times(split, row, epoch, block_S)
        eps, at_least_one = self.noise.eps, self.noise.at_least_one
        return [uniform_noise(maskable_S, block_S, t_K, generator, eps=eps, at_least_one=at_least_one)]

    def _row_weights(self, supervised_B: Tensor) -> Tensor:
        """Return the weight of the tokens of each row in the loss."""
        return torch.ones(len(supervised_B), device=self.device)

    def _denominator(self, supervised_B: Tensor) -> float:
        """Return what the summed loss of a view is divided by."""
        return float(supervised_B.sum())

    def _hidden(self, batch: Corrupted, masked_BS: Tensor) -> tuple[Tensor, Tensor | None]:
        """Run the model; return the hidden states of masked positions, and those that `_score_clean` scores."""
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
            masked_MD, clean_BSD = self.model.masked_hidden(batch.ids_BS, batch.valid_BS, batch.block_BS, masked_BS)
            clean_MD = self._clean_hidden(batch, clean_BSD)
        return masked_MD.to(self.dtype), clean_MD

    def _clean_hidden(self, batch: Corrupted, clean_BSD: Tensor | None) -> Tensor | None:
        """Return the hidden states of clean text that are scored; None: none are."""
        return None

    def _score_clean(self, batch: Corrupted, clean_MD: Tensor, sums: dict[str, Tensor]) -> tuple[Tensor, int]:
        """Add to the sums; return the loss on clean text and the number of scored positions."""
        raise NotImplementedError

    @property
    def _passes(self) -> int:
        """Forward passes over a row per view."""
        return 2 if self.noise.attention == "block" else 1

    def _flops(self, batch: Corrupted, predictions: int) -> float:
        """Count the operations of a step, those of the head for scored positions only."""
        tokens = int(batch.valid_BS.sum()) * len(batch.views) * self._passes
        head_VD = self.model.head_VD
        return self._flops_per_token * tokens + (6 if head_VD.requires_grad else 4) * head_VD.numel() * predictions


def _flops_per_token(model: DiffusionLM) -> float:
    """Count 6 operations per weight, 4 if it is frozen, and of experts only the fraction that a token is routed to.

    The head is excluded. Source: Kaplan et al. 2020, section 2.
    """
    used, head_VD = weights_per_token(model, model.model_config), model.head_VD
    return sum((6 if p.requires_grad else 4) * number for p, number in used if p is not head_VD)


def padded_with_eos(
    example: Example, multiple: int, eos_ids: set[int], max_length: int, whole: bool = False
) -> Example:
    """Pad a response that ends, or the `whole` row, with its end token to a multiple of so many tokens.

    The padding is masked and scored like text, and does not depend on the batch. A truncated response gets none.
    Source: LLaDA, section 2.3 (the model learns where to stop).
    """
    filled = len(example) - (0 if whole else example.prompt_length)
    if not multiple or example.input_ids[-1] not in eos_ids:
        return example
    room = max(0, max_length - len(example))
    fill = min(-filled % multiple, room)
    ids = array("i", example.input_ids)
    ids.extend([example.input_ids[-1]] * fill)
    return Example(example.id, ids, example.prompt_length)


def _rows(examples: Sequence[Example]) -> Rows:
    return Rows([example.id for example in examples], [len(example) for example in examples])
