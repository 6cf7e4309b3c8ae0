#!/bin/sh
# Stands in for ssh inside the emulation: agent.sh [-options] HOST COMMAND...
# HOST is 10.77.0.N or hN; its namespaces are those of process N + 1 (see switch.c).
while :; do
    case $1 in
    -l | -p | -o) shift 2 ;;
    -*) shift ;;
    *) break ;;
    esac
done
number=${1##*[.h]}
shift
exec nsenter --target $((number + 1)) --net --uts --ipc --mount -- sh -c "$*"
