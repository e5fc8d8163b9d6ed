"""The models that lm-evaluation-harness can ask here: how each scores answers, and how it writes them.

A diffusion model trained without a causal side has no exact likelihood but a bound, which masks estimate; one with a
causal side is scored by that, exactly, as any causal model is.

Shape suffixes: B batch, S sequence, M scored places, D hidden.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch

from dllm.decoding.diffusion import GenerateOptions, Sampler, default_sampler, settle, write_ids
from dllm.decoding.settings import Settings
from dllm.decoding.unmasking import sample
from dllm.errors import ConfigError
from dllm.methods.diffusion import likelihood
from dllm.methods.diffusion.passes import batch_of
from dllm.training.batches import Example
from dllm.training.cross_entropy import nll_and_hits
from dllm.training.order import derive_seed

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from dllm.models.diffusion.bidirectional import BidirectionalLM

CHUNK = 512
"""Places whose logits are held at a time."""


@dataclass(frozen=True)
class Score:
    """What a model says of one answer. Units: nats; `error` is a standard error over masks."""

    logprob: float
    error: float
    is_greedy: bool


class Scored(Protocol):
    """A model that scores and writes answers."""

    tokenizer: PreTrainedTokenizerBase
    kind: str
    """What its log-likelihoods are: `exact`, `bound` or `block bound`."""
    longest: int
    """Most ids a scored text may have, prompt included."""
    room: int
    """Most ids a prompt and its answer may have together."""
    eos_ids: set[int]
    mask_token_id: int | None
    device: torch.device

    def score(self, examples: Sequence[Example], advance: Callable[[int], object]) -> list[Score]:
        """Score answers, told by their ids; equal ids share masks. `advance` is told how many more are done."""

    def write(self, prompts: list[list[int]], named: dict[str, Any], again: int) -> list[list[int]]:
        """Generate from prompts in one batch; `again` counts how often the very same was asked before."""


class DiffusionScores:
    """A diffusion model.

    Args:
        load: gives the model; true asks for the form in which it can be scored, where that is another one.
        samples: masks an answer; where it has no more than these, each is taken once and the bound is exact.
        batch_size: rows of one pass.
        check_greedy: find out whether answers are what greedy decoding writes; it costs as many passes as tokens.
        sampler: by default the one that fits the model.
    """

    def __init__(
        self,
        load: Callable[[bool], BidirectionalLM],
        *,
        samples: int = 128,
        batch_size: int = 8,
        seed: int = 0,
        check_greedy: bool = False,
        sampler: Sampler | None = None,
    ) -> None:
        self.model = load(False)
        self._load, self._scorer = load, None if self.model.lays_out_pairs else self.model
        self.samples, self.batch_size, self.seed, self.check_greedy = samples, batch_size, seed, check_greedy
        causal = self.model.note.mode == "hybrid"
        self.sampler: Sampler = sampler or default_sampler(self.model)
        if self.sampler not in ("llada", "llada2") and not causal:
            raise ConfigError(f"sampler {self.sampler} needs a model that also learnt to write causally")
        self.kind = "exact" if causal else "bound" if self.model.note.context == "full" else "block bound"
        self.tokenizer, self.eos_ids = self.model.tokenizer, self.model.eos_ids
        self.mask_token_id: int | None = self.model.mask_token_id
        self.room = self.model.longest
        self.longest = self.room + causal  # nothing follows the last token, so it need not be shown
        self.device = self.model.head_VD.device

    @property
    def scorer(self) -> BidirectionalLM:
        """Return the model in the form that can be scored."""
        if self._scorer is None:
            self._scorer = self._load(True)
        return self._scorer

    def score(self, examples: Sequence[Example], advance: Callable[[int], object]) -> list[Score]:
        if self.kind == "exact":
            scores = likelihood.causal_scores(self.scorer, examples, batch_size=self.batch_size, chunk=CHUNK)
            advance(len(examples))
            return [Score(-nll, 0.0, greedy) for nll, greedy in scores]
        found = likelihood.bound(
            self.scorer,
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

    def write(self, prompts: list[list[int]], named: dict[str, Any], again: int) -> list[list[int]]:
        if again:
            named = {**named, "seed": derive_seed(named["seed"], "again", again)}
        wishes = GenerateOptions(sampler=self.sampler, settings=named)
        settings = settle(self.model, self.sampler, wishes)
        return [answer.token_ids for answer in write_ids(self.model, self.sampler, prompts, wishes, settings)]

    def _greedy(self, examples: Sequence[Example]) -> list[bool]:
        """Tell which answers the surest-first decoding writes, one token a pass."""
        asked: dict[int, dict[tuple[int, ...], list[int]]] = {}
        pairs = [(tuple(e.input_ids[: e.prompt_length]), list(e.input_ids[e.prompt_length :])) for e in examples]
        for prompt, answer in pairs:
            asked.setdefault(len(answer), {})[prompt] = []
        for length, prompts in asked.items():
            settings = Settings(max_new_tokens=length, block_size=self.model.note.block_size)
            rows = list(prompts)
            for begin in range(0, len(rows), self.batch_size):
                part = rows[begin : begin + self.batch_size]
                for prompt, found in zip(part, sample(self.model, part, settings), strict=True):
                    prompts[prompt] = found.token_ids
        return [asked[len(answer)][prompt] == answer for prompt, answer in pairs]


class CausalScores:
    """An ordinary causal model of transformers, scored exactly; it writes by transformers' own `generate`."""

    kind = "exact"
    mask_token_id: int | None = None

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, batch_size: int = 8) -> None:
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size
        self.config = model.config.get_text_config()
        self.room = int(getattr(self.config, "max_position_embeddings", 1 << 30))
        self.longest = self.room + 1
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
    def write(self, prompts: list[list[int]], named: dict[str, Any], again: int) -> list[list[int]]:
        from transformers import GenerationConfig

        if unknown := sorted(set(named) - {"max_new_tokens", "temperature", "top_p", "seed"}):
            raise ConfigError(f"a causal model's sampling has no {', '.join(unknown)}", where="generation_kwargs")
        asked: dict[str, Any] = {"max_new_tokens": named["max_new_tokens"], "do_sample": named["temperature"] > 0}
        if asked["do_sample"]:
            asked |= {"temperature": named["temperature"], "top_p": named.get("top_p", 1.0), "top_k": 0}
        ends = sorted(self.eos_ids) or None
        settings = GenerationConfig(**asked, eos_token_id=ends, pad_token_id=ends[0] if ends else 0)
        answers = []
        for prompt in prompts:  # one by one: each has random numbers of its own, and no padding
            ids_BS = torch.tensor([prompt], device=self.device)
            with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
                torch.manual_seed(derive_seed(named["seed"], "harness", prompt, again))
                model: Any = self.model
                found = model.generate(ids_BS, attention_mask=torch.ones_like(ids_BS), generation_config=settings)
            answers.append(found[0, len(prompt) :].tolist())
        return answers

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        head: Any = self.model.get_output_embeddings()
        found: torch.Tensor = head(hidden)
        cap = getattr(self.config, "final_logit_softcapping", None)
        return found if cap is None else torch.tanh(found / cap) * cap


def example(id: str, given: Sequence[int], scored: Sequence[int]) -> Example:
    """Join what is given and what is scored."""
    return Example(id, array("i", [*given, *scored]), len(given))
