/* core/job/flight.c - the report on a failed job, from the ranks' liveness pages.
 *
 * What it is for: one table that says for each rank whether it lives, its step, the collective it is in or finished
 * last, and then who is absent from the collectives that others wait in.
 * What it does not do: look at processes (launcher.c).  The pages are copies, and are not trusted: texts are cut, and
 * numbers are only printed.
 * A collective is one (communicator, sequence).  A rank is absent from it when it has taken part in that communicator
 * before, or in nothing at all, and its ring does not hold it; it has diverged when the op differs.
 * Threads: [main]. */
#include "job/flight.h"

#include <phalanx/comm.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "base/clean.h"
#include "base/job_calls.h"
#include "base/sys.h"
#include "plugin/where.h"

enum { TEXT_BYTES = 64 * 1024 };

typedef struct text {
  char *bytes;
  size_t used;
} text;

static void put(text *t, const char *format, ...) __attribute__((format(printf, 2, 3)));
static void put(text *t, const char *format, ...) {
  va_list args;
  va_start(args, format);
  int n = vsnprintf(t->bytes + t->used, TEXT_BYTES - t->used, format, args);
  va_end(args);
  if (n > 0) t->used = t->used + (size_t)n < TEXT_BYTES ? t->used + (size_t)n : TEXT_BYTES - 1;
}

const char *phx__signal_name(int number, char *buffer, size_t bytes) {
  const char *name = sigabbrev_np(number);
  if (name)
    snprintf(buffer, bytes, "SIG%s", name);
  else
    snprintf(buffer, bytes, "signal %d", number);
  return buffer;
}

void phx__rank_end_text(const phx__rank_end *end, char *buffer, size_t bytes) {
  char name[32];
  switch (end->condition) {
    case PHX__RANK_NEVER:
      snprintf(buffer, bytes, "never came");
      break;
    case PHX__RANK_STOPPED:
      snprintf(buffer, bytes, "is stopped (%s)", phx__signal_name(end->number, name, sizeof name));
      break;
    case PHX__RANK_EXITED:
      snprintf(buffer, bytes, "exited with status %d", end->number);
      break;
    case PHX__RANK_KILLED:
      snprintf(buffer, bytes, "was killed by %s", phx__signal_name(end->number, name, sizeof name));
      break;
    default:
      snprintf(buffer, bytes, "alive");
      break;
  }
}

/* The oldest collective the rank is in, else the last one it finished, else NULL. */
static const phx_flight *current(const phx_liveness *page) {
  const phx_flight *in = NULL, *done = NULL;
  for (int i = 0; i < PHX_FLIGHT_RING; i++) {
    const phx_flight *f = &page->ring[i];
    if (!f->sequence) continue;
    if (!f->end_ns && (!in || f->begin_ns < in->begin_ns)) in = f;
    if (f->end_ns && (!done || f->end_ns > done->end_ns)) done = f;
  }
  return in ? in : done;
}

bool phx__flight_is_in(const phx_liveness *page) {
  const phx_flight *f = current(page);
  return f && !f->end_ns;
}

static const phx_flight *find(const phx_liveness *page, uint64_t comm, uint64_t sequence, bool *knows_comm) {
  *knows_comm = page->n_flights == 0;
  const phx_flight *found = NULL;
  for (int i = 0; i < PHX_FLIGHT_RING; i++) {
    const phx_flight *f = &page->ring[i];
    if (!f->sequence || f->comm != comm) continue;
    *knows_comm = true;
    if (f->sequence == sequence) found = f;
  }
  return found;
}

static void put_collective(text *t, const phx_flight *f, uint64_t now) {
  if (!f) {
    put(t, "in no collective yet");
    return;
  }
  put(t, "%s %s %llu", f->end_ns ? "finished" : "in", phx_op_name(f->op), (unsigned long long)f->sequence);
  if (f->unit >= 0) put(t, ", unit %d", f->unit);
  put(t, ", %lld bytes, ", (long long)f->bytes);
  double seconds = ((double)now - (double)(f->end_ns ? f->end_ns : f->begin_ns)) * 1e-9;
  if (seconds < 0) seconds = 0;
  put(t, f->end_ns ? "%.2f s ago" : "for %.2f s", seconds);
}

static void put_rank(text *t, const phx__flight_report *report, int32_t r) {
  const phx__rank_end *end = &report->ends[r];
  const phx_liveness *page = &report->pages[r];
  char condition[64], where[160];
  phx__rank_end_text(end, condition, sizeof condition);
  put(t, "  %4d %8d  %-24s %6lld  ", r, end->pid, condition, (long long)page->step);
  put_collective(t, current(page), report->now_ns);
  if (phx__where_text(page, where, sizeof where)) put(t, "; [main] is in %s", where);
  put(t, "\n");
}

static void put_list(text *t, const bool *chosen, int32_t size) {
  bool any = false;
  for (int32_t r = 0; r < size; r++) {
    if (!chosen[r]) continue;
    put(t, any ? ", %d" : "%d", r);
    any = true;
  }
}

/* For the collective that rank `who` is in: who waits, who is absent, who does something else. */
static void put_absent(text *t, const phx__flight_report *report, int32_t who, bool *told) {
  const phx_flight *f = current(&report->pages[who]);
  bool waiting[PHX_RANKS_MAX] = {false}, absent[PHX_RANKS_MAX] = {false};
  int32_t n_absent = 0;
  if (!f || f->end_ns || told[who]) return;
  for (int32_t r = 0; r < report->size; r++) {
    bool knows_comm;
    const phx_flight *other = find(&report->pages[r], f->comm, f->sequence, &knows_comm);
    if (other && other->op != f->op)
      put(t, "  diverged: rank %d is in %s where rank %d is in %s (number %llu)\n", r, phx_op_name(other->op), who,
          phx_op_name(f->op), (unsigned long long)f->sequence);
    else if (other && !other->end_ns)
      waiting[r] = told[r] = true;
    else if (!other && knows_comm)
      absent[r] = true;
    n_absent += absent[r];
  }
  if (n_absent == 0) return;
  put(t, "  absent: rank ");
  put_list(t, absent, report->size);
  put(t, "; %s %llu waits, entered by rank ", phx_op_name(f->op), (unsigned long long)f->sequence);
  put_list(t, waiting, report->size);
  put(t, "\n");
}

static void put_message(text *t, const phx__flight_report *report, int32_t r, const char *label) {
  char message[sizeof report->pages[r].message];
  memcpy(message, report->pages[r].message, sizeof message);
  message[sizeof message - 1] = 0;
  phx__clean(message, sizeof message);
  if (message[0]) put(t, "  %s: rank %d: %s\n", label, r, message);
}

char *phx__flight_text(const phx__flight_report *report) {
  text t = {phx__calloc(1, TEXT_BYTES), 0};
  bool told[PHX_RANKS_MAX] = {false};
  if (!t.bytes) return NULL;
  put(&t, "phalanx: the job of %d rank%s failed: %s\n", report->size, report->size == 1 ? "" : "s", report->cause);
  put(&t, "  rank      pid  condition                  step  collective\n");
  for (int32_t r = 0; r < report->size; r++) put_rank(&t, report, r);
  for (int32_t r = 0; r < report->size; r++) put_absent(&t, report, r, told);
  if (report->first_failed >= 0) put_message(&t, report, report->first_failed, "first failure");
  if (report->run_dir && report->size > 1)
    put(&t, "  logs of ranks 1 to %d: %s/rank-R.log\n", report->size - 1, report->run_dir);
  return t.bytes;
}
