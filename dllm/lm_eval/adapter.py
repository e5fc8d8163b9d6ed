"""A model behind the interface of lm-evaluation-harness.

Every result depends only on the request and its document: not on the batch, the order of requests, or the number of
ranks.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from lm_eval.api.model import LM

from dllm.errors import DataError
from dllm.lm_eval import gathering, generation_arguments, texts
from dllm.lm_eval.generation_arguments import GenerationArguments
from dllm.lm_eval.models import Score, Scored, example
from dllm.progress import Progress
from dllm.prompts.template import render, template_digest
from dllm.training.batches import Example

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

    from dllm.training.distributed import Ranks

AT_ONCE = 64
"""Requests scored between two updates of the harness's cache of results."""


class HarnessModel(LM):
    """Scores texts and generates responses for tasks.

    Args:
        model: the model.
        batch_size: responses generated together.
        seed: of masks and of sampling, where a task gives none.
        max_length: most tokens of a text, if fewer than the model's.
        enable_thinking: passed to chat templates that know it; null leaves it out.
        ranks: this process among those that share the documents.

    Raises:
        DataError: the tokenizer has no token for an empty context.
    """

    def __init__(
        self,
        model: Scored,
        *,
        batch_size: int = 8,
        seed: int = 0,
        max_length: int | None = None,
        enable_thinking: bool | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        super().__init__()
        self.model, self.tokenizer, self.batch_size, self.seed = model, model.tokenizer, batch_size, seed
        spare = max(0, model.max_length - max_length) if max_length is not None else 0
        self.max_length, self.max_scored_length = model.max_length - spare, model.max_scored_length - spare
        self.enable_thinking = enable_thinking
        if ranks is not None:
            self._rank, self._world_size = ranks.rank, ranks.world
        self._device = model.device
        self.errors: list[float] = []
        """Standard errors of the log-likelihoods so far, in nats."""
        ids = (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id, min(model.eos_ids, default=None))
        found = next((id for id in ids if id is not None), None)
        if found is None:
            raise DataError("the tokenizer has neither a BOS nor an EOS token for an empty context")
        self.prefix = int(found)

    def loglikelihood(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return each continuation's log-likelihood given its context, and whether it is the greedy one.

        Units: nats.

        Raises:
            DataError: a continuation is longer than the model's maximum, or holds the mask token.
        """
        said = (request.args[:2] for request in requests)
        pairs = [texts.encode_pair(self.tokenizer, before, after, self.prefix) for before, after in said]
        rows = [self._row(_item(request), *pair) for request, pair in zip(requests, pairs, strict=True)]
        found: list[tuple[float, bool]] = [(0.0, True)] * len(rows)
        for index, score in self._scores(rows, disable_tqdm):
            found[index] = (score.logprob, score.is_greedy)
            self.cache_hook.add_partial("loglikelihood", requests[index].args, found[index])
        return found

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return each text's log-likelihood, window by window.

        Units: nats.

        Raises:
            DataError: a text holds the mask token.
        """
        rows, owners = [], []
        for owner, request in enumerate(requests):
            ids = texts.encode(self.tokenizer, request.args[0])
            for number, pair in enumerate(texts.windows(ids, self.prefix, self.max_scored_length)):
                rows.append(self._row(f"{_item(request)}-{number}", *pair))
                owners.append(owner)
        left = Counter(owners)
        found = [0.0] * len(requests)
        for index, score in self._scores(rows, disable_tqdm):
            owner = owners[index]
            found[owner] += score.logprob
            left[owner] -= 1
            if not left[owner]:
                self.cache_hook.add_partial("loglikelihood_rolling", requests[owner].args, found[owner])
        return found

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return the model's response to each context, up to the first of its stop strings.

        Equal requests at a temperature above 0 get different responses.

        Raises:
            ConfigError: an argument is unknown, or not of this model's sampler.
            DataError: a context holds the mask token, or leaves no room beside the response.
        """
        groups: dict[tuple[GenerationArguments, int], list[tuple[int, list[int]]]] = {}
        seen: dict[tuple[GenerationArguments, tuple[int, ...]], int] = {}
        for index, request in enumerate(requests):
            arguments = generation_arguments.read(request.args[1], self.seed, self.model.settings)
            prompt = self._prompt(request.args[0], arguments.named["max_new_tokens"])
            repeat = seen[arguments, tuple(prompt)] = seen.get((arguments, tuple(prompt)), -1) + 1
            groups.setdefault((arguments, repeat), []).append((index, prompt))
        found = [""] * len(requests)
        with self._progress("generation", len(requests), disable_tqdm) as progress:
            for (arguments, repeat), rows in groups.items():
                rows.sort(key=lambda row: len(row[1]))
                for begin in range(0, len(rows), self.batch_size):
                    part = rows[begin : begin + self.batch_size]
                    responses = self.model.generate([prompt for _, prompt in part], arguments.named, repeat)
                    for (index, _), ids in zip(part, responses, strict=True):
                        found[index] = texts.cut(self.tokenizer, ids, arguments.until)
                        self.cache_hook.add_partial("generate_until", requests[index].args, found[index])
                    progress.update(len(part))
        return found

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Render a chat up to the beginning of the assistant's turn, or up to the end of an unfinished one.

        Raises:
            DataError: there is no template, or it refuses these turns.
        """
        options: dict[str, Any] = {} if self.enable_thinking is None else {"enable_thinking": self.enable_thinking}
        options |= {
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": not add_generation_prompt,
        }
        try:
            return render(self.tokenizer, chat_history, **options)
        except DataError as error:
            raise DataError(f"the chat template fails: {error.message}", where=error.where, hint=error.hint) from None

    def chat_template(self, chat_template: bool | str = False) -> str:
        """Return the chat template, or the one of that name; nothing where none is applied.

        Raises:
            DataError: there is none.
        """
        if chat_template is False or chat_template is None:
            return ""
        several = isinstance(self.tokenizer.chat_template, dict)
        name = chat_template if several and isinstance(chat_template, str) else None
        try:
            return str(self.tokenizer.get_chat_template(name))
        except ValueError as error:
            raise DataError(f"no such chat template: {error}", where=str(self.tokenizer.name_or_path)) from None

    @property
    def tokenizer_name(self) -> str:
        """Name the tokenizer and its template, for the harness's cache of requests."""
        name = str(self.tokenizer.name_or_path).replace("/", "__")
        return f"{name}-{template_digest(self.tokenizer)}" if self.tokenizer.chat_template else name

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return all ranks' tensors of equal length, concatenated in rank order."""
        return gathering.tensors(tensor.reshape(-1), self.world_size)

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        """Return all ranks' objects on rank `dst`, None on the others."""
        found = gathering.values(obj, self.world_size, self.device)
        return found if self.rank == dst else None

    def barrier(self) -> None:
        """Wait for all ranks."""
        gathering.tensors(torch.zeros(1, device=self.device), self.world_size)

    def report(self) -> dict[str, Any]:
        """Return what the log-likelihoods are, and their mean standard error over masks; a collective call.

        Units: nats per continuation or window.
        """
        errors = [error for own in gathering.values(self.errors, self.world_size, self.device) for error in own]
        found: dict[str, Any] = {"kind": self.model.kind, "scored": len(errors)}
        if self.model.kind != "exact" and errors:
            found["samples"] = getattr(self.model, "samples", None)
            found["all_masks_taken"] = sum(error == 0 for error in errors) / len(errors)
            found["mean_error"] = sum(errors) / len(errors)
        return found

    def _row(self, item: str, given: list[int], scored: list[int]) -> Example:
        left = self.max_scored_length - len(scored)
        if left < 1:
            raise DataError(
                f"a continuation of {len(scored)} tokens; the model takes {self.max_scored_length}",
                where=self._begin(scored),
            )
        given = given[-left:]
        if self.model.kind != "exact" and self.model.mask_token_id in [*given, *scored]:
            raise DataError("a text holds the mask token", where=self._begin(scored))
        return example(item, given, scored)

    def _begin(self, ids: list[int]) -> str:
        return repr(str(self.tokenizer.decode(ids[:12])))

    def _prompt(self, context: str, max_new_tokens: int) -> list[int]:
        left = self.max_length - max_new_tokens
        if left < 1:
            raise DataError(
                f"a response of {max_new_tokens} tokens leaves no room for its prompt in the model's {self.max_length}",
                hint="lower max_gen_toks",
            )
        return (texts.encode(self.tokenizer, context) or [self.prefix])[-left:]

    def _scores(self, rows: Sequence[Example], quiet: bool) -> Iterator[tuple[int, Score]]:
        """Score rows, sorted by length; rows without anything to score are left out."""
        order = [index for index, row in enumerate(rows) if len(row) > row.prompt_length]
        order.sort(key=lambda index: (len(rows[index]), rows[index].id, rows[index].input_ids.tobytes()))
        with self._progress("log-likelihood", len(order), quiet) as progress:
            for begin in range(0, len(order), AT_ONCE):
                part = order[begin : begin + AT_ONCE]
                scores = self.model.score([rows[index] for index in part], progress.update)
                self.errors += [score.error for score in scores]
                yield from zip(part, scores, strict=True)

    def _progress(self, what: str, total: int, quiet: bool) -> Progress:
        return Progress(f"lm-eval: {what}", total, "texts", shown=self.rank == 0 and not quiet)


def _item(request: Instance) -> str:
    """Hash a document's content: its choices share masks, whatever its position among others."""
    document = json.dumps(request.doc, sort_keys=True, default=str)
    return hashlib.sha256(document.encode()).hexdigest()[:16]
