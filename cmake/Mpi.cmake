# Whether Group::world is built over MPI: sets DEEPPCR_BUILD_MPI to OFF where there is none. Only MPI's C functions are
# used, and the library is named by its file, which its run-time package has: who uses an installed deeppcr needs no
# headers of MPI.
if(DEEPPCR_SANITIZE)  # MPI's own leaks are none of ours
  set(DEEPPCR_BUILD_MPI OFF)
endif()
if(DEEPPCR_BUILD_MPI)
  find_package(MPI QUIET COMPONENTS CXX)
  if(NOT MPI_CXX_FOUND OR NOT MPI_mpi_LIBRARY)
    set(DEEPPCR_BUILD_MPI OFF)
  endif()
endif()
if(DEEPPCR_BUILD_MPI)
  set(mpi_directories ${MPI_CXX_INCLUDE_DIRS})
  list(REMOVE_ITEM mpi_directories ${CMAKE_CXX_IMPLICIT_INCLUDE_DIRECTORIES})  # naming one breaks <cstdlib>
  list(TRANSFORM mpi_directories PREPEND "-isystem" OUTPUT_VARIABLE mpi_compile_options)
  file(REAL_PATH "${MPI_mpi_LIBRARY}" mpi_library)
  string(REGEX REPLACE "(\\.so\\.[0-9]+)\\..*" "\\1" mpi_library "${mpi_library}")  # without the minor version
endif()

# A test that mpirun runs with so many ranks, one thread each, here whoever one is and however many processors there are.
set(mpirun_environment OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 OMPI_MCA_rmaps_base_oversubscribe=1
                       OMPI_MCA_mpi_yield_when_idle=1 OMPI_MCA_btl_vader_single_copy_mechanism=none DEEPPCR_THREADS=1)
function(add_test_on_ranks name ranks label)
  if(DEEPPCR_BUILD_MPI)
    add_test(NAME ${name}.${ranks}_ranks COMMAND "${MPIEXEC_EXECUTABLE}" -n ${ranks} ${ARGN})
    set_tests_properties(${name}.${ranks}_ranks PROPERTIES LABELS ${label} TIMEOUT 120 PROCESSORS 2
                         ENVIRONMENT "${mpirun_environment}")
  endif()
endfunction()
