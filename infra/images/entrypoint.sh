#!/usr/bin/env bash
# Run a command with secrets read from files: NAME_FILE=/run/secrets/x sets NAME to what the file holds.
set -euo pipefail
for name in PREFECT_API_AUTH_STRING MLFLOW_TRACKING_PASSWORD PGPASSWORD AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY \
  OPENAI_API_KEY HF_TOKEN RCLONE_AUTH_KEY; do
  file=${name}_FILE
  if [ -n "${!file:-}" ] && [ -s "${!file}" ]; then
    export "$name=$(<"${!file}")"
    unset "$file"
  fi
done
exec "$@"
