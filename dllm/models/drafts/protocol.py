"""What a draft family provides: its shape on disk, its network, one block at decoding, its part of the loss.

A family is one class in one file and one line of `dllm.registry.DRAFTS`. Training, decoding, export and loading use
what stands here and nothing else.

Shape suffixes: B batch, N blocks, L slots of a block, P = L - 1 draft tokens of a block, S context, D hidden, F tapped
features, V vocabulary, M slots that have a label.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from dllm.errors import ModelError
from dllm.models.drafts.loss_terms import ExtraLoss, ScoredSlots
from dllm.models.drafts.proposal import BlockRequest, Proposal, Sampling, most_probable


class DraftConfig(Protocol):
    """What every family's config holds, whatever else determines its network."""

    @property
    def block_size(self) -> int:
        """Slots of a block: the anchor, a token that is known, and the draft tokens after it."""

    @property
    def mask_token_id(self) -> int:
        """Id whose embedding stands at the slots to predict."""

    @property
    def target_layer_ids(self) -> tuple[int, ...]:
        """0-based target layers whose outputs are the features."""

    @property
    def hidden_size(self) -> int:
        """Width of the target's embedding and head."""

    @property
    def vocab_size(self) -> int:
        """Rows of the target's embedding."""

    @property
    def num_hidden_layers(self) -> int:
        """Layers of the draft."""

    def to_json(self) -> dict[str, Any]:
        """Return the `config.json` that engines read, `architectures` included."""

    def with_block_size(self, block_size: int) -> DraftConfig:
        """Return the same config for blocks of another size."""


class DraftSettings(Protocol):
    """What `train.dflash.draft` says of a new draft's size; a family's own settings are the section of its name."""

    @property
    def num_hidden_layers(self) -> int:
        """Layers of the draft."""

    @property
    def num_target_layers_tapped(self) -> int:
        """Layers to tap, evenly spread, if `target_layer_ids` is None."""

    @property
    def target_layer_ids(self) -> Sequence[int] | None:
        """Layers to tap."""

    @property
    def sliding_window(self) -> int | None:
        """Context window of the sliding layers."""

    @property
    def layer_types(self) -> Sequence[str] | None:
        """Attention of each layer, `full_attention` or `sliding_attention`; None: sliding with a window, else full."""

    @property
    def causal(self) -> bool | None:
        """Whether slots of a block see only those before them; None: in sliding layers."""


@dataclass(frozen=True)
class TargetIO:
    """The target's input embedding and output head, which its draft shares."""

    embed: nn.Module
    head: nn.Module

    @classmethod
    def of(cls, model: Any) -> TargetIO:
        """Return those of a transformers model.

        Embeddings are rows of the matrix, as in training, also where the model's own are scaled (Gemma).
        """
        embed, head = model.get_input_embeddings(), model.get_output_embeddings()
        return cls(embed if type(embed) is nn.Embedding else nn.Embedding.from_pretrained(embed.weight), head)

    @classmethod
    def of_weights(cls, embedding_VD: Tensor, head_VD: Tensor) -> TargetIO:
        """Wrap an embedding and a head without a bias; no memory is copied."""
        with torch.device("meta"):
            head = nn.Linear(head_VD.shape[1], head_VD.shape[0], bias=False)
        head.weight = nn.Parameter(head_VD, requires_grad=False)
        return cls(nn.Embedding.from_pretrained(embedding_VD), head)


class Draft(nn.Module, ABC):
    """A draft model for speculative decoding: predicts the tokens after an anchor from the target's features.

    Weights are float32 masters; every forward computes in the dtype of its input. Parameter names are those on disk.
    """

    architectures: ClassVar[tuple[str, ...]]
    """Names in the `architectures` of a config.json that this family reads."""
    config: DraftConfig

    @classmethod
    def reads(cls, raw: Mapping[str, Any]) -> bool:
        """Tell whether a config.json is of this family."""
        names = raw.get("architectures")
        return isinstance(names, list) and any(name in cls.architectures for name in names)

    @classmethod
    @abstractmethod
    def read_config(cls, raw: Mapping[str, Any], where: str) -> DraftConfig:
        """Read a config.json of this family.

        Raises:
            ModelError: a key is missing, or asks for what this family does not do.
        """

    @classmethod
    @abstractmethod
    def config_for(
        cls, target_config: Any, settings: DraftSettings, *, block_size: int, mask_token_id: int
    ) -> DraftConfig:
        """Size a new draft by its target's transformers config.

        Raises:
            ModelError: the target has too few layers, or the settings name one it does not have.
        """

    @classmethod
    def tensor_shapes(cls, config: DraftConfig) -> dict[str, tuple[int, ...]]:
        """List the tensors of a checkpoint: those of the module itself, built without memory."""
        with torch.device("meta"):
            module = cls(config)
        return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}

    @abstractmethod
    def __init__(self, config: Any) -> None:
        super().__init__()

    @abstractmethod
    def reset_parameters(self, seed: int) -> None:
        """Draw new weights from the given seed."""

    @classmethod
    def start_config(cls, published: type[Draft], config: Any, settings: DraftSettings) -> DraftConfig:
        """Return the config of the draft that `start_from` makes, from the published one's family and config.

        Raises:
            ModelError: this family cannot start from the other's weights.
        """
        if published is not cls:
            raise ModelError(
                f"the draft is a {published.architectures[0]}, and a {cls.architectures[0]} is trained",
                where="train.dflash.draft.init",
                hint="set train.dflash.draft.architecture to the draft's",
            )
        found: DraftConfig = config
        return found

    @classmethod
    def start_from(cls, published: Draft, settings: DraftSettings, seed: int) -> Draft:
        """Return the draft that training starts from, made of a published one.

        Args:
            published: the draft that `init` names.
            settings: for what it lacks.
            seed: of random weights that it lacks.

        Raises:
            ModelError: this family cannot start from the other's weights.
        """
        cls.start_config(type(published), published.config, settings)
        return published

    @abstractmethod
    def forward(self, embeds_BNLD: Tensor, features_BSF: Tensor, anchor_BN: Tensor, keep_BN: Tensor) -> Tensor:
        """Run many blocks of each sequence at once, each seeing the context before its anchor and itself.

        Shapes: embeds_BNLD embeddings of an anchor and masks, features_BSF of the whole sequences, anchor_BN positions
            (int64), keep_BN bool (a dropped block sees itself only). Returns hidden_BNPD, what the head reads: row p
            predicts the token at anchor + 1 + p.
        """

    def read_context(self, features_BSF: Tensor) -> Any:
        """Return what blocks read of the features, computed once for several calls of `forward_blocks`."""
        return features_BSF

    def forward_blocks(self, embeds_BNLD: Tensor, context: Any, anchor_BN: Tensor, keep_BN: Tensor) -> Tensor:
        """Run blocks as `forward` does, on what `read_context` returned for their sequences.

        Shapes: as in `forward`; of a last block that the target's positions cut, L is less than block_size.
        """
        hidden_BNPD: Tensor = self(embeds_BNLD, context, anchor_BN, keep_BN)
        return hidden_BNPD

    def greedy_tokens(self, hidden_NPD: Tensor, anchor_ids_N: Tensor, target: TargetIO) -> Tensor:
        """Choose the draft tokens of blocks, as `propose` chooses them without random numbers.

        Shapes: hidden_NPD of blocks with these tokens at their anchors; returns ids_NP int64.
        """
        logits_MV: Tensor = target.head(hidden_NPD.flatten(0, 1))
        return most_probable(logits_MV).unflatten(0, hidden_NPD.shape[:2])

    @property
    def num_candidates(self) -> int:
        """How many of the largest logits `extra_loss` gets for each slot."""
        return 0

    @property
    def counts(self) -> Mapping[str, int]:
        """Name and length of this family's own sums, in `ExtraLoss.counts`."""
        return {}

    def extra_loss(self, slots: ScoredSlots, weights_M: Tensor, settings: DraftSettings) -> ExtraLoss | None:
        """Return the sum of this family's own loss terms, and its figures; None has none.

        Every trained parameter must reach the loss's numerator, by a term that may be 0.
        """
        return None

    def metrics(self, sums: Mapping[str, Sequence[float]]) -> dict[str, float]:
        """Turn this family's pooled sums into metrics; `count` by offset and `blocks` are among the sums."""
        return {}

    def adamw_rates(self, settings: DraftSettings) -> Mapping[str, float]:
        """Name the parameters that AdamW trains, also beside Muon, at a multiple of its rate, and without decay."""
        return {}

    def train_flops(
        self, *, context_tokens: int, blocks: int, visible_tokens: int, predictions: int, vocab: int
    ) -> float:
        """Count a training step's operations, for mfu; here, of every matrix at every slot of a block.

        Args:
            context_tokens: tokens of all sequences.
            blocks: blocks of all sequences.
            visible_tokens: context tokens seen, summed over blocks.
            predictions: slots that reach the head.
            vocab: rows of the head.
        Units: floating-point operations.
        """
        matrices = sum(parameter.numel() for parameter in self.parameters() if parameter.ndim > 1)
        return 2.0 * (
            3 * blocks * self.config.block_size * matrices + 2 * predictions * vocab * self.config.hidden_size
        )

    @abstractmethod
    def new_cache(self) -> Any:
        """Return what `propose` keeps between the rounds of one response, empty."""

    @abstractmethod
    def propose(
        self,
        anchor_id: int,
        num_tokens: int,
        features_BSF: Tensor,
        start: int,
        cache: Any,
        target: TargetIO,
        sampling: Sampling | None = None,
    ) -> Proposal:
        """Propose the tokens after an anchor, for one sequence.

        Args:
            anchor_id: the newest token, at position `start`.
            num_tokens: most tokens to propose, at least 1 and fewer than block_size.
            features_BSF: of the positions verified since the last call, in order; with them the cache holds exactly
                the context before `start`.
            start: the anchor's position.
            cache: from `new_cache`; the proposed block leaves nothing in it.
            target: embeds tokens and maps hidden states to logits.
            sampling: how to sample the tokens, if their distributions are returned as well; None asks for the most
                probable ones, which a family may propose in either case.
        """

    def propose_together(self, requests: Sequence[BlockRequest], target: TargetIO) -> list[Proposal]:
        """Propose for several sequences as `propose` does for each; a family may run them in one pass."""
        return [
            self.propose(
                each.anchor_id, each.num_tokens, each.features_BSF, each.start, each.cache, target, each.sampling
            )
            for each in requests
        ]
