# What a fresh Debian 12 machine needs, in one word each. `cmake --list-presets` has the finer choices.
#   make build      install what is missing of packages.txt, configure, build; leaves build/deeppcr
#   make reproduce  the same, then `build/deeppcr reproduce`; ARGUMENTS="mlp --json" is passed on
#   make test       the same set-up and the test packages, then every test; with CI=true warnings are errors
#   make benchmarks builds the programs build/benchmarks/*
#   make format     lets clang-format rewrite the sources
#   make tidy       clang-tidy over nn/ too, which takes minutes
#   make clean      removes build/

# As many jobs as there are processors, and as fit into memory: a file that includes LibTorch takes 1.5 GB to compile.
JOBS ?= $(shell awk -v processors="$$(nproc)" '/^MemAvailable/ { fit = int($$2 / 1500000); \
          print fit < 1 ? 1 : fit < processors ? fit : processors }' /proc/meminfo)
WARNINGS_AS_ERRORS := $(if $(filter true 1,$(CI)),ON,OFF)
CONFIGURE := cmake --preset release --log-level=WARNING -DDEEPPCR_WARNINGS_AS_ERRORS=$(WARNINGS_AS_ERRORS)
BUILD := cmake --build build --parallel $(JOBS)

.PHONY: build reproduce test benchmarks format tidy clean
.NOTPARALLEL:

build:
	@tools/install-packages build
	@$(CONFIGURE) -DDEEPPCR_BUILD_TESTS=OFF -DDEEPPCR_BUILD_EXAMPLES=OFF -DDEEPPCR_BUILD_BENCHMARKS=OFF
	@$(BUILD)

reproduce: build
	build/deeppcr reproduce $(ARGUMENTS)

test:
	@tools/install-packages build test
	@$(CONFIGURE) -DDEEPPCR_BUILD_TESTS=ON -DDEEPPCR_BUILD_EXAMPLES=ON -DDEEPPCR_TEST_WHOLE_TREE=ON \
	    -DCMAKE_CUDA_ARCHITECTURES=90-real
	@$(BUILD)
	ctest --test-dir build --output-on-failure --no-tests=error --parallel $(JOBS)

benchmarks:
	@tools/install-packages build benchmarks
	@$(CONFIGURE) -DDEEPPCR_BUILD_BENCHMARKS=ON
	@$(BUILD)

format:
	@tools/install-packages test
	git ls-files '*.cpp' '*.hpp' '*.cu' '*.cuh' | xargs clang-format-14 -i

tidy:
	@tools/install-packages build test
	@$(CONFIGURE) -DDEEPPCR_BUILD_TESTS=OFF -DDEEPPCR_BUILD_EXAMPLES=OFF -DDEEPPCR_BUILD_BENCHMARKS=OFF
	sed -n 's/^ *"file": "\(.*\)",\{0,1\}$$/\1/p' build/compile_commands.json | grep -v '\.cu$$' | \
	    xargs --max-args=1 --max-procs=$(JOBS) clang-tidy-14 --config-file=.clang-tidy -p build --quiet

clean:
	rm -rf build
