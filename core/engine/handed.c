/* core/engine/handed.c - see handed.h.  Every message names the strategy, its call, the value and what was expected. */
#include "engine/handed.h"

#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>

#include "base/status.h"

enum { STRUCT_MOST = 65536 /* bytes: a struct_size above is no struct's */ };

static const char *id_of(const phx__runtime *rt) { return rt->config->strategy.plugin->descriptor->id; }
static const char *unit_name(const phx__runtime *rt, uint32_t unit) {
  return phx_model_unit(rt->prepared->model, unit)->name;
}

/* A struct of version 1 has at least `least` bytes. */
static bool plausible(size_t struct_size, size_t least) { return struct_size >= least && struct_size <= STRUCT_MOST; }

/* ---- memory ---- */
/* Does [p, p + bytes) begin in an allocation of the host's and end outside it?  Memory that is not the host's is the
 * plugin's own business. */
static bool overruns(const phx__memory_book *book, const void *p, int64_t bytes) {
  for (size_t i = 0; i < book->n; i++) {
    const phx__allocation *a = &book->list[i];
    const int64_t at = (int64_t)((uintptr_t)p - (uintptr_t)a->p);
    if ((uintptr_t)p >= (uintptr_t)a->p && at < a->bytes) return bytes > a->bytes - at;
  }
  return false;
}

/* What is checked.  It becomes text only in a message: checks are made hundreds of times a micro-batch. */
typedef struct thing {
  const char *call;
  const char *part;    /* "memory of state"; where no unit follows, "gradient of" */
  const char *name;    /* the unit's; without a unit, the parameter's or the private state's */
  int64_t stage, unit; /* -1: none */
  int32_t state;       /* PHX_STATE_*, said behind part; -1: not said */
} thing;

static phx_status wrong(const phx__runtime *rt, const thing *t, phx_error *err, const char *format, ...)
    __attribute__((format(printf, 4, 5)));

/* "strategy fsdp: update: the m of unit 3 (h.2)", and what is wrong with it. */
static phx_status wrong(const phx__runtime *rt, const thing *t, phx_error *err, const char *format, ...) {
  char stage[32] = "", state[16] = "", what[160], wrongs[160];
  va_list args;
  va_start(args, format);
  vsnprintf(wrongs, sizeof wrongs, format, args);
  va_end(args);
  if (t->stage >= 0) snprintf(stage, sizeof stage, ", stage %" PRId64, t->stage);
  if (t->state >= 0) snprintf(state, sizeof state, " %d", t->state);
  if (t->unit < 0) snprintf(what, sizeof what, "%s %.64s", t->part, t->name);
  else snprintf(what, sizeof what, "%s%s of unit %" PRId64 " (%.64s)", t->part, state, t->unit, t->name);
  return phx_fail(err, PHX_INTERNAL, "strategy %s: %s%s: the %s %s", id_of(rt), t->call, stage, what, wrongs);
}

static phx_status check_memory(const phx__runtime *rt, const thing *t, const void *p, int64_t bytes, size_t align,
                               phx_error *err) {
  if (!p) return wrong(rt, t, err, "is NULL");
  if ((uintptr_t)p % align) return wrong(rt, t, err, "is at %p, which is no multiple of %zu bytes", p, align);
  if (rt->config->s.run.checked != 1 || !overruns(&rt->book, p, bytes)) return PHX_OK;
  return wrong(rt, t, err, "takes %" PRId64 " bytes, and the allocation that it begins in ends before", bytes);
}

/* ---- views ---- */
enum { COORDINATE = 64 /* elements: where a parameter may begin */ };

/* One parameter of a view. */
typedef struct shown {
  const phx_param *param;
  const phx_param_view *view;
  thing thing;
} shown;

static phx_status check_weight(const phx__runtime *rt, shown *s, phx_error *err) {
  const phx_param_view *v = s->view;
  const size_t size = phx_dtype_bytes(v->weight_dtype);
  s->thing.part = "weight of";
  if (v->weight_dtype != rt->prepared->topology.compute_dtype)
    return wrong(rt, &s->thing, err, "has dtype %d; expected %d", v->weight_dtype,
                 rt->prepared->topology.compute_dtype);
  return check_memory(rt, &s->thing, v->weight, s->param->numel * (int64_t)size,
                      rt->config->s.run.checked == 1 ? COORDINATE * size : size, err);
}

static phx_status check_gradient(const phx__runtime *rt, shown *s, phx_error *err) {
  const phx_param_view *v = s->view;
  s->thing.part = "gradient of";
  if (v->gradient_dtype != PHX_F32)
    return wrong(rt, &s->thing, err, "has dtype %d; expected %d", v->gradient_dtype, PHX_F32);
  if (v->gradient_mode != PHX_GRAD_WRITE && v->gradient_mode != PHX_GRAD_ADD)
    return wrong(rt, &s->thing, err, "has mode %d: neither write nor add", v->gradient_mode);
  return check_memory(rt, &s->thing, v->gradient, s->param->numel * (int64_t)sizeof(float),
                      rt->config->s.run.checked == 1 ? COORDINATE * sizeof(float) : sizeof(float), err);
}

static phx_status check_param(const phx__runtime *rt, const phx_use *use, int32_t pass, uint32_t expected, shown *s,
                              phx_error *err) {
  const phx_param_view *v = s->view;
  const bool backward = pass == PHX_PASS_BACKWARD;
  phx_status status = PHX_OK;
  s->param = phx_model_param(rt->prepared->model, expected);
  s->thing.name = s->param->name;
  if (v->param != expected)
    return phx_fail(err, PHX_INTERNAL,
                    "strategy %s: %s, stage %" PRId64 ": the view has parameter %u where %u (%s) is expected",
                    id_of(rt), s->thing.call, s->thing.stage, v->param, expected, s->param->name);
  if (v->weight || (use->flags & (backward ? PHX_USE_BACKWARD : PHX_USE_FORWARD))) status = check_weight(rt, s, err);
  if (status || !backward || !(use->flags & PHX_USE_GRADIENT) || (s->param->flags & PHX_PARAM_FROZEN)) return status;
  return check_gradient(rt, s, err);
}

static phx_status check_view(const phx__runtime *rt, uint32_t stage, const phx_view *view, uint32_t n,
                             phx_error *err) {
  const char *id = id_of(rt);
  if (!view)
    return phx_fail(err, PHX_INTERNAL, "strategy %s: acquire, stage %u gave no view (NULL) and PHX_OK", id, stage);
  if (!plausible(view->struct_size, offsetof(phx_view, ready) + sizeof view->ready))
    return phx_fail(err, PHX_INTERNAL,
                    "strategy %s: acquire, stage %u: the view's struct_size is %zu; expected %zu or more", id, stage,
                    view->struct_size, sizeof *view);
  if (view->n_params != n || (n > 0 && !view->params))
    return phx_fail(err, PHX_INTERNAL, "strategy %s: acquire, stage %u: the view has %u parameters at %p; expected %u",
                    id, stage, view->n_params, (const void *)view->params, n);
  if (n == 0 || (view->param_stride >= sizeof(phx_param_view) && view->param_stride <= STRUCT_MOST &&
                 view->param_stride % _Alignof(phx_param_view) == 0))
    return PHX_OK;
  return phx_fail(err, PHX_INTERNAL, "strategy %s: acquire, stage %u: the view's param_stride is %u; expected %zu", id,
                  stage, view->param_stride, sizeof(phx_param_view));
}

phx_status phx__handed_view(const phx__runtime *rt, uint32_t stage, int32_t pass, const phx_view *view,
                            phx_error *err) {
  const phx_model *m = rt->prepared->model;
  const phx_stage *s = phx_model_stage(m, stage);
  uint32_t n = 0;
  for (uint32_t i = 0; i < s->n_uses; i++) n += phx_model_unit(m, phx_model_use(m, s->first_use + i)->unit)->n_params;
  phx_status status = check_view(rt, stage, view, n, err);
  if (status) return status;
  shown one = {.thing = {.call = "acquire", .stage = stage, .unit = -1, .state = -1}};
  const char *at = (const char *)view->params;
  for (uint32_t i = 0; i < s->n_uses; i++) {
    const phx_use *use = phx_model_use(m, s->first_use + i);
    const phx_unit *unit = phx_model_unit(m, use->unit);
    for (uint32_t k = 0; k < unit->n_params && !status; k++, at += view->param_stride) {
      one.view = (const phx_param_view *)(const void *)at;
      status = check_param(rt, use, pass, unit->first_param + k, &one, err);
    }
  }
  return status;
}

/* ---- coordinates ---- */
/* Blocks [first, first + blocks) of a unit's flat; call: "visit_state". */
static phx_status check_blocks(const phx__runtime *rt, const char *call, uint32_t unit, uint32_t flat, int64_t first,
                               int64_t blocks, phx_error *err) {
  const phx_model *m = rt->prepared->model;
  if (unit >= m->n_units)
    return phx_fail(err, PHX_INTERNAL, "strategy %s: %s: unit %u; the model has %u", id_of(rt), call, unit, m->n_units);
  if (flat >= PHX_FLATS)
    return phx_fail(err, PHX_INTERNAL, "strategy %s: %s: flat %u of unit %u (%s); there are %d", id_of(rt), call, flat,
                    unit, unit_name(rt, unit), PHX_FLATS);
  const int64_t all = phx_model_unit(m, unit)->blocks[flat];
  if (first >= 0 && blocks > 0 && first < all && blocks <= all - first) return PHX_OK;
  return phx_fail(err, PHX_INTERNAL,
                  "strategy %s: %s: %" PRId64 " blocks from %" PRId64 " on, of unit %u (%s), which has %" PRId64,
                  id_of(rt), call, blocks, first, unit, unit_name(rt, unit), all);
}

/* ---- state ---- */
static phx_status check_place(const phx__runtime *rt, const char *call, int32_t place, phx_error *err) {
  if (place >= PHX_SPACE_DEVICE && place <= PHX_SPACE_PINNED) return PHX_OK;
  return phx_fail(err, PHX_INTERNAL, "strategy %s: %s: place %d is no PHX_SPACE_*", id_of(rt), call, place);
}

static phx_status check_state_kind(const phx__runtime *rt, const phx_slice *s, phx_error *err) {
  const phx_optim *o = &rt->optim.table;
  if (s->kind < PHX_STATE_WEIGHT || s->kind > PHX_STATE_PRIVATE)
    return phx_fail(err, PHX_INTERNAL, "strategy %s: visit_state: state of kind %d; there are 0 to %d", id_of(rt),
                    s->kind, PHX_STATE_PRIVATE);
  if (s->kind == PHX_STATE_PRIVATE && (!s->name || !s->name[0]))
    return phx_fail(err, PHX_INTERNAL, "strategy %s: visit_state: private state without a name", id_of(rt));
  if (s->kind == PHX_STATE_OPTIM && s->state_index >= o->n_states)
    return phx_fail(err, PHX_INTERNAL, "strategy %s: visit_state: optimizer state %u; %s has %u", id_of(rt),
                    s->state_index, o->name, o->n_states);
  if (s->kind == PHX_STATE_OPTIM && s->flat != PHX_FLAT_TRAINABLE)
    return phx_fail(err, PHX_INTERNAL, "strategy %s: visit_state: optimizer state of flat %u, which has none",
                    id_of(rt), s->flat);
  int32_t dtype = PHX_F32;
  if (s->kind == PHX_STATE_OPTIM) dtype = o->states[s->state_index].dtype;
  const bool low = s->kind == PHX_STATE_WEIGHT && s->dtype == rt->prepared->topology.compute_dtype;
  if (phx_dtype_bytes(s->dtype) && (s->kind >= PHX_STATE_BUFFER || s->dtype == dtype || low)) return PHX_OK;
  return phx_fail(err, PHX_INTERNAL, "strategy %s: visit_state: state of kind %d has dtype %d; expected %d",
                  id_of(rt), s->kind, s->dtype, dtype);
}

phx_status phx__handed_slice(const phx__runtime *rt, const phx_slice *s, phx_error *err) {
  if (!s) return phx_fail(err, PHX_INTERNAL, "strategy %s: visit_state named no slice (NULL)", id_of(rt));
  const size_t least = offsetof(phx_slice, where) + sizeof s->where;
  if (!plausible(s->struct_size, least))
    return phx_fail(err, PHX_INTERNAL, "strategy %s: visit_state: a slice's struct_size is %zu; expected %zu or more",
                    id_of(rt), s->struct_size, least);
  if (PHX_HAS(s, phx_slice, numel) && s->numel)
    return phx_fail(err, PHX_UNSUPPORTED,
                    "strategy %s: visit_state: a slice has numel %" PRId64 ", which is reserved: expected 0", id_of(rt),
                    s->numel);
  phx_status status = check_state_kind(rt, s, err);
  if (!status) status = check_place(rt, "visit_state", s->place, err);
  if (status || s->kind != PHX_STATE_PRIVATE)
    return status ? status : check_blocks(rt, "visit_state", s->unit, s->flat, s->first_block, s->blocks, err);
  if (s->blocks > 0 && s->blocks <= INT64_MAX / (PHX_BLOCK * 8)) return PHX_OK;
  return phx_fail(err, PHX_INTERNAL, "strategy %s: visit_state: private state %.64s has %" PRId64 " blocks", id_of(rt),
                  s->name, s->blocks);
}

phx_status phx__handed_map(const phx__runtime *rt, const phx_slice *s, const void *p, phx_error *err) {
  const size_t size = phx_dtype_bytes(s->dtype);
  thing t = {.call = "map", .part = "memory of private state", .name = s->name, .stage = -1, .unit = -1, .state = -1};
  if (s->kind != PHX_STATE_PRIVATE) {
    t.part = "memory of state";
    t.state = s->kind;
    t.unit = s->unit;
    t.name = unit_name(rt, s->unit);
  }
  return check_memory(rt, &t, p, s->blocks * PHX_BLOCK * (int64_t)size, size, err);
}

/* ---- gradients ---- */
phx_status phx__handed_gradient(const phx__runtime *rt, uint32_t unit, int64_t first_block, int64_t blocks,
                                const float *gradient, phx_error *err) {
  PHX_TRY(check_blocks(rt, "gradient_norm", unit, PHX_FLAT_TRAINABLE, first_block, blocks, err));
  const thing t = {.call = "gradient_norm", .part = "gradient", .name = unit_name(rt, unit),
                   .stage = -1, .unit = unit, .state = -1};
  return check_memory(rt, &t, gradient, blocks * PHX_BLOCK * (int64_t)sizeof *gradient, sizeof *gradient, err);
}

static phx_status check_ticket_numbers(const phx__runtime *rt, const phx_ticket *t, float scale, phx_error *err) {
  const phx_model *m = rt->prepared->model;
  if (!t) return phx_fail(err, PHX_INTERNAL, "strategy %s: update: no ticket (NULL)", id_of(rt));
  if (!plausible(t->struct_size, offsetof(phx_ticket, stream) + sizeof t->stream))
    return phx_fail(err, PHX_INTERNAL, "strategy %s: update: a ticket's struct_size is %zu; expected %zu or more",
                    id_of(rt), t->struct_size, sizeof *t);
  if (t->unit >= m->n_units)
    return phx_fail(err, PHX_INTERNAL, "strategy %s: update: ticket for unit %u; the model has %u", id_of(rt), t->unit,
                    m->n_units);
  const int64_t all = phx_model_unit(m, t->unit)->blocks[PHX_FLAT_TRAINABLE] * PHX_BLOCK;
  if (t->first < 0 || t->numel < 0 || t->first > all || t->numel > all - t->first)
    return phx_fail(err, PHX_INTERNAL,
                    "strategy %s: update: ticket for unit %u (%s), %" PRId64 " elements from %" PRId64
                    " on: out of range, it has %" PRId64,
                    id_of(rt), t->unit, unit_name(rt, t->unit), t->numel, t->first, all);
  if (scale != rt->optim.scale)
    return phx_fail(err, PHX_INTERNAL, "strategy %s: update: a ticket's scale is %.9g; update was given %.9g",
                    id_of(rt), (double)scale, (double)rt->optim.scale);
  return check_place(rt, "update", t->place, err);
}

static phx_status check_ticket_part(const phx__runtime *rt, const phx_ticket *t, const char *part, const void *p,
                                    int32_t dtype, phx_error *err) {
  const size_t size = phx_dtype_bytes(dtype);
  const thing what = {.call = "update", .part = part, .name = unit_name(rt, t->unit),
                      .stage = -1, .unit = t->unit, .state = -1};
  if (!size) return wrong(rt, &what, err, "has dtype %d", dtype);
  return check_memory(rt, &what, p, t->numel * (int64_t)size, size, err);
}

phx_status phx__handed_ticket(const phx__runtime *rt, const phx_ticket *t, float scale, phx_error *err) {
  const phx_optim *o = &rt->optim.table;
  phx_status status = check_ticket_numbers(rt, t, scale, err);
  if (status || t->numel == 0) return status;
  if (t->weight || !t->master) status = check_ticket_part(rt, t, "weight", t->weight, t->weight_dtype, err);
  if (!status && t->master) status = check_ticket_part(rt, t, "master", t->master, PHX_F32, err);
  if (!status) status = check_ticket_part(rt, t, "gradient", t->gradient, t->gradient_dtype, err);
  for (uint32_t k = 0; k < o->n_states && !status; k++)
    status = check_ticket_part(rt, t, o->states[k].name, t->states[k], o->states[k].dtype, err);
  return status;
}

/* ---- what create gives ---- */
phx_status phx__handed_self(const void *self, const char *kind, const phx_plugin *plugin, phx_error *err) {
  if (self) return PHX_OK;
  return phx_fail(err, PHX_INTERNAL, "%s %s: create gave nothing (*out is NULL) and PHX_OK", kind, plugin->id);
}

/* The calls that the core makes itself: version 1 ends behind `scale`. */
phx_status phx__handed_device(const phx_device *device, const phx_ops *ops, const phx_plugin *plugin, phx_error *err) {
  if (!device || !ops)
    return phx_fail(err, PHX_INTERNAL, "device %s gave no device or no operations (NULL)", plugin->id);
  if (!plausible(device->struct_size, offsetof(phx_device, space)) || !device->name)
    return phx_fail(err, PHX_INTERNAL, "device %s: the device's struct_size is %zu and its name at %p; expected %zu",
                    plugin->id, device->struct_size, (const void *)device->name, sizeof *device);
  if (!plausible(ops->struct_size, sizeof *ops) || ops->scratch_bytes < 0)
    return phx_fail(err, PHX_INTERNAL,
                    "device %s: the operations' struct_size is %zu, expected %zu or more; scratch of %" PRId64 " B",
                    plugin->id, ops->struct_size, sizeof *ops, ops->scratch_bytes);
  if (device->stream_synchronize && device->stream_wait && device->copy && device->zero) return PHX_OK;
  return phx_fail(err, PHX_INTERNAL, "device %s: one of stream_synchronize, stream_wait, copy and zero is NULL",
                  plugin->id);
}

phx_status phx__handed_comm(const phx_comm *comm, const phx_job *job, const phx_plugin *plugin, phx_error *err) {
  PHX_TRY(phx__handed_self(comm, "comm", plugin, err));
  if (!plausible(comm->struct_size, sizeof *comm))
    return phx_fail(err, PHX_INTERNAL, "comm %s: the communicator's struct_size is %zu; expected %zu or more",
                    plugin->id, comm->struct_size, sizeof *comm);
  if (comm->rank != job->rank || comm->size != job->size)
    return phx_fail(err, PHX_INTERNAL, "comm %s: the communicator has rank %d of %d; this is rank %d of %d",
                    plugin->id, comm->rank, comm->size, job->rank, job->size);
  const bool works = comm->all_reduce && comm->all_gather && comm->split && comm->stats && comm->destroy;
  if (works && comm->health && comm->abort) return PHX_OK;
  return phx_fail(err, PHX_INTERNAL,
                  "comm %s: one of all_reduce, all_gather, split, stats, destroy, health and abort is NULL",
                  plugin->id);
}
