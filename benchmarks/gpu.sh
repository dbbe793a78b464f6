#!/usr/bin/env bash
# The kernels on a real GPU: tested, checked and measured.
#
#   benchmarks/gpu.sh build
#       where nvcc and this project's packages are: builds the programs in build/gpu, for GPUS (default 90-real)
#   benchmarks/gpu.sh run [part ...] [--out FOLDER] [--pararnn CHECKOUT] [--profile]
#       where the GPU is, with this tree and build/gpu carried there: it needs a driver, for some parts what is named
#       here. Parts:
#           tests      the tests of kernels
#           sanitizer  a share of them under compute-sanitizer: memcheck, racecheck, synccheck
#           measure    what is to be known first: copy, functions of the hardware, CUB's scan, the sequential cell
#           solves, cells, map, chains     see benchmarks/gpu/*.cu; chains wants cuBLAS, of a toolkit or of PyTorch
#           nn         nn/ built there against python3's PyTorch 2 (with nvcc, CMake and ninja), tested
#           layers, sampling    the layers of nn/, and sampling by it, against sequential ones; after nn
#           torch      against PyTorch, Triton and JAX, where python3 has them, through nn/ where that is built; with
#                      --pararnn against a checkout of apple/ml-pararnn, which is built in a copy where it is not yet
#           all        every one of them (the default)
#       Each part ends within 8 minutes. --profile: after solves and cells, ncu's view of the first call of each kernel.
#
# Results go to FOLDER, by default benchmarks/results/<date>/: gpu.md has everything in tables, that of earlier runs into
# this folder too, gpu-*.json and gpu-*.log what it comes from. What fails is named there and at the end, the rest still
# runs, and the exit code is 1.
cd "$(dirname "$0")/.." || exit 1
programs="${DEEPPCR_GPU_PROGRAMS:-build/gpu}"
most_megabytes=60
part_seconds="${PART_SECONDS:-460}"

build() {
    set -euo pipefail
    tools/install-packages build test
    local tree=build/gpu-tree
    cmake -S . -B "$tree" -G Ninja --log-level=WARNING -DCMAKE_BUILD_TYPE=Release -DDEEPPCR_BUILD_NN=OFF \
        -DDEEPPCR_BUILD_CLI=OFF -DDEEPPCR_BUILD_EXAMPLES=OFF -DDEEPPCR_BUILD_MPI=OFF -DDEEPPCR_BUILD_TESTS=ON \
        -DBUILD_SHARED_LIBS=ON -DCMAKE_CUDA_ARCHITECTURES="${GPUS:-90-real}"
    cmake --build "$tree" --parallel "${JOBS:-$(nproc)}" --target gpu_programs
    rm -rf "$programs"
    mkdir -p "$programs"
    find "$tree/benchmarks/gpu" -maxdepth 1 -type f \( -name 'gpu_*' -o -name '*.so' \) -exec cp {} "$programs" \;
    ldd "$tree/benchmarks/gpu/gpu_benchmark" | awk '/libhwy|libcudart|libdeeppcr|libstdc|libgcc_s/ { print $3 }' |
        xargs cp --dereference --target-directory="$programs"
    strip "$programs"/*
    local megabytes
    megabytes="$(du -sm "$programs" | cut -f1)"
    echo "built: $megabytes MiB in $programs"
    if [ "$megabytes" -gt "$most_megabytes" ]; then
        echo "gpu.sh: $programs is larger than $most_megabytes MiB: too large to be carried" >&2
        return 1
    fi
}

# attempt NAME SECONDS COMMAND...   runs it, within the part's time; its output goes to gpu-NAME.log
attempt() {
    local name="$1" limit="$2" begin="$SECONDS" left=$((part_ends - SECONDS)) status outcome
    shift 2
    [ "$limit" -le "$left" ] || limit="$left"
    if [ "$limit" -lt 1 ]; then
        status=124
        outcome="not run: no time left"
    else
        timeout --kill-after=10 "$limit" "$@" >"$output/gpu-$name.log" 2>&1
        status=$?
        case "$status" in
        0) outcome=passed ;;
        77) outcome=skipped status=0 ;;
        124 | 137) outcome="stopped after $limit s" ;;
        *) outcome="exit code $status" ;;
        esac
        tail -n 3 "$output/gpu-$name.log"
    fi
    note "$name" "$outcome" "$status" $((SECONDS - begin))
}

# note NAME OUTCOME STATUS SECONDS
note() {
    echo "-- $1: $2"
    echo "| $1 | $2 | $4 |" >>"$output/gpu-commands.md"
    [ "$3" -eq 0 ] || failed+=("$1: $2")
}

test_programs() { find "$programs" -maxdepth 1 -name 'gpu_*_test' | sort; }

tests() {
    local any=0 program
    for program in $(test_programs); do
        any=1
        attempt "$(basename "$program")" 200 "$program"
    done
    [ "$any" -eq 1 ] || note tests "there are none in $programs" 1 0
}

sanitizer() {
    if ! command -v compute-sanitizer >/dev/null; then
        note sanitizer "there is no compute-sanitizer here" 1 0
        return
    fi
    local tools=(memcheck racecheck synccheck) all left program tool
    mapfile -t all < <(test_programs)
    left=$((${#all[@]} * ${#tools[@]}))
    for program in "${all[@]}"; do
        for tool in "${tools[@]}"; do
            attempt "$tool-$(basename "$program")" $(((part_ends - SECONDS) / left)) \
                env GTEST_TOTAL_SHARDS=8 GTEST_SHARD_INDEX=0 \
                compute-sanitizer --tool "$tool" --error-exitcode 9 "$program"
            left=$((left - 1))
        done
    done
}

benchmark() { attempt "$1" "$part_seconds" "$programs/gpu_benchmark" "$1" --json "$output/gpu-$1.json"; }

profile() {
    attempt "profile-$1" 240 ncu --clock-control none --section SpeedOfLight --section Occupancy \
        --section WarpStateStats --section MemoryWorkloadAnalysis \
        --kernel-name-base demangled --kernel-id '::regex:deeppcr:1' \
        --csv --page raw --log-file "$output/gpu-profile-$1.csv" "$programs/gpu_benchmark" "$1"
}

measure() { benchmark first; }
solves() {
    benchmark solves
    [ -z "$profile" ] || profile solves
}
cells() {
    benchmark cells
    [ -z "$profile" ] || profile cells
}
map() { benchmark map; }
chains() { benchmark chains; }

nn_library="${DEEPPCR_GPU_NN:-build/gpu-nn/libdeeppcr_nn.so}"
nn() {
    local script version
    version="$(python3 -c 'import torch; print(torch.__version__)' 2>/dev/null)" || {
        note nn "python3 has no torch here" 1 0
        return
    }
    rm -f "$nn_library" # or a failing build would leave that of another version to be measured
    attempt nn-configure 60 sh -c "cmake -S benchmarks/gpu/nn -B '$(dirname "$nn_library")' -G Ninja \
        -DDEEPPCR_CARRIED='$(realpath "$programs")' \
        -DTorch_DIR=\"\$(python3 -c 'import torch; print(torch.utils.cmake_prefix_path)')/Torch\""
    attempt nn-build 250 cmake --build "$(dirname "$nn_library")" --target deeppcr_torch_library
    for script in nn_torch_library_test nn_samplers_test nn_gpu_test; do
        attempt "$script" 100 python3 "tests/$script.py" "$nn_library" "$version"
    done
}
with_nn() {
    if [ -f "$nn_library" ]; then
        attempt "$1" "$part_seconds" python3 "benchmarks/gpu/$1.py" "$nn_library" --json "$output/$2.json"
    else
        note "$1" "there is no $nn_library: part nn builds it" 1 0
    fi
}
layers() { with_nn nn_benchmark gpu-nn; }
sampling() { with_nn sampling_benchmark gpu-sampling; }

torch() {
    local more=()
    [ ! -f "$nn_library" ] || more+=(--nn "$nn_library")
    local copy=""
    if [ -n "$pararnn" ] && compgen -G "$pararnn/*parallel_reduce_cuda*.so" >/dev/null; then
        more+=(--pararnn "$pararnn")
    elif [ -n "$pararnn" ]; then
        copy="$(mktemp -d)"
        attempt pararnn-build 240 sh -c "cp -R '$pararnn/.' '$copy' && cd '$copy' &&
            TORCH_CUDA_ARCH_LIST=\$(python3 -c 'import torch; print(\"%d.%d\" % torch.cuda.get_device_capability())') \
            MAX_JOBS=16 python3 setup.py build_ext --inplace"
        more+=(--pararnn "$copy")
    fi
    attempt torch 300 python3 benchmarks/gpu/compare_torch.py --library "$programs/libdeeppcr_gpu.so" \
        --json "$output/gpu-torch.json" "${more[@]}"
    [ -z "$copy" ] || rm -rf "$copy"
}

# Where PyTorch keeps its cuBLAS, for a machine without a toolkit's.
cublas_folders() {
    python3 -c 'import glob, os, nvidia
print(":".join(sorted({os.path.dirname(f) for p in nvidia.__path__
                       for f in glob.glob(p + "/**/libcublas.so*", recursive=True)})))' 2>/dev/null
}

report() {
    local file="$output/gpu.md" json=() part
    for part in first solves cells map chains torch; do
        [ -f "$output/gpu-$part.json" ] && json+=("$output/gpu-$part.json")
    done
    {
        echo "# On a GPU, $(date +%Y-%m-%d)"
        echo
        echo "$gpu. $(nvidia-smi --query-gpu=driver_version,memory.total --format=csv,noheader 2>/dev/null | head -n 1)."
        echo "Command: \`benchmarks/gpu.sh run $arguments\`. Version: $(git describe --always --dirty 2>/dev/null)."
        echo
        printf '| command | outcome | seconds |\n| --- | --- | --- |\n'
        cat "$output/gpu-commands.md"
        echo
        if [ ${#json[@]} -gt 0 ]; then "$programs/gpu_benchmark" table "${json[@]}"; fi
        if [ -f "$output/gpu-nn.json" ]; then
            printf '\n## Layers of nn/\n\n'
            cat "$output/gpu-nn_benchmark.log"
        fi
        if [ -f "$output/gpu-sampling.json" ]; then
            printf '\n## Diffusion sampling\n\n'
            cat "$output/gpu-sampling_benchmark.log"
        fi
    } >"$file" || failed+=("report: $file could not be written")
    echo "gpu.sh: $file"
}

run() {
    set -uo pipefail # not -e: what fails is noted, and the next command runs
    local all=(tests sanitizer measure solves cells map chains nn layers sampling torch) parts=() part
    arguments="$*"
    output="benchmarks/results/$(date +%Y-%m-%d)" pararnn="" profile=""
    failed=()
    while [ $# -gt 0 ]; do
        case "$1" in
        all) parts+=("${all[@]}") ;;
        --profile) profile=yes ;;
        --out | --pararnn)
            [ $# -ge 2 ] || usage "$1 names a folder"
            if [ "$1" = --out ]; then output="$2"; else pararnn="$2"; fi
            shift
            ;;
        *)
            [[ " ${all[*]} " == *" $1 "* ]] || usage "there is no part $1"
            parts+=("$1")
            ;;
        esac
        shift
    done
    [ ${#parts[@]} -gt 0 ] || parts=("${all[@]}")
    if ! gpu="$("$programs/gpu_benchmark" gpu 2>&1)"; then
        echo "gpu.sh: $gpu" >&2
        exit 1
    fi
    mkdir -p "$output" || exit 1
    LD_LIBRARY_PATH="${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}$(cublas_folders)"
    export LD_LIBRARY_PATH
    for part in "${parts[@]}"; do
        echo "== $part"
        part_ends=$((SECONDS + part_seconds))
        "$part"
    done
    report
    if [ ${#failed[@]} -gt 0 ]; then
        printf 'gpu.sh: failed: %s\n' "${failed[@]}" >&2
        exit 1
    fi
}

usage() {
    [ $# -eq 0 ] || echo "gpu.sh: $1" >&2
    sed -n '2,/^cd /p' "$0" | grep '^#' | cut -c3- >&2
    exit 1
}

case "${1:-}" in
build) build ;;
run)
    shift
    run "$@"
    ;;
*) usage ;;
esac
