# Both UIs on loopback until Ctrl-C: `make ui`.
set -u
. infra/ports.sh
free_port MLflow "$MLFLOW_PORT" MLFLOW_PORT
free_port Prefect "$PREFECT_PORT" PREFECT_PORT
mkdir -p logs
trap 'trap - EXIT; kill 0' EXIT INT TERM
python -m mlflow server --host 127.0.0.1 --port "$MLFLOW_PORT" --workers 1 \
    --backend-store-uri "${MLFLOW_TRACKING_URI:-sqlite:///$PWD/mlflow.db}" \
    --default-artifact-root "$PWD/mlartifacts" >logs/mlflow.log 2>&1 &
mlflow=$!
prefect server start --host 127.0.0.1 --port "$PREFECT_PORT" >logs/prefect.log 2>&1 &
prefect=$!
up MLflow "http://127.0.0.1:$MLFLOW_PORT/health" $mlflow logs/mlflow.log
echo "MLflow   http://127.0.0.1:$MLFLOW_PORT"
up Prefect "http://127.0.0.1:$PREFECT_PORT/api/health" $prefect logs/prefect.log
echo "Prefect  http://127.0.0.1:$PREFECT_PORT"
echo "Ctrl-C stops both."
wait -n
