"""DFlash as a training strategy: the initial draft, features, anchors and objective.

Shape suffixes: B batch, S sequence, D hidden, V vocabulary, F tapped features, P = block_size - 1 offsets.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol, cast

import torch
from torch import Tensor

from dllm.config.params import Train
from dllm.decoding.walk import GreedyText, Walker
from dllm.methods.dflash.anchors import Anchors, draw_anchors
from dllm.methods.dflash.features import Part
from dllm.methods.dflash.greedy import GreedyRows
from dllm.methods.dflash.objective import Batch, StepSums, dflash_terms
from dllm.methods.dflash.settings import Dflash
from dllm.models.drafts.checkpoint import load_draft, save_draft
from dllm.models.drafts.protocol import Draft, TargetIO
from dllm.models.precision import compute_dtype
from dllm.training.batches import Example, collate
from dllm.training.cross_entropy import FrozenHead
from dllm.training.order import derive_seed
from dllm.training.strategy import LossSums, Rows, Split


class FeatureSource(Protocol):
    """A source of the target's hidden states."""

    def features(self, split: Part, rows: Sequence[int]) -> list[Tensor]:
        """Return the features of some rows of a split, or of greedy responses.

        Shapes: one (S, F) tensor per row, (S, F + D) to distill.
        """


class DflashStrategy:
    """Train a draft to predict the tokens of the target from its hidden states.

    Args:
        draft: the trained model, on its device.
        embedding_VD: the embedding of the target, in any dtype.
        head_VD: the output head of the target.
        splits: the examples of each split.
        source: features of those examples.
        settings: the train section.
        stop_ids: ids that end a response.
        max_positions: the target's, as in `dllm.decoding.walk.Walker`.
        greedy: greedy responses to the prompts of held-out rows, to count rounds on; `source` has their features. None:
            the held-out responses are greedy themselves.
    """

    predictions_name = "block_positions"
    shown = ("loss", "draft_acc", "acceptance_length", "val_acceptance_length", "val_walked_acceptance_length")

    def __init__(
        self,
        draft: Draft,
        embedding_VD: Tensor,
        head_VD: Tensor,
        splits: Mapping[Split, Sequence[Example]],
        source: FeatureSource,
        settings: Train,
        stop_ids: Collection[int] = (),
        max_positions: int | None = None,
        greedy: GreedyRows | None = None,
    ) -> None:
        self.model, self.splits, self.source, self.settings = draft, splits, source, settings
        self.dflash = cast(Dflash, settings.method_settings)
        self.device = embedding_VD.device
        self.dtype = compute_dtype(settings.compute_dtype, self.device)
        self.embedding_VD, self.head = embedding_VD.to(self.dtype), FrozenHead(head_VD.to(self.dtype))
        self.width = embedding_VD.shape[1]
        self.vocab_ids: Tensor | None = None
        self.train_head = self.head
        if self.dflash.loss_vocab == "corpus":
            self.vocab_ids = _response_vocabulary(splits["train"]).to(self.device)
            self.train_head = FrozenHead(self.head.weight_VD[self.vocab_ids])
        self.train_rows, self.heldout_rows = _rows(splits["train"]), _rows(splits["heldout"])
        offsets = draft.config.block_size - 1
        self.counts = {"correct": offsets, "count": offsets, "run_sum": 1, "blocks": 1, **draft.counts}
        self.counts |= {"walk_tokens": 1, "walk_rounds": 1}
        self.stop_ids, self.max_positions = stop_ids, max_positions
        self.greedy, self.num_walked = greedy, self.dflash.walk_samples
        self.greedy_at = {row: at for at, row in enumerate(greedy.rows)} if greedy else {}
        self.adamw_rates = draft.adamw_rates(self.dflash.draft)
        self._in_dtype: Draft | None = None
        """The draft in the compute dtype, during a validation."""

    def terms(self, split: Split, rows: Sequence[int], epoch: int) -> LossSums:
        """Draw the anchors of each row from a seed of its own, and sum loss and correct predictions over its blocks."""
        settings, examples = self.dflash, [self.splits[split][row] for row in rows]
        if split == "train":
            self._in_dtype = None
        input_ids_BS, loss_mask_BS = collate(examples)
        anchors = draw_anchors(
            loss_mask_BS,
            num_blocks=settings.num_blocks_per_sample,
            block_size=self.model.config.block_size,
            sampling=settings.anchor_sampling,
            seeds=[derive_seed(self.settings.seed, split, epoch, example.id) for example in examples],
        )
        known_BSX = torch.nn.utils.rnn.pad_sequence(self.source.features(split, rows), batch_first=True)
        device, training = self.device, split == "train"
        features_BSF, last_BSD = known_BSX.to(device, self.dtype), None
        if settings.distill:
            features_BSF, last_BSD = features_BSF.split([known_BSX.shape[-1] - self.width, self.width], -1)
        batch = Batch(input_ids_BS.to(device), loss_mask_BS.to(device), features_BSF, last_BSD)
        step = dflash_terms(
            self.model,
            self.embedding_VD,
            self.train_head if training else self.head,
            batch,
            Anchors(anchors.pos_BN.to(device), anchors.keep_BN.to(device)),
            settings.draft,
            gamma=settings.loss_decay_gamma,
            loss=settings.loss,
            chunk=settings.ce_chunk_size,
            vocab_ids=self.vocab_ids if training else None,
            distill=settings.distill if training else 0.0,
        )
        terms = self._terms(step, anchors, tokens=sum(map(len, examples)))
        found = {"walk_tokens": 0.0, "walk_rounds": 0.0}
        if not training and any(row < self.num_walked for row in rows):
            found = self._walk(rows, features_BSF)
        return replace(terms, counts={**terms.counts, **found})

    def metrics(self, sums: Mapping[str, Sequence[float]]) -> dict[str, float]:
        """Return accuracy over all offsets and at each, and the acceptance lengths.

        acceptance_length is 1 + the mean over blocks of the number of leading correct predictions: 3, 2, 1, 0 make 2.5.
        It is not the product of the accuracies by offset. walked_acceptance_length, of held-out rows, is the mean
        number of tokens per round of greedy decoding. All are of what the draft proposes after the true tokens.
        """
        figures: dict[str, float] = {}
        if sum(sums["count"]):
            figures["draft_acc"] = sum(sums["correct"]) / sum(sums["count"])
        for k, (correct, count) in enumerate(zip(sums["correct"], sums["count"], strict=True), 1):
            if count:
                figures[f"draft_acc_k{k}"] = correct / count
        if sums["blocks"][0]:
            figures["acceptance_length"] = 1 + sums["run_sum"][0] / sums["blocks"][0]
        if sums.get("walk_rounds", [0])[0]:
            figures["walked_acceptance_length"] = sums["walk_tokens"][0] / sums["walk_rounds"][0]
        return figures | self.model.metrics(sums)

    def score(self, validation: Mapping[str, float]) -> tuple[float, ...]:
        """Prefer the longer acceptance length of decoding held-out rows, or where it was not counted that of their
        blocks; at equal length, the lower loss."""
        lengths = (validation.get(f"val_{name}") for name in ("walked_acceptance_length", "acceptance_length"))
        return next((length for length in lengths if length is not None), 1.0), -validation["val_loss"]

    def save(self, directory: Path, weights: Mapping[str, Tensor] | None = None) -> None:
        """Write the draft in the layout of published drafts, in float32; its weights are never sharded."""
        save_draft(self.model, directory, torch.float32)

    def load(self, directory: Path) -> None:
        """Load the weights that `save` wrote, exactly."""
        self.model.load_state_dict(load_draft(directory).state_dict())

    def _walk(self, rows: Sequence[int], features_BSF: Tensor) -> dict[str, float]:
        """Count tokens and rounds of decoding greedy responses to the prompts of held-out rows."""
        if self._in_dtype is None:
            same = self.dtype == torch.float32
            self._in_dtype = self.model if same else copy.deepcopy(self.model).to(self.dtype)
        target = TargetIO.of_weights(self.embedding_VD, self.head.weight_VD)
        walker = Walker(self._in_dtype, target, max_positions=self.max_positions)
        texts, features = [], []
        for row, features_SF in zip(rows, features_BSF, strict=True):
            if row >= self.num_walked or (text := self._greedy_text(row)) is None:
                continue
            if self.greedy is not None:
                (known_SX,) = self.source.features("greedy", [self.greedy_at[row]])
                features_SF = known_SX[:, : features_SF.shape[-1]].to(self.device, self.dtype)
            texts.append(text)
            features.append(features_SF)
        rounds = [each for response in walker.rounds(texts, features) for each in response] if texts else []
        return {"walk_tokens": sum(each.num_emitted for each in rounds), "walk_rounds": len(rounds)}

    def _greedy_text(self, row: int) -> GreedyText | None:
        """Return the greedy response to a held-out row's prompt, or None where the target has no positions for it."""
        if self.greedy is not None and row not in self.greedy_at:
            return None
        limit = None if self.greedy is None else self.greedy.limit
        each = self.splits["heldout"][row] if self.greedy is None else self.greedy.examples[self.greedy_at[row]]
        stopped = each.input_ids[-1] in self.stop_ids
        if limit is None and not stopped:  # decoded up to where its own last tokens still say what a round accepts
            limit = max(0, len(each) - each.prompt_length - (self.model.config.block_size - 2))
        return GreedyText(each.input_ids, each.prompt_length, stopped, limit)

    def _terms(self, step: StepSums, anchors: Anchors, tokens: int) -> LossSums:
        predictions = int(step.count_P.sum())
        flops = self.model.train_flops(
            context_tokens=tokens,
            blocks=int(anchors.keep_BN.sum()),
            visible_tokens=int(anchors.pos_BN.sum()),
            predictions=predictions,
            vocab=len(self.train_head.weight_VD),
        )
        counts: dict[str, Tensor | float] = {
            "correct": step.correct_P,
            "count": step.count_P,
            "run_sum": step.run_sum,
            "blocks": step.num_blocks,
            **step.extra,
        }
        return LossSums(step.numerator, step.denominator, tokens, predictions, flops, counts)


def _rows(examples: Sequence[Example]) -> Rows:
    return Rows([example.id for example in examples], [len(example) for example in examples])


def _response_vocabulary(examples: Sequence[Example]) -> Tensor:
    ids: set[int] = set()
    for example in examples:
        ids.update(example.input_ids[example.prompt_length :])
    return torch.tensor(sorted(ids), dtype=torch.int64)
