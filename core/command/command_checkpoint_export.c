/* core/command/command_checkpoint_export.c - `phalanx checkpoint export`: one model.safetensors and config.json for
 * others.
 *
 * From a checkpoint, a run (the newest of its checkpoints and its final weights) or another folder.  Names and layout
 * are gpt2.h's: linear weights (in, out) as Conv1D keeps them, no lm_head, since it is wte.weight. */
#include <errno.h>
#include <inttypes.h>
#include <string.h>
#include <unistd.h>

#include "base/status.h"
#include "base/sys.h"
#include "checkpoint/elements.h"
#include "checkpoint/model_source.h"
#include "command/command_checkpoint.h"

typedef struct exported {
  phx__source *source;
  const char *dir; /* the target */
  bool made;       /* it was not there before */
  phx__gpt2 gpt2;
  float *part;
} exported;

typedef struct param_reading {
  phx__source *source;
  phx__source_param param;
} param_reading;

static phx_status read_ours(void *ctx, int64_t first, int64_t numel, float *out, phx_error *err) {
  param_reading *r = ctx;
  return phx__source_read(r->source, &r->param, first, numel, out, err);
}

static phx_status read_stored(void *ctx, int64_t first, int64_t numel, float *out, phx_error *err) {
  param_reading *r = ctx;
  return phx__source_read_stored(r->source, &r->param, first, numel, out, err);
}

static phx_status write_param(exported *e, phx__safetensors_writer *w, uint32_t i, phx_error *err) {
  const phx__gpt2_param p = phx__gpt2_param_at(&e->gpt2, i);
  const bool turned = phx__gpt2_transposed(p.name);
  param_reading r = {.source = e->source};
  if (!phx__source_find(e->source, p.name, &r.param) || r.param.numel != w->tensors[i].numel ||
      r.param.ndim != p.ndim || r.param.shape[turned ? 1 : 0] != p.shape[0])
    return phx_fail(err, PHX_UNSUPPORTED, "%s: parameter %s is not GPT-2's", e->source->path, p.name);
  const bool turn = turned && !r.param.turned; /* it stands as ours does */
  phx__transposer t = {.read = read_ours, .ctx = &r, .rows = r.param.shape[0], .columns = r.param.shape[1]};
  phx__element_fn *read = turn ? phx__transposed_elements : read_stored;
  void *ctx = turn ? (void *)&t : (void *)&r;
  phx_status status = turn ? phx__transposer_open(&t, err) : PHX_OK;
  for (int64_t at = 0; at < r.param.numel && !status; at += PHX__TOOL_PART) {
    const int64_t n = r.param.numel - at < PHX__TOOL_PART ? r.param.numel - at : PHX__TOOL_PART;
    status = read(ctx, at, n, e->part, err);
    if (!status) status = phx__writing(phx__safetensors_write(w, i, at * 4, n * 4, e->part, err));
  }
  if (turn) phx__transposer_close(&t);
  return status;
}

static phx_status write_weights(exported *e, phx_error *err) {
  phx_status status = PHX_OK;
  char path[PHX__TOOL_PATH], part[PHX__TOOL_PATH + 8], step[24];
  const char *const metadata[] = {"format", "pt", e->source->step < 0 ? NULL : "step", step, NULL};
  const uint32_t n = phx__gpt2_n_params(&e->gpt2);
  phx__safetensors_writer *w = NULL;
  phx__tensor *tensors = phx__calloc(n, sizeof *tensors);
  phx__gpt2_param *params = phx__calloc(n, sizeof *params);
  snprintf(step, sizeof step, "%" PRId64, e->source->step);
  snprintf(path, sizeof path, "%.4000s/" PHX__GPT2_WEIGHTS, e->dir);
  snprintf(part, sizeof part, "%s.part", path);
  if (!tensors || !params) {
    status = phx_fail(err, PHX_NOMEM, "no memory to write %s", path);
    goto done;
  }
  for (uint32_t i = 0; i < n; i++) {
    params[i] = phx__gpt2_param_at(&e->gpt2, i);
    tensors[i] = (phx__tensor){.name = params[i].name, .dtype = PHX_F32, .ndim = params[i].ndim};
    memcpy(tensors[i].shape, params[i].shape, sizeof params[i].shape);
  }
  PHX_TRY_GOTO(phx__writing(phx__safetensors_create(part, tensors, n, metadata, false, &w, err)), status, done);
  for (uint32_t i = 0; i < n; i++) PHX_TRY_GOTO(write_param(e, w, i, err), status, done);
  PHX_TRY_GOTO(phx__writing(phx__safetensors_finish(w, NULL, err)), status, done);
  if (phx__sys.rename(part, path))
    status = phx_fail_errno(err, PHX_STATE, errno, "cannot rename %s to %s", part, path);
done:
  phx__safetensors_writer_close(w);
  if (status) phx__sys.unlink(part);
  phx__free(params);
  phx__free(tensors);
  return status;
}

/* Both files or none. */
static phx_status write_both(exported *e, phx_error *err) {
  char path[PHX__TOOL_PATH];
  e->made = !phx__sys.mkdir(e->dir, 0755);
  if (!e->made && errno != EEXIST)
    return phx_fail_errno(err, PHX_INVALID, errno, "cannot create the directory %s", e->dir);
  phx_status status = write_weights(e, err);
  if (!status) {
    status = phx__writing(phx__gpt2_write(e->dir, &e->gpt2, err));
    snprintf(path, sizeof path, "%.4000s/" PHX__GPT2_WEIGHTS, e->dir);
    if (status) phx__sys.unlink(path);
  }
  if (status && e->made) phx__sys.rmdir(e->dir);
  return status;
}

static phx_status find_gpt2(exported *e, phx_error *err) {
  const phx_status status = phx__source_gpt2(e->source, &e->gpt2, err);
  if (status != PHX_UNSUPPORTED) return status;
  return phx_fail_more(err, status, ", and only that is exported; the " PHX__GPT2_WEIGHTS " of a run that is done has "
                      "the weights of any model, under its own names");
}

int phx__checkpoint_export(int argc, char **argv) {
  char path[PHX__TOOL_PATH];
  phx_error err = PHX_ERROR_INIT;
  exported e = {0};
  if (argc != 3) return phx__checkpoint_usage("export CHECKPOINT|RUN|FOLDER OUTDIR");
  e.dir = argv[2];
  phx_status status = phx__source_open(argv[1], &e.source, &err);
  snprintf(path, sizeof path, "%.4000s/" PHX__GPT2_WEIGHTS, e.dir);
  if (!status && !access(path, F_OK))
    status = phx_fail(&err, PHX_INVALID, "%s is there already, and is not overwritten", path);
  if (!status) status = find_gpt2(&e, &err);
  e.part = phx__calloc(PHX__TOOL_PART, sizeof *e.part);
  if (!status && !e.part) status = phx_fail(&err, PHX_NOMEM, "no memory to export %s", argv[1]);
  if (!status) status = write_both(&e, &err);
  if (!status && e.source->step < 0) printf("%s: %" PRIu32 " tensors\n", path, phx__gpt2_n_params(&e.gpt2));
  else if (!status)
    printf("%s: %" PRIu32 " tensors of step %" PRId64 "\n", path, phx__gpt2_n_params(&e.gpt2), e.source->step);
  status = phx__source_explain(e.source, status, &err);
  phx__free(e.part);
  phx__source_close(e.source);
  return status ? phx__checkpoint_refuse(status, &err) : PHX__EXIT_OK;
}
