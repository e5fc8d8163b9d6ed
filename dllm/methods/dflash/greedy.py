"""The target's greedy responses to held-out prompts, on which acceptance is counted without speculative decoding.

They are generated once for a target, in batches, and kept in `work/greedy/` for the next run.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Collection, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dllm.config.params import Target
from dllm.decoding.speculative import Decoder
from dllm.decoding.together import decode_together
from dllm.digests import read_sealed, sealed
from dllm.errors import DataError
from dllm.files import atomic_write
from dllm.methods.dflash.settings import Walk
from dllm.models import target_identity
from dllm.progress import Progress
from dllm.training.batches import Example
from dllm.training.distributed import Ranks

GREEDY = Path("work", "greedy")
"""The responses of targets, a folder for each target, dtype and limit, and a file for each prompt."""


@dataclass(frozen=True)
class GreedyRows:
    """Greedy responses to the prompts of held-out rows whose own responses were not generated greedily.

    Args:
        examples: prompt and response; the response has the tokens that a last round may look at behind the limit.
        rows: the held-out row whose prompt each has.
        limit: tokens of a response that are decoded.
    """

    examples: Sequence[Example]
    rows: Sequence[int]
    limit: int


def greedy_rows(
    root: Path,
    target: Target,
    model: Any,
    heldout: Sequence[Example],
    *,
    block_size: int,
    stop_ids: Collection[int],
    max_positions: int | None,
    ranks: Ranks,
) -> GreedyRows:
    """Respond greedily to the prompts of held-out rows, as long as the longest of their responses.

    Prompts that leave no room for that many tokens are left out. Each rank generates its share.

    Args:
        root: the project's folder.
        target: identity of the model.
        model: the target.
        heldout: the rows.
        block_size: of the draft.
        stop_ids: ids that end a response.
        max_positions: the target's.
        ranks: all of them call it.

    Raises:
        DataError: a response of another rank cannot be read.
    """
    limit = max((len(each) - each.prompt_length for each in heldout), default=0)
    beyond = limit + block_size - 2
    fits = [
        row for row, each in enumerate(heldout) if max_positions is None or each.prompt_length + beyond <= max_positions
    ]
    prompts = [heldout[row].input_ids[: heldout[row].prompt_length] for row in fits]
    responses = greedy_responses(
        root, target, model, [list(ids) for ids in prompts], limit=beyond, stop_ids=stop_ids, ranks=ranks, stage="train"
    )
    made = zip(fits, prompts, responses, strict=True)
    examples = [Example(heldout[row].id, ids + array("i", response), len(ids)) for row, ids, response in made]
    return GreedyRows(examples, fits, limit)


def greedy_responses(
    root: Path,
    target: Target,
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    limit: int,
    stop_ids: Collection[int],
    stage: str,
    batch_size: int = Walk().batch_size,
    ranks: Ranks | None = None,
) -> list[list[int]]:
    """Return a model's greedy responses to prompts, generating those that `work/greedy/` lacks.

    Args:
        root: the project's folder.
        target: identity of the model.
        model: the target.
        prompts: token ids.
        limit: tokens of a response at most.
        stop_ids: ids that end a response, kept as its last id.
        stage: for the progress that is shown.
        batch_size: prompts decoded together.
        ranks: all of them call it with the same prompts, and each generates its share; None: this process alone.

    Raises:
        DataError: a response of another rank cannot be read.
    """
    made_of = [target_identity.identity(target), str(model.dtype), limit, sorted(stop_ids)]
    key = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:16]
    folder = root / GREEDY / key
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{hashlib.sha256(json.dumps(list(ids)).encode()).hexdigest()[:32]}.json" for ids in prompts]
    known = {index: ids for index, file in enumerate(files) if (ids := _finished(file)) is not None}
    if ranks is not None:
        ranks.barrier()  # no rank writes before all have looked, so that their shares fit together
    missing = [index for index in range(len(prompts)) if index not in known]
    left = missing if ranks is None else missing[ranks.rank :: ranks.world]
    shown = ranks is None or ranks.is_main
    options: dict[str, Any] = {"max_new_tokens": limit, "batch_size": batch_size, "stop_ids": stop_ids}
    plain, total = Decoder(model), len(known) + len(left)
    with (
        Progress(f"{stage}: greedy responses", total, "responses", initial=len(known), shown=shown) as bar,
        plain.packed() if left else nullcontext(),
    ):
        for place, generation in decode_together(plain, [prompts[index] for index in left], **options):
            known[left[place]] = generation.token_ids
            atomic_write(files[left[place]], sealed({"token_ids": generation.token_ids}))
            bar.update(1)
    if ranks is not None:
        ranks.barrier()
    for index in missing:
        if index not in known and (ids := _finished(files[index])) is not None:
            known[index] = ids
        if index not in known:
            raise DataError(
                "a greedy response that another rank generated cannot be read",
                where=str(files[index]),
                hint="work/ must be on a file system that all ranks share",
            )
    return [known[index] for index in range(len(prompts))]


def _finished(path: Path) -> list[int] | None:
    """Read a response; one that is not there, torn by a power cut or damaged is generated again."""
    found = read_sealed(path)
    return None if found is None else found["token_ids"]
