#!/usr/bin/env bash
# The kernels on a real GPU: tested, checked and measured.
#
#   benchmarks/gpu.sh build            where nvcc and this project's packages are: builds the programs in build/gpu
#   benchmarks/gpu.sh run [part ...]   where the GPU is (build/gpu, carried there, needs only a driver): parts are tests,
#                                      sanitizer (needs compute-sanitizer), benchmark and map; all of them in about 8
#                                      minutes
#
# Results go to benchmarks/results/<date>/, or to the folder that OUTPUT names: gpu-*.json, gpu-*.md and gpu-*.log.
set -euo pipefail
cd "$(dirname "$0")/.."
programs=build/gpu

build() {
    tools/install-packages build test
    cmake --preset release --log-level=WARNING -DDEEPPCR_BUILD_TESTS=ON
    cmake --build build --parallel "$(nproc)" --target gpu_benchmark gpu_bidiagonal_test gpu_cell_test
    # Highway is the one library that has no static form in Debian.
    cp --dereference "$(ldd "$programs/gpu_benchmark" | awk '/libhwy.so.1/ { print $3 }')" "$programs/"
    echo "built: $(du -sh "$programs" | cut -f1) in $programs"
}

tests() {
    "$programs/gpu_cell_test" 2>&1 | tee "$output/gpu-cell-test.log" | tail -n 3
    "$programs/gpu_bidiagonal_test" 2>&1 | tee "$output/gpu-bidiagonal-test.log" | tail -n 3
}

sanitizer() {
    if ! command -v compute-sanitizer >/dev/null; then
        echo "sanitizer: there is no compute-sanitizer here" >&2
        return 1
    fi
    for tool in memcheck racecheck synccheck; do
        compute-sanitizer --tool "$tool" --error-exitcode 9 "$programs/gpu_cell_test" \
            --gtest_filter='CellOnGpu/1.*' 2>&1 | tee "$output/gpu-$tool-cells.log" | tail -n 2
        compute-sanitizer --tool "$tool" --error-exitcode 9 "$programs/gpu_bidiagonal_test" \
            --gtest_filter='*/0.*OnAGpu:*/0.InPlace*:*/0.Split*' 2>&1 | tee "$output/gpu-$tool-bidiagonal.log" | tail -n 2
    done
}

benchmark() {
    "$programs/gpu_benchmark" machine bidiagonal cells backward --json "$output/gpu.json" | tee "$output/gpu.md"
}

map() {
    "$programs/gpu_benchmark" machine map --json "$output/gpu-map.json" | tee "$output/gpu-map.md"
}

case "${1:-}" in
build)
    build
    ;;
run)
    shift
    output="${OUTPUT:-benchmarks/results/$(date +%Y-%m-%d)}"
    mkdir -p "$output"
    failed=()
    for part in ${@:-tests sanitizer benchmark map}; do
        case "$part" in
        tests | sanitizer | benchmark | map)
            echo "== $part"
            "$part" || failed+=("$part")
            ;;
        *)
            echo "gpu.sh: parts are tests, sanitizer, benchmark and map, not $part" >&2
            exit 1
            ;;
        esac
    done
    [ ${#failed[@]} -eq 0 ] || { echo "gpu.sh: failed: ${failed[*]}" >&2; exit 1; }
    ;;
*)
    sed -n '2,9p' "$0" | cut -c3-
    exit 1
    ;;
esac
