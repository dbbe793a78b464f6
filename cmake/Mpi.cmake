# Whether Group::world is built over MPI: sets DEEPPCR_BUILD_MPI to OFF where there is none. Only MPI's C functions are used,
# and the library is named by its file, which its run-time package has: who uses an installed deeppcr needs no MPI headers.
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
  list(TRANSFORM MPI_CXX_INCLUDE_DIRS PREPEND "-isystem" OUTPUT_VARIABLE mpi_compile_options)
  file(REAL_PATH "${MPI_mpi_LIBRARY}" mpi_library)
endif()
