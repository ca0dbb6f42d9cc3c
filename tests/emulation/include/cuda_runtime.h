/* tests/emulation/include/cuda_runtime.h - the runtime's calls and, for C++, the language of kernels. */
#ifndef PHX__EMULATED_CUDA_RUNTIME_H
#define PHX__EMULATED_CUDA_RUNTIME_H
#include <cuda_runtime_api.h>
#ifdef __cplusplus
#include <cuda_emulation.h>
#endif
#endif
