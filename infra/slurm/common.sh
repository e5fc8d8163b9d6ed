# For the batch scripts beside it: `. infra/slurm/common.sh` in the project's folder.
# shellcheck shell=bash disable=SC1090,SC1091
set -euo pipefail
set -a
. infra/stack.env
# Secrets of this cluster: MLFLOW_TRACKING_URI, MLFLOW_TRACKING_USERNAME, MLFLOW_TRACKING_PASSWORD, HF_TOKEN. The file is yours alone.
[ ! -e "${DLLM_SECRETS:-$HOME/.config/dllm/env}" ] || . "${DLLM_SECRETS:-$HOME/.config/dllm/env}"
set +a
. infra/env.sh

# Run a command on all nodes of the job, and leave the script with its exit code. SIGTERM, which Slurm sends before the
# time limit (--signal), is passed on; the command saves its work, and the job queues again: stages resume by themselves.
# A preempted job is queued again by Slurm (--requeue), a cancelled one by nobody.
run_on_nodes() {
  local code=0 child stopped=
  srun --kill-on-bad-exit=1 "$@" &
  child=$!
  # To the step, by Slurm: srun itself would have it killed after KillWait, 30 seconds. Once: a second one cuts torchrun
  # short.
  trap '[ -n "$stopped" ] || { stopped=1; scancel --signal=TERM "$SLURM_JOB_ID.0"; }' TERM
  while :; do
    wait "$child" && code=0 || code=$?
    kill -0 "$child" 2>/dev/null || break # else it was a signal that ended `wait`
  done
  if [ -n "$stopped" ] && [ "$code" -ne 0 ] && [ "$(squeue --noheader --job "$SLURM_JOB_ID" --format %T)" = RUNNING ]; then
    echo "stopped by SIGTERM (exit code $code); queued again"
    scontrol requeue "$SLURM_JOB_ID"
  fi
  exit "$code"
}
