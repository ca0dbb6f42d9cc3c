/* core/engine/plan_kept.c - see plan_kept.h.
 *
 * Invariant: numbers that pass the checks can be added up, 2^12 of them, without an overflow of int64.
 * Does not: say whether a plan fits a machine. */
#include "engine/plan_kept.h"

#include <inttypes.h>
#include <stdio.h>

#include "base/bytes_text.h"
#include "base/status.h"
#include "plugin/host.h"

#define MOST (INT64_C(1) << 50) /* of bytes: 1 PiB; of calls, too */

/* ---- before ---- */
static const char *strategy_of(const phx__prepared *p) { return p->config->strategy.plugin->descriptor->id; }

static phx_status impossible(const char *kind, const char *id, const char *what, int64_t value, phx_error *err) {
  return phx_fail(err, PHX_INVALID, "%s %s plans %" PRId64 " %s: expected 0 to %" PRId64, kind, id, value, what, MOST);
}

static phx_status check_flags(const phx__prepared *p, phx_error *err) {
  const uint64_t unknown = p->layout.flags & ~(uint64_t)PHX_LAYOUT_REPLICAS_DIFFER;
  if (unknown)
    return phx_fail(err, PHX_UNSUPPORTED, "strategy %s: layout gave flag %d, which this phalanx %s", strategy_of(p),
                    __builtin_ctzll(unknown),
                    unknown & PHX_LAYOUT_NORM_PER_REPLICA ? "has reserved and cannot honour yet" : "does not know");
  if (!p->layout.flags) return PHX_OK;
  if (p->config->strategy.plugin->descriptor->provides & PHX_CAP_DETERMINISTIC)
    return phx_fail(err, PHX_INVALID,
                    "strategy %s: its replicas differ by design (layout), and yet it promises the same bits as other "
                    "strategies (PHX_CAP_DETERMINISTIC)", strategy_of(p));
  if (p->config->s.run.checked == 1)
    return phx_fail(err, PHX_UNSUPPORTED,
                    "run.checked = yes: the replicas of strategy %s differ by design, so what they compute with is not "
                    "the state: use no", strategy_of(p));
  return PHX_OK;
}

phx_status phx__plan_check_layout(const phx__prepared *p, phx_error *err) {
  enum { SLOTS_MOST = 1 << 20 };
  const phx_layout *l = &p->layout;
  if (l->data_size < 1 || l->data_size > p->topology.world_size || l->data_rank < 0 || l->data_rank >= l->data_size)
    return phx_fail(err, PHX_INVALID, "strategy %s: layout gave data rank %d of %d, in a world of %d", strategy_of(p),
                    l->data_rank, l->data_size, p->topology.world_size);
  if (l->activation_slots < 1 || l->activation_slots > SLOTS_MOST)
    return phx_fail(err, PHX_INVALID, "strategy %s: layout gave %d activation slots", strategy_of(p),
                    l->activation_slots);
  if (l->n_axes > sizeof l->axes / sizeof *l->axes)
    return phx_fail(err, PHX_INVALID, "strategy %s: layout gave %u axes; there is room for %d", strategy_of(p),
                    l->n_axes, PHX_AXES_ROOM);
  if (l->gradient_terms < 0 || l->gradient_terms > MOST)
    return phx_fail(err, PHX_INVALID,
                    "strategy %s: layout gave %" PRId64 " terms of a gradient: expected 0 (the plain sum), 1 (a mean), "
                    "or how many", strategy_of(p), l->gradient_terms);
  return check_flags(p, err);
}

phx_status phx__plan_check_stage(const phx__prepared *p, uint32_t stage, phx_error *err) {
  const phx_stage_memory *m = &p->stages[stage].memory;
  const struct {
    int64_t bytes;
    const char *what;
  } parts[] = {{m->output, "output"}, {m->saved, "saved tensors"}, {m->workspace, "workspace"}};
  for (size_t i = 0; i < sizeof parts / sizeof *parts; i++) {
    char what[64];
    snprintf(what, sizeof what, "bytes of %s in stage %u", parts[i].what, stage);
    if (parts[i].bytes < 0 || parts[i].bytes > MOST)
      return impossible("model", p->config->model.plugin->descriptor->id, what, parts[i].bytes, err);
  }
  return PHX_OK;
}

phx_status phx__plan_check_workspace(const phx__prepared *p, int64_t bytes, phx_error *err) {
  if (bytes >= 0 && bytes <= MOST) return PHX_OK;
  return impossible("optimizer", p->config->optimizer.plugin->descriptor->id, "bytes of workspace", bytes, err);
}

static phx_status check_traffic(const phx__prepared *p, int32_t op, phx_error *err) {
  const phx_estimate *e = &p->estimate;
  char what[64];
  snprintf(what, sizeof what, "calls of %s", phx_op_name(op));
  if (e->calls[op] < 0 || e->calls[op] > MOST) return impossible("strategy", strategy_of(p), what, e->calls[op], err);
  snprintf(what, sizeof what, "bytes sent by %s", phx_op_name(op));
  if (e->sent[op] < 0 || e->sent[op] > MOST) return impossible("strategy", strategy_of(p), what, e->sent[op], err);
  if (e->sent[op] == 0 || e->calls[op] > 0) return PHX_OK;
  return phx_fail(err, PHX_INVALID, "strategy %s plans %" PRId64 " bytes sent by %s in no call", strategy_of(p),
                  e->sent[op], phx_op_name(op));
}

/* What lies behind the last kind and the last collective that this core knows. */
static phx_status check_room(const phx__prepared *p, phx_error *err) {
  const phx_estimate *e = &p->estimate;
  for (int32_t k = PHX_MEM_KINDS; k < PHX_MEM_KINDS_ROOM; k++)
    if (e->bytes[k])
      return phx_fail(err, PHX_UNSUPPORTED,
                      "strategy %s plans %" PRId64 " bytes of memory kind %d, which this phalanx does not have",
                      strategy_of(p), e->bytes[k], k);
  for (int32_t op = PHX_OPS; op < PHX_OPS_ROOM; op++)
    if (e->calls[op] || e->sent[op])
      return phx_fail(err, PHX_UNSUPPORTED,
                      "strategy %s plans %" PRId64 " calls of collective %d, which this phalanx does not have",
                      strategy_of(p), e->calls[op], op);
  if (e->period == 0 || e->period == 1) return PHX_OK;
  return phx_fail(err, PHX_UNSUPPORTED,
                  "strategy %s plans its traffic for periods of %" PRId64 " steps; this phalanx measures single steps",
                  strategy_of(p), e->period);
}

phx_status phx__plan_check_estimate(const phx__prepared *p, int64_t comm_buffers, phx_error *err) {
  const phx_estimate *e = &p->estimate;
  int64_t all = 0;
  for (int32_t k = 0; k < PHX_MEM_KINDS; k++) {
    char what[64];
    snprintf(what, sizeof what, "bytes of %s", phx__memory_name(k));
    if (e->bytes[k] < 0 || e->bytes[k] > MOST) return impossible("strategy", strategy_of(p), what, e->bytes[k], err);
    all += e->bytes[k];
  }
  if (e->arena_bytes < 0 || e->arena_bytes > all)
    return phx_fail(err, PHX_INVALID,
                    "strategy %s plans %" PRId64 " bytes with a communicator, of %" PRId64 " bytes in all",
                    strategy_of(p), e->arena_bytes, all);
  if (e->state_bytes < 0 || e->state_bytes > MOST)
    return impossible("strategy", strategy_of(p), "bytes of state", e->state_bytes, err);
  if (comm_buffers < 0 || comm_buffers > MOST)
    return impossible("comm", p->config->comm.plugin->descriptor->id, "bytes of buffers", comm_buffers, err);
  phx_status status = check_room(p, err);
  for (int32_t op = 0; op < PHX_OPS && !status; op++) status = check_traffic(p, op, err);
  return status;
}

/* ---- after ---- */
typedef struct telling {
  phx__plan_say_fn *say;
  void *arg;
  int32_t rank, n;
} telling;

static void tell(telling *t, const char *what, const char *unit, int64_t planned, int64_t measured) {
  char line[200];
  if (planned == measured) return;
  t->n++;
  snprintf(line, sizeof line, "rank %d: %s: %" PRId64 " %s planned, %" PRId64 " measured", t->rank, what, planned, unit,
           measured);
  if (t->say) t->say(t->arg, line);
}

static void tell_memory(telling *t, const char *whose, int64_t grown, int64_t allowed) {
  char line[200], much[24], most[24];
  if (grown <= allowed) return;
  t->n++;
  phx__bytes_text(grown, much);
  phx__bytes_text(allowed, most);
  snprintf(line, sizeof line, "rank %d: %s took %s beside the plan, not through the host; %s are ordinary", t->rank,
           whose, much, most);
  if (t->say) t->say(t->arg, line);
}

int32_t phx__plan_differences(const phx__rank_report *ranks, int32_t n, phx__plan_say_fn *say, void *arg) {
  telling t = {.say = say, .arg = arg};
  for (t.rank = 0; t.rank < n; t.rank++) {
    const phx__rank_report *r = &ranks[t.rank];
    for (int32_t k = 0; k < PHX_MEM_KINDS; k++)
      tell(&t, phx__memory_name(k), "bytes", r->planned[k], r->measured[k]);
    for (int32_t op = 0; r->traffic_counts && op < PHX_OPS; op++) {
      tell(&t, phx_op_name(op), "bytes a step", r->sent_planned[op], r->sent_measured[op]);
      tell(&t, phx_op_name(op), "calls a step", r->calls_planned[op], r->calls_measured[op]);
    }
    tell_memory(&t, "the strategy's calls until the first step", r->hidden_bytes, r->hidden_allowed);
    tell_memory(&t, "the steps after the first", r->later_bytes, r->later_allowed);
  }
  return t.n;
}
