# Reads what the assembler said of the kernels of objects (see keep_assembler_report.sh):
#   cmake "-DREPORTS=a.report;b.report" "-DREGISTERS=advance_kernel.*Ef=128" "-DSPILLS=advance_kernel.*Ed=8" -P ...
# Fails where a kernel takes more registers than the first expression of REGISTERS that matches its name says, or keeps
# more bytes in local memory, spilled or not, than SPILLS says: none where nothing matches. Every expression has to match.
cmake_minimum_required(VERSION 3.24)
set(kernels "")
foreach(report IN LISTS REPORTS)
  file(READ "${report}" text)
  string(REGEX REPLACE ";" "," text "${text}")
  string(REGEX MATCHALL "Compiling entry function '[^']*' for 'sm_90'\n[^\n]*\n[^\n]*bytes stack frame[^\n]*\n[^\n]*Used [0-9]+ registers"
         of_report "${text}")
  if(NOT of_report)
    message(SEND_ERROR "no kernels in ${report}:\n${text}")
  endif()
  list(APPEND kernels ${of_report})
endforeach()

# The number of the first of `rules`, "expression=number", that matches; remembers that it did.
function(find_limit result rules name otherwise)
  foreach(rule IN LISTS rules)
    string(REGEX MATCH "^(.*)=([0-9]+)$" parts "${rule}")
    set(expression "${CMAKE_MATCH_1}")
    set(number "${CMAKE_MATCH_2}")
    if(name MATCHES "${expression}")
      set_property(GLOBAL APPEND PROPERTY matched "${rule}")
      set(${result} ${number} PARENT_SCOPE)
      return()
    endif()
  endforeach()
  set(${result} ${otherwise} PARENT_SCOPE)
endfunction()

foreach(kernel IN LISTS kernels)
  string(REGEX MATCH "entry function '([^']*)'.* ([0-9]+) bytes stack frame, ([0-9]+) bytes spill.*Used ([0-9]+) registers" parts
         "${kernel}")
  set(name "${CMAKE_MATCH_1}")
  set(stack ${CMAKE_MATCH_2})
  set(spilled ${CMAKE_MATCH_3})
  set(registers ${CMAKE_MATCH_4})
  find_limit(most_registers "${REGISTERS}" "${name}" 255)
  find_limit(most_bytes "${SPILLS}" "${name}" 0)
  message(STATUS "${name}: ${registers} registers of ${most_registers}, ${stack} bytes of stack, ${spilled} spilled of ${most_bytes}")
  if(registers GREATER most_registers OR stack GREATER most_bytes OR spilled GREATER most_bytes)
    message(SEND_ERROR "${name} takes too much: ${registers} registers (at most ${most_registers}), ${stack} bytes of stack, "
                       "${spilled} spilled (at most ${most_bytes})")
  endif()
endforeach()
get_property(matched GLOBAL PROPERTY matched)
foreach(rule IN LISTS REGISTERS SPILLS)
  if(NOT rule IN_LIST matched)
    message(SEND_ERROR "no kernel that matches ${rule}")
  endif()
endforeach()
