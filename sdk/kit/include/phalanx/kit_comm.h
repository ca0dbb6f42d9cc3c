/* phalanx/kit_comm.h - for writers of communicators: what is refused of a call's arguments, what is counted, the flight
 * record, and what a report says of a call and of a rank.
 *
 * [any] thread.  Pages of other ranks are read with relaxed atomics: a torn record is a wrong line in a report, never
 * more. */
#ifndef PHALANX_KIT_COMM_H
#define PHALANX_KIT_COMM_H
#include <phalanx/comm.h>
#include <phalanx/job.h>
#ifdef __cplusplus
extern "C" {
#endif

typedef struct phx_kit_call { /* one call as its rank issued it */
  uint64_t comm, number;      /* id of the communicator; number within it, from 1 */
  int64_t numel;
  int32_t op, dtype, reduce, root; /* root: also the peer of send and recv; -1: none */
  int32_t unit, reserved0;
} phx_kit_call;

/* The arguments of a call of rank `me` of `size`, refused alike by every communicator. */
phx_status phx_kit_check_call(const phx_kit_call *call, int32_t me, int32_t size, const void *src, const void *dst,
                              phx_error *err);

typedef struct phx_kit_text { /* appends and never overflows */
  char *at;
  size_t left;
} phx_kit_text;
void phx_kit_say(phx_kit_text *t, const char *format, ...) __attribute__((format(printf, 2, 3)));
void phx_kit_say_call(phx_kit_text *t, const phx_kit_call *call); /* "all_reduce(1000 f32, sum)" */
/* "rank 0: all_reduce(1000 f32, sum), call 12 of communicator 1, unit 3" */
void phx_kit_say_own(phx_kit_text *t, int32_t rank, const phx_kit_call *call);
/* "rank 2 (pid 17) is in barrier, number 4 of communicator 2, for 61.2 s" */
void phx_kit_say_rank(phx_kit_text *t, const phx_job *job, int32_t rank);
void phx_kit_job_failure(const phx_job *job, char *text, size_t size); /* what the failed rank's page says */

/* What stats() tells of a communicator; atomics.  All that is counted is counted in the world's as well (the same one
 * for the world itself). */
typedef struct phx_kit_counters {
  int64_t calls[PHX_OPS], bytes[PHX_OPS], wait_ns;
} phx_kit_counters;
void phx_kit_count_call(phx_kit_counters *own, phx_kit_counters *world, int32_t op, int64_t bytes);
void phx_kit_count_wait(phx_kit_counters *own, phx_kit_counters *world, int64_t ns);
void phx_kit_counters_read(const phx_kit_counters *c, phx_comm_stats *out);

int64_t phx_kit_now_ns(void); /* CLOCK_MONOTONIC */
/* The number of the new record.  bytes: of this rank's buffer. */
uint64_t phx_kit_flight_begin(const phx_job *job, const phx_kit_call *call, uint64_t sequence);
void phx_kit_flight_started(const phx_job *job, uint64_t flight,
                            int64_t now_ns); /* work that began later than its call */
void phx_kit_flight_end(const phx_job *job, uint64_t flight);

#ifdef __cplusplus
}
#endif
#endif
