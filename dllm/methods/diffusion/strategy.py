"""Masked diffusion as a training strategy: `mdlm`, and `hybrid` with its autoregressive half.

Data are unshifted: the logits at a place are scored against the token at that very place. Only the autoregressive
term of `hybrid` looks one token ahead, and it does the shift itself.

Shape suffixes: B batch, S sequence, K blocks of a row, D hidden, M scored places.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dllm.config.params import Train
from dllm.methods.diffusion.build import masking_of, note_of
from dllm.methods.diffusion.noise import Noise, Times, exact_count_noise, noise_generator, uniform_noise
from dllm.methods.diffusion.passes import batch_of, grid_of, masked_pass, origin_of, padded
from dllm.models.diffusion.bidirectional import BidirectionalLM
from dllm.models.sharding import is_sharded, shard_like
from dllm.training.batches import Example
from dllm.training.cross_entropy import weighted_cross_entropy
from dllm.training.distributed import one_rank_at_a_time
from dllm.training.strategy import LossSums, Rows, Split

LEVELS = 10
"""Bins of the noise level by which accuracy is told apart."""


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


class DiffusionStrategy:
    """Train a model to restore masked answers.

    Args:
        model: the model, on its device, with float32 weights.
        splits: the examples of each split.
        settings: the train section, in mode `mdlm` or `hybrid`.
    """

    predictions_name = "masked_tokens"

    def __init__(self, model: BidirectionalLM, splits: Mapping[Split, Sequence[Example]], settings: Train) -> None:
        self.model, self.settings = model, settings
        self.noise = masking_of(settings)
        model.note = note_of(settings, model.mask_token_id)
        self.hybrid = settings.hybrid if settings.mode == "hybrid" else None
        self.dtype, self.device = getattr(torch, settings.compute_dtype), next(model.parameters()).device
        fill = self.noise.eos_padding
        # Where blocks are counted from the row's first column, it is the row that fills them, not the answer.
        whole = self.noise.attention == "block" and origin_of(model) == "sequence"
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
        # Sums of: right guesses and guesses by noise level, cross-entropy, cross-entropy / p, supervised tokens.
        self.counts = {"correct": LEVELS, "masked": LEVELS, "nll": 1, "weighted": 1, "supervised": 1}
        self.shown: tuple[str, ...] = ("loss", "masked_acc", "val_nelbo")
        if self.hybrid is not None:
            self.counts |= {"ar_nll": 1, "ar_correct": 1}
            self.shown = ("loss", "diffusion_loss", "ar_loss", "masked_acc", "val_loss")
        self._flops_a_token = _flops_a_token(model)

    def corrupt(self, split: Split, rows: Sequence[int], epoch: int) -> Corrupted:
        """Draw each row's masks from its own seed; they lie among its answer's tokens."""
        examples = [self.splits[split][row] for row in rows]
        ids_BS, maskable_BS, valid_BS = batch_of(examples)
        sides: list[list[Noise]] = [[] for _ in range(1 + self._paired)]
        blocks = []
        for index, (row, example) in enumerate(zip(rows, examples, strict=True)):
            # Drawn at the row's own length: what it is padded to is the batch's business.
            maskable_S = maskable_BS[index, : len(example)]
            blocks.append(grid_of(self.model, example, self._block_size))
            noise = self._draw(split, row, epoch, example.id, blocks[-1], maskable_S)
            for side, view in zip(sides, [noise, noise.complement(maskable_S)], strict=False):
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
        """Sum cross-entropy / p over the masked tokens, and for `hybrid` the next-token loss over the answer."""
        batch = self.corrupt(split, rows, epoch)
        supervised_B = batch.maskable_BS.sum(1)
        numerator, sums, predictions = self.model(lambda: self._score(batch, self._shares(supervised_B)))
        counts: dict[str, Tensor | float] = {**sums, "supervised": int(supervised_B.sum()) * len(batch.views)}
        denominator = float(supervised_B.sum() if self._normaliser == "token" else len(rows)) * len(batch.views)
        tokens = int(batch.valid_BS.sum())
        return LossSums(numerator, denominator, tokens, predictions, self._flops(batch, predictions), counts)

    def _score(self, batch: Corrupted, share_B: Tensor) -> tuple[Tensor, dict[str, Tensor], int]:
        """Return the loss, the sums beside it, and how many places were scored."""
        numerator = torch.zeros((), device=self.device)
        sums = {name: torch.zeros(length, dtype=torch.float64) for name, length in self.counts.items()}
        predictions = 0
        for masked_BS, prob_BS in batch.views:
            hidden_MD, ar_hidden_MD = self._hidden(batch, masked_BS)
            inverse_M = 1 / prob_BS[masked_BS]
            weights_M = inverse_M * share_B[:, None].expand_as(masked_BS)[masked_BS]
            loss, nll_M, hit_M = weighted_cross_entropy(
                hidden_MD, self.model.head_VD, batch.ids_BS[masked_BS], weights_M, self.noise.ce_chunk_size
            )
            alpha = 1.0 if self.hybrid is None else self.hybrid.ar_loss_alpha
            numerator = numerator + alpha * loss
            predictions += len(nll_M)
            level_M = (prob_BS[masked_BS] * LEVELS).ceil().long().sub(1).clamp(0, LEVELS - 1).cpu()
            sums["masked"] += torch.bincount(level_M, minlength=LEVELS)
            sums["correct"] += torch.bincount(level_M, hit_M.cpu().double(), minlength=LEVELS)
            sums["nll"] += nll_M.double().sum().cpu()
            sums["weighted"] += (nll_M.double() * inverse_M).sum().cpu()
            if ar_hidden_MD is not None:
                ahead_BS = batch.maskable_BS[:, 1:]
                ones_M = torch.ones(len(ar_hidden_MD), device=self.device)
                ar_loss, ar_nll_M, ar_hit_M = weighted_cross_entropy(
                    ar_hidden_MD,
                    self.model.head_VD,
                    batch.ids_BS[:, 1:][ahead_BS],
                    ones_M,
                    self.noise.ce_chunk_size,
                )
                numerator = numerator + ar_loss
                predictions += len(ar_nll_M)
                sums["ar_nll"] += ar_nll_M.double().sum().cpu()
                sums["ar_correct"] += ar_hit_M.sum().cpu()
        return numerator, sums, predictions

    def metrics(self, sums: Mapping[str, Sequence[float]]) -> dict[str, float]:
        """Return the bound, the plain loss on masks, and accuracy on them, over all and by noise level.

        Units: nats a token. `nelbo` is an unbiased estimate of the negative evidence lower bound per supervised token,
        and absent under corruption exact_count, whose places have no equal chances; `masked_acc_p30` is over tokens
        whose chance of being masked was above 0.2 and at most 0.3. `diffusion_loss` and `ar_loss` are what the loss
        adds up, before ar_loss_alpha.
        """
        figures: dict[str, float] = {}
        supervised, masked = sums["supervised"][0], sum(sums["masked"])
        if supervised and (self.hybrid is None or self.hybrid.corruption == "uniform"):
            figures["nelbo"] = sums["weighted"][0] / supervised
        if masked:
            figures["masked_ce"] = sums["nll"][0] / masked
            figures["masked_acc"] = sum(sums["correct"]) / masked
        for level, (correct, count) in enumerate(zip(sums["correct"], sums["masked"], strict=True), 1):
            if count:
                figures[f"masked_acc_p{100 * level // LEVELS}"] = correct / count
        if self.hybrid is not None and supervised:
            figures["diffusion_loss"] = sums["weighted"][0] / supervised
            figures["ar_loss"] = sums["ar_nll"][0] / supervised
            figures["ar_acc"] = sums["ar_correct"][0] / supervised
        return figures

    def score(self, validation: Mapping[str, float]) -> tuple[float, ...]:
        """Prefer the lower held-out loss."""
        return (-validation["val_loss"],)

    def save(self, directory: Path, weights: Mapping[str, Tensor] | None = None) -> None:
        """Write the model as a directory that transformers loads, in float32; of an adapted one the adapter alone."""
        if self.model.adapter is not None:
            self.model.adapter.save(directory)
        else:
            self.model.save(directory, weights)

    def load(self, directory: Path) -> None:
        """Take back the weights that `save` wrote, exactly."""
        if self.model.adapter is not None:
            self.model.adapter.load(directory)
        else:
            own = self.model.state_dict()
            with one_rank_at_a_time(self.device) if is_sharded(self.model) else nullcontext():
                whole = self._read(directory, torch.float32).state_dict()
                pieces = {name: shard_like(whole.pop(name), own[name]) for name in list(whole)}
            self.model.load_state_dict(pieces)

    def export(self, checkpoint: Path, directory: Path, dtype: torch.dtype) -> None:
        """Write what `save` wrote into a checkpoint as a model in `dtype`, the adapter merged.

        Nothing can be trained afterwards.
        """
        if self.model.adapter is None:
            return self._read(checkpoint, dtype).save(directory)
        self.model.adapter.load(checkpoint)
        self.model.adapter.merge()
        self.model.adapter = None
        self.model.to(dtype).save(directory)

    def _read(self, directory: Path, dtype: torch.dtype) -> BidirectionalLM:
        # The code in a checkpoint is the target's, which the recipe already allowed to run.
        return BidirectionalLM.from_directory(directory, dtype, trust_remote_code=self.model.kind is not None)

    @property
    def _paired(self) -> bool:
        return self.hybrid is None and self.settings.mdlm.complementary

    @property
    def _normaliser(self) -> str:
        return "token" if self.hybrid is not None else self.settings.mdlm.normaliser

    @property
    def _block_size(self) -> int | None:
        by_block = self.noise.attention == "block" or (
            self.hybrid is not None and self.hybrid.corruption == "exact_count"
        )
        return self.noise.block_size if by_block else None

    def _draw(self, split: Split, row: int, epoch: int, id: str, block_S: Tensor, maskable_S: Tensor) -> Noise:
        generator = noise_generator(self.settings.seed, split, epoch, id)
        t_K = self.times[split].of(row, epoch, max(1, int(block_S.max()) + 1), generator)
        eps, at_least_one = self.noise.eps, self.noise.at_least_one
        if self.hybrid is not None and self.hybrid.corruption == "exact_count":
            assert self.hybrid.block_size is not None
            return exact_count_noise(
                maskable_S,
                block_S,
                t_K,
                generator,
                eps=eps,
                block_size=self.hybrid.block_size,
                half_life_ratio=self.hybrid.half_life_ratio,
                at_least_one=at_least_one,
            )
        if self._paired:
            # Chances from eps to 1 - eps: the complement's are then in the same range. A pair never lacks a mask.
            t_K, at_least_one = t_K * (1 - 2 * eps) / (1 - eps), False
        return uniform_noise(maskable_S, block_S, t_K, generator, eps=eps, at_least_one=at_least_one)

    def _hidden(self, batch: Corrupted, masked_BS: Tensor) -> tuple[Tensor, Tensor | None]:
        """Run the model; return the hidden states of masked places, and for `hybrid` those that foresee the answer."""
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
            masked_MD, clean_BSD = masked_pass(
                self.model, batch.ids_BS, batch.valid_BS, batch.block_BS, masked_BS, self.model.note.context
            )
            if self.hybrid is None:
                return masked_MD.to(self.dtype), None
            if clean_BSD is None:
                clean_BSD = self.model.causal_hidden(batch.ids_BS, batch.valid_BS)
        return masked_MD.to(self.dtype), clean_BSD[:, :-1][batch.maskable_BS[:, 1:]].to(self.dtype)

    def _shares(self, supervised_B: Tensor) -> Tensor:
        """Weigh rows: alike by token, or, with normaliser `sequence`, alike by row."""
        if self._normaliser == "sequence":
            return 1 / supervised_B.clamp_min(1).float()
        return torch.ones(len(supervised_B), device=self.device)

    def _flops(self, batch: Corrupted, predictions: int) -> float:
        """Count a step's operations, the head for scored places only."""
        passes = 2 if self.noise.attention == "block" or self.hybrid is not None else 1
        tokens = int(batch.valid_BS.sum()) * len(batch.views) * passes
        head_VD = self.model.head_VD
        return self._flops_a_token * tokens + (6 if head_VD.requires_grad else 4) * head_VD.numel() * predictions


def _flops_a_token(model: BidirectionalLM) -> float:
    """Count 6 operations a weight, 4 where it does not move, and of experts only the share a token meets.

    The head is left out. Source: Kaplan et al. 2020, section 2.
    """
    experts = getattr(model.config, "num_experts", None)
    share = model.config.num_experts_per_tok / experts if experts else 1.0
    head_VD = model.head_VD
    return sum(
        (6 if p.requires_grad else 4) * p.numel() * (share if ".experts." in name else 1.0)
        for name, p in model.named_parameters()
        if p is not head_VD
    )


def padded_with_eos(
    example: Example, multiple: int, eos_ids: set[int], max_length: int, whole: bool = False
) -> Example:
    """Fill a finished answer with its own end token up to a multiple of so many tokens, its own or the `whole` row's.

    The fill is text like any other: seen, masked and scored. A row's fill is its own affair, not its batch's. An answer
    that was cut, and so does not end, gets none.
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
