# Whether sums go from GPU to GPU by NCCL: sets DEEPPCR_BUILD_NCCL to OFF where there is no header of it, or no CUDA. The
# library, of 200 MB, is opened when ranks first sum on GPUs of their own (src/distribute/nccl.cu), and is not linked.
if(NOT DEEPPCR_BUILD_CUDA)
  set(DEEPPCR_BUILD_NCCL OFF)
endif()
if(DEEPPCR_BUILD_NCCL)
  find_path(NCCL_INCLUDE_DIR nccl.h HINTS ${CUDAToolkit_INCLUDE_DIRS})
  mark_as_advanced(NCCL_INCLUDE_DIR)
  if(NCCL_INCLUDE_DIR)  # 2.14 and later
    file(STRINGS "${NCCL_INCLUDE_DIR}/nccl.h" nccl_need_not_block REGEX "ncclCommInitRankConfig" LIMIT_COUNT 1)
  endif()
  if(NOT nccl_need_not_block)
    set(DEEPPCR_BUILD_NCCL OFF)
  endif()
endif()
