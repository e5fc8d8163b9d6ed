"""Sample responses of a draft's evaluation: the text of each, cut where its rounds of decoding ended."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dllm.decoding.comparison import Pair
from dllm.methods.dflash.sets import Question

FILE = "samples.json"


def write(path: Path, tokenizer: Any, questions: Sequence[Question], pairs: Sequence[Pair]) -> None:
    """Write the decoded responses: `{"samples": [{"prompt_id", "source", "prompt", "tau", "pieces"}, ...]}`.

    A piece is `[text, tokens]`: first the token that the prompt's pass gives, then what each round has emitted. A
    character whose bytes lie in two pieces stands in the later one.
    """
    prompts = {question.id: question for question in questions}
    samples = [_sample(tokenizer, prompts[pair.prompt_id], pair) for pair in pairs if pair.prompt_id in prompts]
    path.write_text(json.dumps({"samples": samples}, ensure_ascii=False) + "\n", encoding="utf-8", errors="replace")


def _sample(tokenizer: Any, question: Question, pair: Pair) -> Mapping[str, Any]:
    pieces: list[tuple[str, int]] = []
    start, shown = 0, ""
    for emitted in (1, *(counts.num_emitted for counts in pair.rounds)):
        end = min(start + emitted, len(pair.token_ids))
        text = tokenizer.decode(pair.token_ids[:end], skip_special_tokens=False)
        whole = text.rstrip("\ufffd") if end < len(pair.token_ids) else text
        pieces.append((whole[len(shown) :], end - start))
        start, shown = end, whole
    return {
        "prompt_id": question.id,
        "source": question.source,
        "prompt": tokenizer.decode(question.ids, skip_special_tokens=False),
        "tau": sum(counts.num_emitted for counts in pair.rounds) / len(pair.rounds) if pair.rounds else None,
        "pieces": pieces,
    }
