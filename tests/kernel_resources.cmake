# Compiles a file of kernels for one GPU and reads what the assembler says of them:
#   cmake -DNVCC=... -DSOURCE=... -DROOT=... -DREGISTERS=128 -DHOT=advance_kernel.*Ef -P kernel_resources.cmake
# Fails where a kernel whose name matches HOT spills registers, keeps arrays in local memory or takes more than REGISTERS.
execute_process(
  COMMAND "${NVCC}" -std=c++20 -O3 -arch=sm_90 --expt-relaxed-constexpr -Xptxas -v "-I${ROOT}/include" "-I${ROOT}/src" -cubin -o /dev/null
          "${ROOT}/${SOURCE}"
  RESULT_VARIABLE failed ERROR_VARIABLE report OUTPUT_VARIABLE output)
if(failed)
  message(FATAL_ERROR "nvcc failed:\n${report}${output}")
endif()
string(APPEND report "${output}")
string(REGEX REPLACE ";" "," report "${report}")
string(REGEX MATCHALL "Compiling entry function '[^']*' for 'sm_90'\n[^\n]*\n[^\n]*bytes stack frame[^\n]*\n[^\n]*Used [0-9]+ registers" kernels
       "${report}")
set(seen 0)
foreach(kernel IN LISTS kernels)
  string(REGEX REPLACE ".*entry function '([^']*)'.*" "\\1" name "${kernel}")
  if(NOT name MATCHES "${HOT}")
    continue()
  endif()
  math(EXPR seen "${seen} + 1")
  string(REGEX REPLACE ".* ([0-9]+) bytes stack frame, ([0-9]+) bytes spill.*Used ([0-9]+) registers" "\\1,\\2,\\3" found
         "${kernel}")
  string(REPLACE "," ";" found "${found}")
  list(GET found 0 stack)
  list(GET found 1 spills)
  list(GET found 2 registers)
  message(STATUS "${name}: ${registers} registers, ${stack} bytes of stack, ${spills} spilled")
  if(stack GREATER 0 OR spills GREATER 0 OR registers GREATER REGISTERS)
    message(SEND_ERROR "${name} takes too much: ${registers} registers (at most ${REGISTERS}), ${stack} bytes of stack")
  endif()
endforeach()
if(seen EQUAL 0)
  message(FATAL_ERROR "no kernel matches ${HOT}:\n${report}")
endif()
