#!/usr/bin/env bash
# train.py as N processes on this machine: scripts/launch_local.sh N [train.py's arguments…]     PYTHON=… picks the interpreter
# Another program: scripts/launch_local.sh N serve.py [its arguments…]
#
# Output is prefixed by the process' number. When one fails the others are ended, and its exit code is returned. Ctrl-C
# and SIGTERM save and end all; a second one, two seconds later or more, kills.
set -u
case ${1:-} in '' | 0 | *[!0-9]*) echo "error: usage: $0 N [train.py's arguments]; N is a number of processes" >&2; exit 2 ;; esac
n=$1
shift
program=train.py
case ${1:-} in -*) ;; *.py) program=$1 && shift ;; esac # --config=FILE.py is an argument
python=${PYTHON:-python}
here=$(dirname "${BASH_SOURCE[0]}")
port=$("$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])') || exit 2

alive=()
for ((i = 0; i < n; i++)); do
  "$python" "$here/../$program" --coordinator="127.0.0.1:$port" --num_processes="$n" --process_id="$i" "$@" \
    > >(trap "" INT TERM && exec sed -u "s/^/[$i] /") 2>&1 & # what they say at the end is shown, too
  alive+=("$!")
done
# `timeout` signals this program, and then all of its group: again within a second or two is the same signal.
stopped=
stop() {
  if [ -z "$stopped" ]; then
    stopped=$SECONDS
    kill -TERM "${alive[@]}"
  elif ((SECONDS - stopped > 1)); then
    kill -KILL "${alive[@]}"
  fi
}
trap stop INT TERM

code=0 deadline=0
while ((${#alive[@]})); do
  sleep 0.2
  running=()
  for pid in "${alive[@]}"; do
    if kill -0 "$pid" 2>/dev/null; then
      running+=("$pid")
    elif wait "$pid" || ((failed = $?, code)); then
      :
    else
      code=$failed deadline=$((SECONDS + 15))
    fi
  done
  if ((${#running[@]} && code)); then # they find out themselves, and say so; those that cannot are killed
    ((SECONDS < deadline)) || kill -KILL "${running[@]}"
  fi
  alive=("${running[@]}")
done
exit "$code"
