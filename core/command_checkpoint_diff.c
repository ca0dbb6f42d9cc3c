/* core/command_checkpoint_diff.c - `phalanx checkpoint diff A B`: the first tensor that differs, and by how much at
 * most.
 *
 * A and B are checkpoints, runs (their latest) or safetensors files.  Tensors are compared by name, bit for bit;
 * optimizer states only when both sides have them.  A file in the layout of Hugging Face's GPT-2 is recognised by the
 * shape of its first attention matrix, and compared with other layouts as if it were turned.  Exit status 0: equal, 1:
 * they differ (as of diff and cmp). */
#include <inttypes.h>
#include <math.h>
#include <string.h>

#include "command_checkpoint.h"
#include "status.h"
#include "sys.h"

enum { EXIT_DIFFER = 1 };

typedef struct side {
  char path[PHX__TOOL_PATH];
  phx__checkpoint_reader *reader; /* one of the two */
  phx__safetensors *file;
  bool turned; /* linear weights stand as (in, out), and the other side's do not */
  float *blocks, *part;
  unsigned char *raw;
} side;

typedef struct comparison {
  side a, b;
  int64_t tensors, differing;
  double most;
  char most_name[300];
} comparison;

static phx_status side_open(side *s, const char *path, phx_error *err) {
  struct stat st;
  s->blocks = phx__calloc(PHX__TOOL_PART + 2 * PHX_BLOCK, sizeof *s->blocks);
  s->part = phx__calloc(PHX__TOOL_PART, sizeof *s->part);
  s->raw = phx__calloc(PHX__TOOL_PART, 4);
  if (!s->blocks || !s->part || !s->raw) return phx__fail(err, PHX_NOMEM, "no memory to compare");
  if (!stat(path, &st) && !S_ISDIR(st.st_mode)) {
    snprintf(s->path, sizeof s->path, "%s", path);
    return phx__safetensors_open(path, &s->file, err);
  }
  phx_status status = phx__checkpoint_resolve(path, s->path, err);
  return status ? status : phx__checkpoint_reader_open(s->path, &s->reader, err);
}

/* Conv1D's: (width, 3 width), where ours is (3 width, width). */
static bool is_turned(const side *s) {
  const phx__tensor *t = s->file ? phx__safetensors_find(s->file, "h.0.attn.c_attn.weight") : NULL;
  return t && t->ndim == 2 && t->shape[0] > 0 && t->shape[1] == 3 * t->shape[0];
}

static void side_close(side *s) {
  phx__checkpoint_reader_close(s->reader);
  phx__safetensors_close(s->file);
  phx__free(s->blocks);
  phx__free(s->part);
  phx__free(s->raw);
}

/* One tensor of one side. */
typedef struct view {
  bool found;
  uint32_t ndim;
  const int64_t *shape;
  int64_t numel;
  phx__element_fn *read;
  void *ctx;
  phx__param_source param;
  phx__tensor_source tensor;
  phx__transposer turn; /* with turned */
  bool turned;
  int64_t turned_shape[2];
} view;

/* state: -1 for weights, else the number in `states` of this side. */
static void view_of(side *s, const char *name, int state, view *out) {
  memset(out, 0, sizeof *out);
  if (s->file) {
    const phx__tensor *t = state < 0 ? phx__safetensors_find(s->file, name) : NULL;
    if (!t) return;
    out->tensor = (phx__tensor_source){s->file, t, s->raw, false};
    out->found = true;
    out->ndim = t->ndim;
    out->shape = t->shape;
    out->numel = t->numel;
    out->read = phx__tensor_elements;
    if (!s->turned || !phx__gpt2_transposed(name) || t->ndim != 2 || t->numel == 0) return;
    out->turned = true;
    out->turned_shape[0] = t->shape[1];
    out->turned_shape[1] = t->shape[0];
    out->shape = out->turned_shape;
    out->turn = (phx__transposer){.read = phx__tensor_elements, .ctx = &out->tensor, .rows = t->shape[0],
                                  .columns = t->shape[1]};
    out->read = phx__transposed_elements;
    return;
  }
  for (uint32_t i = 0; i < s->reader->manifest->n_params && !out->found; i++) {
    const phx__manifest_param *p = &s->reader->manifest->params[i];
    if (strcmp(p->name, name) || (state >= 0 && p->flat != PHX_FLAT_TRAINABLE)) continue;
    out->param = (phx__param_source){s->reader, p, state < 0 ? PHX_STATE_WEIGHT : PHX_STATE_OPTIM,
                                     state < 0 ? 0 : (uint32_t)state, s->blocks};
    out->found = true;
    out->ndim = p->ndim;
    out->shape = p->shape;
    out->numel = p->numel;
    out->read = phx__param_elements;
  }
}

static void *context(view *v) {
  return v->turned ? (void *)&v->turn : v->read == phx__param_elements ? (void *)&v->param : (void *)&v->tensor;
}

static void differs(comparison *c, const char *name, const char *why) {
  if (!c->differing++) printf("first difference: %s: %s\n", name, why);
}

static phx_status compare_values(comparison *c, const char *name, view *a, view *b, phx_error *err) {
  double most = 0;
  bool differ = false;
  char why[160] = "";
  for (int64_t at = 0; at < a->numel; at += PHX__TOOL_PART) {
    const int64_t n = a->numel - at < PHX__TOOL_PART ? a->numel - at : PHX__TOOL_PART;
    phx_status status = a->read(context(a), at, n, c->a.part, err);
    if (!status) status = b->read(context(b), at, n, c->b.part, err);
    if (status) return status;
    if (!memcmp(c->a.part, c->b.part, (size_t)n * 4)) continue;
    for (int64_t i = 0; i < n; i++) {
      const float x = c->a.part[i], y = c->b.part[i];
      if (!memcmp(&x, &y, 4)) continue;
      const double d = fabs((double)x - (double)y);
      if (!differ)
        snprintf(why, sizeof why, "element %" PRId64 " is %.9g and %.9g", at + i, (double)x, (double)y);
      differ = true;
      if (!(d <= most)) most = isnan(d) ? INFINITY : d;
    }
  }
  if (!differ) return PHX_OK;
  differs(c, name, why);
  if (most >= c->most) {
    c->most = most;
    snprintf(c->most_name, sizeof c->most_name, "%s", name);
  }
  return PHX_OK;
}

static phx_status compare_tensor(comparison *c, const char *name, int state_a, int state_b, const char *label,
                                 phx_error *err) {
  view a, b;
  char shown[300];
  snprintf(shown, sizeof shown, "%s%s%s", label ? label : "", label ? " of " : "", name);
  view_of(&c->a, name, state_a, &a);
  view_of(&c->b, name, state_b, &b);
  if (!a.found && !b.found) return PHX_OK;
  c->tensors++;
  if (!a.found || !b.found) {
    differs(c, shown, a.found ? "only in the first" : "only in the second");
    return PHX_OK;
  }
  if (a.ndim != b.ndim || (a.ndim && memcmp(a.shape, b.shape, a.ndim * sizeof *a.shape))) {
    differs(c, shown, "the shapes differ");
    return PHX_OK;
  }
  phx_status status = a.turned ? phx__transposer_open(&a.turn, err) : PHX_OK;
  if (!status && b.turned) status = phx__transposer_open(&b.turn, err);
  if (!status) status = compare_values(c, shown, &a, &b, err);
  phx__transposer_close(&a.turn); /* of zeros is fine */
  phx__transposer_close(&b.turn);
  return status;
}

static uint32_t names_of(const side *s) { return s->file ? s->file->n : s->reader->manifest->n_params; }
static const char *name_at(const side *s, uint32_t i) {
  return s->file ? s->file->tensors[i].name : s->reader->manifest->params[i].name;
}

static phx_status compare_weights(comparison *c, phx_error *err) {
  phx_status status = PHX_OK;
  view in_a;
  for (uint32_t i = 0; i < names_of(&c->a) && !status; i++)
    status = compare_tensor(c, name_at(&c->a, i), -1, -1, NULL, err);
  for (uint32_t i = 0; i < names_of(&c->b) && !status; i++) { /* what only the second has */
    view_of(&c->a, name_at(&c->b, i), -1, &in_a);
    if (!in_a.found) status = compare_tensor(c, name_at(&c->b, i), -1, -1, NULL, err);
  }
  return status;
}

static phx_status compare_states(comparison *c, phx_error *err) {
  const phx__manifest *a = c->a.reader->manifest, *b = c->b.reader->manifest;
  phx_status status = PHX_OK;
  for (uint32_t i = 0; i < a->n_states; i++)
    for (uint32_t j = 0; j < b->n_states; j++)
      for (uint32_t p = 0; p < a->n_params && !status && !strcmp(a->states[i].name, b->states[j].name); p++)
        if (a->params[p].flat == PHX_FLAT_TRAINABLE)
          status = compare_tensor(c, a->params[p].name, (int)i, (int)j, a->states[i].name, err);
  return status;
}

int phx__checkpoint_diff(int argc, char **argv) {
  phx_error err = PHX_ERROR_INIT;
  const bool weights_only = argc == 4 && !strcmp(argv[3], "--weights");
  if (argc != 3 && !weights_only) return phx__checkpoint_usage("diff A B [--weights]");
  comparison *c = phx__calloc(1, sizeof *c);
  if (!c) return phx__checkpoint_refuse(phx__fail(&err, PHX_NOMEM, "no memory to compare"), &err);
  phx_status status = side_open(&c->a, argv[1], &err);
  if (!status) status = side_open(&c->b, argv[2], &err);
  c->a.turned = !status && is_turned(&c->a) && !is_turned(&c->b);
  c->b.turned = !status && is_turned(&c->b) && !is_turned(&c->a);
  if (!status) status = compare_weights(c, &err);
  const bool states = !status && c->a.reader && c->b.reader && !weights_only;
  if (states) {
    const phx__manifest *a = c->a.reader->manifest, *b = c->b.reader->manifest;
    if (a->step != b->step) printf("step: %" PRId64 " and %" PRId64 "\n", a->step, b->step);
    if (a->n_states != b->n_states || strcmp(a->optimizer, b->optimizer)) differs(c, "optimizer", "not the same one");
    status = compare_states(c, &err);
  }
  if (!status && c->differing)
    printf("%" PRId64 " of %" PRId64 " tensors differ; maximum difference %.9g%s%s\n", c->differing, c->tensors,
           c->most, c->most_name[0] ? " in " : "", c->most_name);
  else if (!status)
    printf("equal: %" PRId64 " tensors, bit for bit%s\n", c->tensors, states ? "" : " (weights only)");
  const int differing = c->differing > 0;
  side_close(&c->a);
  side_close(&c->b);
  phx__free(c);
  if (status) return phx__checkpoint_refuse(status, &err);
  return differing ? EXIT_DIFFER : PHX__EXIT_OK;
}
