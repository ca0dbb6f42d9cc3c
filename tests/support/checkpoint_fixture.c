/* tests/support/checkpoint_fixture.c - see checkpoint_fixture.h. */
#include "checkpoint_fixture.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>

#include "engine/layout.h"
#include "engine/state_hash.h"
#include "base/sys.h"

#define MUST(call)                                                                     \
  do {                                                                                 \
    phx_error err_ = {sizeof err_, 0, 0, {0}};                                         \
    phx_error *err = &err_;                                                            \
    if (call) {                                                                        \
      fprintf(stderr, "%s:%d: %s: %s\n", __FILE__, __LINE__, #call, err_.message);     \
      abort();                                                                         \
    }                                                                                  \
  } while (0)

checkpoint_fixture checkpoint_fixture_small(void) {
  return (checkpoint_fixture){.layers = 2, .width = 12, .vocab = 257, .context = 9, .heads = 3, .ranks = 2, .step = 3};
}

phx_model *checkpoint_fixture_model(const checkpoint_fixture *f) {
  static const struct {
    const char *name;
    int rows, columns; /* in widths */
  } block[12] = {{"ln_1.weight", 1, 0},      {"ln_1.bias", 1, 0},          {"attn.c_attn.weight", 3, 1},
                 {"attn.c_attn.bias", 3, 0}, {"attn.c_proj.weight", 1, 1}, {"attn.c_proj.bias", 1, 0},
                 {"ln_2.weight", 1, 0},      {"ln_2.bias", 1, 0},          {"mlp.c_fc.weight", 4, 1},
                 {"mlp.c_fc.bias", 4, 0},    {"mlp.c_proj.weight", 1, 4},  {"mlp.c_proj.bias", 1, 0}};
  static char names[400][40];
  static phx_param params[400];
  static phx_unit units[40];
  static phx_stage stage = {.name = "all"};
  static phx_use uses[40];
  uint32_t n = 0, u = 0;
  memset(units, 0, sizeof units);
#define PARAM(unit_, rows_, columns_, ...)                                           \
  do {                                                                               \
    snprintf(names[n], sizeof names[0], __VA_ARGS__);                                \
    params[n] = (phx_param){.name = names[n],                                        \
                            .shape = {rows_, (columns_) > 0 ? (columns_) : 1, 1, 1}, \
                            .ndim = (columns_) > 0 ? 2 : 1,                          \
                            .unit = unit_};                                          \
    units[unit_].n_params++;                                                         \
    n++;                                                                             \
  } while (0)
  units[u] = (phx_unit){.name = "wte", .first_param = n};
  PARAM(u, f->vocab, f->width, "wte.weight");
  units[++u] = (phx_unit){.name = "wpe", .first_param = n};
  PARAM(u, f->context, f->width, "wpe.weight");
  for (int l = 0; l < f->layers; l++) {
    static char unit_names[32][16];
    snprintf(unit_names[l], sizeof unit_names[0], "h.%d", l);
    units[++u] = (phx_unit){.name = unit_names[l], .first_param = n};
    for (int i = 0; i < 12; i++)
      PARAM(u, block[i].rows * f->width, block[i].columns * f->width, "h.%d.%s", l, block[i].name);
  }
  units[++u] = (phx_unit){.name = "ln_f", .first_param = n};
  PARAM(u, f->width, 0, "ln_f.weight");
  PARAM(u, f->width, 0, "ln_f.bias");
  for (uint32_t i = 0; i <= u; i++) uses[i] = (phx_use){i, PHX_USE_FORWARD | PHX_USE_BACKWARD | PHX_USE_GRADIENT};
  stage.n_uses = u + 1;
  const phx_model declared = {.struct_size = sizeof declared, .params = params, .units = units, .stages = &stage,
                              .uses = uses, .n_params = n, .n_units = u + 1, .n_stages = 1, .n_uses = u + 1,
                              .param_stride = sizeof params[0], .unit_stride = sizeof units[0],
                              .stage_stride = sizeof stage, .use_stride = sizeof uses[0]};
  phx_model *model = NULL;
  MUST(phx__layout_build(&declared, &model, err));
  return model;
}

float checkpoint_fixture_value(const checkpoint_fixture *f, int state, uint32_t param, int64_t element) {
  uint64_t x = ((uint64_t)f->step << 40) ^ ((uint64_t)(state + 1) << 36) ^ ((uint64_t)param << 24) ^ (uint64_t)element;
  x = (x ^ x >> 31) * 0x9e3779b97f4a7c15u;
  x ^= x >> 29;
  const float value = (float)((double)(x >> 40) / 16777216.0 - 0.5);
  return state == 1 ? value * value : value;
}

typedef struct building {
  const checkpoint_fixture *f;
  phx_model *model;
  phx__manifest *m;
  phx__state_hash hash;
} building;

static void fill(const building *b, const phx__manifest_slice *s, float *out) {
  phx__range r = {0};
  memset(out, 0, (size_t)s->blocks * PHX_BLOCK * sizeof *out);
  while (phx__layout_next(b->model, s->unit, s->flat, s->first_block * PHX_BLOCK, s->blocks * PHX_BLOCK, &r))
    for (int64_t i = 0; i < r.numel; i++)
      out[r.first - s->first_block * PHX_BLOCK + i] =
          checkpoint_fixture_value(b->f, s->kind == PHX_STATE_OPTIM ? (int)s->index : -1,
                                   (uint32_t)(r.param - phx_model_param(b->model, 0)), r.in_param + i);
}

/* Blocks of every flat are dealt out to the ranks in pieces; states go to another rank than weights. */
static void deal(building *b) {
  for (uint32_t state = 0; state < 3; state++)
    for (uint32_t u = 0; u < b->m->n_units; u++) {
      const int64_t blocks = b->m->units[u].blocks[0];
      const int64_t share = (blocks + b->f->ranks - 1) / b->f->ranks;
      const int64_t most = b->f->pieces && b->f->pieces < share ? b->f->pieces : share;
      for (int64_t at = 0, turn = 0; at < blocks; at += most, turn++) {
        const phx__manifest_slice s = {
            .kind = state ? PHX_STATE_OPTIM : b->f->masters ? PHX_STATE_MASTER : PHX_STATE_WEIGHT,
            .index = state ? state - 1 : 0, .unit = u, .flat = 0, .first_block = at,
            .blocks = blocks - at < most ? blocks - at : most, .dtype = PHX_F32,
            .file = (uint32_t)((turn + state) % b->f->ranks)};
        MUST(phx__manifest_add_slice(b->m, &s, err));
      }
    }
}

static void write_rank(building *b, const char *dir, uint32_t rank) {
  char path[4096], name[64];
  phx__tensor *tensors = calloc(b->m->n_slices + 1, sizeof *tensors);
  char(*names)[96] = calloc(b->m->n_slices + 1, sizeof *names);
  uint32_t n = 0;
  for (uint32_t i = 0; i < b->m->n_slices; i++) {
    const phx__manifest_slice *s = &b->m->slices[i];
    if (s->file != rank) continue;
    phx__manifest_tensor_name(b->m, s->kind, s->index, s->unit, s->flat, s->first_block, names[n]);
    tensors[n] = (phx__tensor){.name = names[n], .dtype = PHX_F32, .ndim = 1, .shape = {s->blocks * PHX_BLOCK}};
    n++;
  }
  if (b->f->privates)
    tensors[n++] = (phx__tensor){.name = "private.residue/0/0/0", .dtype = PHX_F32, .ndim = 1, .shape = {PHX_BLOCK}};
  phx__safetensors_writer *w = NULL;
  snprintf(name, sizeof name, "rank-%05u.safetensors", rank);
  snprintf(path, sizeof path, "%s/%s", dir, name);
  MUST(phx__safetensors_create(path, tensors, n, NULL, true, &w, err));
  n = 0;
  for (uint32_t i = 0; i < b->m->n_slices; i++) {
    phx__manifest_slice *s = &b->m->slices[i];
    if (s->file != rank) continue;
    float *data = malloc((size_t)s->blocks * PHX_BLOCK * sizeof *data);
    fill(b, s, data);
    s->offset = w->tensors[n].begin;
    MUST(phx__safetensors_write(w, n, 0, s->blocks * PHX_BLOCK * 4, data, err));
    const phx_slice slice = {.struct_size = sizeof slice, .kind = s->kind, .state_index = s->index, .unit = s->unit,
                             .flat = s->flat, .first_block = s->first_block, .blocks = s->blocks, .dtype = PHX_F32};
    phx__state_hash_slice(&b->hash, b->model, &slice, data);
    free(data);
    n++;
  }
  if (b->f->privates) {
    static const float residue[PHX_BLOCK] = {1, 2, 3};
    const phx__manifest_private p = {.name = "residue", .rank = (int32_t)rank, .blocks = 1, .dtype = PHX_F32,
                                     .file = rank, .offset = w->tensors[n].begin};
    MUST(phx__safetensors_write(w, n, 0, sizeof residue, residue, err));
    MUST(phx__manifest_add_private(b->m, &p, err));
  }
  uint64_t *sums = calloc((size_t)phx__chunks_count(w->file.bytes), sizeof *sums);
  MUST(phx__safetensors_finish(w, sums, err));
  MUST(phx__manifest_add_file(b->m, name, w->file.bytes, sums, err));
  phx__safetensors_writer_close(w);
  free(sums);
  free(names);
  free(tensors);
}

void checkpoint_fixture_write(const checkpoint_fixture *f, const char *dir) {
  building b = {.f = f, .model = checkpoint_fixture_model(f), .m = phx__manifest_create()};
  char text[32];
  mkdir(dir, 0755);
  b.m->step = f->step;
  b.m->samples = f->step * 8;
  b.m->data_seed = b.m->generator_seed = UINT64_MAX - 1; /* no double holds it */
  b.m->ranks = f->ranks;
  b.m->time = (int64_t)time(NULL) - 200;
  b.m->optimizer = phx__strdup("adamw");
  b.m->states[0] = (phx__manifest_state){phx__strdup("m"), PHX_F32};
  b.m->states[1] = (phx__manifest_state){phx__strdup("v"), PHX_F32};
  b.m->n_states = 2;
  MUST(phx__manifest_add_plugin(b.m, "strategy", "zero", "0.1.0", "00", err));
  MUST(phx__manifest_add_plugin(b.m, "model", "gpt", "0.1.0", "11", err));
  MUST(phx__manifest_set_model(b.m, b.model, err));
  MUST(phx__manifest_add_config(b.m, "model", "plugin", "gpt", err));
  snprintf(text, sizeof text, "%d", f->heads);
  MUST(phx__manifest_add_config(b.m, "model", "heads", text, err));
  MUST(phx__manifest_add_config(b.m, "run", "out", "a \"name\"\twith \\ all \x01 of it", err));
  MUST(phx__manifest_add_identity(b.m, "threads", "1", err));
  deal(&b);
  for (int r = 0; r < f->ranks; r++) write_rank(&b, dir, (uint32_t)r);
  phx__state_hash_text(b.hash, b.m->state_hash);
  MUST(phx__manifest_write(dir, b.m, err));
  phx__manifest_free(b.m);
  phx__layout_free(b.model);
}

void checkpoint_fixture_run(const checkpoint_fixture *f, const char *run) {
  char path[4096];
  mkdir(run, 0755);
  snprintf(path, sizeof path, "%s/checkpoints", run);
  mkdir(path, 0755);
  snprintf(path, sizeof path, "%s/checkpoints/step-%08lld", run, (long long)f->step);
  checkpoint_fixture_write(f, path);
  snprintf(path, sizeof path, "%s/checkpoints/latest", run);
  FILE *file = fopen(path, "w");
  if (!file || fprintf(file, "step-%08lld\n", (long long)f->step) < 0 || fclose(file)) abort();
}
