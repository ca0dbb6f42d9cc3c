/* core/engine/runtime_open.c - see runtime_open.h.  A failed open closes what was opened. */
#include "engine/runtime_open.h"

#include <stdio.h>
#include <string.h>

#include "base/job_calls.h"
#include "base/status.h"
#include "base/sys.h"
#include "engine/cpus.h"
#include "engine/handed.h"
#include "engine/memory_watch.h"
#include "engine/prepare.h"
#include "engine/state_io.h"
#include "plugin/comm_watch.h"
#include "plugin/where.h"

/* What state passes through on devices that the CPU cannot read. */
static phx_status take_chunk(phx__runtime *rt, phx_error *err) {
  const phx_memory what = {.struct_size = sizeof what, .bytes = phx__state_io_bytes(rt->device),
                           .kind = PHX_MEM_BUFFER, .space = PHX_SPACE_PINNED};
  if (what.bytes == 0) return PHX_OK;
  rt->prepared->planned[PHX_MEM_BUFFER] += phx_align_bytes(what.bytes);
  return rt->core_host.table.alloc(&rt->core_host, &what, &rt->chunk, err);
}

static phx_status open_device(phx__runtime *rt, phx_error *err) {
  const phx__config *c = rt->config;
  const phx_device_table *table = rt->prepared->device;
  int32_t threads = 1;
  PHX_TRY(phx__threads_of_rank(c, rt->job, &threads, err));
  PHX_TRY(PHX__IN(rt->job, PHX_KIND_DEVICE, PHX_IN_CREATE, -1,
                  table->create(&rt->device_host.table, c->device.config, threads, &rt->device_self, err)));
  PHX_TRY(phx__handed_self(rt->device_self, "device", c->device.plugin->descriptor, err));
  rt->book.device_table = table;
  rt->book.device_self = rt->device_self;
  rt->device = table->device(rt->device_self);
  rt->ops = table->ops(rt->device_self);
  PHX_TRY(phx__handed_device(rt->device, rt->ops, c->device.plugin->descriptor, err));
  rt->prepared->planned[PHX_MEM_WORKSPACE] += phx_align_bytes(rt->ops->scratch_bytes);
  phx__memory_book_hold(&rt->book, PHX_MEM_WORKSPACE, PHX_SPACE_DEVICE,
                        phx_align_bytes(rt->ops->scratch_bytes));
  rt->book.device = rt->device;
  return take_chunk(rt, err);
}

static phx_status open_comm(phx__runtime *rt, phx_error *err) {
  int64_t arena = 0;
  PHX_TRY(phx__job_max(rt->job, rt->prepared->estimate.arena_bytes, &arena, err));
  rt->comm_host.device = rt->device;
  PHX_TRY(PHX__IN(rt->job, PHX_KIND_COMM, PHX_IN_CREATE, -1,
                  rt->prepared->comm->create(&rt->comm_host.table, rt->config->comm.config, arena, &rt->world, err)));
  PHX_TRY(phx__handed_comm(rt->world, rt->job, rt->config->comm.plugin->descriptor, err));
  phx__comm_watch_open(rt->world);
  phx__memory_book_hold(&rt->book, PHX_MEM_BUFFER, PHX_SPACE_HOST,
                        rt->prepared->comm->buffer_bytes(rt->config->comm.config, rt->job->size));
  rt->book.arena = rt->prepared->comm->arena(rt->world);
  rt->book.arena_bytes = rt->prepared->estimate.arena_bytes;
  return PHX__IN_COMM(rt->job, rt->world->split(rt->world->ctx, 0, rt->world->rank, &rt->core, err));
}

static phx_status open_model(phx__runtime *rt, phx_error *err) {
  rt->model_host.device = rt->device;
  rt->model_host.ops = rt->ops;
  const phx_status status =
      PHX__IN(rt->job, PHX_KIND_MODEL, PHX_IN_CREATE, -1,
              rt->prepared->model_table->create(&rt->model_host.table, rt->config->model.config, rt->prepared->model,
                                                &rt->prepared->shape, &rt->model, err));
  return status ? status : phx__handed_self(rt->model, "model", rt->config->model.plugin->descriptor, err);
}

/* What a plugin cannot run without. */
static phx_status check_needs(const phx__runtime *rt, phx__host *host, const phx_plugin *d, phx_error *err) {
  const char *kind = phx__kind_name(d->kind);
  if ((d->needs & PHX_NEED_HOST_MEMORY) && !(rt->device->caps & PHX_DEVICE_HOST_MEMORY))
    return phx_fail(err, PHX_UNSUPPORTED, "%s %s needs a device whose memory the CPU can read; %s is none", kind,
                     d->id, rt->device->name);
  for (const char *const *wanted = d->extensions; wanted && *wanted; wanted++)
    if (!host->table.extension(host, *wanted))
      return phx_fail(err, PHX_UNSUPPORTED, "%s %s needs the host extension %s, which this core does not offer to it",
                       kind, d->id, *wanted);
  return PHX_OK;
}

static phx_status open_optimizer(phx__runtime *rt, phx_error *err) {
  const phx_plugin *d = rt->config->optimizer.plugin->descriptor;
  rt->optimizer_host.device = rt->device;
  rt->optimizer_host.ops = rt->ops;
  PHX_TRY(check_needs(rt, &rt->optimizer_host, d, err));
  PHX_TRY(PHX__IN(rt->job, PHX_KIND_OPTIMIZER, PHX_IN_CREATE, -1,
                  rt->prepared->optimizer->create(&rt->optimizer_host.table, rt->config->optimizer.config,
                                                  rt->prepared->model, &rt->optimizer, err)));
  PHX_TRY(phx__handed_self(rt->optimizer, "optimizer", d, err));
  phx__optim_init(&rt->optim, rt->prepared, rt->job, rt->optimizer);
  return PHX_OK;
}

static phx_status open_strategy(phx__runtime *rt, phx_error *err) {
  rt->strategy_host.device = rt->device;
  rt->strategy_host.comm = rt->world;
  rt->strategy_host.optim = &rt->optim.table;
  PHX_TRY(check_needs(rt, &rt->strategy_host, rt->config->strategy.plugin->descriptor, err));
  PHX_TRY(phx__cover_open(rt->prepared->model, 1 + rt->optim.table.n_states, &rt->state_cover, err));
  rt->state_cover.frozen = true;
  rt->state_words = phx__calloc((size_t)phx__cover_size(&rt->state_cover), sizeof *rt->state_words);
  if (!rt->state_words) return phx_fail(err, PHX_NOMEM, "no memory to count the state");
  phx__memory_watch_begin(&rt->book);
  PHX_TRY(PHX__IN_STRATEGY(rt->job, PHX_IN_CREATE, -1,
                           rt->prepared->strategy->create(&rt->strategy_host.table, rt->config->strategy.config,
                                                          &rt->prepared->topology, rt->prepared->model, &rt->strategy,
                                                          err)));
  return phx__handed_self(rt->strategy, "strategy", rt->config->strategy.plugin->descriptor, err);
}

static void name_plugins(const phx__config *c, const phx_job *job) {
  const phx__selected *const chosen[] = {NULL, &c->strategy, &c->device, &c->comm, &c->model,
                                         &c->optimizer}; /* by PHX_KIND_* */
  for (int kind = PHX_KIND_STRATEGY; kind <= PHX_KIND_OPTIMIZER; kind++)
    snprintf(job->mine->plugins[kind], sizeof job->mine->plugins[kind], "%s", chosen[kind]->plugin->descriptor->id);
}

phx_status phx__runtime_open(const phx__config *config, const phx_job *job, phx__prepared *prepared,
                             phx__runtime **out, phx_error *err) {
  phx_status status = PHX_OK;
  phx__runtime *rt = phx__calloc(1, sizeof *rt);
  if (!rt) {
    phx__prepared_free(prepared);
    return phx_fail(err, PHX_NOMEM, "no memory for the run");
  }
  rt->config = config;
  rt->job = job;
  rt->prepared = prepared;
  name_plugins(config, job);
  phx__host_init(&rt->core_host, "core", job, &rt->book);
  phx__host_init(&rt->device_host, config->device.plugin->descriptor->id, job, &rt->book);
  phx__host_init(&rt->comm_host, config->comm.plugin->descriptor->id, job, &rt->book);
  phx__host_init(&rt->model_host, config->model.plugin->descriptor->id, job, &rt->book);
  phx__host_init(&rt->optimizer_host, config->optimizer.plugin->descriptor->id, job, &rt->book);
  phx__host_init(&rt->strategy_host, config->strategy.plugin->descriptor->id, job, &rt->book);
  phx__host *const hosts[] = {&rt->core_host,  &rt->device_host,    &rt->comm_host,
                              &rt->model_host, &rt->optimizer_host, &rt->strategy_host};
  for (size_t i = 0; i < sizeof hosts / sizeof *hosts; i++) hosts[i]->table.deterministic = config->s.run.deterministic;
  PHX_TRY_GOTO(open_device(rt, err), status, done);
  PHX_TRY_GOTO(open_comm(rt, err), status, done);
  PHX_TRY_GOTO(open_model(rt, err), status, done);
  PHX_TRY_GOTO(open_optimizer(rt, err), status, done);
  PHX_TRY_GOTO(open_strategy(rt, err), status, done);
  *out = rt;
done:
  if (status) phx__runtime_close(rt);
  return status;
}

/* A call that failed before stays, for the report. */
static void enter_destroy(const phx__runtime *rt, int32_t kind) {
  const int32_t call = rt->job->mine->in_call;
  phx__job_heartbeat(rt->job);
  if (call == PHX_IN_CORE || call == PHX_IN_DESTROY) phx__enter(rt->job, kind, PHX_IN_DESTROY, -1);
}

/* The communicator, and the device that it works with. */
static void close_world(phx__runtime *rt) {
  if (rt->world && !phx__comm_watch_close()) {
    phx__log(rt->job->rank, rt->comm_host.plugin, PHX_LOG_ERROR,
             "a call of health or abort does not return: the communicator and the device stay open");
    return;
  }
  if (rt->world) rt->prepared->comm->destroy(rt->world);
  enter_destroy(rt, PHX_KIND_DEVICE);
  if (rt->device_self) rt->prepared->device->destroy(rt->device_self);
}

void phx__runtime_close(phx__runtime *rt) {
  if (!rt) return;
  phx__memory_watch_end();
  if (rt->device) rt->device->stream_synchronize(rt->device->ctx, NULL, NULL);
  enter_destroy(rt, PHX_KIND_STRATEGY);
  if (rt->strategy) rt->prepared->strategy->destroy(rt->strategy);
  enter_destroy(rt, PHX_KIND_OPTIMIZER);
  if (rt->optimizer) rt->prepared->optimizer->destroy(rt->optimizer);
  enter_destroy(rt, PHX_KIND_MODEL);
  if (rt->model) rt->prepared->model_table->destroy(rt->model);
  enter_destroy(rt, PHX_KIND_COMM);
  if (rt->core) rt->core->destroy(rt->core);
  const phx__host *plugins[] = {&rt->strategy_host, &rt->optimizer_host, &rt->model_host};
  for (int i = 0; i < 3; i++) {
    char text[128];
    if (phx__host_held(plugins[i], text, sizeof text) > 0)
      phx__log(rt->job->rank, plugins[i]->plugin, PHX_LOG_ERROR, text);
  }
  phx__memory_book_clear(&rt->book);
  close_world(rt);
  if (rt->job->mine->in_call == PHX_IN_DESTROY) phx__leave(rt->job, PHX_OK);
  phx__cover_close(&rt->state_cover);
  phx__free(rt->state_words);
  phx__prepared_free(rt->prepared);
  phx__free(rt);
}

int64_t phx__driver_bytes(const phx__runtime *rt) {
  const phx_device_table *t = rt->prepared->device;
  return PHX_HAS(t, phx_device_table, driver_bytes) && t->driver_bytes ? t->driver_bytes(rt->device_self) : -1;
}
