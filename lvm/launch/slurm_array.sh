#!/bin/bash
# Run {{name}}: each task of the array {{task}}.
set -uo pipefail
{{exports}}
{{secrets}}
{{setup}}
cd {{folder}} || exit 1
stopping="" process=""
trap 'stopping=1; kill "$process"' TERM
python {{command}} {{index}} &
process=$!
wait "$process"
code=$?
while kill -0 "$process" 2>/dev/null; do wait "$process"; code=$?; done
echo "ended with exit code $code"
case "$code" in {{final}}) exit "$code" ;; esac
# SIGTERM comes before the time limit and at preemption, which are no failures.
failures="failures-$SLURM_ARRAY_JOB_ID-$SLURM_ARRAY_TASK_ID"
touch "$failures"
if [ -z "$stopping" ]; then echo "$code" >>"$failures"; fi
state="$(squeue --noheader --jobs="${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID" --format=%T)"
if [ "$(wc -l <"$failures")" -le {{max_restarts}} ] && [ "$state" = RUNNING ]; then
  scontrol requeue "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"
fi
exit "$code"
