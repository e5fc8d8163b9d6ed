"""Generate from texts with an ordinary causal model, speculatively with a draft or without one; text streams."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TextIO

from transformers import PreTrainedTokenizerBase

from dllm.config.params import Target
from dllm.decoding.encoding import check_room, checked
from dllm.decoding.sampler import Sampler
from dllm.decoding.sampling import samplings
from dllm.decoding.settings import SampledSettings
from dllm.decoding.speculative import Decoder, Generation, Round
from dllm.decoding.together import decode_together
from dllm.models import targets
from dllm.models.checkpoints import Checkpoint
from dllm.models.drafts.checkpoint import load_draft
from dllm.prompts import template as chat


def generate(
    checkpoint: Checkpoint,
    target: Target,
    texts: Sequence[str],
    sampler: Sampler,
    settings: SampledSettings,
    stream: TextIO | None = None,
    batch_size: int = 1,
) -> Iterator[dict[str, Any]]:
    """Generate from each text, one chat each; yield its record, in order.

    Args:
        checkpoint: the draft, where the sampler uses one.
        target: the causal model.
        stream: where to print each response while it is generated, and a summary after it.
        batch_size: texts decoded together; above 1 a response is printed when it has ended.

    Raises:
        ModelError: the checkpoint or its target is missing, or they do not fit.
        DataError: a prompt is empty, or leaves no room for its response.
    """
    model, tokenizer = targets.load_target(target), targets.load_tokenizer(target)
    decoder = sampler.decoder(model, lambda: load_draft(checkpoint.path, model.config), settings)
    stop_ids = chat.stop_ids(tokenizer, model.generation_config, model.config.get_text_config())
    prompts = []
    for number, text in enumerate(texts, 1):
        ids = chat.prompt_ids(tokenizer, [{"role": "user", "content": checked(text, number)}], target.enable_thinking)
        check_room(len(ids), settings.max_new_tokens, decoder.limit, number)
        prompts.append(ids)
    responses = (_one_by_one if batch_size == 1 else partial(_together, batch_size=batch_size))(
        decoder, prompts, settings, stop_ids, lambda: StreamedResponse(tokenizer, stream)
    )
    with decoder.packed():
        for text, response in zip(texts, responses, strict=True):
            response.finish(decoder)
            yield {
                "prompt": text,
                **response.figures(stop_ids),
                "sampler": sampler.name,
                "block_size": decoder.block_size,
                "target": target.model,
                "checkpoint": str(checkpoint.path),
            }


def _one_by_one(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    settings: SampledSettings,
    stop_ids: Collection[int],
    new: Callable[[], StreamedResponse],
) -> Iterator[StreamedResponse]:
    for ids, sampling in zip(prompts, samplings(prompts, settings), strict=True):
        response = new()
        rounds = decoder.decode(ids, max_new_tokens=settings.max_new_tokens, stop_ids=stop_ids, sampling=sampling)
        for each in rounds:
            response.add(each)
        yield response


def _together(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    settings: SampledSettings,
    stop_ids: Collection[int],
    new: Callable[[], StreamedResponse],
    batch_size: int,
) -> Iterator[StreamedResponse]:
    """Decode in a batch; yield the responses in the order of their prompts, in which they do not end."""
    ended: dict[int, Generation] = {}
    found = decode_together(
        decoder,
        prompts,
        max_new_tokens=settings.max_new_tokens,
        batch_size=batch_size,
        stop_ids=stop_ids,
        samplings=samplings(prompts, settings),
    )
    for number in range(len(prompts)):
        while number not in ended:
            index, generation = next(found)
            ended[index] = generation
        response, one = new(), ended.pop(number)
        response.token_ids, response.rounds, response.prefill_s = one.token_ids, one.rounds, one.prefill_s
        yield response


@dataclass
class StreamedResponse:
    """A response while it is generated: text is printed as soon as it is whole characters."""

    tokenizer: PreTrainedTokenizerBase
    stream: TextIO | None
    token_ids: list[int] = field(default_factory=list)
    rounds: list[Round] = field(default_factory=list)
    prefill_s: float = 0.0
    text: str = ""

    def add(self, each: Round) -> None:
        """Append the tokens of a round."""
        if each.is_prefill:
            self.prefill_s = each.seconds
        else:
            self.rounds.append(each)
        self.token_ids += each.tokens
        text = self._decoded()
        if text.endswith("\ufffd"):  # a character whose bytes are not complete yet
            return
        if self.stream is not None:
            print(text[len(self.text) :], end="", file=self.stream, flush=True)
        self.text = text

    def figures(self, stop_ids: Collection[int]) -> dict[str, Any]:
        """Return what `generate --json` prints of the response.

        Units: tokens_per_s counts tokens after the first, over `decode_s`; in a batch, the response's own while others
            are decoded too.
        """
        seconds, emitted = sum(r.seconds for r in self.rounds), [r.counts.num_emitted for r in self.rounds]
        return {
            "text": self._decoded(),
            "token_ids": self.token_ids,
            "tokens": len(self.token_ids),
            "rounds": len(emitted),
            "tokens_per_round": emitted,
            "tau": sum(emitted) / len(emitted) if emitted else None,
            "tokens_per_s": (len(self.token_ids) - 1) / seconds if seconds else None,
            "prefill_s": self.prefill_s,
            "decode_s": seconds,
            "stopped": self.token_ids[-1] in stop_ids,
        }

    def finish(self, decoder: Decoder) -> None:
        """Print the rest of the text and a summary."""
        if self.stream is None:
            return
        found = self.figures(())
        rest = found["text"][len(self.text) :]
        if found["tau"] is None:
            summary = f"[{found['tokens']} token, no round]"
        elif decoder.draft is None:
            summary = f"[{found['tokens']} tokens, one per round; {found['tokens_per_s']:.1f} tokens/s]"
        else:
            rounds = " ".join(map(str, found["tokens_per_round"]))
            summary = (
                f"[tokens per round: {rounds}]\n[{found['tokens']} tokens in {found['rounds']} rounds of up to "
                f"{decoder.block_size}; τ {found['tau']:.2f}; {found['tokens_per_s']:.1f} tokens/s]"
            )
        print(f"{rest}\n\n{summary}", file=self.stream, flush=True)

    def _decoded(self) -> str:
        return str(self.tokenizer.decode(self.token_ids, skip_special_tokens=True))
