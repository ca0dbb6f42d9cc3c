/* core/engine/engine.c - the only training loop: read phx__engine_step first, at the bottom.
 *
 * Activations belong to the engine: per slot (a micro-batch in flight) the output and the saved tensors of every stage
 * this rank runs, and two buffers that the gradient of a boundary alternates between.  The strategy decides where
 * weights and gradients are; the model computes; the communicators move.  No allocation after create. */
#include "engine/engine.h"

#include <math.h>
#include <string.h>

#include "base/job_calls.h"
#include "base/status.h"
#include "base/sys.h"
#include "engine/handed.h"
#include "engine/stage_view.h"
#include "plugin/where.h"

/* ---- buffers ---- */
static phx_status take_in(phx__runtime *rt, int32_t space, int32_t kind, int64_t bytes, void **out, phx_error *err) {
  const phx_memory what = {.struct_size = sizeof what, .bytes = bytes, .kind = kind, .space = space};
  return bytes > 0 ? rt->core_host.table.alloc(&rt->core_host, &what, out, err) : PHX_OK;
}

static phx_status take(phx__runtime *rt, int32_t kind, int64_t bytes, void **out, phx_error *err) {
  return take_in(rt, PHX_SPACE_DEVICE, kind, bytes, out, err);
}

static phx_status take_pinned(phx__runtime *rt, int64_t bytes, void **out, phx_error *err) {
  return take_in(rt, PHX_SPACE_PINNED, PHX_MEM_BUFFER, bytes, out, err);
}

static phx_status take_slot(phx__engine *e, int32_t slot, phx_error *err) {
  const phx__prepared *p = e->rt->prepared;
  const uint32_t n = p->model->n_stages;
  phx_status status = PHX_OK;
  for (uint32_t s = 0; s < n && !status; s++) {
    const size_t i = (size_t)slot * n + s;
    status = take(e->rt, PHX_MEM_ACTIVATION, p->stages[s].output, &e->outputs[i], err);
    if (!status) status = take(e->rt, PHX_MEM_ACTIVATION, p->stages[s].saved, &e->saved[i], err);
  }
  for (size_t parity = 0; parity < 2 && !status; parity++)
    status = take(e->rt, PHX_MEM_ACTIVATION, p->boundary_bytes, &e->gradients[(size_t)slot * 2 + parity], err);
  return status;
}

phx_status phx__engine_create(phx__runtime *rt, phx__engine **out, phx_error *err) {
  phx_status status = PHX_OK;
  const phx__prepared *p = rt->prepared;
  const size_t slots = (size_t)p->layout.activation_slots, n = p->model->n_stages;
  void *tokens = NULL, *host_tokens = NULL, *losses = NULL, *norm_blocks = NULL;
  phx__engine *e = phx__calloc(1, sizeof *e);
  if (!e) return phx_fail(err, PHX_NOMEM, "no memory for the engine");
  e->rt = rt;
  e->outputs = phx__calloc(slots * n, sizeof *e->outputs);
  e->saved = phx__calloc(slots * n, sizeof *e->saved);
  e->gradients = phx__calloc(slots * 2, sizeof *e->gradients);
  if (!e->outputs || !e->saved || !e->gradients) {
    status = phx_fail(err, PHX_NOMEM, "no memory for the engine");
    goto done;
  }
  PHX_TRY_GOTO(phx__step_check_open(rt, &e->check, err), status, done);
  e->sums = phx__calloc((size_t)(PHX__SUM_WORDS + phx__step_check_size(&e->check)), sizeof *e->sums);
  if (!e->sums) {
    status = phx_fail(err, PHX_NOMEM, "no memory for the engine");
    goto done;
  }
  PHX_TRY_GOTO(take(rt, PHX_MEM_BUFFER, p->token_bytes, &tokens, err), status, done);
  e->tokens = tokens;
  PHX_TRY_GOTO(take_pinned(rt, p->token_bytes, &host_tokens, err), status, done);
  e->host_tokens = host_tokens;
  PHX_TRY_GOTO(take_pinned(rt, p->loss_slots * (int64_t)sizeof *e->losses, &losses, err), status, done);
  e->losses = losses;
  PHX_TRY_GOTO(take_pinned(rt, p->norm_blocks * (int64_t)sizeof *e->norm_blocks, &norm_blocks, err), status, done);
  e->norm_blocks = norm_blocks;
  for (int32_t slot = 0; slot < (int32_t)slots; slot++) PHX_TRY_GOTO(take_slot(e, slot, err), status, done);
  PHX_TRY_GOTO(take(rt, PHX_MEM_WORKSPACE, p->workspace_bytes, &e->workspace, err), status, done);
  *out = e;
done:
  if (status) phx__engine_destroy(e);
  return status;
}

void phx__engine_destroy(phx__engine *e) {
  if (!e) return;
  const phx__prepared *p = e->rt->prepared;
  const size_t slots = (size_t)p->layout.activation_slots, n = p->model->n_stages;
  const phx_host *host = &e->rt->core_host.table;
  e->rt->device->stream_synchronize(e->rt->device->ctx, NULL, NULL); /* what is released is not in use any more */
  host->release(host->ctx, e->workspace);
  for (size_t i = slots * 2; e->gradients && i-- > 0;) host->release(host->ctx, e->gradients[i]);
  for (size_t i = slots * n; e->saved && e->outputs && i-- > 0;) {
    host->release(host->ctx, e->saved[i]);
    host->release(host->ctx, e->outputs[i]);
  }
  host->release(host->ctx, e->logits);
  host->release(host->ctx, e->norm_blocks);
  host->release(host->ctx, e->losses);
  host->release(host->ctx, e->host_tokens);
  host->release(host->ctx, e->tokens);
  phx__step_check_close(&e->check);
  phx__free(e->sums);
  phx__free(e->gradients);
  phx__free(e->saved);
  phx__free(e->outputs);
  phx__free(e);
}

/* ---- one stage ---- */
static int64_t micro_tokens(const phx__engine *e) {
  return e->rt->prepared->shape.micro * e->rt->prepared->shape.sequence;
}

static phx_stage_call stage_call(phx__engine *e, uint32_t stage, int32_t pass, int32_t micro_batch, int32_t slot,
                                 const phx_view *view) {
  const phx__prepared *p = e->rt->prepared;
  const size_t row = (size_t)slot * p->model->n_stages;
  const uint32_t last = p->model->n_stages - 1;
  int32_t *tokens = e->tokens + 2 * micro_batch * micro_tokens(e);
  phx_stage_call call = {
      .struct_size = sizeof call, .stage = stage, .pass = pass, .view = view, .saved = e->saved[row + stage],
      .workspace = e->workspace, .input = stage > 0 ? e->outputs[row + stage - 1] : NULL,
      .output = stage < last ? e->outputs[row + stage] : NULL, .tokens = tokens, .targets = tokens + micro_tokens(e),
      .batch = p->shape.micro, .sequence = p->shape.sequence};
  if (stage == last) call.loss = &e->losses[micro_batch];
  if (pass == PHX_PASS_BACKWARD) {
    call.d_output = stage < last ? e->gradients[slot * 2 + (int32_t)(stage & 1)] : NULL;
    call.d_input = stage > 0 ? e->gradients[slot * 2 + (int32_t)((stage - 1) & 1)] : NULL;
  }
  return call;
}

static int stage_runs(const phx__engine *e, uint32_t stage, int32_t micro_batch) {
  const phx__prepared *p = e->rt->prepared;
  const phx_model_table *t = p->model_table;
  return !PHX_HAS(t, phx_model_table, stage_runs) || !t->stage_runs ||
         t->stage_runs(e->rt->model, stage, (uint64_t)e->rt->config->s.run.seed, e->step, micro_batch,
                       p->layout.data_rank);
}

/* A stage that does not run hands its input (or its output's gradient) on. */
static phx_status pass_on(phx__engine *e, const phx_stage_call *call, phx_error *err) {
  const phx_device *d = e->rt->device;
  const int64_t bytes = e->rt->prepared->stages[call->stage].memory.output;
  if (!call->input || !call->output)
    return phx_fail(err, PHX_UNSUPPORTED, "stage %u cannot be skipped: it is the first or the last", call->stage);
  if (bytes != e->rt->prepared->stages[call->stage - 1].memory.output)
    return phx_fail(err, PHX_UNSUPPORTED, "stage %u cannot be skipped: its output is not of its input's size",
                    call->stage);
  if (call->pass == PHX_PASS_BACKWARD) return d->copy(d->ctx, call->d_input, call->d_output, bytes, NULL, err);
  return d->copy(d->ctx, call->output, call->input, bytes, NULL, err);
}

/* What a device or a strategy cannot know of its failure: where in the model it was. */
static phx_status failed_in(const phx__engine *e, uint32_t stage, int32_t pass, phx_status status, phx_error *err) {
  const phx_model *m = e->rt->prepared->model;
  if (status == PHX_OK) return PHX_OK;
  phx__where_reason(e->rt->job, status, err);
  return phx_fail_more(err, status, "; in stage %u (%s), %s", stage, phx_model_stage(m, stage)->name,
                       pass == PHX_PASS_BACKWARD ? "backward" : "forward");
}

static phx_status run_stage(phx__engine *e, const phx_stage_call *call, int runs, phx_error *err) {
  const phx_model_table *model = e->rt->prepared->model_table;
  phx__job_heartbeat(e->rt->job);
  if (!runs) return pass_on(e, call, err);
  phx_status status = phx__stage_ready(e->rt, call->view, err);
  if (status) return status;
  const int backward = call->pass == PHX_PASS_BACKWARD;
  phx__gradient_check *check = backward ? e->check.gradients : NULL;
  if (check) status = phx__gradient_check_before(check, call->view, err);
  if (status) return status;
  status = PHX__IN(e->rt->job, PHX_KIND_MODEL, backward ? PHX_IN_BACKWARD : PHX_IN_FORWARD, (int32_t)call->stage,
                   backward ? model->backward(e->rt->model, call, err) : model->forward(e->rt->model, call, err));
  if (!status && check) status = phx__gradient_check_after(check, call->view, err);
  if (!status && e->at_stage) e->at_stage(e->at_stage_arg);
  return status;
}

/* acquire, run, release */
static phx_status stage_pass(phx__engine *e, uint32_t stage, int32_t pass, int32_t micro_batch,
                             const phx_stage_call *override, phx_error *err) {
  const phx_model *m = e->rt->prepared->model;
  const phx_view *view = NULL;
  phx_status status = phx__stage_acquire(e->rt, stage, pass, micro_batch, &view, err);
  if (status) return failed_in(e, stage, pass, status, err);
  const int runs = pass == PHX_PASS_EVALUATE || stage_runs(e, stage, micro_batch);
  phx_stage_call call = override ? *override : stage_call(e, stage, pass, micro_batch, 0, view);
  call.view = view;
  status = run_stage(e, &call, runs, err);
  if (status) return failed_in(e, stage, pass, status, err);
  uint32_t flags = 0;
  if (pass == PHX_PASS_BACKWARD) {
    const phx_stage *s = phx_model_stage(m, stage);
    for (uint32_t i = 0; i < s->n_uses; i++)
      if (phx_model_use(m, s->first_use + i)->flags & PHX_USE_LAST) flags |= PHX_RELEASE_LAST_USE;
    if (!runs) flags |= PHX_RELEASE_NO_GRADIENT;
  }
  status = phx__stage_release(e->rt, stage, pass, micro_batch, flags, err);
  return failed_in(e, stage, pass, status, err);
}

/* ---- the executor: what a strategy that runs the step itself may call ---- */
static int64_t executor_boundary_bytes(void *ctx, uint32_t stage) {
  return ((phx__engine *)ctx)->rt->prepared->stages[stage].memory.output;
}

static void *executor_boundary(void *ctx, uint32_t stage, int32_t slot, int32_t gradient) {
  phx__engine *e = ctx;
  if (gradient) return e->gradients[slot * 2 + (int32_t)(stage & 1)];
  return e->outputs[(size_t)slot * e->rt->prepared->model->n_stages + stage];
}

/* A stage within run_step: the strategy's call goes on after it. */
static phx_status run_inside(phx__engine *e, const phx_stage_call *call, int32_t micro_batch, phx_error *err) {
  phx_status status = phx__handed_view(e->rt, call->stage, call->pass, call->view, err);
  if (!status) status = run_stage(e, call, stage_runs(e, call->stage, micro_batch), err);
  if (status) return failed_in(e, call->stage, call->pass, status, err);
  phx__enter(e->rt->job, PHX_KIND_STRATEGY, PHX_IN_RUN_STEP, -1);
  return PHX_OK;
}

static phx_status executor_forward(void *ctx, uint32_t stage, int32_t micro_batch, int32_t slot, const phx_view *view,
                                   phx_error *err) {
  const phx_stage_call call = stage_call(ctx, stage, PHX_PASS_FORWARD, micro_batch, slot, view);
  return run_inside(ctx, &call, micro_batch, err);
}

static phx_status executor_backward(void *ctx, uint32_t stage, int32_t micro_batch, int32_t slot, const phx_view *view,
                                    phx_error *err) {
  const phx_stage_call call = stage_call(ctx, stage, PHX_PASS_BACKWARD, micro_batch, slot, view);
  return run_inside(ctx, &call, micro_batch, err);
}

static int32_t executor_runs(void *ctx, uint32_t stage, int32_t micro_batch) {
  return stage_runs(ctx, stage, micro_batch);
}

static phx_status run_own_schedule(phx__engine *e, phx_error *err) {
  const phx_executor executor = {
      .struct_size = sizeof executor, .ctx = e, .micro_batches = e->rt->prepared->topology.accumulate,
      .n_stages = e->rt->prepared->model->n_stages, .boundary_bytes = executor_boundary_bytes,
      .boundary = executor_boundary, .forward = executor_forward, .backward = executor_backward,
      .runs = executor_runs};
  return PHX__IN_STRATEGY(e->rt->job, PHX_IN_RUN_STEP, -1,
                          e->rt->prepared->strategy->run_step(e->rt->strategy, &executor, err));
}

/* ---- data, loss and norm ---- */
static phx_status to_device(phx__engine *e, int64_t bytes, phx_error *err) {
  const phx_device *d = e->rt->device;
  return d->copy(d->ctx, e->tokens, e->host_tokens, bytes, NULL, err);
}

int64_t phx__engine_samples(const phx__engine *e, int64_t steps) {
  const phx__prepared *p = e->rt->prepared;
  return steps * p->shape.micro * p->topology.accumulate * p->layout.data_size + e->samples_ahead;
}

static phx_status load_batch(phx__engine *e, phx__data *data, phx_error *err) {
  const phx__prepared *p = e->rt->prepared;
  const int64_t first = phx__engine_samples(e, e->step - 1);
  for (int32_t micro = 0; micro < p->topology.accumulate; micro++) {
    int32_t *at = e->host_tokens + 2 * micro * micro_tokens(e);
    PHX_TRY(phx__data_batch(data, first, micro, p->topology.accumulate, p->layout.data_rank, p->layout.data_size,
                            p->shape.micro, at, at + micro_tokens(e), err));
  }
  memset(e->losses, 0, sizeof *e->losses * (size_t)p->topology.accumulate);
  return to_device(e, (int64_t)sizeof(int32_t) * 2 * p->topology.accumulate * micro_tokens(e), err);
}

/* Mean over data ranks and micro-batches; ranks combine by the canonical tree, ranks without the loss add zero. */
static phx_status combine_loss(phx__engine *e, int32_t micro_batches, double *out, phx_error *err) {
  const phx_device *d = e->rt->device;
  double sum = 0;
  PHX_TRY(d->stream_synchronize(d->ctx, NULL, err));
  for (int32_t micro = 0; micro < micro_batches; micro++) sum += e->losses[micro];
  PHX_TRY(PHX__IN_COMM(e->rt->job,
                       e->rt->core->all_reduce(e->rt->core->ctx, &sum, &sum, 1, PHX_F64, PHX_SUM, NULL, err)));
  *out = sum / ((double)micro_batches * e->rt->prepared->layout.data_size);
  return PHX_OK;
}

static phx__exact_sum *norm_of(phx__engine *e) { return (phx__exact_sum *)(void *)e->sums; }

/* Sums of squares, exactly.  Where bits may depend on the order anyway, sums of many go in instead: the device is idle
 * meanwhile, and a model of 1558M has 1.5 million of them. */
static void norm_take(phx__engine *e, const double *sums, int64_t n) {
  enum { LANES = 8 };
  double lane[LANES] = {0};
  if (e->rt->config->s.run.deterministic) {
    for (int64_t i = 0; i < n; i++) phx__exact_sum_add(norm_of(e), sums[i]);
    return;
  }
  int64_t at = 0;
  for (; at + LANES <= n; at += LANES)
    for (int k = 0; k < LANES; k++) lane[k] += sums[at + k];
  for (; at < n; at++) lane[0] += sums[at];
  for (int k = 0; k < LANES; k++) phx__exact_sum_add(norm_of(e), lane[k]);
}

static phx_status norm_add(void *ctx, uint32_t unit, int64_t first_block, int64_t blocks, const float *gradient,
                           phx_stream *stream, phx_error *err) {
  phx__engine *e = ctx;
  const phx_device *d = e->rt->device;
  const int64_t most = e->rt->prepared->norm_blocks;
  phx_status status = phx__step_check_norm(&e->check, unit, first_block, blocks, gradient, stream, err);
  for (int64_t done = 0; done < blocks && !status; done += most) {
    const int64_t n = blocks - done < most ? blocks - done : most;
    status =
        e->rt->ops->block_norms(e->rt->ops->ctx, e->norm_blocks, gradient + done * PHX_BLOCK, n, stream, err);
    if (!status) status = d->stream_synchronize(d->ctx, stream, err);
    if (!status) norm_take(e, e->norm_blocks, n);
  }
  return status;
}

/* The norm of the unscaled sum over ranks and micro-batches. */
static phx_status gradient_norm(phx__engine *e, double *out, phx_error *err) {
  const phx_accumulator acc = {.struct_size = sizeof acc, .ctx = e, .add = norm_add};
  const int64_t n_counts = phx__step_check_size(&e->check);
  memset(norm_of(e), 0, sizeof(phx__exact_sum));
  phx__cover_clear(&e->check.norm);
  PHX_TRY(PHX__IN_STRATEGY(e->rt->job, PHX_IN_NORM, -1,
                           e->rt->prepared->strategy->gradient_norm(e->rt->strategy, &acc, err)));
  phx__step_check_words(&e->check, e->sums + PHX__SUM_WORDS);
  PHX_TRY(PHX__IN_COMM(e->rt->job, e->rt->core->all_reduce(e->rt->core->ctx, e->sums, e->sums,
                                                           PHX__SUM_WORDS + n_counts, PHX_I64, PHX_SUM, NULL, err)));
  PHX_TRY(phx__step_check_judge(&e->check, e->sums + PHX__SUM_WORDS, err));
  *out = sqrt(phx__exact_sum_value(norm_of(e)));
  return PHX_OK;
}

static phx_status run_micro_batches(phx__engine *e, phx_error *err) {
  const phx_strategy_table *strategy = e->rt->prepared->strategy;
  const int32_t n = e->rt->prepared->topology.accumulate;
  const int32_t stages = (int32_t)e->rt->prepared->model->n_stages;
  phx_status status = PHX_OK;
  for (int32_t micro = 0; micro < n && !status; micro++) {
    status = PHX__IN_STRATEGY(e->rt->job, PHX_IN_BEGIN, -1,
                              strategy->begin_micro_batch(e->rt->strategy, micro, micro == n - 1, err));
    for (int32_t s = 0; s < stages && !status; s++)
      status = stage_pass(e, (uint32_t)s, PHX_PASS_FORWARD, micro, NULL, err);
    for (int32_t s = stages - 1; s >= 0 && !status; s--)
      status = stage_pass(e, (uint32_t)s, PHX_PASS_BACKWARD, micro, NULL, err);
  }
  return status;
}

/* ---- the step ---- */
/* What happens to a step that cannot be applied: the run stops, or goes on with the weights and states as they are. */
static phx_status not_finite(phx__engine *e, phx__step_result *result, phx_error *err) {
  const phx__settings *s = &e->rt->config->s;
  const int64_t row = e->skipped + 1;
  const bool too_many = s->run.on_nonfinite == 1 && s->run.max_skipped > 0 && row >= s->run.max_skipped;
  e->not_finite = s->run.on_nonfinite == 0 || too_many;
  if (too_many)
    return phx_fail(err, PHX_INVALID,
                    "step %lld: loss %g, gradient norm %g: not finite, as in the %lld steps before: nothing has been "
                    "learned since step %lld (run.max_skipped = %lld in a row); the run has diverged: go on from an "
                    "earlier checkpoint with a lower optimizer.lr, or set optimizer.clip",
                    (long long)e->step, result->loss, result->grad_norm, (long long)(row - 1),
                    (long long)(e->step - row), (long long)s->run.max_skipped);
  if (e->not_finite)
    return phx_fail(err, PHX_INVALID,
                    "step %lld: loss %g, gradient norm %g: not finite, stopped before the update; lower optimizer.lr, "
                    "set optimizer.clip, or pass over such steps with run.on_nonfinite = skip",
                    (long long)e->step, result->loss, result->grad_norm);
  e->skipped = row;
  result->skipped = true;
  return PHX__IN_STRATEGY(e->rt->job, PHX_IN_FINISH, -1,
                          e->rt->prepared->strategy->discard_gradients(e->rt->strategy, err));
}

phx_status phx__engine_step(phx__engine *e, phx__data *data, int64_t step, phx__step_result *out, phx_error *err) {
  phx_status status = PHX_OK;
  const phx_strategy_table *strategy = e->rt->prepared->strategy;
  const phx__settings *settings = &e->rt->config->s;
  const phx_job *job = e->rt->job;
  const double terms = phx__gradient_terms(e->rt->prepared);
  phx__step_result result = {.lr = phx__optim_lr(settings, step)};
  e->step = step;
  phx__job_state(job, PHX_RANK_RUNNING, step);
  if (e->check.gradients) phx__gradient_check_begin(e->check.gradients, step);

  PHX_TRY_GOTO(load_batch(e, data, err), status, done);
  if (PHX_HAS(strategy, phx_strategy_table, run_step) && strategy->run_step)
    PHX_TRY_GOTO(run_own_schedule(e, err), status, done);
  else PHX_TRY_GOTO(run_micro_batches(e, err), status, done);
  PHX_TRY_GOTO(PHX__IN_STRATEGY(job, PHX_IN_FINISH, -1, strategy->finish_gradients(e->rt->strategy, err)), status,
               done);
  if (e->check.gradients) PHX_TRY_GOTO(phx__gradient_check_sum(e->check.gradients, err), status, done);
  PHX_TRY_GOTO(combine_loss(e, e->rt->prepared->topology.accumulate, &result.loss, err), status, done);

  double norm = 0;
  PHX_TRY_GOTO(gradient_norm(e, &norm, err), status, done);
  result.grad_norm = norm / terms;
  /* Both numbers have the same bits on every rank, so every rank decides alike. */
  if (!isfinite(result.loss) || !isfinite(result.grad_norm)) {
    PHX_TRY_GOTO(not_finite(e, &result, err), status, done);
    *out = result;
    goto done;
  }
  e->skipped = 0;
  const double clip = settings->optimizer.clip;
  const double factor = clip > 0 && result.grad_norm > clip ? clip / result.grad_norm : 1.0;
  e->rt->optim.step = step;
  e->rt->optim.lr = result.lr;
  const float scale = (float)(factor / terms);
  phx__step_check_update(&e->check, scale);
  PHX_TRY_GOTO(PHX__IN_STRATEGY(job, PHX_IN_UPDATE, -1, strategy->update(e->rt->strategy, step, scale, err)), status,
               done);
  PHX_TRY_GOTO(phx__step_check_updated(&e->check, err), status, done);
  *out = result;
done:
  e->rt->optim.step = 0;
  return status;
}

phx_status phx__engine_updated(phx__engine *e, phx_error *err) {
  return phx__step_check_last(&e->check, e->sums + PHX__SUM_WORDS, err);
}

/* ---- evaluation ---- */
/* Logits of the last position of the one sequence that is loaded. */
static phx_status evaluate_logits(phx__engine *e, int64_t length, phx_error *err) {
  const uint32_t n = e->rt->prepared->model->n_stages;
  phx_status status = PHX_OK;
  for (uint32_t s = 0; s < n && !status; s++) {
    phx_stage_call call = stage_call(e, s, PHX_PASS_EVALUATE, 0, 0, NULL);
    call.batch = 1;
    call.sequence = length;
    call.targets = NULL;
    call.loss = NULL;
    call.logits = s == n - 1 ? e->logits : NULL;
    status = stage_pass(e, s, PHX_PASS_EVALUATE, 0, &call, err);
  }
  return status;
}

static phx_status check_can_evaluate(const phx__engine *e, phx_error *err) {
  for (uint32_t s = 0; s < e->rt->prepared->model->n_stages; s++)
    if (!e->rt->prepared->layout.stage_owned[s])
      return phx_fail(err, PHX_UNSUPPORTED, "strategy %s does not hold every stage on every rank: no evaluation",
                      e->rt->config->strategy.plugin->descriptor->id);
  return PHX_OK;
}

/* How many windows fit beside each other into the buffers of a micro-batch. */
static int64_t windows_at_once(const phx__prepared *p) {
  int64_t most = p->shape.micro;
  for (uint32_t s = 0; s < p->model->n_stages; s++)
    if (p->stages[s].window * most > p->stages[s].output) most = p->stages[s].output / p->stages[s].window;
  return most > 1 ? most : 1;
}

/* One stage over `rows` windows that are loaded, one at a time: the bits of a product may depend on its number of rows,
 * so no call's shape depends on the micro-batch.  Its weights are acquired once. */
static phx_status evaluate_stage(phx__engine *e, uint32_t stage, int64_t rows, phx_error *err) {
  const phx__prepared *p = e->rt->prepared;
  const phx_view *view = NULL;
  phx_status status = phx__stage_acquire(e->rt, stage, PHX_PASS_EVALUATE, 0, &view, err);
  for (int64_t row = 0; row < rows && !status; row++) {
    phx_stage_call call = stage_call(e, stage, PHX_PASS_EVALUATE, 0, 0, view);
    call.batch = 1;
    call.tokens += 2 * row * p->shape.sequence;
    call.targets = call.tokens + p->shape.sequence;
    if (call.input) call.input = (const char *)call.input + row * p->stages[stage - 1].window;
    if (call.output) call.output = (char *)call.output + row * p->stages[stage].window;
    if (call.loss) call.loss += row;
    status = run_stage(e, &call, 1, err);
  }
  if (!status) status = phx__stage_release(e->rt, stage, PHX_PASS_EVALUATE, 0, 0, err);
  return failed_in(e, stage, PHX_PASS_EVALUATE, status, err);
}

/* Windows [first, first + rows) of this rank; their losses come into e->losses. */
static phx_status evaluate_windows(phx__engine *e, phx__data *data, int64_t first, int64_t rows, phx_error *err) {
  const phx_device *d = e->rt->device;
  const int64_t sequence = e->rt->prepared->shape.sequence;
  phx_status status = PHX_OK;
  for (int64_t row = 0; row < rows && !status; row++) {
    int32_t *at = e->host_tokens + 2 * row * sequence;
    status = phx__data_window(data, first + row, at, at + sequence, err);
  }
  if (!status && rows > 0) status = to_device(e, (int64_t)sizeof(int32_t) * 2 * rows * sequence, err);
  for (uint32_t s = 0; s < e->rt->prepared->model->n_stages && !status; s++) status = evaluate_stage(e, s, rows, err);
  return status ? status : d->stream_synchronize(d->ctx, NULL, err);
}

typedef struct window_sum { /* of windows' mean losses: they all have as many tokens */
  phx__exact_sum losses;
  int64_t windows, stop; /* stop: ranks that are asked to */
} window_sum;
enum { WINDOW_SUM_WORDS = PHX__SUM_WORDS + 2 };
_Static_assert(sizeof(window_sum) == WINDOW_SUM_WORDS * sizeof(int64_t), "travels as int64");

static phx_status add_up(phx__engine *e, window_sum *part, window_sum *sum, phx_error *err) {
  const phx_comm *core = e->rt->core;
  const phx_status status =
      PHX__IN_COMM(e->rt->job, core->all_reduce(core->ctx, part, part, WINDOW_SUM_WORDS, PHX_I64, PHX_SUM, NULL, err));
  for (int i = 0; i < PHX__SUM_LIMBS; i++) sum->losses.limbs[i] += part->losses.limbs[i];
  sum->losses.not_finite += part->losses.not_finite;
  sum->windows += part->windows;
  sum->stop = part->stop;
  memset(part, 0, sizeof *part);
  return status;
}

/* Ranks take groups of windows in turn, and meet when each has done a few: none waits long for another.  The sum is
 * exact, so that neither the order nor the division can show. */
phx_status phx__engine_validate(phx__engine *e, phx__data *data, int64_t windows, double *loss, phx_error *err) {
  enum { MEETING = 16 /* windows */ };
  const phx__prepared *p = e->rt->prepared;
  phx_status status = check_can_evaluate(e, err);
  const int64_t all = phx__data_windows(data), group = windows_at_once(p), turn = group * p->layout.data_size;
  const int64_t wanted = windows > 0 && windows < all ? windows : all, often = group < MEETING ? MEETING / group : 1;
  window_sum sum = {.windows = 0}, part = {.windows = 0};
  int64_t turns = 0;
  for (int64_t at = 0; at < wanted && !status && !sum.stop; at += turn) {
    const int64_t first = at + p->layout.data_rank * group, left = wanted - first;
    const int64_t mine = left < group ? left : group, rows = mine > 0 ? mine : 0;
    status = evaluate_windows(e, data, first, rows, err);
    for (int64_t row = 0; row < rows && !status; row++) phx__exact_sum_add(&part.losses, e->losses[row]);
    part.windows += rows;
    turns++;
    part.stop = e->stop_asked && e->stop_asked();
    if (!status && (turns % often == 0 || at + turn >= wanted)) status = add_up(e, &part, &sum, err);
  }
  *loss = NAN;
  if (status || sum.stop) return status;
  if (sum.windows % wanted) /* more than once where ranks share their data */
    return phx_fail(err, PHX_INTERNAL, "%lld of %lld windows of the held-out data were evaluated",
                    (long long)sum.windows, (long long)wanted);
  *loss = sum.losses.not_finite ? INFINITY : phx__exact_sum_value(&sum.losses) / (double)sum.windows;
  return PHX_OK;
}

phx_status phx__engine_logits(phx__engine *e, const int32_t *tokens, int64_t length, const float **logits,
                              phx_error *err) {
  const phx_device *d = e->rt->device;
  PHX_TRY(check_can_evaluate(e, err));
  if (!e->logits) { /* training never asks for them */
    void *p = NULL;
    PHX_TRY(take_pinned(e->rt, e->rt->prepared->facts.vocabulary * (int64_t)sizeof *e->logits, &p, err));
    e->logits = p;
  }
  memcpy(e->host_tokens, tokens, (size_t)length * sizeof *tokens);
  PHX_TRY(to_device(e, length * (int64_t)sizeof *tokens, err));
  phx_status status = evaluate_logits(e, length, err);
  if (!status) status = d->stream_synchronize(d->ctx, NULL, err);
  if (!status) *logits = e->logits;
  return status;
}
