# Tests of the tree as a whole: the core's tests under sanitizers, the file readers under a fuzzer, projects that use the
# library, and the style checks. They are ctest tests like all others, so that one run and one summary cover everything.
include(ProcessorCount)
ProcessorCount(processors)

# A build tree of its own as a fixture of the tests that run programs from it. COST: begins first, for it takes long.
function(add_build_tree name)
  add_test(NAME ${name}.build WORKING_DIRECTORY "${PROJECT_SOURCE_DIR}"
           COMMAND sh -c "cmake=\"$0\" tree=\"$1\"; shift; \"$cmake\" -B \"$tree\" \"$@\" && \"$cmake\" --build \"$tree\""
                   "${CMAKE_COMMAND}" "${PROJECT_BINARY_DIR}/${name}" ${ARGN})
  set_tests_properties(${name}.build PROPERTIES FIXTURES_SETUP ${name} LABELS ${name} TIMEOUT 1800
                                                PROCESSORS ${processors} COST 1000)
endfunction()

# The core's and files' tests under the sanitizers. Three threads, on small machines too: one alone cannot race. Races do
# not depend on the type, so ThreadSanitizer leaves out the second type of each typed suite, double, and two of the five
# cells; nor does accuracy. What holds for every float is counted without them, and so are the tables and statistics of
# hard dynamics, which run the same code as its other tests: it would take hours, or minutes; and of sLSTM on processors,
# by far the slowest cell here, what its random problems run too. Nor is here what is chosen by how long the kernels'
# emulation takes. Of kernels, whose fibers are slow, float alone, of the diagonal Elman cell none, which has as many
# states as ParaGRU, of sLSTM one type of numbers, of tensor cores what else uses them, and nothing is computed twice to
# compare the bits.
set(statistics "*OverAllFloats*:*EveryRow*:*FrozenPrefix*:*DampingAndAnderson*:*ErrorOfAThousand*:*AccuracyOf*:*FasterByFar*")
set(asan_filter "-CellTest/3.OverlapAndShooting*:CellTest/3.ReversedInTime:${statistics}")
set(emulated_filter
    "-*/1.*:CellOnGpu/2.*:CellOnGpu/3.*InEveryType*:CellOnGpu/*.TheSameBits*:*TheSameBitsWhateverTheOrder*:*AsDocumented:*TensorCoresSolve*:${statistics}")
set(tsan_filter "-*/1.*:CellTest/2.*:CellTest/3.*:*Accurate*:*Derivative*:${statistics}")
foreach(sanitizer IN ITEMS asan tsan)
  add_build_tree(${sanitizer} --preset ${sanitizer})
  foreach(name IN LISTS core_tests)
    set(filter ${${sanitizer}_filter})
    if(name MATCHES "^emulated_")
      if(sanitizer STREQUAL "tsan")  # one thread, whose fibers ThreadSanitizer would take for several
        continue()
      endif()
      set(filter ${emulated_filter})
    endif()
    add_test(NAME ${sanitizer}.${name}
             COMMAND ${without_address_randomisation} "${PROJECT_BINARY_DIR}/${sanitizer}/tests/${name}"
                     --gtest_filter=${filter})
    set_tests_properties(${sanitizer}.${name} PROPERTIES FIXTURES_REQUIRED ${sanitizer} LABELS ${sanitizer} TIMEOUT 900
                         ENVIRONMENT "DEEPPCR_THREADS=3;UBSAN_OPTIONS=print_stacktrace=1;TSAN_OPTIONS=halt_on_error=1;RC_PARAMS=seed=1 max_success=100")
  endforeach()
endforeach()

# The file readers, fuzzed for some seconds each.
add_build_tree(fuzz -S tests/fuzz -G Ninja -DCMAKE_CXX_COMPILER=clang++-14)
file(GLOB fuzzers CONFIGURE_DEPENDS RELATIVE "${CMAKE_CURRENT_SOURCE_DIR}/fuzz" fuzz/*_fuzz.cpp)
foreach(source IN LISTS fuzzers)
  string(REGEX REPLACE "_fuzz\\.cpp$" "" format "${source}")
  add_test(NAME fuzz.${format}
           COMMAND ${without_address_randomisation} "${CMAKE_CTEST_COMMAND}" --test-dir "${PROJECT_BINARY_DIR}/fuzz"
                   --output-on-failure --no-tests=error --tests-regex "^fuzz\\.${format}$")
  set_tests_properties(fuzz.${format} PROPERTIES FIXTURES_REQUIRED fuzz LABELS fuzz TIMEOUT 600)
endforeach()

# Consumers: once with the installed package, once with add_subdirectory.
set(prefix "${PROJECT_BINARY_DIR}/consumer/prefix")
add_test(NAME consumer.install COMMAND "${CMAKE_COMMAND}" --install "${PROJECT_BINARY_DIR}" --prefix "${prefix}")
set_tests_properties(consumer.install PROPERTIES FIXTURES_SETUP installed LABELS consumer TIMEOUT 120)
function(add_consumer name)
  add_test(NAME consumer.${name}
           COMMAND "${CMAKE_CTEST_COMMAND}" --build-and-test "${CMAKE_CURRENT_SOURCE_DIR}/consumer"
                   "${PROJECT_BINARY_DIR}/consumer/${name}" --build-generator Ninja --build-noclean
                   --build-options -DCMAKE_CXX_COMPILER=${CMAKE_CXX_COMPILER} -DCMAKE_BUILD_TYPE=None
                   -DCMAKE_CXX_FLAGS=-DHWY_COMPILE_ONLY_STATIC ${ARGN}
                   --test-command consumer)
  set_tests_properties(consumer.${name} PROPERTIES LABELS consumer TIMEOUT 600)
endfunction()
add_consumer(find_package "-DCMAKE_PREFIX_PATH=${prefix}")
set_tests_properties(consumer.find_package PROPERTIES FIXTURES_REQUIRED installed)
add_consumer(add_subdirectory "-DDEEPPCR_SOURCE=${PROJECT_SOURCE_DIR}")

# What kernels take of a GPU, as the assembler says: registers of the hot ones, and none spills but those named.
if(DEEPPCR_BUILD_CUDA)
  set_target_properties(deeppcr PROPERTIES
                        RULE_LAUNCH_COMPILE "${CMAKE_CURRENT_SOURCE_DIR}/keep_assembler_report.sh <OBJECT>")
  target_compile_options(deeppcr PRIVATE "$<$<COMPILE_LANGUAGE:CUDA>:-Xptxas=-v>")
  function(add_resource_test name)
    cmake_parse_arguments(PARSE_ARGV 1 test "" "" "SOURCES;REGISTERS;SPILLS")
    list(TRANSFORM test_SOURCES REPLACE "(.+)" "${PROJECT_BINARY_DIR}/CMakeFiles/deeppcr.dir/src/\\1.o.report")
    add_test(NAME cuda.${name}
             COMMAND "${CMAKE_COMMAND}" "-DREPORTS=${test_SOURCES}" "-DREGISTERS=${test_REGISTERS}" "-DSPILLS=${test_SPILLS}"
                     -P "${CMAKE_CURRENT_SOURCE_DIR}/kernel_resources.cmake")
    set_tests_properties(cuda.${name} PROPERTIES LABELS cuda TIMEOUT 600)
  endfunction()
  add_resource_test(cells SOURCES recurrence/cells_cuda.cu SPILLS "advance_kernel.*8ParaLSTMEd=8" REGISTERS
                    "shoot_tiles_kernel.*(ParaGRU|ParaLSTM)Ef=64" "shoot_tiles_kernel.*(Diagonal|Para).*E(f|NS.*)Lb1=80"
                    "[0-9](advance|multiply|repair)_kernel.*(Diagonal|Para).*E(f|NS.*)Lb1=128"
                    "[0-9](backward|correct)_kernel.*(Diagonal|GRU).*E(f|NS.*)Lb1=128"
                    "[0-9](backward|correct)_kernel.*ParaLSTMEf=128" "[0-9](backward|correct)_kernel.*ParaLSTMENS.*Lb1=168"
                    "[0-9](advance|repair)_kernel.*SLSTM.*E(f|NS.*)Lb1=136")
  add_resource_test(dense_cells SOURCES recurrence/dense_cells_cuda.cu
                    SPILLS "RepairI[fd]Li4E.*LayoutILi32E=124" "linearise_statesIfLi4E.*LayoutILi(8|16)E=24"
                    REGISTERS "linearise_statesIf=128" "advance.*(Forward|Backward)I[fd]=252" "RepairIfLi[13]E=128" "RepairIfLi4E=160")
  add_resource_test(dense_chain SOURCES recurrence/dense_chain_cuda.cu
                    SPILLS "RepairIf.*LayoutILi(8|16)E.*ELi1EEE=8" "ForwardIf.*LayoutILi(8|16)E.*ELi4EEE=8"
                    REGISTERS "advance.*(Forward|Backward)If.*LayoutILi4E.*ELi1EEE=64"
                    "advance.*(Forward|Backward)If.*LayoutILi16E.*ELi1EEE=128" "advance.*ForwardIf.*LayoutILi8E.*ELi1EEE=128"
                    "advance.*(Forward|Repair|Backward)If.*LayoutILi32E=128" "linearise_layersIf=84" "add_outer_productsIf=64")
  add_resource_test(newton SOURCES newton/newton_cuda.cu newton/fused_cuda.cu newton/overlap_cuda.cu newton/update_cuda.cu
                    REGISTERS "(test|settle|advance)_=64" "collect=32" "(update|measure)_rows=40")
  add_resource_test(bidiagonal SOURCES reduce/scan_tiles_cuda.cu reduce/reduce_cuda.cu
                    REGISTERS "scan_tileI(f|N)=128" "substitute_rowsIf=64" "substitute_rows=110")
  add_resource_test(bidiagonal_dense SOURCES reduce/scan_dense_cuda.cu
                    SPILLS "summarise_smallId.*Li32E=8" "summarise_smallId.*Li16E=48" "summarise_smallIf.*Li32E=40"
                    REGISTERS "(summarise|substitute)_smallI(f|N)=220" "run_large.*TensorCoresE[12]E=160" "run_largeI(f|N)=220")
  if(DEEPPCR_BUILD_NCCL)
    set(nccl distribute/nccl.cu)
  endif()
  add_resource_test(others SOURCES recurrence/diagonal_cuda.cu recurrence/gather_cuda.cu ${nccl} REGISTERS "I[fd]=32")
endif()

# Style: clang-format over everything, clang-tidy over what does not include LibTorch (`make tidy` does that too).
find_program(CLANG_FORMAT clang-format-14 REQUIRED)
find_program(CLANG_TIDY clang-tidy-14 REQUIRED)
set(directories include src files nn cli tests examples benchmarks)
list(TRANSFORM directories PREPEND "${PROJECT_SOURCE_DIR}/")
set(patterns "")
foreach(directory IN LISTS directories)
  list(APPEND patterns "${directory}/*.hpp" "${directory}/*.cpp" "${directory}/*.cuh" "${directory}/*.cu")
endforeach()
file(GLOB_RECURSE sources CONFIGURE_DEPENDS ${patterns})
add_test(NAME style.format COMMAND "${CLANG_FORMAT}" --dry-run --Werror ${sources})
set_tests_properties(style.format PROPERTIES LABELS style)
foreach(source IN LISTS sources)
  file(RELATIVE_PATH name "${PROJECT_SOURCE_DIR}" "${source}")
  if(name MATCHES "^(src|files|cli)/.*\\.cpp$" AND NOT name MATCHES "/no_[a-z]+\\.cpp$")  # no part of this build
    # Where several are compiled together, they are looked at together.
    set(together "")
    if(name MATCHES "^src/")
      get_source_file_property(together "${source}" TARGET_DIRECTORY deeppcr_host TOGETHER)
    elseif(TARGET deeppcr_program AND name MATCHES "^cli/")
      get_source_file_property(together "${source}" TARGET_DIRECTORY deeppcr_program TOGETHER)
    endif()
    if(together)
      set(source "${together}")
      file(RELATIVE_PATH name "${PROJECT_BINARY_DIR}" "${source}")
      if(TEST tidy.${name})
        continue()
      endif()
    endif()
    add_test(NAME tidy.${name} COMMAND "${CLANG_TIDY}" "--config-file=${PROJECT_SOURCE_DIR}/.clang-tidy" -p "${PROJECT_BINARY_DIR}"
                                       --quiet "${source}")
    set_tests_properties(tidy.${name} PROPERTIES LABELS tidy TIMEOUT 300)
  endif()
endforeach()
