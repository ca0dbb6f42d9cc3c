/* core/command/restart.c - see restart.h.
 *
 * Every attempt is a job of its own, with new shared memory and new processes, so nothing of a failed one is left in
 * the next.  An attempt goes on from what the one before has committed, or from the beginning when it has committed
 * nothing.  The first failure is kept, and told again at the end: later ones are often only its echo.
 * Not restarted: what the user ended, what a signal stopped (status 5), and what was refused (2) or found damaged (4),
 * which a second try meets again.  So does a lack of memory, as a rule: one restart is tried, since others may have had
 * it, and a second kill for it in a row is the last.  Threads: [main]. */
#include "command/restart.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#include "base/complain.h"
#include "base/status.h"
#include "base/sys.h"
#include "checkpoint/checkpoint.h"
#include "command/memory_room.h"
#include "command/train_check.h"
#include "engine/cpus.h"
#include "job/launcher.h"
#include "job/run_lock.h"

phx_status phx__restart_accumulate(const phx__config *config, int32_t ranks, int64_t *out, phx_error *err) {
  const phx__settings *s = &config->s;
  const int64_t total = s->run.ranks * s->batch.micro * s->batch.accumulate;
  if (ranks < 1) return phx_fail(err, PHX_INVALID, "run.elastic: no rank is left");
  const int64_t once = ranks * s->batch.micro;
  if (total % once)
    return phx_fail(err, PHX_INVALID,
                    "run.elastic: the global batch of %" PRId64 " ranks x %" PRId64 " micro x %" PRId64
                    " accumulate = %" PRId64 " sequences does not divide over %d ranks x %" PRId64 " = %" PRId64
                    " (remainder %" PRId64 "); choose batch.micro and batch.accumulate so that it does",
                    s->run.ranks, s->batch.micro, s->batch.accumulate, total, ranks, s->batch.micro, once,
                    total % once);
  *out = total / once;
  return PHX_OK;
}

typedef struct attempt {
  int32_t ranks;
  int64_t accumulate, from; /* from: the checkpoint that it begins with, or 0 */
  char n[16], set[64], resume[PHX__CHECKPOINT_PATH];
  char **argv; /* the caller's, and what differs */
} attempt;

static phx_status make_argv(attempt *a, const phx__config *config, char *const *argv, phx_error *err) {
  size_t n = 0;
  static char flag_n[] = "-n", flag_set[] = "--set";
  while (argv[n]) n++;
  phx__free(a->argv);
  a->argv = phx__calloc(n + 6, sizeof *a->argv);
  if (!a->argv) return phx_fail(err, PHX_NOMEM, "no memory for a command line of %zu words", n + 6);
  memcpy(a->argv, argv, n * sizeof *argv);
  if (a->ranks != config->s.run.ranks) {
    snprintf(a->n, sizeof a->n, "%d", a->ranks);
    snprintf(a->set, sizeof a->set, "batch.accumulate=%" PRId64, a->accumulate);
    a->argv[n++] = flag_n;
    a->argv[n++] = a->n;
    a->argv[n++] = flag_set;
    a->argv[n++] = a->set;
  }
  if (a->from > 0) {
    snprintf(a->resume, sizeof a->resume, "--resume=%s", config->s.run.out);
    a->argv[n++] = a->resume;
  }
  return PHX_OK;
}

/* How the next attempt differs; refuses what would not run. */
static phx_status prepare_next(attempt *a, const phx__config *config, int32_t lost, phx_error *err) {
  bool found = false;
  phx_status status = phx__run_lock_check(err);
  if (!status) status = phx__checkpoint_newest(config->s.run.out, INT64_MAX, &a->from, &found, err);
  if (!found) a->from = 0;
  if (status || !config->s.run.elastic || lost == 0) return status;
  PHX_TRY(phx__restart_accumulate(config, a->ranks - lost, &a->accumulate, err));
  phx__config next = *config; /* a copy of the values; the rest stays the caller's */
  a->ranks -= lost;
  next.s.run.ranks = a->ranks;
  next.s.batch.accumulate = a->accumulate;
  return phx__train_check(&next, err);
}

static int launch(const attempt *a, const phx__config *config, phx__outcome *outcome) {
  char memory[256] = "";
  phx__room room;
  phx__config now = *config; /* a copy of the values; the rest stays the caller's */
  now.s.run.ranks = a->ranks;
  now.s.batch.accumulate = a->accumulate;
  phx__room_read("", &room);
  if (phx__room_say(&now, &room, memory, sizeof memory, NULL)) memory[0] = 0;
  const phx__launch launch = {.ranks = a->ranks,
                              .threads = config->s.run.pin == 2 ? 0 : phx__threads(config, a->ranks),
                              .timeout_s = config->s.run.timeout,
                              .run_dir = config->s.run.out,
                              .memory = memory[0] ? memory : NULL,
                              .argv = a->argv,
                              .saves = config->s.checkpoint.every > 0,
                              .outcome = outcome};
  return phx__launch_run(&launch);
}

static const char *how_it_ended(int result) {
  if (result == PHX__EXIT_OK) return "done after";
  return result == PHX__EXIT_STOPPED ? "stopped after" : "given up after";
}

int phx__restart_run(const phx__config *config, char *const *argv, bool *restarted) {
  phx_error err = PHX_ERROR_INIT;
  attempt a = {.ranks = (int32_t)config->s.run.ranks, .accumulate = config->s.batch.accumulate};
  phx__outcome outcome = {0}, first = {0};
  int64_t restarts = 0;
  bool no_memory = false; /* the attempt before ended so */
  int result = PHX__EXIT_RANK;
  phx_status status = make_argv(&a, config, argv, &err);
  while (!status) {
    result = launch(&a, config, &outcome);
    if (outcome.failed && !first.failed) first = outcome;
    if (!outcome.failed || restarts == config->s.run.max_restarts) break;
    if (outcome.no_memory && no_memory) {
      phx__complain("no restart: ranks were killed for lack of memory twice in a row; give the job more, or lower "
                    "batch.micro, run.ranks or the model");
      break;
    }
    no_memory = outcome.no_memory;
    status = prepare_next(&a, config, outcome.lost, &err);
    if (!status) status = make_argv(&a, config, argv, &err);
    if (status) break;
    restarts++;
    char from[48] = "the beginning";
    if (a.from > 0) snprintf(from, sizeof from, "the checkpoint of step %" PRId64, a.from);
    phx__complain("restart %" PRId64 " of at most %" PRId64 ", on %d rank%s, accumulate %" PRId64 ", from %s",
            restarts, config->s.run.max_restarts, a.ranks, a.ranks == 1 ? "" : "s", a.accumulate, from);
  }
  if (status) phx__complain("%s%s", first.failed ? "no restart: " : "", err.message);
  if (restarts > 0)
    phx__complain("%s %" PRId64 " restart%s; the first failure was: %s",
            how_it_ended(result), restarts, restarts == 1 ? "" : "s", first.cause);
  phx__free(a.argv);
  *restarted = restarts > 0;
  return result;
}
