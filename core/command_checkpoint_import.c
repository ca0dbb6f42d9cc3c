/* core/command_checkpoint_import.c - `phalanx checkpoint import`: weights trained elsewhere become a checkpoint of
 * step 0.
 *
 * DIR holds model.safetensors and config.json as Hugging Face writes them for GPT-2; names with or without
 * "transformer.". lm_head.weight may be there if it equals wte.weight, since our head is tied; masks (attn.bias,
 * attn.masked_bias) carry nothing and are passed over; anything else is refused by name.  Optimizer states are zero. 
 * The checkpoint is written beside its place and renamed when it is whole.  The model's layout is the plugin's own,
 * asked through a configuration. */
#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "checkpoint_dir.h"
#include "command_checkpoint.h"
#include "json.h"
#include "layout.h"
#include "optim.h"
#include "prepare.h"
#include "state_hash.h"
#include "status.h"
#include "sys.h"

#define SHARD "rank-00000.safetensors"
enum { UNITS_PART = PHX__TOOL_PART / PHX_BLOCK }; /* blocks written at once */

typedef struct import {
  char target[PHX__TOOL_PATH], part[PHX__TOOL_PATH], parent[PHX__TOOL_PATH]; /* the checkpoint; beside it; above it */
  char run[PHX__TOOL_PATH];                                                  /* "" when a checkpoint was named */
  phx__safetensors *file;
  phx__config *config;
  phx__prepared *prepared;
  phx__manifest *manifest;
  phx_optim optim;
  phx__transposer *turned; /* (n_params) of the matrices; one at a time has memory */
  phx__tensor_source *sources; /* (n_params) */
  float *data, *part_data;
  unsigned char *raw;
  phx__state_hash hash;
} import;

/* ---- where it goes ---- */
static phx_status choose_target(import *in, const char *out, phx_error *err) {
  char path[PHX__TOOL_PATH];
  struct stat st;
  const char *slash = strrchr(out, '/');
  const bool named = !strncmp(slash ? slash + 1 : out, "step-", 5);
  if (strlen(out) > 4000) return phx__fail(err, PHX_INVALID, "-o: the path is too long");
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
    return phx__fail(err, PHX_INVALID, "%s is there already, and is not overwritten", in->target);
  snprintf(path, sizeof path, "%.4000s/checkpoints/latest", in->run);
  if (in->run[0] && !lstat(path, &st))
    return phx__fail(err, PHX_INVALID, "%s has checkpoints of its own: import into a run of its own", in->run);
  return PHX_OK;
}

/* ---- the model: an existing run's configuration, or one made from config.json ---- */
static phx_status read_sizes(const char *dir, char *ini, size_t room, phx_error *err) {
  static const char *const keys[5][2] = {{"n_layer", "layers"}, {"n_head", "heads"}, {"n_embd", "width"},
                                         {"n_positions", "context"}, {"vocab_size", "vocab"}};
  enum { MOST = 1 << 20 };
  char path[PHX__TOOL_PATH], *text = NULL;
  int fd = -1;
  int64_t bytes = 0, value[5] = {0};
  cJSON *root = NULL;
  snprintf(path, sizeof path, "%s/config.json", dir);
  phx_status status = phx__file_open(path, &fd, &bytes, err);
  if (status) return status;
  if (bytes > MOST) status = phx__fail(err, PHX_IO, "%s has %" PRId64 " bytes; %d are the most", path, bytes, MOST);
  else if (!(text = phx__calloc(1, (size_t)bytes + 1)))
    status = phx__fail(err, PHX_NOMEM, "no memory to read %s", path);
  else status = phx__file_read(fd, path, text, bytes, 0, err);
  phx__sys.close(fd);
  if (!status &&
      !(root = cJSON_ParseWithLength(text, (size_t)bytes))) /* theirs has fractions: our strict reader would refuse */
    status = phx__fail(err, PHX_IO, "%s is not JSON", path);
  const char *type = cJSON_GetStringValue(cJSON_GetObjectItemCaseSensitive(root, "model_type"));
  if (!status && (!type || strcmp(type, "gpt2")))
    status =
        phx__fail(err, PHX_UNSUPPORTED, "%s: model_type is '%.40s', and import reads gpt2", path, type ? type : "");
  const char *act = cJSON_GetStringValue(cJSON_GetObjectItemCaseSensitive(root, "activation_function"));
  if (!status && act && strcmp(act, "gelu_new"))
    status = phx__fail(err, PHX_UNSUPPORTED, "%s: activation_function is '%.40s', and ours is gelu_new", path, act);
  for (int i = 0; i < 5 && !status; i++) {
    const double number = cJSON_GetNumberValue(cJSON_GetObjectItemCaseSensitive(root, keys[i][0]));
    if (number >= 1 && number <= 1 << 24) value[i] = (int64_t)number;
    else status = phx__fail(err, PHX_INVALID, "%s: %s is missing or not a size", path, keys[i][0]);
  }
  if (!status)
    snprintf(ini, room,
             "[run]\nstrategy = ddp\n[data]\ntrain = imported\n[batch]\nmicro = 1\nsequence = %" PRId64
             "\n[model]\nplugin = gpt\nlayers = %" PRId64 "\nheads = %" PRId64 "\nwidth = %" PRId64
             "\ncontext = %" PRId64 "\nvocab = %" PRId64 "\n",
             value[3], value[0], value[1], value[2], value[3], value[4]);
  cJSON_Delete(root);
  phx__free(text);
  return status;
}

static phx_status open_model(import *in, const char *dir, phx_error *err) {
  static const phx__override one_rank[] = {{"run.ranks=1", "import"}, {"batch.total=0", "import"}};
  char ini[1024], path[PHX__TOOL_PATH];
  int fd = -1;
  phx_status status = PHX_OK;
  snprintf(path, sizeof path, "%.4000s/config.ini", in->run);
  if (!in->run[0] || access(path, F_OK)) {
    PHX__TRY(read_sizes(dir, ini, sizeof ini, err));
    fd = phx__sys.memfd_create("config.ini", MFD_CLOEXEC);
    if (fd < 0) {
      status = phx__fail_errno(err, PHX_NOMEM, errno, "no memory for a configuration");
      goto done;
    }
    PHX__TRY(phx__file_write(fd, "a configuration in memory", ini, (int64_t)strlen(ini), 0, err));
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
  }
  status = phx__config_load(path, one_rank, 2, stderr, &in->config);
  if (status) {
    phx__fail(err, status, "the model cannot be laid out: see above");
    goto done;
  }
  PHX__TRY(phx__prepare(in->config, 0, 1, 0, 1, 0, 0, &in->prepared, err));
  phx__optim_states(&in->config->s, &in->optim);
done:
  if (fd >= 0) phx__sys.close(fd);
  return status;
}

/* ---- what stands where in the file that is read ---- */
static const char *bare_name(const char *name) { return strncmp(name, "transformer.", 12) ? name : name + 12; }

static bool passed_over(const char *name) {
  const size_t n = strlen(name);
  return (n > 10 && !strcmp(name + n - 10, ".attn.bias")) || (n > 17 && !strcmp(name + n - 17, ".attn.masked_bias"));
}

static phx_status check_head(import *in, const phx__tensor *head, const phx__tensor *wte, phx_error *err) {
  phx__tensor_source a = {in->file, head, in->raw}, b = {in->file, wte, in->raw};
  if (head->numel != wte->numel)
    return phx__fail(err, PHX_UNSUPPORTED, "%s: %s is not wte.weight: our head is tied", in->file->path, head->name);
  for (int64_t at = 0; at < head->numel; at += PHX__TOOL_PART) {
    const int64_t n = head->numel - at < PHX__TOOL_PART ? head->numel - at : PHX__TOOL_PART;
    phx_status status = phx__tensor_elements(&a, at, n, in->data, err);
    if (!status) status = phx__tensor_elements(&b, at, n, in->part_data, err);
    if (status) return status;
    if (memcmp(in->data, in->part_data, (size_t)n * 4))
      return phx__fail(err, PHX_UNSUPPORTED, "%s: %s differs from wte.weight, and our head is tied", in->file->path,
                       head->name);
  }
  return PHX_OK;
}

static phx_status find_tensors(import *in, phx_error *err) {
  const phx_model *model = in->prepared->model;
  const phx__tensor *head = NULL;
  for (uint32_t t = 0; t < in->file->n; t++) {
    const phx__tensor *tensor = &in->file->tensors[t];
    const char *name = bare_name(tensor->name);
    uint32_t i = 0;
    if (passed_over(name)) continue;
    if (!strcmp(name, "lm_head.weight")) {
      head = tensor;
      continue;
    }
    while (i < model->n_params && strcmp(phx_model_param(model, i)->name, name)) i++;
    if (i == model->n_params)
      return phx__fail(err, PHX_INVALID, "%s: tensor %.200s is none of this model's", in->file->path, tensor->name);
    if (in->sources[i].tensor)
      return phx__fail(err, PHX_INVALID, "%s: tensor %.200s is there with and without 'transformer.'", in->file->path,
                       name);
    const phx_param *p = phx_model_param(model, i);
    const bool turned = phx__gpt2_transposed(p->name);
    bool same = tensor->ndim == p->ndim;
    for (uint32_t d = 0; same && d < p->ndim; d++) same = tensor->shape[d] == p->shape[turned ? 1 - d : d];
    if (!same)
      return phx__fail(err, PHX_INVALID, "%s: tensor %.200s has another shape than in this model", in->file->path,
                       tensor->name);
    in->sources[i] = (phx__tensor_source){in->file, tensor, in->raw};
  }
  for (uint32_t i = 0; i < model->n_params; i++)
    if (!in->sources[i].tensor)
      return phx__fail(err, PHX_INVALID, "%s has no tensor %s", in->file->path, phx_model_param(model, i)->name);
  return head ? check_head(in, head, in->sources[0].tensor, err) : PHX_OK;
}

/* ---- the checkpoint ---- */
static phx_status fill_manifest(import *in, phx_error *err) {
  char text[32];
  phx__manifest *m = in->manifest = phx__manifest_create();
  if (!m) return phx__fail(err, PHX_NOMEM, "no memory for a manifest");
  phx_status status = phx__checkpoint_describe(m, in->config, &in->optim, in->prepared->model, 1, err);
  snprintf(text, sizeof text, "%" PRIu32, in->file->n);
  if (!status) status = phx__manifest_add_identity(m, "imported_tensors", text, err);
  return status;
}

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
        phx_status status = phx__manifest_add_slice(in->manifest, &s, err);
        if (status) return status;
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
    phx__transposer *turn = &in->turned[i];
    phx_status status = PHX_OK;
    if (!phx__gpt2_transposed(r.param->name)) {
      status = phx__tensor_elements(&in->sources[i], r.in_param, r.numel, at, err);
    } else {
      if (!turn->band) {
        *turn = (phx__transposer){.read = phx__tensor_elements, .ctx = &in->sources[i], .rows = r.param->shape[1],
                                  .columns = r.param->shape[0]};
        status = phx__transposer_open(turn, err);
      }
      if (!status) status = phx__transposed_elements(turn, r.in_param, r.numel, at, err);
      if (r.in_param + r.numel == r.param->numel) phx__transposer_close(turn);
    }
    if (status) return status;
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
    phx_status status = fill_part(in, s, b, n, err);
    if (!status)
      status = phx__writing(phx__safetensors_write(w, i, b * PHX_BLOCK * 4, n * PHX_BLOCK * 4, in->data, err));
    if (status) return status;
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
    status = phx__fail(err, PHX_NOMEM, "no memory to write %s", path);
    goto done;
  }
  for (uint32_t i = 0; i < n; i++) {
    const phx__manifest_slice *s = &in->manifest->slices[i];
    phx__manifest_tensor_name(in->manifest, s->kind, s->index, s->unit, s->flat, 0, names[i]);
    tensors[i] = (phx__tensor){.name = names[i], .dtype = PHX_F32, .ndim = 1, .shape = {s->blocks * PHX_BLOCK}};
  }
  PHX__TRY(phx__writing(phx__safetensors_create(path, tensors, n, NULL, true, &w, err)));
  for (uint32_t i = 0; i < n; i++) PHX__TRY(write_slice(in, w, i, err));
  sums = phx__calloc((size_t)phx__chunks_count(w->file.bytes), sizeof *sums);
  if (!sums) {
    status = phx__fail(err, PHX_NOMEM, "no memory to write %s", path);
    goto done;
  }
  PHX__TRY(phx__writing(phx__safetensors_finish(w, sums, err)));
  PHX__TRY(phx__manifest_add_file(in->manifest, SHARD, w->file.bytes, sums, err));
  phx__state_hash_text(in->hash, in->manifest->state_hash);
  PHX__TRY(phx__writing(phx__manifest_write(in->part, in->manifest, err)));
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
  return phx__fail_errno(err, PHX_INVALID, errno, "cannot create the directory %s", path);
}

/* Whole, or nothing is left: neither of the files nor of the directories. */
static phx_status commit(import *in, phx_error *err) {
  char path[PHX__TOOL_PATH + 32];
  bool run = false, parent = false, part = false, there = false;
  phx_status status = PHX_OK;
  if (in->run[0]) PHX__TRY(make_directory(in->run, &run, err));
  if (in->run[0]) PHX__TRY(make_directory(in->parent, &parent, err));
  PHX__TRY(make_directory(in->part, &part, err));
  PHX__TRY(write_shard(in, err));
  PHX__TRY(phx__writing(phx__dir_flush(in->part, err)));
  if (phx__sys.rename(in->part, in->target)) {
    status = phx__fail_errno(err, PHX_STATE, errno, "cannot rename %s to %s", in->part, in->target);
    goto done;
  }
  there = true;
  PHX__TRY(phx__writing(phx__dir_flush(in->parent, err)));
  if (in->run[0]) PHX__TRY(phx__writing(phx__checkpoint_point(in->run, 0, err)));
done:
  if (!status || there) return status;
  snprintf(path, sizeof path, "%s/" SHARD, in->part);
  if (part) phx__sys.unlink(path);
  snprintf(path, sizeof path, "%s/" PHX__MANIFEST_NAME, in->part);
  if (part) phx__sys.unlink(path);
  if (part) phx__sys.rmdir(in->part);
  if (parent) phx__sys.rmdir(in->parent);
  if (run) phx__sys.rmdir(in->run);
  return status;
}

static phx_status run_import(import *in, const char *dir, const char *out, phx_error *err) {
  char path[PHX__TOOL_PATH];
  phx_status status = choose_target(in, out, err);
  snprintf(path, sizeof path, "%.4000s/model.safetensors", dir);
  if (!status) status = phx__safetensors_open(path, &in->file, err);
  if (!status) status = open_model(in, dir, err);
  if (status) return status;
  const uint32_t n = in->prepared->model->n_params;
  in->turned = phx__calloc(n, sizeof *in->turned);
  in->sources = phx__calloc(n, sizeof *in->sources);
  in->data = phx__calloc(PHX__TOOL_PART, sizeof *in->data);
  in->part_data = phx__calloc(PHX__TOOL_PART, sizeof *in->part_data);
  in->raw = phx__calloc(PHX__TOOL_PART, 4);
  if (!in->turned || !in->sources || !in->data || !in->part_data || !in->raw)
    return phx__fail(err, PHX_NOMEM, "no memory to import %s", path);
  status = find_tensors(in, err);
  if (!status) status = fill_manifest(in, err);
  if (!status) status = add_slices(in, err);
  return status ? status : commit(in, err);
}

int phx__checkpoint_import(int argc, char **argv) {
  phx_error err = PHX_ERROR_INIT;
  if (argc != 4 || strcmp(argv[2], "-o")) return phx__checkpoint_usage("import DIR -o CHECKPOINT|RUN");
  import *in = phx__calloc(1, sizeof *in);
  if (!in) return phx__checkpoint_refuse(phx__fail(&err, PHX_NOMEM, "no memory to import"), &err);
  phx_status status = run_import(in, argv[1], argv[3], &err);
  if (!status) printf("%s: %" PRIu32 " parameters, optimizer states zero\n", in->target, in->manifest->n_params);
  if (in->turned)
    for (uint32_t i = 0; i < in->prepared->model->n_params; i++) phx__transposer_close(&in->turned[i]);
  phx__free(in->turned);
  phx__free(in->sources);
  phx__free(in->data);
  phx__free(in->part_data);
  phx__free(in->raw);
  phx__manifest_free(in->manifest);
  phx__prepared_free(in->prepared);
  phx__config_free(in->config);
  phx__safetensors_close(in->file);
  phx__free(in);
  return status ? phx__checkpoint_refuse(status, &err) : PHX__EXIT_OK;
}
