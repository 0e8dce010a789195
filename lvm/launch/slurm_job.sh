#!/bin/bash
# Run {{name}}: a batch script for `sbatch`.
set -uo pipefail
{{exports}}
{{secrets}}
{{setup}}
cd {{folder}} || exit 1
{{job}}
# A preempted job receives SIGTERM here too; wait for its processes, which are saving.
trap 'stopping=1' TERM
max_restarts={{max_restarts}} failures="failures-$SLURM_JOB_ID" stopping=""
while true; do
  # When one process has ended, the others have time to exit by themselves with meaningful codes.
  srun --kill-on-bad-exit=0 --wait={{grace}} python "${job[@]}" &
  step=$!
  wait "$step"
  code=$?
  while kill -0 "$step" 2>/dev/null; do wait "$step"; code=$?; done
  echo "ended with exit code $code"
  case "$code" in {{final}}) exit "$code" ;; esac
  if [ "$max_restarts" = 0 ]; then exit "$code"; fi
  if [ "$code" = {{preempted}} ]; then break; fi
  # A line for each failure: the step of the newest checkpoint. Failures since that checkpoint count.
  saved="$(cat "$workdir/progress" 2>/dev/null || echo 0)"
  echo "$saved" >>"$failures"
  count="$(grep -cx "$saved" "$failures")"
  if [ "$count" -gt "$max_restarts" ]; then exit "$code"; fi
  # A second failure may be due to the nodes: the queue may choose others.
  if [ "$count" -gt 1 ] || [ -n "$stopping" ]; then break; fi
done
if [ "$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T)" = RUNNING ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
