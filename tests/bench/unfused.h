/* tests/bench/unfused.h - causal attention without fusion, as the comparator of the fused one. */
#ifndef PHX__UNFUSED_H
#define PHX__UNFUSED_H
#include <stdint.h>

typedef struct unfused {
  const float *qkv, *dout; /* (B, T, 3C), (B, T, C) */
  float *out, *dqkv;
  float *p, *dp;           /* (B, H, T, T) each: the probabilities, kept for backward; their gradient */
  int64_t b, t, c, heads;
  int64_t rows;            /* queries per product: it is only as wide as the causal mask leaves it */
  int by_blocks;           /* 0: each operation runs over everything, as a framework without a fused kernel does it.
                              1: all operations of a block of rows follow each other while it is in the cache: tiling
                              without online softmax, the strongest form short of fusion */
} unfused;

void unfused_forward(const unfused *u);
void unfused_backward(const unfused *u);
#endif
