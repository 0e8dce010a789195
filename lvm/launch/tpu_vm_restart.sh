failures=0
while true; do
{{attempt}}
  case "$code" in {{final}}) break ;; esac
  if [ "$code" != {{preempted}} ]; then failures=$((failures + 1)); fi
  if [ "$failures" -gt {{max_restarts}} ]; then break; fi
  sleep 10
done
