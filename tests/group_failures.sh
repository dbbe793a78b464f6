#!/bin/sh
# group_failures.sh <mpirun> <group_failures>: however a rank ends, the run ends within seconds, with what went wrong.
set -eu
mpirun="$1" program="$2" output="$(mktemp)"
trap 'rm -f "$output"' EXIT

expect() { # how, status (or "failure"), what the output says
    status=0
    # shellcheck disable=SC2086 # how is one word or two
    timeout 20 "$mpirun" -n 4 "$program" $1 >"$output" 2>&1 || status=$?
    if [ "$status" -eq 124 ]; then echo "$1: still running after 20 seconds"; cat "$output"; exit 1; fi
    if { [ "$2" = failure ] && [ "$status" -eq 0 ]; } || { [ "$2" != failure ] && [ "$status" -ne "$2" ]; }; then
        echo "$1: ended with status $status, expected $2"; cat "$output"; exit 1
    fi
    grep -q "$3" "$output" || { echo "$1: did not say '$3':"; cat "$output"; exit 1; }
}
expect works 0 "4 ranks are done"
expect "initialises works" 0 "4 ranks are done"
expect dawdles 0 "4 ranks are done"
expect killed failure "rank 3 .*signal 9"
expect throws failure "the sensor is off"
expect exits 1 "no such file"
expect leaves failure "rank 3 has ended, and this one waits for a message from it"
expect "initialises leaves" failure "rank 3 has ended, and this one waits for a message from it"
expect unheard failure "rank 3 has ended, and this one has a message for it"
