"""What is checked before the first prompt is read and the first token is generated: models, chat template, engine."""

from __future__ import annotations

import sys

from transformers import PreTrainedTokenizerBase

from dllm.config.params import Params
from dllm.engines.engine import EngineFactory
from dllm.models import hub
from dllm.models.target_files import check_revision, check_shards
from dllm.models.targets import check_vocabulary, load_tokenizer, locate
from dllm.prompts.template import prompt_ids
from dllm.prompts.template_probes import check_thinking_modes, writes_date
from dllm.registry import ENGINES, METHODS

DATED = (
    "warning: the target's chat template writes today's date (strftime_now): a run that is resumed, or evaluated, on "
    "another day has other prompts under the same fingerprint"
)


def check(params: Params, *, reports: bool = True) -> PreTrainedTokenizerBase:
    """Refuse what a later stage would refuse, as far as configs say, and return the target's tokenizer.

    No weights are read.

    Args:
        params: of the run.
        reports: print what works with the target.

    Raises:
        ConfigError: the engine's settings are impossible, or the mask token is; the target has no revisions.
        ModelError: the target or the draft is not supported, by the method or the engine, or not wholly there.
        DataError: the tokenizer has no chat template that renders a question, or in the thinking modes that are asked.
    """
    engine: EngineFactory = ENGINES[params.regenerate.engine]
    engine.check(params.regenerate)
    works = METHODS[params.train.mode].check_models(params)
    if works and reports:
        print(works, file=sys.stderr, flush=True)
    engine.check_target(params.target)
    check_revision(params.target)
    path = locate(params.target, weights=False)
    if hub.commit_of(path) is None:  # what is missing of the hub's is downloaded when it is needed
        check_shards(path)
    tokenizer = load_tokenizer(params.target)
    ids = prompt_ids(tokenizer, [{"role": "user", "content": "Hello"}], params.target.enable_thinking)
    check_vocabulary(params.target, tokenizer, ids)
    if writes_date(tokenizer):
        print(DATED, file=sys.stderr, flush=True)
    if params.target.enable_thinking is not None:
        check_thinking_modes(tokenizer, "target.enable_thinking")
    if params.evaluate.thinking is not None:
        check_thinking_modes(tokenizer, "evaluate.thinking")
    return tokenizer
