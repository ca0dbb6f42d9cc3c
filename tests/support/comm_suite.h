/* comm_suite.h - one suite for every communicator: bodies for fake_job_run, on the plugin that comm_suite names. */
#ifndef COMM_SUITE_H
#define COMM_SUITE_H
#include "fake_job.h"

#define COMM_SUITE_ARENA (48 << 20)

typedef struct comm_suite_setup {
  const phx_comm_table *table;
  const void *config;
  int64_t communicators;   /* that the configuration allows */
  int32_t any_order;       /* sums of floats are compared within the bound of any order */
  int32_t far_arena;       /* the CPU cannot touch the arena: its buffers are copied there and back by the device */
  void (*enter)(fake_rank *rank), (*leave)(fake_rank *rank); /* around create and destroy, or NULL */
} comm_suite_setup;
extern comm_suite_setup comm_suite;

typedef struct rig {
  fake_rank *rank;
  phx_comm *comm;
  phx_error err;
  char *arena, *far; /* far: the arena itself, where `arena` is a copy of it for the CPU; NULL: they are one */
  int64_t used;
  char *heap[4];
  int n_heap;
  int bad;
} rig;
#define COMM_SUITE_BAD(g, ...)                                                              \
  do {                                                                           \
    if (!(g)->bad) fake_report((g)->rank, __FILE__, __LINE__, "equal", __VA_ARGS__); \
    (g)->bad = 1;                                                                \
  } while (0)

typedef struct shape { int32_t op, dtype, reduce; int64_t numel; int in_arena, in_place; int64_t shift; } shape;

int comm_suite_rig_open(rig *g, fake_rank *rank, int64_t arena);
void comm_suite_rig_close(rig *g);
/* A buffer with guards, in the arena or not, moved `shift` bytes from a 64-byte boundary. */
char *comm_suite_buffer(rig *g, int in_arena, int64_t bytes, int64_t shift);
void comm_suite_buffers_free(rig *g);
void comm_suite_fill(char *p, int32_t dtype, uint64_t seed, int32_t r, int64_t first, int64_t numel);
void comm_suite_try_shape(rig *g, const shape *s, uint64_t seed); /* one call: result, source, guards, stats */
int64_t comm_suite_order_shows(void); /* of 1000 sums of 4: how many differ when added left to right */

void comm_suite_battery(fake_rank *rank);
void comm_suite_pairs(fake_rank *rank);
void comm_suite_streams(fake_rank *rank);
void comm_suite_splits(fake_rank *rank);
void comm_suite_pool_empty(fake_rank *rank);
void comm_suite_mismatch(fake_rank *rank);
void comm_suite_absent(fake_rank *rank);
void comm_suite_late(fake_rank *rank);
void comm_suite_suspended(fake_rank *rank);
void comm_suite_killed(fake_rank *rank);
void comm_suite_arguments(fake_rank *rank);
void comm_suite_tiny_staging(fake_rank *rank);
void comm_suite_as_threads(fake_rank *rank);
#endif
