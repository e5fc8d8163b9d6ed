#!/usr/bin/env bash
# Make the secrets of infra/compose.yaml that are missing, each in a file of infra/secrets/ that only you can read. The
# token of the Hugging Face hub is taken from HF_TOKEN, and may be empty.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
umask 077
mkdir -p secrets
random() { head -c 24 /dev/urandom | base64 | tr '+/' '-_' | tr -d '\n'; }
keep() { [ -e "secrets/$1" ] || printf '%s' "$2" >"secrets/$1"; }
keep postgres_password "$(random)"
keep mlflow_password "$(random)"
# One password for Prefect and MLflow, as Prefect's variable has it: user:password.
keep api_auth "dllm:$(<secrets/mlflow_password)"
keep s3_access_key dllm
keep s3_secret_key "$(random)"
keep grafana_password "$(random)"
keep hf_token "${HF_TOKEN:-}"
ls -l secrets
