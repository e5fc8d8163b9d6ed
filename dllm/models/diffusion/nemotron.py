"""Nemotron-Labs-Diffusion, by its own code.

Shape suffixes: B batch, S sequence, C columns of a pass, M masked positions, D hidden.
Source: the model's code.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from typing_extensions import override

from dllm.errors import ModelError
from dllm.models.diffusion import older_code
from dllm.models.diffusion.config import Context, DiffusionConfig
from dllm.models.diffusion.own_code import OwnCodeLM, accepted, check_width, in_one_dtype, without_head
from dllm.models.diffusion.protocol import Columns, DiffusionLM

PAIRED = ("block_diff", "sbd_block_diff")
"""Values of `dlm_paradigm` that train: in the code as published the first has a causal clean half; where there is a
second, as in code before it, only that one has."""


class NemotronLabsDiffusion(OwnCodeLM):
    """Nemotron-Labs-Diffusion, whose code sets its masks and lays out [x_t | x_0] itself.

    Its code is built one way to generate and another to train (`for_likelihood`).
    """

    model_type = "nemotron_labs_diffusion"
    published = DiffusionConfig("hybrid", 100, 32)
    sets_own_masks = True

    @classmethod
    @override
    def training_conflict(cls, *, predicts_next: bool, by_block: bool, recomputes: bool) -> str | None:
        if not (predicts_next and by_block):
            return "this model's code lays out blocks itself: train it with mode hybrid and attention block"
        return super().training_conflict(predicts_next=predicts_next, by_block=by_block, recomputes=recomputes)

    @property
    @override
    def default_sampler(self) -> str:
        return "own" if self.config.context == "causal" else super().default_sampler

    @override
    def _hidden(
        self, ids_BS: Tensor, valid_BS: Tensor | None, allowed_BSS: Tensor | None, position_ids_BS: Tensor
    ) -> Tensor:
        raise ModelError("this model's code sets its own masks", where=self.model_type, hint="use --sampler own")

    @override
    def causal_hidden(self, ids_BS: Tensor, valid_BS: Tensor | None = None) -> Tensor:
        everything_BS = torch.ones_like(ids_BS, dtype=torch.bool) if valid_BS is None else valid_BS
        return self.paired(ids_BS, everything_BS, torch.zeros_like(everything_BS))[1]

    @override
    def masked_hidden(
        self,
        ids_BS: Tensor,
        valid_BS: Tensor,
        block_BS: Tensor,
        masked_BS: Tensor,
        context: Context | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        noisy_BSD, clean_BSD = self.paired(ids_BS, valid_BS, masked_BS)
        return noisy_BSD[masked_BS], clean_BSD

    def paired(self, ids_BS: Tensor, valid_BS: Tensor, masked_BS: Tensor) -> tuple[Tensor, Tensor]:
        """Run noisy blocks beside the clean text, with blocks counted from the first column.

        What follows a row's end is masked up to the end of its block, as in generation, so that a row does not depend
        on its batch.

        Shapes: valid_BS bool, false on padding on the right; returns hidden_BSD of the noisy half and of the causal
            clean one.

        Raises:
            ModelError: the model has no block size, was built to generate, or its code does not lay out pairs.
        """
        size, length = self.config.block_size, ids_BS.shape[1]
        if size is None:
            raise ModelError("this model has no layout of its own", where=self.model_type)
        room = (0, -length % size)
        masked_BS = nn.functional.pad(masked_BS | ~valid_BS, room, value=True)
        noisy_BSD, clean_BSD = self._run_pair(nn.functional.pad(ids_BS, room), masked_BS, size)
        return noisy_BSD[:, :length], clean_BSD[:, :length]

    def _run_pair(self, ids_BS: Tensor, masked_BS: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
        needed = {"labels": ids_BS, "masked_indices": masked_BS, "skip_loss": True}
        arguments = accepted(self.model, **needed, block_size=block_size)
        if missing := sorted(set(needed) - set(arguments)):
            raise ModelError(f"the model's forward pass takes no {missing[0]}", where=self.model_type)
        if (paradigm := getattr(self.model.config, "dlm_paradigm", None)) not in PAIRED:
            raise ModelError(f"the model's code was set up for {paradigm}, not for training", where=self.model_type)
        _, call = in_one_dtype(self.model, ids_BS.device.type)
        with without_head(self.model) as width:
            found = call(ids_BS, **arguments)
        noisy, clean = found.logits, getattr(found, "causal_logits", None)
        if clean is None and noisy.shape[1] == 2 * ids_BS.shape[1]:  # older code returns both halves as one
            noisy, clean = noisy.chunk(2, 1)
        if clean is None:
            raise ModelError("the model's code returns no causal logits", where=self.model_type)
        return check_width(noisy, width), check_width(clean, width)

    @override
    def columns(self, number: int) -> Columns:
        return _OwnCodeColumns(self)

    @override
    def for_likelihood(self, block_size: int | None = None) -> DiffusionLM:
        size = block_size or self.config.block_size
        if size is None:
            return self
        knows_both = any(PAIRED[1] in file.read_text(errors="replace") for file in self.code.glob("*.py"))
        changed = {"dlm_paradigm": PAIRED[knows_both], "block_size": size}
        found = NemotronLabsDiffusion(self._rebuilt(changed), self.tokenizer, self.mask_token_id)
        found.config = DiffusionConfig(self.config.mode, self.mask_token_id, size)
        found.eos_ids, found.changed = self.eos_ids, changed
        return found

    def _rebuilt(self, changed: dict[str, Any]) -> PreTrainedModel:
        """Build the model by its code again, with other entries of its config, around the same weights."""
        config = copy.deepcopy(self.model.config)
        for name, value in changed.items():
            setattr(config, name, value)
        build: Any = type(self.model).from_pretrained
        try:
            built = build(None, config=config, state_dict=self.model.state_dict(), dtype=self.model.dtype)
        except (OSError, ValueError, ImportError, AttributeError, TypeError, KeyError) as error:
            message = f"{type(error).__name__}: {error}".strip().split("\n")[0]
            raise ModelError(
                f"the model's own code cannot be built for training ({message})", where=str(self.code)
            ) from error
        older_code.settle(built)
        own = dict(self.model.named_parameters())
        for name, parameter in built.named_parameters():
            parameter.data = own[name].data  # one copy of the weights
        built.config.name_or_path = str(self.code)
        built.to(self.head_VD.device).eval().requires_grad_(False)
        rebuilt: PreTrainedModel = built
        return rebuilt


class _OwnCodeColumns:
    """Columns by the switch between causal and full attention that the model's attention layers have.

    Source: the calls that the model's own generation code makes.

    Raises:
        ModelError: there is no switch, or the model was built to train.
    """

    def __init__(self, model: NemotronLabsDiffusion) -> None:
        self.model: Any = model.model
        self.switched: list[Any] = [module for module in self.model.modules() if hasattr(module, "diffusion_lm")]
        if not self.switched:
            raise ModelError("the model's code has no switch between causal and full attention", where=model.model_type)
        if model.changed:
            raise ModelError("the model's code was set up for training, not for generation", where=model.model_type)
        self.cache = DynamicCache()

    def run(self, ids_BC: Tensor, begin: int, causal: bool) -> Tensor:
        if (beyond := self.cache.get_seq_length() - begin) > 0:
            self.cache.crop(-beyond)
        for module in self.switched:
            module.diffusion_lm = not causal
        try:
            with without_head(self.model) as width:
                found = self.model(ids_BC, past_key_values=self.cache, use_cache=causal, use_causal_mask=causal)
        finally:
            for module in self.switched:
                module.diffusion_lm = True  # as published
        return check_width(found.logits, width)
