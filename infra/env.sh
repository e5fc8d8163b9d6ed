# Environment for this project's tools: `. infra/env.sh` in the project's folder. Facts about the machine only.
DLLM_HOME="$PWD"
PATH="$PWD/.venv/bin:$PATH"
PREFECT_HOME="$PWD/.prefect"
PREFECT_SERVER_ANALYTICS_ENABLED=false
DVC_NO_ANALYTICS=1
MLFLOW_DISABLE_TELEMETRY=true
DO_NOT_TRACK=1
PYTHONUNBUFFERED=1
export DLLM_HOME PATH PREFECT_HOME PREFECT_SERVER_ANALYTICS_ENABLED DVC_NO_ANALYTICS MLFLOW_DISABLE_TELEMETRY
export DO_NOT_TRACK PYTHONUNBUFFERED
# The temporary server of `make run` may take long to start on a busy machine, and longer still the first time.
PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS=300
export PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS
