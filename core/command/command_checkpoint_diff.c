/* core/command/command_checkpoint_diff.c - `phalanx checkpoint diff A B`: the first tensor that differs, and by how
 * much at most.
 *
 * A and B are checkpoints, runs (the newest that they have), folders or safetensors files.  Tensors are compared by
 * name, bit for bit, in our layout, whatever the files have; optimizer states only when both sides have them.  Exit
 * status 0: equal, 1: they differ (as of diff and cmp). */
#include <inttypes.h>
#include <math.h>
#include <string.h>

#include "base/status.h"
#include "base/sys.h"
#include "checkpoint/elements.h"
#include "checkpoint/model_source.h"
#include "command/command_checkpoint.h"

enum { EXIT_DIFFER = 1 };

typedef struct side {
  phx__source *source;
  float *part;
} side;

typedef struct comparison {
  side a, b;
  int64_t tensors, differing;
  double most;
  char most_name[300];
} comparison;

static phx_status side_open(side *s, const char *path, phx_error *err) {
  s->part = phx__calloc(PHX__TOOL_PART, sizeof *s->part);
  if (!s->part) return phx_fail(err, PHX_NOMEM, "no memory to compare");
  return phx__source_open(path, &s->source, err);
}

static void side_close(side *s) {
  phx__source_close(s->source);
  phx__free(s->part);
}

/* state: -1 for weights, else the number in `states` of this side. */
static bool find(const side *s, const char *name, int state, phx__source_param *out) {
  return state < 0 ? phx__source_find(s->source, name, out)
                   : phx__source_find_state(s->source, name, (uint32_t)state, out);
}

static void differs(comparison *c, const char *name, const char *why) {
  if (!c->differing++) printf("first difference: %s: %s\n", name, why);
}

static phx_status compare_values(comparison *c, const char *name, const phx__source_param *a,
                                 const phx__source_param *b, phx_error *err) {
  double most = 0;
  bool differ = false;
  char why[160] = "";
  for (int64_t at = 0; at < a->numel; at += PHX__TOOL_PART) {
    const int64_t n = a->numel - at < PHX__TOOL_PART ? a->numel - at : PHX__TOOL_PART;
    PHX_TRY(phx__source_read(c->a.source, a, at, n, c->a.part, err));
    PHX_TRY(phx__source_read(c->b.source, b, at, n, c->b.part, err));
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
  phx__source_param a, b;
  char shown[300];
  snprintf(shown, sizeof shown, "%s%s%s", label ? label : "", label ? " of " : "", name);
  const bool in_a = find(&c->a, name, state_a, &a), in_b = find(&c->b, name, state_b, &b);
  if (!in_a && !in_b) return PHX_OK;
  c->tensors++;
  if (!in_a || !in_b) {
    differs(c, shown, in_a ? "only in the first" : "only in the second");
    return PHX_OK;
  }
  if (a.ndim != b.ndim || (a.ndim && memcmp(a.shape, b.shape, a.ndim * sizeof *a.shape))) {
    differs(c, shown, "the shapes differ");
    return PHX_OK;
  }
  return compare_values(c, shown, &a, &b, err);
}

static phx_status compare_weights(comparison *c, phx_error *err) {
  phx_status status = PHX_OK;
  phx__source_param p, in_a;
  for (uint32_t i = 0; i < phx__source_n(c->a.source) && !status; i++)
    if (phx__source_at(c->a.source, i, &p)) status = compare_tensor(c, p.name, -1, -1, NULL, err);
  for (uint32_t i = 0; i < phx__source_n(c->b.source) && !status; i++) /* what only the second has */
    if (phx__source_at(c->b.source, i, &p) && !phx__source_find(c->a.source, p.name, &in_a))
      status = compare_tensor(c, p.name, -1, -1, NULL, err);
  return status;
}

static phx_status compare_states(comparison *c, phx_error *err) {
  const phx__manifest *a = c->a.source->reader->manifest, *b = c->b.source->reader->manifest;
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
  if (!c) return phx__checkpoint_refuse(phx_fail(&err, PHX_NOMEM, "no memory to compare"), &err);
  phx_status status = side_open(&c->a, argv[1], &err);
  if (!status) status = side_open(&c->b, argv[2], &err);
  if (!status) status = compare_weights(c, &err);
  const bool states = !status && c->a.source->reader && c->b.source->reader && !weights_only;
  if (states) {
    const phx__manifest *a = c->a.source->reader->manifest, *b = c->b.source->reader->manifest;
    if (a->step != b->step) printf("step: %" PRId64 " and %" PRId64 "\n", a->step, b->step);
    if (a->n_states != b->n_states || strcmp(a->optimizer, b->optimizer)) differs(c, "optimizer", "not the same one");
    status = compare_states(c, &err);
  }
  if (!status && c->differing)
    printf("%" PRId64 " of %" PRId64 " tensors differ; maximum difference %.9g%s%s\n", c->differing, c->tensors,
           c->most, c->most_name[0] ? " in " : "", c->most_name);
  else if (!status)
    printf("equal: %" PRId64 " tensors, bit for bit%s\n", c->tensors, states ? "" : " (weights only)");
  status = phx__source_explain(c->a.source, status, &err);
  status = phx__source_explain(c->b.source, status, &err);
  const int differing = c->differing > 0;
  side_close(&c->a);
  side_close(&c->b);
  phx__free(c);
  if (status) return phx__checkpoint_refuse(status, &err);
  return differing ? EXIT_DIFFER : PHX__EXIT_OK;
}
