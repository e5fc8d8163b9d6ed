"""What a run of the flow `pipeline` can be asked for.

The types are the form that Prefect's pages show, and the schema by which its server refuses a wrong value before it
makes a flow run. What a schema cannot say (types of overrides, values that clash) is checked before the first stage.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, JsonValue

from dllm import secrets
from dllm.config import recipe_book
from dllm.config.brief import brief
from dllm.config.load import load_params
from dllm.config.params import Params
from dllm.errors import ConfigError, DllmError
from dllm.stages import DVC_STAGES, STAGES
from dllm.tracking.runs import flatten

PARAMS_FILE = "params.yaml"
"""In place of a recipe's name: the file in the project's folder, or of the checkout's commit."""
NAME_CHARS = 200
DEPTH = 4
"""Of lists and mappings in a parameter's value, as far as the server looks into them."""


def _secret_schema(depth: int) -> dict[str, Any]:
    found: list[dict[str, Any]] = [{"type": "string", "pattern": secrets.pattern()}]
    if depth:
        inner = _secret_schema(depth - 1)
        found.append({"type": "array", "contains": inner})
        found.append({"type": "object", "not": {"additionalProperties": {"not": inner}}})
    return {"anyOf": found}


NO_SECRET = {"not": _secret_schema(0)}
"""Prefect's database keeps parameters, so its server refuses the forms of secrets before it does."""


def check_open(value: Any) -> Any:
    """Check that a parameter, which Prefect keeps, holds no secret, also none of this environment.

    Raises:
        ValueError: it does.
    """
    if secrets.holds_secret(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)):
        raise ValueError("it holds a secret, and Prefect keeps parameters: set OPENAI_API_KEY or DLLM_TARGET_URL")
    return value


def _known_recipe(name: str) -> str:
    if name != PARAMS_FILE:
        try:
            recipe_book.source(name)
        except ConfigError as error:
            raise ValueError(str(error)) from None
    return name


def _keys(schema: Mapping[str, Any], definitions: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield every dotted key of a JSON schema, those of sections included."""
    for key, value in schema.get("properties", {}).items():
        yield prefix + key
        for option in [value, *value.get("anyOf", [])]:
            if "$ref" in option:
                yield from _keys(definitions[option["$ref"].rpartition("/")[2]], definitions, f"{prefix}{key}.")


def _overrides_schema() -> dict[str, Any]:
    whole = Params.model_json_schema(by_alias=True)
    keys = dict.fromkeys(_keys(whole, whole["$defs"]), True)
    # Not as `properties` of the parameter itself: the form would have a field for each.
    return {"if": True, "then": {"properties": keys, "additionalProperties": False, "not": _secret_schema(DEPTH)}}


Recipe = Annotated[
    str, AfterValidator(_known_recipe), Field(json_schema_extra={"enum": [PARAMS_FILE, *recipe_book.names()]})
]
Overrides = Annotated[dict[str, JsonValue], AfterValidator(check_open), Field(json_schema_extra=_overrides_schema())]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Stage = Literal["prepare", "regenerate", "train", "evaluate", "register"]
Revision = Annotated[str, Field(min_length=1, max_length=200, pattern=r"^[^-\s][^\s:]*$")]
SaveAs = Literal["nothing", "branch", "experiment"]


@dataclass(frozen=True)
class Request:
    """The params of a flow run, and what is special about it. Arguments as of the flow `pipeline`."""

    recipe: str = PARAMS_FILE
    overrides: Mapping[str, JsonValue] = field(default_factory=dict)
    seed: int | None = None
    from_stage: str = "prepare"
    force: bool = False
    register: bool = True
    checkout: str | None = None

    def params(self, root: Path) -> Params:
        """Read the recipe, or the params.yaml in `root`, and apply the overrides.

        Raises:
            ConfigError: a key is unknown, or a value is wrong; the line names it.
        """
        overrides = dict(self.overrides)
        if self.seed is not None and overrides.setdefault("train.seed", self.seed) != self.seed:
            raise ConfigError("train.seed is given twice", where="overrides", hint="leave out one of it and seed")
        # JSON is YAML.
        given = [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in overrides.items()]
        if self.recipe == PARAMS_FILE:
            return load_params(root / PARAMS_FILE, given)
        return recipe_book.load(self.recipe, given)

    def write_params(self, root: Path, *, force: bool) -> None:
        """Write what `params` returns to params.yaml, where it is not what the file says already.

        Args:
            root: where the file lies.
            force: overwrite values that are those of no recipe.

        Raises:
            ConfigError: the values are wrong, or those in the file would be lost.
        """
        params, path = self.params(root), root / PARAMS_FILE
        if self.recipe == PARAMS_FILE and not self._changes():
            return
        with contextlib.suppress(DllmError):  # what is wrong with the old file is about to go
            if load_params(path) == params:  # of this very run, resumed or retried
                return
        if not force:
            recipe_book.check_nothing_lost(path, "run in a checkout (checkout: HEAD), or keep a copy and remove it")
        comment = "" if self.recipe == PARAMS_FILE else recipe_book.source(self.recipe).partition("\n")[0]
        recipe_book.write(path, recipe_book.text_of(params, [line for line in [comment, *self._notes()] if line]))

    def _notes(self) -> list[str]:
        return [f"# Changed for a flow run: {', '.join(changes)}."] if (changes := self._changes()) else []

    def _changes(self) -> list[str]:
        changes = [f"{key}={brief(value)}" for key, value in secrets.hide_in(self.overrides).items()]
        return [*changes, f"seed {self.seed}"] if self.seed is not None else changes

    def name(self, root: Path) -> str:
        """Name a flow run after its recipe, and what is special about it."""
        recipe = self.recipe
        if recipe == PARAMS_FILE:
            with contextlib.suppress(DllmError):  # the run itself says what is wrong
                recipe = load_params(root / PARAMS_FILE).recipe
        special = self._changes()
        if self.checkout not in (None, "HEAD"):
            special.append(f"at {self.checkout}")
        if self.from_stage != "prepare":
            special.append(f"from {self.from_stage}")
        special += ["forced"] * self.force + ["not registered"] * (not self.register)
        return brief(secrets.hide(f"{recipe}: {', '.join(special)}" if special else recipe), NAME_CHARS)

    def check_left_out(self, root: Path) -> None:
        """Refuse values that change a stage before `from_stage`, whose result is taken as it is.

        A checkout runs such a stage again, so there they may be given.

        Raises:
            ConfigError: a value is not that of params.yaml; it is named.
        """
        left_out = DVC_STAGES[: STAGES.index(self.from_stage)]
        if self.checkout is not None or not left_out:
            return
        asked, found = self.params(root), load_params(root / PARAMS_FILE)
        for section in ("target", *left_out):
            ours, theirs = (flatten(getattr(each, section).model_dump(mode="json")) for each in (asked, found))
            if key := next((key for key in (*ours, *theirs) if ours.get(key) != theirs.get(key)), None):
                first = left_out[0] if section == "target" else section
                raise ConfigError(
                    f"{section}.{key} changes the stage {first}, whose result is taken as it is",
                    where=f"from_stage: {self.from_stage}",
                    hint=f"leave it as it is in {PARAMS_FILE}, or start from {first}",
                )

    def stages(self) -> tuple[str, ...]:
        """List the stages of DVC from `from_stage` on."""
        return DVC_STAGES[DVC_STAGES.index(self.from_stage) :] if self.from_stage in DVC_STAGES else ()


def is_made_up(name: str) -> bool:
    """Return whether Prefect may have made up a flow run's name: `brave-otter`, `tau4-roentgen-k` in its pages."""
    return re.fullmatch(r"[a-z0-9-]+", name) is not None
