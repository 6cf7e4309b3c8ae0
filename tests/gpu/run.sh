#!/usr/bin/env bash
# Everything that needs a GPU, in one go, in under 10 minutes, without a network (docs/gpu.md):
# figures as markdown, windows between GPUs, verify, a short training, rank tests on the device.
#
#   MPMP_PYTHON       python whose torch sees the GPU; else python3 on PATH, then .venv
#   MPMP_WHEELS       folder of wheels for what that python lacks (tyro, pytest-mpi, ...)
#   MPMP_MPI_ARCHIVE  a relocatable CUDA-aware Open MPI (.tgz); else the mpirun on PATH
#   OUT               folder for gpu-figures.md and gpu.log; else docs/ and the temporary directory
#   MPMP_GPU_DRY=1    the same flow, tiny, on the CPU: a trial of this script
#
# A section that fails or outlasts its limit does not stop the others; the exit code tells.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source ./env.sh

DRY=${MPMP_GPU_DRY:-0}
WORK=$(mktemp -d "${TMPDIR:-/tmp}/mpmp-gpu.XXXXXX")
trap 'rm -rf "$WORK"' EXIT
if [ -n "${OUT:-}" ]; then
    FIGURES=$OUT/gpu-figures.md LOG=$OUT/gpu.log
elif [ "$DRY" = 1 ]; then
    FIGURES=$WORK/gpu-figures.md LOG=$WORK/gpu.log
else
    FIGURES=docs/gpu-figures.md LOG=${TMPDIR:-/tmp}/mpmp-gpu.log
fi
: >"$LOG"
BUDGET_S=570
FAILED=()
RESULTS="$WORK/results"

# --- sections -------------------------------------------------------------------------------------

section() { # section NAME LIMIT_S COMMAND...: run it, show its end, remember how it went
    local name=$1 limit=$2 began=$SECONDS left=$((BUDGET_S - SECONDS)) code word
    shift 2
    [ "$limit" -le "$left" ] || limit=$left
    LAST=$WORK/${name//[^a-z0-9]/-}.log
    printf '\n=== %s: %s\n' "$name" "$*" | tee -a "$LOG"
    if [ "$limit" -le 5 ]; then
        echo "no time left" >"$LAST"
        code=124
    else
        # SIGTERM lets mpirun end its ranks; SIGKILL would leave them on the GPU.
        timeout --kill-after=10 "$limit" "$@" >"$LAST" 2>&1 </dev/null
        code=$?
    fi
    cat "$LAST" >>"$LOG"
    case $code in 0) word=passed ;; 124) word="FAILED: no end within $limit s" ;; *) word="FAILED with code $code" ;; esac
    if [ $code -ne 0 ]; then
        FAILED+=("$name")
        tail -n 40 "$LAST"
    else
        tail -n 3 "$LAST"
    fi
    printf -- '--- %s: %s after %s s\n' "$name" "$word" "$((SECONDS - began))" | tee -a "$LOG"
    printf -- '- %s: %s (%s s)\n' "$name" "$word" "$((SECONDS - began))" >>"$RESULTS"
    return $code
}

give_up() {
    echo "make gpu: $1" >&2
    exit 3
}

# --- python, wheels, MPI --------------------------------------------------------------------------

sees_gpu() { "$1" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; }

choose_python() { # the first that sees the GPU; for a trial, the first that has torch
    local candidate
    for candidate in ${MPMP_PYTHON:+"$MPMP_PYTHON"} python3 .venv/bin/python; do
        candidate=$(command -v "$candidate") || continue
        if [ "$DRY" = 1 ]; then
            "$candidate" -c 'import torch' 2>/dev/null || continue
        else
            sees_gpu "$candidate" || continue
        fi
        echo "$candidate"
        return
    done
    return 1
}

add_wheels() {
    PYTHONPATH=$WORK/site${PYTHONPATH:+:$PYTHONPATH}
    "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade \
        --target "$WORK/site" "$MPMP_WHEELS"/*.whl || give_up "the wheels in MPMP_WHEELS do not fit"
}

missing_modules() { # what has to be brought as wheels
    "$PYTHON" -c '
import importlib.util, sys
names = "torch numpy mpi4py safetensors pytest pytest_mpi pytest_timeout".split()
names += "tyro docstring_parser typeguard".split()  # tyro and what it needs
print(*[name for name in names if importlib.util.find_spec(name) is None])'
}

unpack_mpi() {
    mkdir -p "$WORK/mpi"
    tar -xzf "$MPMP_MPI_ARCHIVE" -C "$WORK/mpi" || give_up "MPMP_MPI_ARCHIVE cannot be unpacked"
    local mpirun prefix
    mpirun=$(find "$WORK/mpi" -path '*/bin/mpirun' -print -quit)
    [ -n "$mpirun" ] || give_up "MPMP_MPI_ARCHIVE holds no bin/mpirun"
    prefix=${mpirun%/bin/mpirun}
    export OPAL_PREFIX=$prefix PMIX_PREFIX=$prefix PRTE_PREFIX=$prefix
    export LD_LIBRARY_PATH=$prefix/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
    export MPI4PY_LIBMPI=$prefix/lib/libmpi.so.40
    export OMPI_MCA_pml=${OMPI_MCA_pml:-ob1}
    PATH=$prefix/bin:$PATH
}

find_libcuda() { # MPI opens libcuda.so.1 by name; torch may find it elsewhere
    ldconfig -p 2>/dev/null | grep -q 'libcuda\.so\.1' && return
    local folder
    for folder in /usr/local/nvidia/lib64 /usr/local/nvidia/lib /usr/lib64-nvidia /usr/lib/wsl/lib; do
        if [ -e "$folder/libcuda.so.1" ]; then
            export LD_LIBRARY_PATH=${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}$folder
            return
        fi
    done
}

PYTHON=$(choose_python) || give_up "no python here has a torch that sees a GPU; name one with MPMP_PYTHON"
# An environment that brings its own MPI has mpirun beside its python; an archive goes before it.
PATH=$(dirname "$PYTHON"):$PATH
[ -z "${MPMP_MPI_ARCHIVE:-}" ] || unpack_mpi
[ "$DRY" = 1 ] || find_libcuda
[ -z "${MPMP_WHEELS:-}" ] || add_wheels
export PATH PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 MPMP_GPU_DRY=$DRY
MISSING=$(missing_modules)
[ -z "$MISSING" ] || give_up "$PYTHON lacks: $MISSING; bring wheels in a folder named by MPMP_WHEELS"
command -v mpirun >/dev/null || give_up "no mpirun; name a CUDA-aware Open MPI with MPMP_MPI_ARCHIVE"
echo "python $PYTHON, mpirun $(command -v mpirun)"

ranks() { # ranks NAME LIMIT_S N ARGS...: python on N ranks
    local name=$1 limit=$2 n=$3
    shift 3
    section "$name" "$limit" mpirun -n "$n" "$PYTHON" "$@"
}

# --- what is done ---------------------------------------------------------------------------------

if [ "$DRY" = 1 ]; then
    DEVICE=cpu TESTED="2" SHARING="2" VERIFIED="2" LAYOUT=dp1.pp1.tp2 STEPS=3 DTYPE=float32 CHOSEN=(-k "float32 or kernels")
    TINY=(--model.layers 2 --model.heads 2 --model.width 16 --model.context 16)
    SHORT=(--train.eval-batches 1 --train.sample-tokens 0)
else
    DEVICE=cuda TESTED="1 2 4" SHARING="2 4" VERIFIED="2 4" LAYOUT=all STEPS=50 DTYPE=bfloat16 CHOSEN=() TINY=() SHORT=()
fi

tests() { # tests NAME LIMIT_S N ARGS...: pytest on N ranks
    local name=$1 limit=$2 n=$3
    shift 3
    ranks "$name" "$limit" "$n" -m pytest --with-mpi --color=no -q -p no:cacheprovider "$@"
}

# The tests come last, and straight transfers last among them: those may take the ranks down.
ranks figures 90 2 tests/gpu/measure.py
grep -E '^(- |\||Allreduce|$)' "$LAST" >"$WORK/figures.md"

for n in $VERIFIED; do
    ranks "verify on $n ranks" 90 "$n" -m mpmp.verify --layout $LAYOUT --train.device $DEVICE "${TINY[@]}"
    grep -E '^verify ' "$LAST" >>"$WORK/verified"
done

ranks "training on 2 ranks" 90 2 -m mpmp.train --parallel.tensor 2 --train.steps $STEPS \
    --train.device $DEVICE --train.dtype $DTYPE --checkpoint.dir "$WORK/run" "${TINY[@]}" "${SHORT[@]}"
tail -n 30 "$LAST" >"$WORK/trained"

WINDOWS=tests/gpu/test_device_windows.py
for n in $SHARING; do
    tests "windows on $n ranks" 150 "$n" $WINDOWS
done

for n in $TESTED; do
    tests "tests on $n ranks" 120 "$n" tests/gpu --ignore $WINDOWS "${CHOSEN[@]}"
done

{
    echo "# Figures from a GPU machine"
    echo
    echo "Written by tests/gpu/run.sh on $(date -u +%F), $(git describe --always --dirty 2>/dev/null || echo 'no git')."
    [ "$DRY" != 1 ] || echo "A dry run on the CPU: these are no figures of a GPU."
    echo
    cat "$WORK/figures.md"
    printf '\n## verify, worst errors\n\n```\n%s\n```\n' "$(cat "$WORK/verified")"
    printf '\n## Training, 2 ranks, tensor parallel, %s\n\n```\n%s\n```\n' "$DTYPE" "$(cat "$WORK/trained")"
    printf '\n## Sections\n\n%s\n' "$(cat "$RESULTS")"
} >"$FIGURES"
printf '\n%s s in all; figures in %s, log in %s\n' "$SECONDS" "$FIGURES" "$LOG"
if [ ${#FAILED[@]} -gt 0 ]; then
    printf 'failed: %s\n' "${FAILED[@]}"
    exit 1
fi
