# Whether sums go from GPU to GPU by NCCL: sets DEEPPCR_BUILD_NCCL to OFF where there is no header of it, or no CUDA. The
# library, of 200 MB, is opened when ranks first sum on GPUs of their own (src/distribute/nccl.cu), and is not linked.
if(NOT DEEPPCR_BUILD_CUDA)
  set(DEEPPCR_BUILD_NCCL OFF)
endif()
if(DEEPPCR_BUILD_NCCL)
  find_path(NCCL_INCLUDE_DIR nccl.h HINTS ${CUDAToolkit_INCLUDE_DIRS})
  mark_as_advanced(NCCL_INCLUDE_DIR)
  if(NOT NCCL_INCLUDE_DIR)
    set(DEEPPCR_BUILD_NCCL OFF)
  endif()
endif()
