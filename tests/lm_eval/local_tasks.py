"""Models whose results are known, and tasks in local files."""

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import yaml

from dllm.models.diffusion.config import DiffusionConfig
from dllm.models.diffusion.protocol import DiffusionLM
from tests.models.small_models import small_model

VOCABULARY = 1408

HYBRID = DiffusionConfig("hybrid", 500)
BLOCKS = DiffusionConfig("mdlm", 500, 3)


def request(*args: Any, doc: object = None) -> Any:
    """Make a request of the harness, as far as the adapter reads it."""
    return SimpleNamespace(args=args, doc=doc or {"text": args[0]})


def whole_model(config: DiffusionConfig | None = None, scale: float = 0.4) -> DiffusionLM:
    """Make a random model that knows all tokens of its tokenizer."""
    model = small_model(config=config, scale=scale)
    model.model.resize_token_embeddings(VOCABULARY, mean_resizing=False)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight in (model.model.get_input_embeddings().weight, model.head_VD):
            weight.normal_(0, scale, generator=generator)
    return model


def of_one_word(log_odds: dict[str, float], config: DiffusionConfig | None = None) -> DiffusionLM:
    """Make a model that gives each token the same probability everywhere: some tokens these log-odds, all others 0.

    All embeddings are alike and nothing is added to them on the way, so that its logits are the head's rows' sums.
    """
    model = whole_model(config)
    odds = torch.zeros(model.head_VD.shape[0])
    for word, value in log_odds.items():
        for id in model.tokenizer(word)["input_ids"]:
            odds[id] = value
    with torch.no_grad():
        for name, weight in model.model.named_parameters():
            if "o_proj" in name or "down_proj" in name:
                weight.zero_()
        model.model.get_input_embeddings().weight.fill_(1.0)
        width = model.head_VD.shape[1]
        model.head_VD.copy_((odds / width)[:, None].expand(-1, width))
    model.eos_ids = set()
    return model


def write_task(folder: Path, name: str, documents: Sequence[dict[str, Any]], **values: Any) -> None:
    """Write a task and its documents, with the cache of the data beside them."""
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in documents))
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")},
        "test_split": "test",
        "metadata": {"version": 1},
        **values,
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(task))
