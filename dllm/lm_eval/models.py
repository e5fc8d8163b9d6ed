"""How diffusion and causal models score texts and generate responses for lm-evaluation-harness.

A masked diffusion model has no exact likelihood but a lower bound, estimated over masks; one that also learned causal
prediction is scored by that, exactly, as any causal model is.

Shape suffixes: B batch, S sequence, M scored positions, D hidden.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from transformers import GenerationConfig

from dllm.config.params import Target
from dllm.decoding.settings import CausalSettings, LengthSettings, Settings
from dllm.decoding.unmasking import sample
from dllm.errors import ConfigError, ModelError
from dllm.methods.diffusion import likelihood
from dllm.methods.diffusion.noise import batch_of
from dllm.models import checkpoints, targets
from dllm.models.diffusion.families import load_diffusion_lm
from dllm.models.diffusion.protocol import DiffusionLM, softcapped
from dllm.models.positions import UNBOUNDED, positions_in
from dllm.models.target_config import SOFTCAP, check_logits
from dllm.registry import SAMPLERS
from dllm.training.batches import Example
from dllm.training.cross_entropy import nll_and_hits
from dllm.training.order import derive_seed

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CHUNK = 512
"""Positions whose logits exist at one time."""


@dataclass(frozen=True)
class Score:
    """Log-likelihood of one continuation. Units: nats; `error` is a standard error over masks."""

    logprob: float
    error: float
    is_greedy: bool


class Scored(Protocol):
    """A model that scores texts and generates responses."""

    tokenizer: PreTrainedTokenizerBase
    kind: str
    """What its log-likelihoods are: `exact`, `bound` or `block bound`."""
    max_length: int
    """Most tokens of a prompt and its response together."""
    max_scored_length: int
    """Most tokens of a scored text, its context included."""
    settings: type[LengthSettings]
    """What its sampler takes."""
    eos_ids: set[int]
    mask_token_id: int | None
    device: torch.device

    def score(self, examples: Sequence[Example], advance: Callable[[int], object]) -> list[Score]:
        """Score continuations; equal example ids share masks. `advance` receives the number of finished ones."""

    def generate(self, prompts: list[list[int]], named: dict[str, Any], repeat: int) -> list[list[int]]:
        """Generate from prompts in one batch; `repeat` counts equal requests before these."""


class DiffusionScores:
    """A diffusion model.

    Args:
        model: the model.
        samples: masks per continuation; where it has no more, each is taken once and the bound is exact.
        batch_size: rows per pass.
        check_greedy: decode too, to tell whether continuations are greedy; it costs one pass per token.
        sampler: by default the one that fits the model.
    """

    def __init__(
        self,
        model: DiffusionLM,
        *,
        samples: int = 128,
        batch_size: int = 8,
        seed: int = 0,
        check_greedy: bool = False,
        sampler: str | None = None,
    ) -> None:
        self.model = model
        self.samples, self.batch_size, self.seed, self.check_greedy = samples, batch_size, seed, check_greedy
        causal = model.config.predicts_next
        self.sampler = SAMPLERS[sampler or model.default_sampler]
        self.sampler.check(model)
        self.settings: type[LengthSettings] = self.sampler.settings["diffusion"]
        self.kind = "exact" if causal else "bound" if model.config.context == "full" else "block bound"
        self.tokenizer, self.eos_ids = model.tokenizer, model.eos_ids
        self.mask_token_id: int | None = model.mask_token_id
        self.max_length = model.max_length
        self.max_scored_length = self.max_length + causal  # the last token is scored, not fed
        self.device = model.head_VD.device

    @cached_property
    def _scorer(self) -> DiffusionLM:
        """Return the model in the form that scores given text."""
        return self.model.for_likelihood()

    def score(self, examples: Sequence[Example], advance: Callable[[int], object]) -> list[Score]:
        if self.kind == "exact":
            scores = likelihood.causal_scores(self._scorer, examples, batch_size=self.batch_size, chunk=CHUNK)
            advance(len(examples))
            return [Score(-nll, 0.0, greedy) for nll, greedy in scores]
        found = likelihood.bound(
            self._scorer,
            examples,
            samples=self.samples,
            batch_size=self.batch_size,
            seed=self.seed,
            chunk=CHUNK,
            count_out=True,
            advance=advance,
        )
        greedy = self._greedy(examples) if self.check_greedy else [False] * len(examples)
        pairs = [likelihood.mean_and_error(own) for own in found.estimates]
        return [Score(-mean, error, same) for (mean, error), same in zip(pairs, greedy, strict=True)]

    def generate(self, prompts: list[list[int]], named: dict[str, Any], repeat: int) -> list[list[int]]:
        if repeat:
            named = {**named, "seed": derive_seed(named["seed"], "again", repeat)}
        settings = self.sampler.settle(self.model, named)
        return [each.token_ids for each in self.sampler.decode(self.model, prompts, settings)]

    def _greedy(self, examples: Sequence[Example]) -> list[bool]:
        """Tell which continuations greedy decoding generates, one token per pass."""
        by_length: dict[int, dict[tuple[int, ...], list[int]]] = {}
        pairs = [(tuple(e.input_ids[: e.prompt_length]), list(e.input_ids[e.prompt_length :])) for e in examples]
        for prompt, continuation in pairs:
            by_length.setdefault(len(continuation), {})[prompt] = []
        for length, prompts in by_length.items():
            settings = Settings(max_new_tokens=length, block_size=self.model.config.block_size)
            rows = list(prompts)
            for begin in range(0, len(rows), self.batch_size):
                part = rows[begin : begin + self.batch_size]
                for prompt, found in zip(part, sample(self.model, part, settings), strict=True):
                    prompts[prompt] = found.token_ids
        return [by_length[len(continuation)][prompt] == continuation for prompt, continuation in pairs]


class CausalScores:
    """An ordinary causal model of transformers, scored exactly; it generates by transformers' `generate`."""

    kind = "exact"
    settings: type[LengthSettings] = CausalSettings
    mask_token_id: int | None = None

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, batch_size: int = 8) -> None:
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size
        self.config = model.config.get_text_config()
        self.max_length = positions_in(self.config.to_dict()) or UNBOUNDED
        self.max_scored_length = self.max_length + 1
        ids: Any = model.generation_config.eos_token_id if model.generation_config is not None else None
        ids = tokenizer.eos_token_id if ids is None else ids
        self.eos_ids = {ids} if isinstance(ids, int) else set(ids or ())
        self.device = model.device

    @torch.no_grad()
    def score(self, examples: Sequence[Example], advance: Callable[[int], object]) -> list[Score]:
        found = []
        for begin in range(0, len(examples), self.batch_size):
            part = examples[begin : begin + self.batch_size]
            ids_BS, maskable_BS, _ = (x.to(self.device) for x in batch_of(part))
            ahead_BS = maskable_BS[:, 1:]
            # Padding is on the right, where causal attention does not look.
            hidden_MD = self.model.base_model(input_ids=ids_BS[:, :-1], use_cache=False).last_hidden_state[ahead_BS]
            nll_M, hit_M = nll_and_hits(self._logits, hidden_MD, ids_BS[:, 1:][ahead_BS], CHUNK)
            found += [Score(-nll, 0.0, hit) for nll, hit in likelihood.by_row(ahead_BS, nll_M, hit_M)]
            advance(len(part))
        return found

    @torch.no_grad()
    def generate(self, prompts: list[list[int]], named: dict[str, Any], repeat: int) -> list[list[int]]:
        options: dict[str, Any] = {"max_new_tokens": named["max_new_tokens"], "do_sample": named["temperature"] > 0}
        if options["do_sample"]:
            options |= {"temperature": named["temperature"], "top_p": named.get("top_p", 1.0), "top_k": 0}
        ends = sorted(self.eos_ids) or None
        settings = GenerationConfig(**options, eos_token_id=ends, pad_token_id=ends[0] if ends else 0)
        responses = []
        for prompt in prompts:  # one by one: each has its own random state, and no padding
            ids_BS = torch.tensor([prompt], device=self.device)
            with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
                torch.manual_seed(derive_seed(named["seed"], "harness", prompt, repeat))
                model: Any = self.model
                found = model.generate(ids_BS, attention_mask=torch.ones_like(ids_BS), generation_config=settings)
            responses.append(found[0, len(prompt) :].tolist())
        return responses

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        head: Any = self.model.get_output_embeddings()
        return softcapped(head(hidden), self.config)


def example(id: str, given: Sequence[int], scored: Sequence[int]) -> Example:
    """Join context and continuation."""
    return Example(id, array("i", [*given, *scored]), len(given))


def load_model(
    directory: Path,
    device: torch.device,
    *,
    trust_remote_code: bool = False,
    sampler: str | None = None,
    samples: int = 128,
    batch_size: int = 8,
    seed: int = 0,
    check_greedy: bool = False,
) -> Scored:
    """Load a diffusion LM or an ordinary causal one to score texts and generate responses.

    Args:
        directory: from `dllm.models.checkpoints.find`.
        device: where to.
        trust_remote_code: run the code that lies in the directory.
        sampler: for a diffusion LM, by default the one that fits it.
        samples: as in `DiffusionScores`, like the rest.

    Raises:
        ModelError: the directory holds a draft, cannot be read, or scales its logits.
        ConfigError: the model needs its own code, or the sampler does not fit.
    """
    target = Target(model=str(directory), trust_remote_code=trust_remote_code)
    # On a CPU bfloat16 is no faster, and near ties would differ between batches.
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    found = checkpoints.identify(directory)
    if found.kind == "draft":
        raise ModelError("a draft has no likelihood of its own", where=str(directory), hint="name its target")
    if found.kind == "causal":
        if sampler is not None:
            raise ConfigError(f"sampler {sampler} is for diffusion models", where=str(directory))
        check_logits(target, directory, "scoring texts", SOFTCAP, "lm_head_bias")
        causal = targets.load_target(target, dtype, device)
        return CausalScores(causal, targets.load_tokenizer(target), batch_size=batch_size)
    found.require_trust(trust_remote_code)
    model = load_diffusion_lm(target, dtype, device)
    return DiffusionScores(
        model, samples=samples, batch_size=batch_size, seed=seed, check_greedy=check_greedy, sampler=sampler
    )
