#!/usr/bin/env bash
# worker.sh POOL [LIMIT]: make the pools that are missing, deploy the flows, and take flow runs of POOL, LIMIT at a time.
set -euo pipefail
pool=$1 limit=${2:-1}
for name in local parts; do
  prefect --no-prompt work-pool inspect "$name" >/dev/null 2>&1 ||
    prefect --no-prompt work-pool create "$name" --type process
done
prefect --no-prompt deploy --all
exec prefect worker start --pool "$pool" --type process --limit "$limit" --with-healthcheck
