"""YAML as params files use it: read as DVC reads it, with repeated keys refused.

PyYAML follows YAML 1.1, where 6e-4 is text; DVC follows 1.2, where it is a number. Both read params.yaml here.
"""

import re
from typing import Any

import yaml


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value} is there twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def read(text: str) -> Any:
    """Read one YAML document.

    Raises:
        yaml.YAMLError: the text is not YAML, or a mapping holds a key twice.
    """
    return yaml.load(text, Loader=_Loader)
