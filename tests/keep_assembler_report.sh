#!/bin/sh
# Runs a compiler and keeps what it says beside the object: keep_assembler_report.sh OBJECT COMMAND...
object=$1
shift
"$@" 2> "$object.report" && exit 0
status=$?
cat "$object.report" >&2
exit $status
