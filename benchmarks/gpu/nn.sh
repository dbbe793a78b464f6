#!/usr/bin/env bash
# nn/ on a real GPU: built there against the machine's PyTorch, tested and measured.
#
#   benchmarks/gpu/nn.sh build       where nvcc and this project's packages are: the core, to be carried, in build/gpu/nn
#   benchmarks/gpu/nn.sh tests       where the GPU is, which needs the source tree, build/gpu/nn, PyTorch 2, CUDA's
#   benchmarks/gpu/nn.sh benchmark   toolkit, CMake and ninja. PYTHON names the Python that has PyTorch (python3).
#
# Results go to benchmarks/results/<date>/, or to the folder that OUTPUT names: gpu-nn*.
set -euo pipefail
cd "$(dirname "$0")/../.."
carried=build/gpu/nn
built="$carried/build"
python="${PYTHON:-python3}"
output="${OUTPUT:-benchmarks/results/$(date +%Y-%m-%d)}"

build() {
    tools/install-packages build test
    cmake --preset release --log-level=WARNING
    cmake --build build --parallel "$(nproc)" --target libdeeppcr.a
    mkdir -p "$carried"
    strip --strip-debug -o "$carried/libdeeppcr.a" build/libdeeppcr.a
    cp --dereference "$(ldconfig -p | awk '/libhwy.so.1 / { print $NF; exit }')" "$carried/"
    echo "built: $(du -sh "$carried" | cut -f1) in $carried"
}

# Against the machine's PyTorch: libdeeppcr_nn.so. What has been built is not built again.
build_against_pytorch() {
    local torch
    torch="$("$python" -c 'import torch; print(torch.utils.cmake_prefix_path)')/Torch"
    mkdir -p "$output"
    {
        cmake -S benchmarks/gpu/nn -B "$built" -G Ninja -DTorch_DIR="$torch"
        cmake --build "$built" --target deeppcr_torch_library
    } >"$output/gpu-nn-build.log" 2>&1 || {
        tail -n 40 "$output/gpu-nn-build.log" >&2
        return 1
    }
}

tests() {
    build_against_pytorch
    local version failed=0 status
    version="$("$python" -c 'import torch; print(torch.__version__)')"
    for test in nn_torch_library_test nn_gpu_test; do
        status=0
        "$python" "tests/$test.py" "$built/libdeeppcr_nn.so" "$version" >"$output/gpu-$test.log" 2>&1 || status=$?
        tail -n 1 "$output/gpu-$test.log"
        [ "$status" -eq 0 ] || failed=1  # also where it was skipped: there is nothing else to see here
    done
    return "$failed"
}

benchmark() {
    build_against_pytorch
    "$python" benchmarks/gpu/nn_benchmark.py "$built/libdeeppcr_nn.so" --json "$output/gpu-nn.json" |
        tee "$output/gpu-nn.md"
}

case "${1:-}" in
build | tests | benchmark)
    "$1"
    ;;
*)
    sed -n '2,9p' "$0" | cut -c3-
    exit 1
    ;;
esac
