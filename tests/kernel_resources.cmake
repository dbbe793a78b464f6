# Reads what the assembler said of the kernels of an object (see keep_assembler_report.sh):
#   cmake -DREPORT=... -DREGISTERS=128 -DHOT=advance_kernel.*Ef -P kernel_resources.cmake
# Fails where a kernel whose name matches HOT spills registers, keeps arrays in local memory or takes more than REGISTERS.
# STACK: bytes that it may spill all the same, outside its loop over the steps; 0 where not given.
if(NOT DEFINED STACK)
  set(STACK 0)
endif()
file(READ "${REPORT}" report)
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
  if(stack GREATER STACK OR spills GREATER STACK OR registers GREATER REGISTERS)
    message(SEND_ERROR "${name} takes too much: ${registers} registers (at most ${REGISTERS}), ${stack} bytes of stack")
  endif()
endforeach()
if(seen EQUAL 0)
  message(FATAL_ERROR "no kernel matches ${HOT}:\n${report}")
endif()
