/* inner.h - what the files of the NCCL double share: the memory of all ranks, and how bytes move in it. */
#ifndef NCCL_DOUBLE_INNER_H
#define NCCL_DOUBLE_INNER_H
#include <nccl.h>
#include <stdint.h>

#include "nccl_double.h"

#define CHUNK 16384
#define ROOMS 24

typedef struct channel { /* from one rank to another; words only grow */
  uint32_t posted, taken;
  uint32_t bytes[2];
  char data[2][CHUNK];
} channel;
typedef struct room { /* of one communicator */
  uint32_t used, arrived;
  channel pair[DOUBLE_RANKS][DOUBLE_RANKS]; /* [from][to] */
} room;
typedef struct double_memory {
  double_control control;
  room rooms[ROOMS];
} double_memory;

extern double_memory *double_shared;
extern __thread int double_rank;

struct ncclComm {
  room *room;
  int n, me, world_rank;
  int references; /* the handle, and what is on its way on streams or in a helper's thread */
  int aborted, state, ended, registrations;
};

typedef struct move { /* bytes to or from a peer */
  int peer, is_send;
  char *p;
  size_t bytes, done;
} move;
/* All of them; those with one peer in their order.  0: done; -1: aborted. */
int double_move(struct ncclComm *c, move *moves, int n);
void double_pause(int *turns);
void double_release(struct ncclComm *c);
/* Waits until the communicator is aborted. */
void double_hang(struct ncclComm *c);

enum { DO_MOVES = 0, DO_ALL_REDUCE, DO_REDUCE, DO_REDUCE_SCATTER, DO_ALL_GATHER, DO_BROADCAST };
typedef struct work { /* one kernel */
  struct ncclComm *comm;
  int kind, root, fault, n_moves;
  const char *src;
  char *dst;
  size_t count, element;
  ncclDataType_t type;
  ncclRedOp_t op;
  move *moves;
} work;
void double_run(void *arg);  /* a work, on its stream */
void double_drop(void *arg);
#endif
