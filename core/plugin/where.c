/* core/plugin/where.c - the call of a plugin that a rank is in, as text.
 *
 * What it is for: the report on a failed job, and the message of a rank that crashes: so nothing here may use stdio or
 * allocate.  The page may be a copy of anything: numbers out of range say nothing, texts are cut and cleaned.
 * Threads: [any]; also in a signal handler. */
#include "plugin/where.h"

#include <string.h>

#include "base/status.h"

#include "base/clean.h"

void (*phx__where_watch)(int32_t kind);

typedef struct text {
  char *at;
  size_t left; /* the terminating zero included */
} text;

static void put(text *t, const char *s, size_t most) {
  for (; most > 0 && *s && t->left > 1; s++, most--, t->left--) *t->at++ = *s;
  *t->at = 0;
}

static void put_number(text *t, int32_t value) {
  char digits[12];
  size_t n = sizeof digits;
  digits[--n] = 0;
  do digits[--n] = (char)('0' + value % 10);
  while ((value /= 10) > 0);
  put(t, digits + n, sizeof digits);
}

bool phx__where_text(const phx_liveness *page, char *out, size_t bytes) {
  static const char *const kinds[] = {NULL, "strategy", "device", "comm", "model", "optimizer"};
  static const char *const calls[] = {NULL,       "create",  "visit_state, map or state_changed",
                                      "begin_micro_batch", "acquire", "release",
                                      "finish_gradients or discard_gradients", "gradient_norm", "update",
                                      "run_step", "forward", "backward", "a collective of the core", "destroy",
                                      "prepare_state", "state_restored"};
  const int32_t call = __atomic_load_n(&page->in_call, __ATOMIC_RELAXED);
  const int32_t kind = __atomic_load_n(&page->in_plugin, __ATOMIC_RELAXED);
  const int32_t stage = __atomic_load_n(&page->in_stage, __ATOMIC_RELAXED);
  text t = {out, bytes};
  if (bytes == 0) return false;
  out[0] = 0;
  if (call <= PHX_IN_CORE || call > PHX_IN_RESTORED) return false;
  if (kind < PHX_KIND_STRATEGY || kind > PHX_KIND_OPTIMIZER) return false;
  put(&t, kinds[kind], 16);
  put(&t, " ", 1);
  put(&t, page->plugins[kind], sizeof page->plugins[kind] - 1);
  put(&t, ": ", 2);
  put(&t, calls[call], 64);
  if (stage >= 0) {
    put(&t, ", stage ", 8);
    put_number(&t, stage);
  }
  phx__clean(out, bytes);
  return true;
}

void phx__where_reason(const phx_job *job, phx_status status, phx_error *err) {
  char where[160];
  if (!err) return;
  err->message[sizeof err->message - 1] = 0; /* a plugin may have filled it to the brim */
  if (status == PHX_OK || err->message[0]) return;
  const bool known = job && phx__where_text(job->mine, where, sizeof where);
  phx_fail(err, status, "%s failed with %s (status %d) and gave no reason", known ? where : "a call",
           phx__status_name(status), status);
}
