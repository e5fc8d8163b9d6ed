#!/usr/bin/env bash
# worker.sh POOL [LIMIT]: make the pools that are missing, deploy the flows, and take flow runs of POOL, LIMIT at a time.
set -euo pipefail
pool=$1 limit=${2:-1}
python infra/deploy.py
exec prefect worker start --pool "$pool" --type process --limit "$limit" --with-healthcheck
