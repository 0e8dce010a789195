failures="failures-$SLURM_JOB_ID"
if [ "$code" != {{preempted}} ]; then echo "$code" >>"$failures"; else touch "$failures"; fi
state="$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T)"
if [ "$(wc -l <"$failures")" -le {{max_restarts}} ] && [ "$state" = RUNNING ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
