/* tests/emulation/cublaslt_double.h - what a test sets and reads of the cuBLASLt double. */
#ifndef PHX__CUBLASLT_DOUBLE_H
#define PHX__CUBLASLT_DOUBLE_H
#include <cublasLt.h>
#ifdef __cplusplus
extern "C" {
#endif
typedef struct cublaslt_double_state {
  int refuse;         /* epilogues (bits of cublasLtEpilogue_t) that the heuristic has no algorithm for */
  int64_t heuristics, products, alive; /* calls; objects not destroyed */
  uint32_t reduction_mask; /* of the last heuristic; 7: not set */
  uint32_t bf16_masks;     /* of all heuristics with bf16 results, ORed */
} cublaslt_double_state;
extern cublaslt_double_state cublaslt_double;
#ifdef __cplusplus
}
#endif
#endif
