"""The section `regenerate` of params.yaml: how the target answers, and by which engine."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from dllm.config.section import Port, PositiveInt, Seconds, Section, Seed, Size, TokenCount
from dllm.registry import ENGINES


def _http(url: str) -> str:
    if not url.lower().startswith(("http://", "https://")):  # the engine reads the rest, and not with every engine
        raise ValueError("not an http address: it begins with http:// or https://")
    return url


OWN_OPTIONS = {
    "--host": "the server listens on loopback only",
    "--port": "set regenerate.sglang.port",
    "--model": "set target.model",
    "--model-path": "set target.model",
    "--tokenizer-path": "set target.model",
    "--revision": "set target.revision",
    "--served-model-name": "the server is asked by the name it is started with",
    "--trust-remote-code": "set target.trust_remote_code",
    "--enable-custom-logit-processor": "requests would run code",
    "--config": "write the options of that file into args",
}
"""Options of SGLang that `args` may not hold, and what is there instead: the last one given would win."""


def _not_ours(argument: str) -> str:
    name = argument.partition("=")[0].replace("_", "-")
    # argparse takes the beginning of an option's name for it, where no other begins so.
    own = next((option for option in OWN_OPTIONS if option.startswith(name)), None) if name[2:] else None
    if own and name.startswith("--"):
        raise ValueError(f"{own} is not for args: {OWN_OPTIONS[own]}")
    return argument


class Sglang(Section):
    """A SGLang server that `dllm serve`, or the stage with engine `sglang`, starts and takes down."""

    python: str | None = ".venv-sglang/bin/python"
    """Interpreter of the environment that has SGLang, relative to the project's folder."""
    image: str | None = None
    """A container image that has SGLang, instead of `python`."""
    port: Port = 0
    """0 takes a free one."""
    args: list[Annotated[str, AfterValidator(_not_ours)]] = Field(default=[])
    """Further arguments of `sglang.launch_server`, e.g. [--tp, "2"]; none of address, model or code."""
    start_timeout_s: Seconds = 1800.0
    """Patience until the first token, in seconds."""


class Regenerate(Section):
    """The target answers every prompt."""

    engine: Annotated[str, AfterValidator(ENGINES.check)] = "local"
    """`local`: in this process; `openai`: servers that are running; `sglang`: one started for the stage; `dataset`:
    nothing is generated, the dataset's own last responses are taken."""
    servers: list[Annotated[str, AfterValidator(_http)]] = Field(default=[])
    """Addresses of OpenAI-compatible servers, for engine `openai`; DLLM_TARGET_URL (commas between several) goes
    before them."""
    served_model: str | None = None
    """Name the servers know the target by; null takes `target.model`."""
    concurrency: Size = 64
    """Requests in flight over all servers, for engines `openai` and `sglang`."""
    batch_size: Size = 64
    """Rows decoded together, for engine `local`."""
    samples_per_prompt: Size = 1
    temperature: Annotated[float, Field(ge=0, le=2)] = 0.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    max_new_tokens: TokenCount = 256
    shard_size: PositiveInt = 1000
    """Rows a parquet shard."""
    seed: Seed = 0
    turns: Literal["all", "last"] = "all"
    """`all`: every assistant turn is answered anew, each after the new ones; `last`: only the last, the others stay."""
    drop: list[Literal["length", "empty", "repetition", "tool_mismatch", "overlong"]] = Field(default=[])
    """Flags whose rows are left out of the shards; they are counted all the same."""
    timeout_s: Seconds = 600.0
    """Patience with one request, and with the absence of all servers, in seconds."""
    max_retries: Annotated[int, Field(ge=0, le=1000)] = 5
    """Further tries of a request after a fault that may pass."""
    max_failure_rate: Annotated[float, Field(gt=0, le=1)] = 0.2
    """The run stops when a larger share of the latest rows was refused."""
    sglang: Sglang = Sglang()

    @model_validator(mode="after")
    def _check_sampling(self) -> Regenerate:
        if self.temperature == 0 and self.samples_per_prompt > 1:
            raise ValueError("samples_per_prompt > 1 at temperature 0 repeats the same answer; raise temperature")
        if self.temperature == 0 and self.top_p < 1:
            raise ValueError("top_p requires sampling, which temperature 0 leaves out; raise temperature")
        return self
