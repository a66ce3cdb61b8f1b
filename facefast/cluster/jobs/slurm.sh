#!/usr/bin/env bash
# A run of facefast as a job of Slurm: facefast/cluster/jobs/slurm.sh, filled in by `facefast submit slurm`.
#: directives

set -euo pipefail

#: settings

attempt=${SLURM_RESTART_COUNT:-0}
say() { echo "job $SLURM_JOB_ID, attempt $attempt: $*"; }

# The signal ahead of the time limit is for the ranks, whom Slurm sends it to. Where somebody sends it to everything
# (scancel --full), this script has to be there afterwards.
trap ':' USR1

# Scripts of modules and of environments are not written for -e and -u.
set +eu
if [ ${#modules[@]} -gt 0 ]; then
  # shellcheck source=/dev/null
  type module >/dev/null 2>&1 || source /etc/profile
  module load "${modules[@]}" || { say "module load ${modules[*]} failed; module avail lists what there is"; exit 64; }
fi
if [ -n "$venv" ]; then
  # shellcheck source=/dev/null
  source "$venv/bin/activate" || { say "$venv/bin/activate cannot be read on $(hostname)"; exit 64; }
fi
set -eu

# All nodes meet at the first, at a port that follows the job: two jobs on one machine do not meet.
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
meeting=${hosts%%$'\n'*}:$((10000 + SLURM_JOB_ID % 20000))

# Each rank's lines go to a file of its own in $logs/ranks, and into the job's log by this mark.
# shellcheck disable=SC2016 # torchrun puts the number in
export TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE='[rank ${rank}] '

# One launcher a node: torchrun, which starts a rank for each GPU, that ends with the ranks' own exit code and hands
# signals to them alone. torchrun itself ends with 1 whatever happened, and dies of USR1.
launcher=(
  "${inside[@]}" "$python" -m facefast.cluster.launch
  --nnodes="$SLURM_JOB_NUM_NODES" --nproc-per-node="$ranks_per_node" --max-restarts=0
  --rdzv-backend=c10d --rdzv-endpoint="$meeting" --rdzv-id="$SLURM_JOB_ID-$attempt"
  --log-dir="$logs/ranks" --redirects=3 --tee=3
  -- "${train[@]}"
)

# A node that ends is no reason to kill the others at once: they notice, save where they can, and end with the code that
# says why. srun ends with the highest. Since Slurm 22.05 it has to be told how many cores a task has.
step+=(--nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1)
step+=(${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} --kill-on-bad-exit=0 --wait=180)
say "$SLURM_JOB_NUM_NODES nodes ($SLURM_JOB_NODELIST) meet at $meeting"
code=0
srun "${step[@]}" "${launcher[@]}" || code=$?

# 75 alone is a run that was cut short and goes on by the same command; any other code would come again.
if [ "$code" -ne "$goes_on" ]; then
  say "ended with $code"
  exit "$code"
fi
if [ "$attempt" -ge "$restarts" ]; then
  say "stopped, to go on, but this was the last of $restarts restarts: scontrol requeue $SLURM_JOB_ID goes on"
  exit "$code"
fi
say "stopped, to go on: requeued"
scontrol requeue "$SLURM_JOB_ID" || say "it could not be requeued; the same facefast submit goes on"
exit "$code"
