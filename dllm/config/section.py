"""What every section of params.yaml is: strict, frozen, described by its attributes' docstrings, with finite values.

The bounds are far above what any run uses: they refuse slips of the keyboard before hours are spent on them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, create_model

PositiveInt = Annotated[int, Field(ge=1, le=2**31 - 1)]
NonNegativeInt = Annotated[int, Field(ge=0, le=2**31 - 1)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Size = Annotated[int, Field(ge=1, le=2**16)]
"""A number of things that are in memory at one time: rows of a batch, requests, samples, ranks of an adapter."""
Layers = Annotated[int, Field(ge=1, le=1024)]
TokenCount = Annotated[int, Field(ge=1, le=2**24)]
"""A length in tokens, or a number of positions."""
Seed = Annotated[int, Field(ge=0, lt=2**63)]
"""What `torch.Generator.manual_seed` takes on every device."""
Seconds = Annotated[float, Field(gt=0, le=30 * 24 * 3600)]
Port = Annotated[int, Field(ge=0, le=65535)]


class Section(BaseModel):
    """A part of params.yaml: unknown keys are errors, numbers are finite, values never change."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, strict=True, allow_inf_nan=False
    )


def with_sections(base: type[Section], name: str, settings: Mapping[str, type[Section]], about: str) -> Any:
    """Return a section like `base` with optional sections inside, of registered members.

    Args:
        base: what all members share.
        name: of the new class.
        settings: the members' sections by key.
        about: describes each of these keys.
    """
    fields: dict[str, Any] = {
        key: (section | None, Field(default=None, description=about)) for key, section in settings.items()
    }
    return create_model(name, __base__=base, __module__=base.__module__, __doc__=base.__doc__, **fields)
