/* core/command/balance.c - see balance.h. */
#include "command/balance.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#include "base/status.h"
#include "plugin/host.h"
#include "plugin/where.h"

static void count(phx__balance *b, double seconds, int64_t wait_ns) {
  const int64_t step_ns = (int64_t)(seconds * 1e9);
  /* a thread of a stream waits while [main] computes, so that both together may be more than the step */
  const int64_t own_ns = wait_ns < step_ns ? step_ns - wait_ns : 0;
  b->steps++;
  b->own_ns += own_ns;
  b->wait_ns += wait_ns;
  if (b->all_steps == 1) b->all_own = b->all_wait = 0; /* the first step of a process is no measure */
  b->all_steps++;
  b->all_own += own_ns;
  b->all_wait += wait_ns;
}

int32_t phx__balance_slowest(const phx__rank_report *ranks, int32_t n, double *ratio) {
  int32_t slowest = 0;
  double others = 0;
  *ratio = 1;
  if (n < 2) return -1;
  for (int32_t r = 1; r < n; r++)
    if (ranks[r].own_ns > ranks[slowest].own_ns) slowest = r;
  for (int32_t r = 0; r < n; r++) others += r == slowest ? 0 : (double)ranks[r].own_ns;
  if (ranks[slowest].own_ns <= 0) return -1;
  if (others > 0) *ratio = (double)ranks[slowest].own_ns * (n - 1) / others;
  return slowest;
}

/* "rank 1 is the slowest: ..." */
static void describe(const phx__rank_report *ranks, int32_t n, int64_t first, int64_t last) {
  double ratio = 1;
  char text[300];
  const int32_t slowest = phx__balance_slowest(ranks, n, &ratio);
  int64_t least = INT64_MAX, most_wait = 0;
  if (slowest < 0) return;
  for (int32_t r = 0; r < n; r++) {
    if (ranks[r].own_ns < least) least = ranks[r].own_ns;
    if (ranks[r].wait_ns > most_wait) most_wait = ranks[r].wait_ns;
  }
  snprintf(text, sizeof text,
           "steps %" PRId64 " to %" PRId64 ": rank %d is the slowest with %.2f ms of its own a step, %.2f times the "
           "others' mean; own times from %.2f ms, waiting for peers %.2f to %.2f ms",
           first, last, slowest, 1e-6 * (double)ranks[slowest].own_ns, ratio, 1e-6 * (double)least,
           1e-6 * (double)ranks[slowest].wait_ns, 1e-6 * (double)most_wait);
  phx__log(0, "core", PHX_LOG_INFO, text);
}

/* ",\"balance\":{...}" */
static void add_member(phx__progress *progress, const phx__rank_report *ranks, int32_t n, int64_t first) {
  char text[64 + 2 * PHX_RANKS_MAX * 24];
  double ratio = 1;
  const int32_t slowest = phx__balance_slowest(ranks, n, &ratio);
  size_t used =
      (size_t)snprintf(text, sizeof text, ",\"balance\":{\"from\":%" PRId64 ",\"slowest\":%d", first, slowest);
  for (int list = 0; list < 2; list++)
    for (int32_t r = 0; r < n; r++) {
      const int64_t ns = list ? ranks[r].wait_ns : ranks[r].own_ns;
      const char *begin = list ? "],\"wait_ms\":[" : ",\"own_ms\":[", *before = r ? "," : begin;
      used += (size_t)snprintf(text + used, sizeof text - used, "%s%.6g", before, 1e-6 * (double)ns);
    }
  snprintf(text + used, sizeof text - used, "]}");
  phx__progress_add(progress, text);
}

phx_status phx__balance_step(phx__balance *b, const phx__runtime *rt, phx__progress *progress, int64_t step,
                             double seconds, int64_t wait_ns, phx_error *err) {
  const int64_t every = rt->config->s.run.balance_every;
  phx__rank_report all[PHX_RANKS_MAX];
  int64_t mine[2], numbers[2 * PHX_RANKS_MAX];
  if (rt->job->size < 2) return PHX_OK;
  if (b->steps == 0) b->from = step;
  count(b, seconds, wait_ns);
  if (every == 0 || step % every) return PHX_OK;
  mine[0] = b->own_ns / b->steps;
  mine[1] = b->wait_ns / b->steps;
  PHX_TRY(PHX__IN_COMM(rt->job, rt->core->all_gather(rt->core->ctx, mine, numbers, 2, PHX_I64, NULL, err)));
  for (int32_t r = 0; r < rt->job->size; r++) {
    all[r].own_ns = numbers[2 * r];
    all[r].wait_ns = numbers[2 * r + 1];
  }
  if (rt->job->rank == 0) {
    describe(all, rt->job->size, b->from, step);
    add_member(progress, all, rt->job->size, b->from);
  }
  b->steps = b->own_ns = b->wait_ns = 0;
  return PHX_OK;
}

void phx__balance_report(const phx__balance *b, phx__rank_report *mine) {
  const int64_t counted = b->all_steps > 1 ? b->all_steps - 1 : b->all_steps;
  mine->own_ns = counted ? b->all_own / counted : 0;
  mine->wait_ns = counted ? b->all_wait / counted : 0;
}

void phx__balance_say(const phx__run_result *result, int64_t steps) {
  if (result->n_ranks > 1) describe(result->ranks, result->n_ranks, result->steps - steps + 1, result->steps);
}
