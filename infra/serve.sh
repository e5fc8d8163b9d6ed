# A Prefect server, the deployment and a worker, all on loopback, until Ctrl-C: `make serve`.
set -u
. infra/ports.sh
free_port Prefect "$PREFECT_PORT" PREFECT_PORT
mkdir -p logs
export PREFECT_API_URL="http://127.0.0.1:$PREFECT_PORT/api"
trap 'trap - EXIT; kill 0' EXIT INT TERM
prefect server start --host 127.0.0.1 --port "$PREFECT_PORT" >logs/prefect.log 2>&1 &
up Prefect "$PREFECT_API_URL/health" $! logs/prefect.log
prefect --no-prompt work-pool create --type process dllm >/dev/null 2>&1 || true  # it is there already
prefect --no-prompt work-pool set-concurrency-limit dllm 1 >/dev/null || exit 4
prefect --no-prompt deploy --all >logs/deploy.log 2>&1 || { cat logs/deploy.log >&2; exit 4; }
echo "Prefect  http://127.0.0.1:$PREFECT_PORT, worker of pool dllm running"
echo "Start a run from another shell:"
echo "    . infra/env.sh && PREFECT_API_URL=$PREFECT_API_URL prefect deployment run 'pipeline/smollm2-dflash' --watch"
echo "Ctrl-C stops both."
prefect worker start --pool dllm --name "$(hostname)" 2>&1 | tee logs/worker.log
