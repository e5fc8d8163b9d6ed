# For the batch scripts beside it: `. infra/slurm/common.sh` in the project's folder.
# shellcheck shell=bash disable=SC1090,SC1091
set -euo pipefail
set -a
. infra/stack.env
# Secrets of this cluster: MLFLOW_TRACKING_URI, MLFLOW_TRACKING_PASSWORD, HF_TOKEN. The file is yours alone.
[ ! -e "${DLLM_SECRETS:-$HOME/.config/dllm/env}" ] || . "${DLLM_SECRETS:-$HOME/.config/dllm/env}"
set +a
. infra/env.sh

# Run a command on all nodes of the job, and leave the script with its exit code. SIGTERM, which Slurm sends before the
# time limit (--signal) and on preemption, is passed on; the command saves its work, and the job queues again. Stages
# resume by themselves.
run_on_nodes() {
  local code=0 child stopped=
  srun --kill-on-bad-exit=1 "$@" &
  child=$!
  trap 'stopped=1; kill -TERM "$child" 2>/dev/null || true' TERM
  while :; do
    wait "$child" && code=0 || code=$?
    kill -0 "$child" 2>/dev/null || break  # else it was a signal that ended `wait`
  done
  if [ -n "$stopped" ] && [ "$code" -ne 0 ]; then
    echo "stopped after SIGTERM with code $code; requeued"
    scontrol requeue "${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_}${SLURM_ARRAY_TASK_ID:-$SLURM_JOB_ID}"
  fi
  exit "$code"
}
