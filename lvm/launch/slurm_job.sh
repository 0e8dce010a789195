#!/bin/bash
# Run {{name}}: a batch script for `sbatch`.
set -uo pipefail
{{exports}}
{{secrets}}
{{setup}}
cd {{folder}} || exit 1
{{job}}
# A preempted job receives SIGTERM here too; wait for its processes, which are saving.
trap ':' TERM
# When one process has ended, the others have time to exit by themselves with meaningful codes.
srun --kill-on-bad-exit=0 --wait={{grace}} python "${job[@]}" &
step=$!
wait "$step"
code=$?
while kill -0 "$step" 2>/dev/null; do wait "$step"; code=$?; done
echo "ended with exit code $code"
case "$code" in {{final}}) exit "$code" ;; esac
{{requeue}}
exit "$code"
