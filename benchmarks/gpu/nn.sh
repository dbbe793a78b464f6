#!/usr/bin/env bash
# nn/ on a real GPU: built there against the machine's PyTorch, and tested.
#
#   benchmarks/gpu/nn.sh build   where nvcc and this project's packages are: the core, to be carried, in build/gpu/nn
#   benchmarks/gpu/nn.sh run     where the GPU is, which needs the source tree, build/gpu/nn, PyTorch 2, CUDA's toolkit,
#                                CMake and ninja: builds nn/ (PYTHON names the Python that has PyTorch; python3) and runs
#                                its tests
#
# The results go to benchmarks/results/<date>/, or to the folder that OUTPUT names: gpu-nn-*.log.
set -euo pipefail
cd "$(dirname "$0")/../.."
carried=build/gpu/nn

build() {
    tools/install-packages build test
    cmake --preset release --log-level=WARNING
    cmake --build build --parallel "$(nproc)" --target libdeeppcr.a
    mkdir -p "$carried"
    # Debug information would be most of what is carried.
    strip --strip-debug -o "$carried/libdeeppcr.a" build/libdeeppcr.a
    cp --dereference "$(ldconfig -p | awk '/libhwy.so.1 / { print $NF; exit }')" "$carried/"
    echo "built: $(du -sh "$carried" | cut -f1) in $carried"
}

run() {
    local python="${PYTHON:-python3}" built="$carried/build" torch
    output="${OUTPUT:-benchmarks/results/$(date +%Y-%m-%d)}"
    mkdir -p "$output"
    torch="$("$python" -c 'import torch; print(torch.utils.cmake_prefix_path)')/Torch"
    {
        cmake -S benchmarks/gpu/nn -B "$built" -G Ninja -DTorch_DIR="$torch"
        cmake --build "$built" --target deeppcr_torch_library
    } >"$output/gpu-nn-build.log" 2>&1 || { tail -n 40 "$output/gpu-nn-build.log" >&2; return 1; }
    local failed=0 version
    version="$("$python" -c 'import torch; print(torch.__version__)')"
    for test in nn_torch_library_test nn_gpu_test; do
        "$python" "tests/$test.py" "$built/libdeeppcr_nn.so" "$version" >"$output/gpu-${test//_/-}.log" 2>&1 || failed=1
        tail -n 1 "$output/gpu-${test//_/-}.log"
    done
    return "$failed"
}

case "${1:-}" in
build | run)
    "$1"
    ;;
*)
    sed -n '2,9p' "$0" | cut -c3-
    exit 1
    ;;
esac
