/* tests/bench/unfused.h - causal attention without fusion, as the comparator of the fused one. */
#ifndef PHX__UNFUSED_H
#define PHX__UNFUSED_H
#include <stdint.h>
/* p(B, H, T, T): the probabilities, kept for backward.  rows: queries per product.  block(rows, T): scratch. */
void unfused_forward(float *out, float *p, const float *qkv, int64_t b, int64_t t, int64_t c, int64_t heads,
                     int64_t rows);
void unfused_backward(float *dqkv, const float *dout, const float *qkv, const float *out, const float *p, float *block,
                      int64_t b, int64_t t, int64_t c, int64_t heads, int64_t rows);
#endif
