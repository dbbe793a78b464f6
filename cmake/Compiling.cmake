# How every target of this project is compiled: warnings and sanitizers, in one place.
add_library(deeppcr_compiling INTERFACE)
target_compile_options(deeppcr_compiling INTERFACE -Wall -Wextra -Wshadow -Wnon-virtual-dtor -Woverloaded-virtual)
# GCC 12 sees overlapping copies in std::string's operator+ where there are none (GCC bug 105651).
target_compile_options(deeppcr_compiling INTERFACE $<$<CXX_COMPILER_ID:GNU>:-Wno-restrict>)
if(DEEPPCR_WARNINGS_AS_ERRORS)
  target_compile_options(deeppcr_compiling INTERFACE -Werror)
endif()
if(DEEPPCR_SANITIZE)
  add_compile_options(-fsanitize=${DEEPPCR_SANITIZE} -fno-omit-frame-pointer -fno-sanitize-recover=all)
  add_link_options(-fsanitize=${DEEPPCR_SANITIZE})
  if(DEEPPCR_SANITIZE MATCHES "address,undefined")  # what AddressSanitizer finds too is left to it
    add_compile_options(-fno-sanitize=null,object-size,pointer-overflow)
    if(CMAKE_CXX_COMPILER_ID STREQUAL "Clang")  # checks by calls: a third less to compile, little slower
      add_compile_options("SHELL:-mllvm -asan-instrumentation-with-call-threshold=0")
    endif()
  endif()
  # One instruction set is enough under a sanitizer, and takes minutes less to compile than four: AVX2 where there is one.
  add_compile_definitions(HWY_COMPILE_ONLY_STATIC)
  file(STRINGS /proc/cpuinfo processor LIMIT_COUNT 1 REGEX "^flags.* avx2 ")
  if(processor)
    add_compile_options(-march=haswell -maes -mpclmul)
  endif()
endif()
# The sanitizers of GCC 12 and clang 14 cannot live with addresses randomised by 32 bits, as newer kernels do by default:
# what prefixes a sanitized program to switch that off, where the machine lets one.
execute_process(COMMAND setarch -R true RESULT_VARIABLE setarch_result OUTPUT_QUIET ERROR_QUIET)
set(without_address_randomisation "")
if(setarch_result EQUAL 0)
  set(without_address_randomisation setarch -R)
endif()
if(DEEPPCR_SANITIZE)
  set(CMAKE_CROSSCOMPILING_EMULATOR ${without_address_randomisation})
endif()

# Compiles sources of a target together that are listed in one argument, "one.cpp two.cpp": where what they include takes
# longer than they themselves do. One name then means one thing in all of them, in unnamed namespaces too. The property
# TOGETHER of each is the file that CMake writes to include them all.
option(DEEPPCR_COMPILE_TOGETHER "Compile files together whose headers take longest: in half the time, where processors are few" ON)
function(compile_together target)
  if(NOT DEEPPCR_COMPILE_TOGETHER)
    return()
  endif()
  set_target_properties(${target} PROPERTIES UNITY_BUILD ON UNITY_BUILD_MODE GROUP)
  foreach(sources IN LISTS ARGN)
    separate_arguments(sources)
    list(GET sources 0 first)
    get_filename_component(group "${first}" NAME_WE)
    set(together "${CMAKE_CURRENT_BINARY_DIR}/CMakeFiles/${target}.dir/Unity/unity_${group}_cxx.cxx")
    set_source_files_properties(${sources} PROPERTIES UNITY_GROUP ${group} TOGETHER "${together}")
  endforeach()
endfunction()
