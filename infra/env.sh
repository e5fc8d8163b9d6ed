# Environment for this project's tools: `. infra/env.sh` in the project's folder. Facts about the machine only.
# shellcheck shell=sh
DLLM_HOME="$PWD"
PATH="$PWD/.venv/bin:$PATH"
PREFECT_HOME="$PWD/.prefect"
PREFECT_SERVER_ANALYTICS_ENABLED=false
DVC_NO_ANALYTICS=1
MLFLOW_DISABLE_TELEMETRY=true
DO_NOT_TRACK=1
PYTHONUNBUFFERED=1
PYTHONUTF8=1
export DLLM_HOME PATH PREFECT_HOME PREFECT_SERVER_ANALYTICS_ENABLED DVC_NO_ANALYTICS MLFLOW_DISABLE_TELEMETRY
export DO_NOT_TRACK PYTHONUNBUFFERED PYTHONUTF8
# No `prefect` command may start a server of its own: it would have no password (infra/gate.py).
PREFECT_SERVER_ALLOW_EPHEMERAL_MODE=false
export PREFECT_SERVER_ALLOW_EPHEMERAL_MODE
# No proxy for loopback, in `prefect` and `mlflow` commands; dllm/process/proxies.py does it for ours.
if [ -n "${http_proxy-}${HTTP_PROXY-}${https_proxy-}${HTTPS_PROXY-}${all_proxy-}${ALL_PROXY-}" ]; then
  NO_PROXY="${no_proxy-},${NO_PROXY-},localhost,127.0.0.1,::1"
  no_proxy="$NO_PROXY"
  export NO_PROXY no_proxy
fi
