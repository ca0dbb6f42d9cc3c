/* core/train.c - see train.h.  What a rank does, top to bottom: phx__train_rank. */
#include "train.h"

#include <inttypes.h>
#include <math.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "drift.h"
#include "launcher.h"
#include "progress.h"
#include "report.h"
#include "restart.h"
#include "status.h"
#include "sys.h"
#include "weights.h"

enum { MEASURED_STEP = 2 }; /* memory and traffic are measured in this step: the first steady one */

static int32_t cpus(void) {
  cpu_set_t set;
  return sched_getaffinity(0, sizeof set, &set) ? 1 : CPU_COUNT(&set);
}

int32_t phx__threads(const phx__config *config, int32_t local_ranks) {
  if (config->s.device.threads > 0) return (int32_t)config->s.device.threads;
  const int32_t share = cpus() / (local_ranks > 0 ? local_ranks : 1);
  return share > 1 ? share : 1;
}

typedef struct run {
  const phx__config *config;
  const phx_job *job;
  phx__prepared *prepared; /* until the runtime owns it */
  phx__runtime *rt;
  phx__engine *engine;
  phx__drift *drift; /* NULL: not asked for, or one rank */
  phx__data *train, *valid;
  phx__progress progress;
  phx__run_result result;
  double *step_seconds; /* (steps) */
  double sampling;      /* seconds of this step that went into measuring memory */
  phx__rank_report mine;
} run;

/* ---- before anything is allocated ---- */
static phx_status open_data(const phx__config *c, const phx__prepared *p, phx__data **train, phx__data **valid,
                            phx_error *err) {
  const uint64_t seed = (uint64_t)c->s.run.seed;
  phx_status status = phx__data_open(c->s.data.train, p->shape.sequence, p->facts.vocabulary, seed, train, err);
  if (status) return status;
  status = phx__data_check_batch(*train, p->shape.micro, p->topology.accumulate, p->layout.data_size, err);
  if (status) return status;
  if (!c->s.data.valid[0]) return PHX_OK;
  status = phx__data_open(c->s.data.valid, p->shape.sequence, p->facts.vocabulary, seed, valid, err);
  if (!status && phx__data_windows(*valid) < p->shape.micro)
    status = phx__fail(err, PHX_INVALID, "data.valid = %s holds %" PRId64 " sequences, fewer than batch.micro = %" PRId64,
                       c->s.data.valid, phx__data_windows(*valid), p->shape.micro);
  return status;
}

phx_status phx__train_check(const phx__config *config, phx_error *err) {
  const int32_t size = (int32_t)config->s.run.ranks;
  phx_status status = PHX_OK;
  for (int32_t rank = 0; rank < size && !status; rank++) {
    phx__prepared *p = NULL;
    phx__data *train = NULL, *valid = NULL;
    status = phx__prepare(config, rank, size, rank, size, 0, 0, &p, err);
    if (!status && rank == 0) status = open_data(config, p, &train, &valid, err);
    if (!status && config->s.run.drift_every > 0) status = phx__drift_supported(p, err);
    phx__data_close(train);
    phx__data_close(valid);
    phx__prepared_free(p);
  }
  const int32_t threads = phx__threads(config, size);
  if (!status && config->s.run.pin == 1 && threads * size > cpus())
    status = phx__fail(err, PHX_INVALID, "run.pin = yes: %d ranks x %d threads need %d CPUs, and there are %d", size,
                       threads, threads * size, cpus());
  return status;
}

/* ---- measuring ---- */
static void sample_pss(void *arg) {
  run *r = arg;
  const double begin = phx__now();
  const int64_t pss = phx__pss_bytes();
  if (pss > r->mine.peak_pss) r->mine.peak_pss = pss;
  r->sampling += phx__now() - begin;
}

/* What the strategy moved: all of the world, without the core's own losses, norms and hashes. */
static void strategy_traffic(const phx__runtime *rt, phx_comm_stats *out) {
  phx_comm_stats core = {.struct_size = sizeof core};
  out->struct_size = sizeof *out;
  rt->world->stats(rt->world->ctx, out);
  rt->core->stats(rt->core->ctx, &core);
  for (int op = 0; op < PHX_OPS; op++) {
    out->bytes[op] -= core.bytes[op];
    out->calls[op] -= core.calls[op];
  }
}

static int64_t bytes_of(const phx_comm_stats *s) {
  int64_t sum = 0;
  for (int op = 0; op < PHX_OPS; op++) sum += s->bytes[op];
  return sum;
}

static void keep_traffic(run *r, const phx_comm_stats *before, const phx_comm_stats *after) {
  for (int op = 0; op < PHX_OPS; op++) {
    r->mine.sent_measured[op] = after->bytes[op] - before->bytes[op];
    r->mine.calls_measured[op] = after->calls[op] - before->calls[op];
  }
}

static int by_value(const void *a, const void *b) {
  const double x = *(const double *)a, y = *(const double *)b;
  return (x > y) - (x < y);
}

static phx_status gather_reports(run *r, phx_error *err) {
  phx__rank_report *mine = &r->mine;
  const phx__runtime *rt = r->rt;
  memcpy(mine->planned, rt->prepared->planned, sizeof mine->planned);
  memcpy(mine->measured, rt->book.peak, sizeof mine->measured);
  /* what the device and the communicator hold for themselves is not in the book, but in the plan */
  mine->measured[PHX_MEM_WORKSPACE] += phx_align_bytes(rt->ops->scratch_bytes);
  mine->measured[PHX_MEM_BUFFER] += rt->prepared->comm->buffer_bytes(r->config->comm.config, r->job->size);
  memcpy(mine->sent_planned, rt->prepared->estimate.sent, sizeof mine->sent_planned);
  memcpy(mine->calls_planned, rt->prepared->estimate.calls, sizeof mine->calls_planned);
  r->result.n_ranks = r->job->size;
  return rt->core->all_gather(rt->core->ctx, mine, r->result.ranks, (int64_t)(sizeof *mine / sizeof(int64_t)), PHX_I64,
                              NULL, err);
}

/* ---- the loop ---- */
static phx_status train_step(run *r, int64_t step, phx_error *err) {
  const phx__settings *s = &r->config->s;
  phx_comm_stats before, after;
  phx__step_result result;
  const bool measured = step == (s->run.steps < MEASURED_STEP ? s->run.steps : MEASURED_STEP);
  const int64_t allocator_calls = r->rt->book.calls;
  r->engine->at_stage = measured ? sample_pss : NULL;
  r->engine->at_stage_arg = r;
  r->sampling = 0;
  strategy_traffic(r->rt, &before);
  const double begin = phx__now();
  phx_status status = phx__engine_step(r->engine, r->train, step, &result, err);
  if (status) return status;
  const double seconds = phx__now() - begin - r->sampling;
  strategy_traffic(r->rt, &after);
  r->step_seconds[step - 1] = seconds;
  if (measured) keep_traffic(r, &before, &after);
  if (step > 1) r->mine.steady_calls += r->rt->book.calls - allocator_calls;

  const bool last = step == s->run.steps;
  if (r->drift && (last || step % s->run.drift_every == 0)) status = phx__drift_check(r->drift, step, err);
  if (status) return status;
  r->result.skipped += result.skipped;
  double valid_loss = NAN;
  char hash[33];
  if (r->valid && (last || (s->run.valid_every > 0 && step % s->run.valid_every == 0)))
    status = phx__engine_validate(r->engine, r->valid, s->run.valid_batches, &valid_loss, err);
  const bool hashed = last || (s->run.hash_every > 0 && step % s->run.hash_every == 0);
  phx__state_hash sum;
  if (!status && hashed) status = phx__runtime_state_hash(r->rt, &sum, err);
  if (status) return status;
  if (hashed) phx__state_hash_text(sum, hash);
  if (last) {
    r->result.loss = result.loss;
    r->result.valid_loss = valid_loss;
    memcpy(r->result.state_hash, hash, sizeof hash);
  }
  return phx__progress_step(&r->progress, step, &result, seconds, bytes_of(&after) - bytes_of(&before), valid_loss,
                            hashed ? hash : NULL, err);
}

static phx_status finish(run *r, phx_error *err) {
  char path[4200];
  const int64_t n = r->config->s.run.steps;
  double *t = n > 1 ? r->step_seconds + 1 : r->step_seconds;
  const size_t count = (size_t)(n > 1 ? n - 1 : 1);
  snprintf(path, sizeof path, "%s/weights.safetensors", r->config->s.run.out);
  phx_status status = phx__weights_write(r->rt, path, err);
  if (!status) status = gather_reports(r, err);
  if (status || r->job->rank != 0) return status;
  qsort(t, count, sizeof *t, by_value);
  const double median = count % 2 ? t[count / 2] : 0.5 * (t[count / 2 - 1] + t[count / 2]);
  r->result.steps = n;
  r->result.step_ms = 1e3 * median;
  r->result.tokens_per_s = (double)r->progress.tokens_per_step / median;
  return phx__run_json_write(r->rt, &r->result, err);
}

static phx_status open_run(run *r, phx_error *err) {
  phx_status status = phx__job_open(r->config->s.run.timeout, &r->job, err);
  if (status) return status;
  status = phx__prepare(r->config, r->job->rank, r->job->size, r->job->local_rank, r->job->local_size, 0, 0,
                        &r->prepared, err);
  if (!status) status = open_data(r->config, r->prepared, &r->train, &r->valid, err);
  if (!status && r->job->size != r->config->s.run.ranks)
    status = phx__fail(err, PHX_INVALID, "run.ranks = %" PRId64 ", but the launcher started %d ranks: give -n %d",
                       r->config->s.run.ranks, r->job->size, r->job->size);
  if (!status && r->config->s.run.drift_every > 0) status = phx__drift_supported(r->prepared, err);
  if (!status && r->config->s.run.max_restarts > 0 && !getenv("PHALANX_RANK"))
    status = phx__fail(err, PHX_UNSUPPORTED,
                       "run.max_restarts = %" PRId64 " is for ranks that this command starts; another launcher started "
                       "these: use its restarts, and 0 here",
                       r->config->s.run.max_restarts);
  if (!status) status = phx__job_agree(r->job, phx__config_hash(r->config), "the configuration", err);
  /* under torchrun, mpirun or srun nobody made the directory yet; other ranks write there after they met rank 0 */
  if (!status && r->job->rank == 0 && phx__job_is_rank() && !getenv("PHALANX_RANK"))
    status = phx__run_dir_create(r->config, err);
  return status;
}

static phx_status run_steps(run *r, phx_error *err) {
  phx__prepared *prepared = r->prepared;
  r->prepared = NULL;
  phx_status status = phx__runtime_open(r->config, r->job, prepared, &r->rt, err);
  if (!status) status = phx__engine_create(r->rt, &r->engine, err);
  if (!status) status = phx__runtime_initialise(r->rt, err);
  if (!status && r->config->s.run.drift_every > 0 && r->job->size > 1)
    status = phx__drift_open(r->rt, &r->drift, err);
  if (!status) status = phx__progress_open(&r->progress, r->rt, err);
  if (!status && r->job->rank == 0) status = phx__run_json_write(r->rt, NULL, err);
  r->step_seconds = phx__calloc((size_t)r->config->s.run.steps, sizeof(double));
  if (!status && !r->step_seconds) status = phx__fail(err, PHX_NOMEM, "no memory for the step times");
  for (int64_t step = 1; step <= r->config->s.run.steps && !status; step++) status = train_step(r, step, err);
  return status ? status : finish(r, err);
}

int phx__train_rank(const phx__config *config) {
  phx_error err = PHX_ERROR_INIT;
  run r = {.config = config};
  r.result.valid_loss = NAN;
  phx_status status = open_run(&r, &err);
  const bool refused = status != PHX_OK;
  if (!status) status = run_steps(&r, &err);
  phx__progress_close(&r.progress);
  if (status) {
    fprintf(stderr, "phalanx: rank %d: %s\n", r.job ? r.job->rank : 0, err.message);
    if (r.job) {
      phx__job_state(r.job, 4, r.engine ? r.engine->step : 0);
      r.job->fail(r.job->ctx, err.message);
    }
  }
  if (!status || refused || r.job->size == 1) { /* after a failure peers may be gone: the process ends as it is */
    phx__drift_close(r.drift);
    phx__engine_destroy(r.engine);
    phx__runtime_close(r.rt);
    phx__prepared_free(r.prepared);
    phx__data_close(r.train);
    phx__data_close(r.valid);
    phx__free(r.step_seconds);
  }
  if (!status) phx__job_state(r.job, 3, config->s.run.steps);
  if (!status) return PHX__EXIT_OK;
  return refused ? PHX__EXIT_REFUSED : PHX__EXIT_RANK;
}

static void say_plugin(const char *kind, const phx__plugin *p) {
  char line[4400];
  snprintf(line, sizeof line, "%s %s %s, ABI %u.%u, %s, sha256 %s", kind, p->descriptor->id, p->descriptor->version,
           p->descriptor->table_major, p->descriptor->table_minor, p->path, p->sha256);
  phx__log(0, "core", PHX_LOG_INFO, line);
}

int phx__train_launch(const phx__config *config, char *const *argv) {
  phx_error err = PHX_ERROR_INIT;
  phx_status status = phx__train_check(config, &err);
  if (!status) status = phx__run_dir_create(config, &err);
  if (status) {
    fprintf(stderr, "phalanx: %s\n", err.message);
    return PHX__EXIT_REFUSED;
  }
  say_plugin("strategy", config->strategy.plugin);
  say_plugin("device", config->device.plugin);
  say_plugin("comm", config->comm.plugin);
  say_plugin("model", config->model.plugin);
  if (config->s.run.ranks > 1 || config->s.run.max_restarts > 0) return phx__restart_run(config, argv);
  /* it was accepted above: what goes wrong now is a failure, not a refusal */
  const int exit_status = phx__train_rank(config);
  return exit_status == PHX__EXIT_REFUSED ? PHX__EXIT_RANK : exit_status;
}
