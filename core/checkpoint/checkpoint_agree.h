/* core/checkpoint/checkpoint_agree.h - the ranks agree whether a phase succeeded, with one message; for checkpoint*.c
 * and train.c. */
#ifndef PHX__CHECKPOINT_AGREE_H
#define PHX__CHECKPOINT_AGREE_H
#include "engine/runtime.h"

typedef struct phx__verdict {
  int64_t value;        /* in: of this rank */
  phx__state_hash hash; /* in */
  int64_t first, most;  /* out: rank 0's value; the largest */
  phx__state_hash sum;  /* out, modulo 2^128 */
} phx__verdict;

/* [main][collective] mine and why (filled when mine is a failure): what became of this rank's part.  The same result on
 * all ranks: PHX_OK, or the first failed rank's status with its message.  verdict (NULL: none) is exchanged on the way,
 * its outputs filled on PHX_OK; all ranks pass one or none does.  PHX_COMM: the ranks could not meet. */
phx_status phx__agree(phx__runtime *rt, phx_status mine, const phx_error *why, phx__verdict *verdict, phx_error *err);
#endif
