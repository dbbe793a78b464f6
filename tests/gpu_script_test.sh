#!/usr/bin/env bash
# benchmarks/gpu.sh with programs that stand for the real ones: what fails is reported, the rest still runs, results are
# whole. gpu_script_test.sh SCRIPT BENCHMARK: the script, and gpu_benchmark compiled over the emulation.
set -euo pipefail
script="$(realpath "$1")" benchmark="$(realpath "$2")"
here="$(mktemp -d)"
trap 'rm -rf "$here"' EXIT
mkdir "$here/programs" "$here/path"
export DEEPPCR_GPU_PROGRAMS="$here/programs" DEEPPCR_GPU_NN="$here/libdeeppcr_nn.so" PATH="$here/path:$PATH"

stand_in() { # FILE LINES
    printf '#!/usr/bin/env bash\n%s\n' "$2" >"$1"
    chmod +x "$1"
}
expect() { # WHAT TEXT FILE
    grep -qF -- "$2" "$3" || { echo "FAILED: $1: no '$2' in"; cat "$3"; exit 1; }
}
expect_not() {
    ! grep -qF -- "$2" "$3" || { echo "FAILED: $1: '$2' in"; cat "$3"; exit 1; }
}
run() { # EXIT-CODE ARGUMENTS...
    local expected="$1" status=0
    shift
    "$script" run "$@" --out "$here/out" >"$here/said" 2>&1 || status=$?
    [ "$status" -eq "$expected" ] || { echo "FAILED: run $*: exit code $status, not $expected"; cat "$here/said"; exit 1; }
}

stand_in "$here/programs/gpu_benchmark" "case \$1 in table | gpu) tiny=;; *) tiny=--tiny ;; esac
exec '$benchmark' \"\$@\" \$tiny"
stand_in "$here/programs/gpu_first_test" 'echo all well'
stand_in "$here/programs/gpu_second_test" 'echo nothing well; exit 3'
stand_in "$here/programs/gpu_third_test" 'echo well again'
stand_in "$here/path/python3" 'exit 5'
stand_in "$here/path/nvidia-smi" 'echo "580.1, 143771 MiB"'

# A test that fails: named with its exit code; those before and after it run.
run 1 tests
for said in '| gpu_first_test | passed |' '| gpu_second_test | exit code 3 |' '| gpu_third_test | passed |' \
    'emulated GPU 0. 580.1, 143771 MiB.'; do
    expect "tests" "$said" "$here/out/gpu.md"
done
expect "tests" 'failed: gpu_second_test: exit code 3' "$here/said"
expect "tests" 'nothing well' "$here/out/gpu-gpu_second_test.log"
expect "the table without measurements" '| one row of 2^28, float | | | | copy of the same bytes | | 0.85x | not run | |' \
    <("$here/programs/gpu_benchmark" table)

# Without failures the exit code is 0. Sanitizers that find nothing, and one that does.
rm "$here/programs/gpu_second_test"
run 0 tests
stand_in "$here/path/compute-sanitizer" 'shift; [ $1 = racecheck ] && { echo a race; exit 9; }; exec "${@: -1}"'
run 1 sanitizer
expect "sanitizer" '| memcheck-gpu_first_test | passed |' "$here/out/gpu.md"
expect "sanitizer" '| racecheck-gpu_first_test | exit code 9 |' "$here/out/gpu.md"
expect "sanitizer" '| synccheck-gpu_third_test | passed |' "$here/out/gpu.md"

# Measurements over the emulation, after a part that fails: whole, and never counted as those of a GPU.
run 1 torch measure solves cells map chains
expect "torch" '| torch | exit code 5 |' "$here/out/gpu.md"
for part in first solves cells map chains; do
    expect "$part" "| $part | passed |" "$here/out/gpu.md"
    expect "$part" '"tiny": true' "$here/out/gpu-$part.json"
done
expect "the table" '| tiny sizes |' "$here/out/gpu.md"
expect_not "the table" '| yes |' "$here/out/gpu.md"
expect_not "the table" '| no |' "$here/out/gpu.md"
expect "the table" "| ParaGRU forward | | | | Apple's fused kernel | | 6x | not run | |" "$here/out/gpu.md"

# What needs nn/, without it and with it.
run 1 layers sampling
for part in nn_benchmark sampling_benchmark; do
    expect "$part" "| $part | there is no $here/libdeeppcr_nn.so: part nn builds it |" "$here/out/gpu.md"
done
touch "$here/libdeeppcr_nn.so"
stand_in "$here/path/python3" '[[ $1 = */nn_benchmark.py && $2 = */libdeeppcr_nn.so ]] || exit 5
echo all layers; echo "[]" >"$4"'
run 1 layers sampling
expect "layers" 'all layers' "$here/out/gpu.md"
expect "layers" '| nn_benchmark | passed |' "$here/out/gpu.md"
expect "sampling" '| sampling_benchmark | exit code 5 |' "$here/out/gpu.md"

expect "earlier runs" '| gpu_second_test | exit code 3 |' "$here/out/gpu.md"

# A benchmark that fails half-way leaves what it has; one that hangs is stopped.
stand_in "$here/programs/gpu_benchmark" "case \$1 in
solves) '$benchmark' \"\$@\" --tiny; exit 1 ;;
cells) sleep 60 ;;
*) exec '$benchmark' \"\$@\" ;;
esac"
rm -r "$here/out"
run 1 solves
expect "a failing benchmark" '| solves | exit code 1 |' "$here/out/gpu.md"
expect "a failing benchmark" '| blocks of 2 |' "$here/out/gpu.md"
PART_SECONDS=3 run 1 cells
expect "a hanging benchmark" '| cells | stopped after 3 s |' "$here/out/gpu.md"

# No GPU: nothing runs.
stand_in "$here/programs/gpu_benchmark" 'echo "gpu_benchmark: no CUDA-capable device is detected" >&2; exit 1'
rm -r "$here/out"
run 1 all
expect "no GPU" 'no CUDA-capable device is detected' "$here/said"
[ ! -e "$here/out" ] || { echo "FAILED: no GPU: there are results"; exit 1; }
run 1 tests everything
expect "an unknown part" 'there is no part everything' "$here/said"
echo "gpu.sh: all well"
