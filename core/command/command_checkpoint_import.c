/* core/command/command_checkpoint_import.c - `phalanx checkpoint import`: weights trained elsewhere become a checkpoint
 * of step 0.
 *
 * From a folder with config.json and model.safetensors, or several files and their index, as Hugging Face writes them
 * for GPT-2 (model_source.c checks it whole); or from a run or a checkpoint of ours, of any model, whose weights alone
 * are taken.  A weight that is no finite number is refused.  Optimizer states are zero.  The checkpoint is written
 * beside its place and renamed when it is whole.  The model's layout is the plugin's own, asked through a
 * configuration. */
#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/complain.h"
#include "base/status.h"
#include "base/sys.h"
#include "checkpoint/checkpoint.h"
#include "checkpoint/checkpoint_dir.h"
#include "checkpoint/checkpoint_resolve.h"
#include "checkpoint/elements.h"
#include "checkpoint/model_config.h"
#include "command/command_checkpoint.h"
#include "engine/layout.h"
#include "engine/prepare.h"
#include "engine/state_hash.h"
#include "job/run_lock.h"
#include "plugin/config_load.h"

#define SHARD "rank-00000.safetensors"
enum { UNITS_PART = PHX__TOOL_PART / PHX_BLOCK }; /* blocks written at once */

typedef struct import {
  char target[PHX__TOOL_PATH], part[PHX__TOOL_PATH], parent[PHX__TOOL_PATH]; /* the checkpoint; beside it; above it */
  char run[PHX__TOOL_PATH];                                                  /* "" when a checkpoint was named */
  phx__source *source;
  phx__gpt2 gpt2;
  phx__config *config;
  phx__prepared *prepared;
  phx__manifest *manifest;
  phx__source_param *params; /* (n_params) */
  float *data;
  phx__state_hash hash;
} import;

/* ---- where it goes ---- */
static phx_status choose_target(import *in, const char *out, phx_error *err) {
  struct stat st;
  const char *slash = strrchr(out, '/');
  const bool named = !strncmp(slash ? slash + 1 : out, "step-", 5);
  if (strlen(out) > 4000) return phx_fail(err, PHX_INVALID, "-o: the path is too long");
  if (named) {
    snprintf(in->target, sizeof in->target, "%s", out);
    snprintf(in->parent, sizeof in->parent, "%.*s", slash ? (int)(slash - out) : 1, slash ? out : ".");
  } else {
    snprintf(in->run, sizeof in->run, "%s", out);
    snprintf(in->parent, sizeof in->parent, "%s/checkpoints", out);
    snprintf(in->target, sizeof in->target, "%s/checkpoints/step-00000000", out);
  }
  snprintf(in->part, sizeof in->part, "%.4000s/.step-import.%d.part", in->parent, (int)getpid());
  if (!lstat(in->target, &st))
    return phx_fail(err, PHX_INVALID, "%s is there already, and is not overwritten", in->target);
  if (in->run[0] && phx__has_checkpoints(in->run))
    return phx_fail(err, PHX_INVALID, "%s has checkpoints of its own: import into a run of its own", in->run);
  return PHX_OK;
}

static phx_status fill_manifest(import *in, phx_error *err) {
  char text[32];
  phx__manifest *m = in->manifest = phx__manifest_create();
  if (!m) return phx_fail(err, PHX_NOMEM, "no memory for a manifest");
  phx_status status = phx__checkpoint_describe(m, in->prepared, 1, err);
  snprintf(text, sizeof text, "%" PRIu32, phx__source_n(in->source));
  if (!status) status = phx__manifest_add_identity(m, "imported_tensors", text, err);
  return status;
}

/* ---- the model: config.json's; a configuration of the target's run must say the same ---- */
static const phx__override one_rank[] = {{"run.ranks=1", "import"},
                                         {"batch.total=0", "import"},
                                         {"run.strategy=ddp", "import"}, /* of a run of another model */
                                         {"precision.reduce=fp32", "import"}};

/* One that is no GPT-2 is told by its checkpoint, or by its run. */
static phx_status configure_other(import *in, const char *own, phx_error *err) {
  char ini[PHX__TOOL_PATH] = "";
  if (own[0])
    return phx_fail(err, PHX_INVALID,
                     "%s is of a model that is no GPT-2, which is not compared with %s: import into a run of its own",
                     in->source->path, own);
  if (!in->source->reader) snprintf(ini, sizeof ini, "%.4000s/config.ini", in->source->run);
  return phx__model_config(in->source, ini, one_rank, 4, &in->config, err);
}

static phx_status open_model(import *in, phx_error *err) {
  char path[PHX__TOOL_PATH];
  phx_status status = phx__source_gpt2(in->source, &in->gpt2, err);
  const bool other = status == PHX_UNSUPPORTED;
  if (status && !other) return status;
  snprintf(path, sizeof path, "%.4000s/config.ini", in->run);
  const bool made = !in->run[0] || access(path, F_OK);
  if (made) path[0] = 0;
  if (other) status = configure_other(in, path, err);
  else status = phx__model_config(in->source, path, one_rank, 2, &in->config, err);
  if (status) return status;
  PHX_TRY(phx__prepare(in->config, 0, 1, 0, 1, 0, 0, &in->prepared, err));
  PHX_TRY(fill_manifest(in, err));
  if (!made) {
    phx__gpt2 own;
    char theirs[PHX__TOOL_PATH];
    snprintf(theirs, sizeof theirs, "%.4000s/%s", in->source->path,
             in->source->has_config ? PHX__GPT2_CONFIG : PHX__MANIFEST_NAME);
    PHX_TRY(phx__gpt2_of_manifest(path, in->manifest, &own, err));
    PHX_TRY(phx__gpt2_same(theirs, &in->gpt2, path, &own, err));
  }
  return PHX_OK;
}

/* The source has every parameter in its shape. */
static phx_status find_params(import *in, phx_error *err) {
  const phx_model *model = in->prepared->model;
  in->params = phx__calloc(model->n_params, sizeof *in->params);
  if (!in->params) return phx_fail(err, PHX_NOMEM, "no memory to import %s", in->source->path);
  for (uint32_t i = 0; i < model->n_params; i++) {
    const phx_param *p = phx_model_param(model, i);
    if (!phx__source_find(in->source, p->name, &in->params[i]))
      return phx_fail(err, PHX_INVALID, "%s has no tensor %s", in->source->path, p->name);
    bool same = in->params[i].ndim == p->ndim;
    for (uint32_t d = 0; same && d < p->ndim; d++) same = in->params[i].shape[d] == p->shape[d];
    if (!same)
      return phx_fail(err, PHX_INVALID, "%s: tensor %s has another shape than in this model", in->source->path,
                      p->name);
  }
  return PHX_OK;
}

/* ---- the checkpoint ---- */
/* One slice per state and flat, in the order of the manifest. */
static phx_status add_slices(import *in, phx_error *err) {
  const phx__manifest *m = in->manifest;
  for (uint32_t state = 0; state <= m->n_states; state++)
    for (uint32_t u = 0; u < m->n_units; u++)
      for (uint32_t f = 0; f < (state ? 1 : PHX_FLATS); f++) {
        if (!m->units[u].blocks[f]) continue;
        const phx__manifest_slice s = {.kind = state ? PHX_STATE_OPTIM : PHX_STATE_WEIGHT,
                                       .index = state ? state - 1 : 0,
                                       .unit = u,
                                       .flat = f,
                                       .blocks = m->units[u].blocks[f],
                                       .dtype = PHX_F32};
        PHX_TRY(phx__manifest_add_slice(in->manifest, &s, err));
      }
  return PHX_OK;
}

/* Values of a part of a flat, padding zero. */
static phx_status fill_part(import *in, const phx__manifest_slice *s, int64_t block, int64_t blocks, phx_error *err) {
  const phx_model *model = in->prepared->model;
  phx__range r = {0};
  memset(in->data, 0, (size_t)blocks * PHX_BLOCK * sizeof *in->data);
  if (s->kind != PHX_STATE_WEIGHT) return PHX_OK;
  while (phx__layout_next(model, s->unit, s->flat, block * PHX_BLOCK, blocks * PHX_BLOCK, &r)) {
    const size_t i = (size_t)(r.param - phx_model_param(model, 0));
    float *at = in->data + (r.first - block * PHX_BLOCK);
    PHX_TRY(phx__source_read(in->source, &in->params[i], r.in_param, r.numel, at, err));
  }
  return PHX_OK;
}

static phx_status write_slice(import *in, phx__safetensors_writer *w, uint32_t i, phx_error *err) {
  phx__manifest_slice *s = &in->manifest->slices[i];
  s->offset = w->tensors[i].begin;
  for (int64_t b = 0; b < s->blocks; b += UNITS_PART) {
    const int64_t n = s->blocks - b < UNITS_PART ? s->blocks - b : UNITS_PART;
    const phx_slice part = {.struct_size = sizeof part, .kind = s->kind, .state_index = s->index, .unit = s->unit,
                            .flat = s->flat, .first_block = b, .blocks = n, .dtype = PHX_F32};
    PHX_TRY(fill_part(in, s, b, n, err));
    PHX_TRY(phx__writing(phx__safetensors_write(w, i, b * PHX_BLOCK * 4, n * PHX_BLOCK * 4, in->data, err)));
    phx__state_hash_slice(&in->hash, in->prepared->model, &part, in->data);
  }
  return PHX_OK;
}

static phx_status write_shard(import *in, phx_error *err) {
  phx_status status = PHX_OK;
  char path[PHX__TOOL_PATH + 32];
  const uint32_t n = in->manifest->n_slices;
  phx__safetensors_writer *w = NULL;
  uint64_t *sums = NULL;
  phx__tensor *tensors = phx__calloc(n, sizeof *tensors);
  char(*names)[96] = phx__calloc(n, sizeof *names);
  snprintf(path, sizeof path, "%s/" SHARD, in->part);
  if (!tensors || !names) {
    status = phx_fail(err, PHX_NOMEM, "no memory to write %s", path);
    goto done;
  }
  for (uint32_t i = 0; i < n; i++) {
    const phx__manifest_slice *s = &in->manifest->slices[i];
    phx__manifest_tensor_name(in->manifest, s->kind, s->index, s->unit, s->flat, 0, names[i]);
    tensors[i] = (phx__tensor){.name = names[i], .dtype = PHX_F32, .ndim = 1, .shape = {s->blocks * PHX_BLOCK}};
  }
  PHX_TRY_GOTO(phx__writing(phx__safetensors_create(path, tensors, n, NULL, true, &w, err)), status, done);
  for (uint32_t i = 0; i < n; i++) PHX_TRY_GOTO(write_slice(in, w, i, err), status, done);
  sums = phx__calloc((size_t)phx__chunks_count(w->file.bytes), sizeof *sums);
  if (!sums) {
    status = phx_fail(err, PHX_NOMEM, "no memory to write %s", path);
    goto done;
  }
  PHX_TRY_GOTO(phx__writing(phx__safetensors_finish(w, sums, err)), status, done);
  PHX_TRY_GOTO(phx__manifest_add_file(in->manifest, SHARD, w->file.bytes, sums, err), status, done);
  phx__state_hash_text(in->hash, in->manifest->state_hash);
  PHX_TRY_GOTO(phx__writing(phx__manifest_write(in->part, in->manifest, err)), status, done);
done:
  phx__safetensors_writer_close(w);
  phx__free(sums);
  phx__free(names);
  phx__free(tensors);
  return status;
}

static phx_status make_directory(const char *path, bool *made, phx_error *err) {
  *made = !phx__sys.mkdir(path, 0755);
  if (*made || errno == EEXIST) return PHX_OK;
  return phx_fail_errno(err, PHX_INVALID, errno, "cannot create the directory %s", path);
}

/* No run begins, or goes on, in it meanwhile; one that has done so since the target was chosen is left alone. */
static phx_status lock_run(const import *in, phx_error *err) {
  char path[PHX__TOOL_PATH];
  struct stat st;
  PHX_TRY(phx__run_lock_take(in->run, err));
  if (phx__has_checkpoints(in->run))
    return phx_fail(err, PHX_INVALID, "%s has checkpoints of its own: import into a run of its own", in->run);
  snprintf(path, sizeof path, "%.4000s/" PHX__GPT2_WEIGHTS, in->run); /* a resume from the import would replace them */
  if (!lstat(path, &st))
    return phx_fail(err, PHX_INVALID, "%s has final weights of its own: import into a run of its own", in->run);
  return PHX_OK;
}

/* Whole, or nothing is left: neither of the files nor of the directories. */
static phx_status commit(import *in, phx_error *err) {
  char path[PHX__TOOL_PATH + 32];
  bool run = false, parent = false, part = false, there = false;
  phx_status status = PHX_OK;
  if (in->run[0]) PHX_TRY_GOTO(make_directory(in->run, &run, err), status, done);
  if (in->run[0]) PHX_TRY_GOTO(lock_run(in, err), status, done);
  if (in->run[0]) PHX_TRY_GOTO(make_directory(in->parent, &parent, err), status, done);
  PHX_TRY_GOTO(make_directory(in->part, &part, err), status, done);
  PHX_TRY_GOTO(write_shard(in, err), status, done);
  PHX_TRY_GOTO(phx__writing(phx__dir_flush(in->part, err)), status, done);
  PHX_TRY_GOTO(phx__run_lock_check(err), status, done);
  if (phx__sys.rename(in->part, in->target)) {
    status = phx_fail_errno(err, PHX_STATE, errno, "cannot rename %s to %s", in->part, in->target);
    goto done;
  }
  there = true;
  PHX_TRY_GOTO(phx__writing(phx__dir_flush(in->parent, err)), status, done);
  if (in->run[0]) PHX_TRY_GOTO(phx__writing(phx__checkpoint_point(in->run, 0, err)), status, done);
done:
  if (!status || there) goto release;
  snprintf(path, sizeof path, "%s/" SHARD, in->part);
  if (part) phx__sys.unlink(path);
  snprintf(path, sizeof path, "%s/" PHX__MANIFEST_NAME, in->part);
  if (part) phx__sys.unlink(path);
  if (part) phx__sys.rmdir(in->part);
  if (parent) phx__sys.rmdir(in->parent);
release:
  phx__run_lock_release();
  if (status && !there && run) phx__sys.rmdir(in->run);
  return status;
}

static phx_status run_import(import *in, const char *from, const char *out, phx_error *err) {
  PHX_TRY(choose_target(in, out, err));
  PHX_TRY(phx__source_open(from, &in->source, err));
  PHX_TRY(open_model(in, err));
  in->source->finite = true;
  in->data = phx__calloc(PHX__TOOL_PART, sizeof *in->data);
  if (!in->data) return phx_fail(err, PHX_NOMEM, "no memory to import %s", from);
  phx_status status = find_params(in, err);
  if (!status) status = add_slices(in, err);
  return status ? status : commit(in, err);
}

int phx__checkpoint_import(int argc, char **argv) {
  phx_error err = PHX_ERROR_INIT;
  if (argc != 4 || strcmp(argv[2], "-o"))
    return phx__checkpoint_usage("import FOLDER|CHECKPOINT|RUN -o CHECKPOINT|RUN");
  if (!strncmp(argv[3], "--", 2)) {
    phx__complain("-o needs a value, and %s is an option (a directory of that name is ./%s)", argv[3], argv[3]);
    return PHX__EXIT_REFUSED;
  }
  import *in = phx__calloc(1, sizeof *in);
  if (!in) return phx__checkpoint_refuse(phx_fail(&err, PHX_NOMEM, "no memory to import"), &err);
  phx_status status = run_import(in, argv[1], argv[3], &err);
  if (!status) printf("%s: %" PRIu32 " parameters, optimizer states zero\n", in->target, in->manifest->n_params);
  if (!status && in->gpt2.dropout[0])
    printf("%s was trained with dropout (%s): the model is the same, and is trained on without it\n", argv[1],
           in->gpt2.dropout);
  status = phx__source_explain(in->source, status, &err);
  phx__free(in->params);
  phx__free(in->data);
  phx__manifest_free(in->manifest);
  phx__prepared_free(in->prepared);
  phx__config_free(in->config);
  phx__source_close(in->source);
  phx__free(in);
  return status ? phx__checkpoint_refuse(status, &err) : PHX__EXIT_OK;
}
