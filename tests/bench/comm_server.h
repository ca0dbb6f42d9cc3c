/* tests/bench/comm_server.h - a set of ranks that bench_comm drives: ours (forked), or Open MPI's (under mpirun).
 *
 * The driver writes a job and raises `number`; every rank runs it and stores the number in done[rank].  Idle ranks
 * sleep, so that one set does not disturb the other's turn.  The page is an anonymous shared mapping, or a mapped file.
 */
#ifndef PHX__COMM_SERVER_H
#define PHX__COMM_SERVER_H
#include <stdint.h>
#include <time.h>

enum { SERVE_ALL_REDUCE = 0, SERVE_REDUCE_SCATTER = 1, SERVE_ALL_GATHER = 2, SERVE_BOUND = 3, SERVE_QUIT = 4 };
enum { SERVE_RANKS = 2 };

typedef struct comm_server {
  uint32_t number, done[SERVE_RANKS];
  int32_t what;   /* SERVE_* */
  int64_t bytes;  /* of the whole buffer: all_reduce's, reduce_scatter's source, all_gather's destination */
  int32_t rounds; /* in a row */
  int32_t failed;
  double seconds[SERVE_RANKS]; /* per round */
  char about[160];             /* versions, written by rank 0 before done[0] first changes */
} comm_server;

static inline double serve_now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}
/* The next job's number; sleeps while there is none. */
static inline uint32_t serve_next(comm_server *s, uint32_t last) {
  uint32_t number;
  while ((number = __atomic_load_n(&s->number, __ATOMIC_ACQUIRE)) == last)
    nanosleep(&(struct timespec){0, 200000}, NULL);
  return number;
}
static inline void serve_done(comm_server *s, int rank, uint32_t number, double seconds) {
  s->seconds[rank] = seconds;
  __atomic_store_n(&s->done[rank], number, __ATOMIC_RELEASE);
}
/* Small buffers are written anew before each call, as a program does: lines left with the peer are part of the cost. */
static inline void serve_touch(const comm_server *s, float *x) {
  for (int64_t i = 0; s->bytes <= 64 << 10 && i < s->bytes / 4; i += 16) x[i] = 1.0f;
}
#endif
