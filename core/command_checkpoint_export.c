/* core/command_checkpoint_export.c - `phalanx checkpoint export`: one model.safetensors and config.json for others.
 *
 * Names and layout are those of the GPT-2 files that Hugging Face publishes: without "transformer." in front (their
 * loader takes both), linear weights (in, out) as Conv1D keeps them, no lm_head, since it is wte.weight.  Our own
 * names are the same, and linear weights are (out, in). */
#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "command_checkpoint.h"
#include "status.h"
#include "sys.h"

typedef struct exported {
  phx__checkpoint_reader *reader;
  const char *dir; /* the target */
  bool made;       /* it was not there before */
  phx__gpt2 gpt2;
  float *blocks, *part;
} exported;

static phx_status write_param(exported *e, phx__safetensors_writer *w, uint32_t i, phx_error *err) {
  const phx__manifest_param *p = &e->reader->manifest->params[i];
  phx__param_source source = {e->reader, p, PHX_STATE_WEIGHT, 0, e->blocks};
  phx__transposer turn = {.read = phx__param_elements, .ctx = &source, .rows = p->shape[0], .columns = p->shape[1]};
  const bool turned = phx__gpt2_transposed(p->name);
  phx__element_fn *read = turned ? phx__transposed_elements : phx__param_elements;
  void *ctx = turned ? (void *)&turn : (void *)&source;
  phx_status status = turned ? phx__transposer_open(&turn, err) : PHX_OK;
  for (int64_t at = 0; at < p->numel && !status; at += PHX__TOOL_PART) {
    const int64_t n = p->numel - at < PHX__TOOL_PART ? p->numel - at : PHX__TOOL_PART;
    status = read(ctx, at, n, e->part, err);
    if (!status) status = phx__writing(phx__safetensors_write(w, i, at * 4, n * 4, e->part, err));
  }
  if (turned) phx__transposer_close(&turn);
  return status;
}

static phx_status write_weights(exported *e, phx_error *err) {
  static const char *const metadata[] = {"format", "pt", NULL}; /* what transformers asks for */
  const phx__manifest *m = e->reader->manifest;
  phx_status status = PHX_OK;
  char path[PHX__TOOL_PATH], part[PHX__TOOL_PATH + 8];
  phx__safetensors_writer *w = NULL;
  phx__tensor *tensors = phx__calloc(m->n_params, sizeof *tensors);
  snprintf(path, sizeof path, "%s/model.safetensors", e->dir);
  snprintf(part, sizeof part, "%s.part", path);
  if (!tensors) {
    status = phx__fail(err, PHX_NOMEM, "no memory to write %s", path);
    goto done;
  }
  for (uint32_t i = 0; i < m->n_params; i++) {
    const phx__manifest_param *p = &m->params[i];
    const bool turned = phx__gpt2_transposed(p->name);
    tensors[i] = (phx__tensor){.name = p->name, .dtype = PHX_F32, .ndim = p->ndim};
    for (uint32_t d = 0; d < p->ndim; d++) tensors[i].shape[d] = p->shape[turned ? 1 - d : d];
  }
  PHX__TRY(phx__writing(phx__safetensors_create(part, tensors, m->n_params, metadata, false, &w, err)));
  for (uint32_t i = 0; i < m->n_params; i++) PHX__TRY(write_param(e, w, i, err));
  PHX__TRY(phx__writing(phx__safetensors_finish(w, NULL, err)));
  if (phx__sys.rename(part, path))
    status = phx__fail_errno(err, PHX_STATE, errno, "cannot rename %s to %s", part, path);
done:
  phx__safetensors_writer_close(w);
  if (status) phx__sys.unlink(part);
  phx__free(tensors);
  return status;
}

/* Both files or none. */
static phx_status write_both(exported *e, phx_error *err) {
  char path[PHX__TOOL_PATH];
  e->made = !phx__sys.mkdir(e->dir, 0755);
  if (!e->made && errno != EEXIST)
    return phx__fail_errno(err, PHX_INVALID, errno, "cannot create the directory %s", e->dir);
  phx_status status = write_weights(e, err);
  if (!status) {
    status = phx__writing(phx__gpt2_write(e->dir, &e->gpt2, err));
    snprintf(path, sizeof path, "%s/model.safetensors", e->dir);
    if (status) phx__sys.unlink(path);
  }
  if (status && e->made) phx__sys.rmdir(e->dir);
  return status;
}

int phx__checkpoint_export(int argc, char **argv) {
  char dir[PHX__TOOL_PATH], path[PHX__TOOL_PATH];
  phx_error err = PHX_ERROR_INIT;
  exported e = {0};
  if (argc != 3) return phx__checkpoint_usage("export CHECKPOINT|RUN OUTDIR");
  e.dir = argv[2];
  phx_status status = phx__checkpoint_resolve(argv[1], dir, &err);
  snprintf(path, sizeof path, "%s/model.safetensors", e.dir);
  if (!status && !access(path, F_OK))
    status = phx__fail(&err, PHX_INVALID, "%s is there already, and is not overwritten", path);
  if (!status) status = phx__checkpoint_reader_open(dir, &e.reader, &err);
  if (!status) status = phx__gpt2_of_manifest(dir, e.reader->manifest, &e.gpt2, &err);
  e.blocks = phx__calloc(PHX__TOOL_PART + 2 * PHX_BLOCK, sizeof *e.blocks);
  e.part = phx__calloc(PHX__TOOL_PART, sizeof *e.part);
  if (!status && (!e.blocks || !e.part)) status = phx__fail(&err, PHX_NOMEM, "no memory to export %s", dir);
  if (!status) status = write_both(&e, &err);
  if (!status) printf("%s: %" PRIu32 " tensors of step %" PRId64 "\n", path, e.reader->manifest->n_params,
                      e.reader->manifest->step);
  phx__free(e.blocks);
  phx__free(e.part);
  phx__checkpoint_reader_close(e.reader);
  return status ? phx__checkpoint_refuse(status, &err) : PHX__EXIT_OK;
}
