# Where cuDNN's headers (9.10 or newer) are found, attention can use it; the library itself is loaded at run time.
find_path(PHALANX_CUDNN_INCLUDE cudnn_graph.h HINTS ${CUDAToolkit_INCLUDE_DIRS} /usr/local/cuda/include
          DOC "Directory of cuDNN's headers; empty: attention by own kernels only")
set(PHALANX_CUDNN NO)
if(PHALANX_CUDNN_INCLUDE AND EXISTS ${PHALANX_CUDNN_INCLUDE}/cudnn_version.h
   AND EXISTS ${PHALANX_CUDNN_INCLUDE}/library_types.h)
  file(STRINGS ${PHALANX_CUDNN_INCLUDE}/cudnn_version.h version REGEX "^#define CUDNN_M(AJOR|INOR) ")
  string(REGEX REPLACE "[^0-9]*([0-9]+)[^0-9]+([0-9]+).*" "\\1.\\2" version "${version}")
  if(version VERSION_GREATER_EQUAL 9.10 AND version VERSION_LESS 10)
    set(PHALANX_CUDNN YES)
  endif()
endif()
function(phalanx_use_cudnn target)
  if(PHALANX_CUDNN)
    target_compile_definitions(${target} PUBLIC PHX__CUDNN=1)
    target_include_directories(${target} SYSTEM PUBLIC ${PHALANX_CUDNN_INCLUDE})
  endif()
endfunction()
