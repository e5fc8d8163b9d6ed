"""The DFlash 2 draft: DFlash with short convolutions over the slots of a block, and a selector among candidates.

Shape suffixes: B batch, N blocks, L slots of a block, P = L - 1 draft tokens of a block, D hidden, V vocabulary, M
slots that have a label, K candidates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from dllm.errors import ModelError
from dllm.models.drafts.config import DFlashConfig
from dllm.models.drafts.convolution import Convolution
from dllm.models.drafts.dflash import DFlashDraft
from dllm.models.drafts.dflash2_settings import MOST_TAPS, DFlash2Settings
from dllm.models.drafts.layers import Layer
from dllm.models.drafts.loss_terms import ExtraLoss, ScoredSlots
from dllm.models.drafts.proposal import Proposal, Sampling
from dllm.models.drafts.protocol import Draft, DraftConfig, DraftSettings, TargetIO
from dllm.models.drafts.selector import CandidateSelector

CODEBOOKS = ("candidate_selector.predecessor_codebook", "candidate_selector.successor_codebook")


@dataclass(frozen=True, kw_only=True)
class DFlash2Config(DFlashConfig):
    """Everything that determines a DFlash 2 draft's network and its inputs."""

    family: ClassVar[str] = "DFlash 2"
    architecture: ClassVar[str] = "DFlash2DraftModel"
    nested: ClassVar[tuple[str, ...]] = (
        *DFlashConfig.nested,
        "conv_kernel_size",
        "conv_group_size",
        "selector_rank",
        "selector_top_k",
    )
    conv_kernel_size: int
    conv_group_size: int
    selector_rank: int
    selector_top_k: int

    @classmethod
    def from_json(cls, raw: Mapping[str, Any], where: str = "config.json") -> Self:
        """Read a published `config.json`; raises as `DFlashConfig.from_json` does."""
        config = super().from_json(raw, where)
        config.check(where)
        return config

    def check(self, where: str) -> None:
        """Check what the numbers must be to each other.

        Raises:
            ModelError: the groups of the convolution do not divide the width, it has too many taps, or there are more
                candidates than tokens.
        """
        if self.hidden_size % self.conv_group_size:
            what = f"conv_group_size {self.conv_group_size} does not divide the hidden size {self.hidden_size}"
            raise ModelError(what, where=where)
        if self.conv_kernel_size > MOST_TAPS:
            raise ModelError(f"conv_kernel_size must be at most {MOST_TAPS}, got {self.conv_kernel_size}", where=where)
        if self.selector_top_k > self.vocab_size:
            what = f"selector_top_k {self.selector_top_k} is more than the vocabulary of {self.vocab_size}"
            raise ModelError(what, where=where)


class ConvolutionLayer(Layer):
    """A DFlash layer with convolutions around its attention and its MLP."""

    def __init__(self, config: DFlash2Config) -> None:
        super().__init__(config)
        shape = (config.hidden_size, config.conv_kernel_size, config.conv_group_size)
        self.attention_conv, self.mlp_conv = Convolution(*shape), Convolution(*shape)

    def enter(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the convolved input of the attention, and the deltas for its output."""
        normed = self.input_layernorm(x)
        before, after = self.attention_conv.deltas(normed)
        return self.attention_conv.convolve(normed, before, 0), after

    def finish(self, x: Tensor, mixed: Tensor, entered: Tensor) -> Tensor:
        """Add the convolved attention output, then the convolved MLP."""
        x = x + self.attention_conv.convolve(self.self_attn.o_proj(mixed), entered, 1)
        normed = self.post_attention_layernorm(x)
        before, after = self.mlp_conv.deltas(normed)
        return x + self.mlp_conv.convolve(self.mlp(self.mlp_conv.convolve(normed, before, 0)), after, 1)


class DFlash2Draft(DFlashDraft):
    """Predict all tokens of a block in one pass, then choose among each slot's candidates by the token before it.

    A new one computes what the DFlash draft of the same weights does: its convolutions start as the identity, and its
    successor codebook at zero.
    Source: DFlash 2 (z-lab); layout as in the released checkpoints.
    """

    architectures = ("DFlash2DraftModel",)
    config_type = DFlash2Config
    layer_type = ConvolutionLayer
    mixes_slots = True
    config: DFlash2Config

    def __init__(self, config: DFlash2Config) -> None:
        super().__init__(config)
        shape = config.hidden_size, config.vocab_size, config.selector_rank, config.selector_top_k
        self.candidate_selector = CandidateSelector(*shape)

    @classmethod
    def reads(cls, raw: Mapping[str, Any]) -> bool:
        """Tell whether a config.json is a DFlash 2 draft's, by its architecture."""
        names = raw.get("architectures")
        return isinstance(names, list) and any(name in cls.architectures for name in names)

    @classmethod
    def config_for(
        cls, target_config: Any, settings: DraftSettings, *, block_size: int, mask_token_id: int
    ) -> DFlash2Config:
        """Size a new draft by its target and `train.dflash.draft.dflash2`; unless settings say so, it isn't causal."""
        plain = super().config_for(target_config, settings, block_size=block_size, mask_token_id=mask_token_id)
        return _extended(replace(plain, is_causal=bool(settings.causal)), _own(settings))

    @classmethod
    def start_config(cls, published: type[Draft], config: Any, settings: DraftSettings) -> DraftConfig:
        """Return a DFlash 2 draft's config as it is, a DFlash draft's with the sizes of the settings."""
        if published is DFlashDraft:
            return _extended(config, _own(settings))
        return super().start_config(published, config, settings)

    @classmethod
    def start_from(cls, published: Draft, settings: DraftSettings, seed: int) -> Draft:
        """Return the draft that training starts from: a DFlash 2 draft as it is, a DFlash draft with what it lacks.

        The logits of the latter stay the same; the selector's random part is drawn from the seed.
        """
        if type(published) is not DFlashDraft:
            return super().start_from(published, settings, seed)
        draft = cls(_extended(published.config, _own(settings)))
        draft.reset_parameters(seed)
        draft.load_state_dict(published.state_dict(), strict=False)
        return draft

    def reset_parameters(self, seed: int, std: float = 0.02) -> None:
        """Draw all matrices from N(0, std^2), but the predecessor codebook from N(0, 0.5^2), wide, as tokens differ.

        The convolutions are the identity. The successor codebook is zero, and is the first part of the selector that
        learns.
        """
        super().reset_parameters(seed, std)
        with torch.no_grad():
            for conv in self._convolutions():
                conv.base_kernel.zero_()[:, 0] = 1
                conv.kernel_projection.weight.zero_()
            self.candidate_selector.predecessor_codebook.mul_(0.5 / std)
            self.candidate_selector.successor_codebook.zero_()

    @property
    def num_candidates(self) -> int:
        """Candidates of a slot."""
        return self.candidate_selector.top_k

    @property
    def counts(self) -> Mapping[str, int]:
        """Slots whose true token is a candidate; correct tokens and leading runs without the selector."""
        return {"candidates_found": 1, "base_correct": self.config.block_size - 1, "base_run_sum": 1}

    def extra_loss(self, slots: ScoredSlots, weights_M: Tensor, settings: DraftSettings) -> ExtraLoss:
        """Add the cross-entropy over the candidates after the true predecessor, in the weights of the loss.

        The leading runs of correct choices are those of `propose`: up to their end, its predecessors are the true ones.
        """
        own, valid_BNP = _own(settings), slots.valid_BNP
        before_M, label_M = slots.ids_BNL[..., :-1][valid_BNP], slots.ids_BNL[..., 1:][valid_BNP]
        logits_MK, ids_MK = slots.top_logits_MK, slots.top_ids_MK
        if slots.vocab_ids is not None:
            ids_MK = slots.vocab_ids[ids_MK]
        found_M = (ids_MK == label_M[:, None]).any(-1)
        if own.missing_label == "insert":
            logits_MK, ids_MK = _with_label(slots, logits_MK, ids_MK, label_M, found_M)
        scores_MK = self.candidate_selector.scores(slots.hidden_MD, before_M, logits_MK, ids_MK)
        is_label_MK = ids_MK == label_M[:, None]
        nll_M = -(torch.log_softmax(scores_MK, -1) * is_label_MK).sum(-1)  # 0 without the label
        hit_M = found_M & (ids_MK.gather(1, scores_MK.detach().argmax(-1, keepdim=True))[:, 0] == label_M)
        base_correct_P, base_run_sum = slots.correct(slots.hit_M)
        return ExtraLoss(
            own.selector_loss_weight * (weights_M * nll_M).sum(),
            hit_M,
            {"candidates_found": found_M.sum(), "base_correct": base_correct_P, "base_run_sum": base_run_sum},
        )

    def metrics(self, sums: Mapping[str, Sequence[float]]) -> dict[str, float]:
        """Return the share of true tokens among the candidates, and what accuracy would be without the selector."""
        figures: dict[str, float] = {}
        if total := sum(sums["count"]):
            figures["candidate_recall"] = sums["candidates_found"][0] / total
            figures["base_acc"] = sum(sums["base_correct"]) / total
        for k, (correct, count) in enumerate(zip(sums["base_correct"], sums["count"], strict=True), 1):
            if count:
                figures[f"base_acc_k{k}"] = correct / count
        if sums["blocks"][0]:
            figures["base_acceptance_length"] = 1 + sums["base_run_sum"][0] / sums["blocks"][0]
        return figures

    def adamw_rates(self, settings: DraftSettings) -> Mapping[str, float]:
        """Let the codebooks learn faster: each step touches few of their rows."""
        return dict.fromkeys(CODEBOOKS, _own(settings).codebook_lr_factor)

    def train_flops(
        self, *, context_tokens: int, blocks: int, visible_tokens: int, predictions: int, vocab: int
    ) -> float:
        """Count as for DFlash, with the products of the convolutions and the selector."""
        config = self.config
        counted = {"context_tokens": context_tokens, "blocks": blocks, "visible_tokens": visible_tokens}
        plain = super().train_flops(**counted, predictions=predictions, vocab=vocab)
        projections = sum(conv.kernel_projection.weight.numel() for conv in self._convolutions())
        selector = config.selector_rank * (config.hidden_size + config.selector_top_k)
        return plain + 6.0 * (blocks * config.block_size * projections + predictions * selector)

    def choose(self, anchor_id: int, hidden_PD: Tensor, logits_PV: Tensor, sampling: Sampling | None) -> Proposal:
        """Take the tokens of the selector's walk from the anchor, the best ones or sampled ones."""
        if sampling is not None:
            return self.candidate_selector.sample(anchor_id, hidden_PD, logits_PV, sampling)
        anchor_ids = torch.tensor([anchor_id], device=hidden_PD.device)
        return Proposal(self.candidate_selector.greedy(anchor_ids, hidden_PD[None], logits_PV[None])[0])

    def greedy_tokens(self, hidden_NPD: Tensor, anchor_ids_N: Tensor, target: TargetIO) -> Tensor:
        """Walk each block from its anchor."""
        logits_MV: Tensor = target.head(hidden_NPD.flatten(0, 1))
        return self.candidate_selector.greedy(anchor_ids_N, hidden_NPD, logits_MV.unflatten(0, hidden_NPD.shape[:2]))

    def _convolutions(self) -> list[Convolution]:
        return [module for module in self.modules() if isinstance(module, Convolution)]


def _own(settings: DraftSettings) -> DFlash2Settings:
    return cast(Any, settings).dflash2


def _extended(plain: DFlashConfig, own: DFlash2Settings) -> DFlash2Config:
    sizes = own.model_dump(include={"conv_kernel_size", "conv_group_size", "selector_rank", "selector_top_k"})
    config = DFlash2Config(**vars(plain), **sizes)
    config.check("train.dflash.draft.dflash2")
    return config


def _with_label(
    slots: ScoredSlots, logits_MK: Tensor, ids_MK: Tensor, label_M: Tensor, found_M: Tensor
) -> tuple[Tensor, Tensor]:
    """Put a label that is no candidate in the place of the least probable one."""
    row_M = label_M if slots.vocab_ids is None else torch.searchsorted(slots.vocab_ids, label_M)
    label_logit_M = (slots.hidden_MD * slots.head_VD[row_M]).sum(-1)
    place_MK = F.one_hot(logits_MK.argmin(-1), logits_MK.shape[-1]).bool() & ~found_M[:, None]
    logits_MK = torch.where(place_MK, label_logit_M[:, None], logits_MK)
    return logits_MK, torch.where(place_MK, label_M[:, None], ids_MK)
