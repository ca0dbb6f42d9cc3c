/* toy.c - the toy model, its optimizer and the single-threaded reference.  [any] pure functions on their arguments. */
#include "toy.h"
#include <assert.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void *zeroed(size_t bytes) {
  void *p = calloc(1, bytes ? bytes : 1);
  if (!p) abort();
  return p;
}

uint64_t toy_mix(uint64_t x) { /* splitmix64 */
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

/* In [-1, 1), a multiple of 2^-23. */
static float unit_float(uint64_t h) {
  return (float)((int64_t)(h >> 40) - (1 << 23)) * (1.0f / (1 << 23));
}

uint16_t toy_bf16(float x) {
  uint32_t bits, low;
  memcpy(&bits, &x, sizeof bits);
  low = bits & 0xffffu;
  if (isnan(x)) return (uint16_t)(bits >> 16 | 0x40u);
  bits >>= 16;
  return (uint16_t)(low > 0x8000u || (low == 0x8000u && (bits & 1u)) ? bits + 1 : bits);
}

float toy_from_bf16(uint16_t h) {
  uint32_t bits = (uint32_t)h << 16;
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

static void round_all(float *x, int64_t n) {
  for (int64_t e = 0; e < n; e++) x[e] = toy_from_bf16(toy_bf16(x[e]));
}

/* ---- building ---- */
toy *toy_new(void) {
  toy *t = zeroed(sizeof *t);
  t->model = (phx_model){.struct_size = sizeof(phx_model),
                         .params = t->params,
                         .units = t->units,
                         .stages = t->stages,
                         .uses = t->uses,
                         .param_stride = sizeof(phx_param),
                         .unit_stride = sizeof(phx_unit),
                         .stage_stride = sizeof(phx_stage),
                         .use_stride = sizeof(phx_use)};
  return t;
}

uint32_t toy_unit(toy *t, const char *name) {
  uint32_t u = t->model.n_units++;
  assert(u < TOY_UNITS);
  t->units[u] = (phx_unit){.name = name, .first_param = t->model.n_params};
  return u;
}

void toy_param(toy *t, int64_t rows, int64_t cols, uint32_t flags) {
  uint32_t u = t->model.n_units - 1, p = t->model.n_params++;
  assert(p < TOY_PARAMS);
  snprintf(t->names[p], sizeof t->names[p], "%.20s.p%u", t->units[u].name, p - t->units[u].first_param);
  t->params[p] = (phx_param){.name = t->names[p],
                             .shape = {rows, cols, 1, 1},
                             .ndim = 2,
                             .flags = flags,
                             .unit = u,
                             .init = PHX_INIT_NORMAL,
                             .init_std = 0.02,
                             .role = PHX_ROLE_MATRIX};
  t->units[u].n_params++;
}

uint32_t toy_stage(toy *t, const char *name) {
  uint32_t s = t->model.n_stages++;
  assert(s < TOY_STAGES);
  t->stages[s] = (phx_stage){.name = name, .first_use = t->model.n_uses};
  return s;
}

void toy_use(toy *t, uint32_t unit, uint32_t flags) {
  assert(t->model.n_uses < TOY_USES);
  t->uses[t->model.n_uses++] = (phx_use){unit, flags};
  t->stages[t->model.n_stages - 1].n_uses++;
}

toy *toy_finish(toy *t) {
  int64_t total[PHX_FLATS] = {0, 0};
  for (uint32_t u = 0; u < t->model.n_units; u++) {
    int64_t at[PHX_FLATS] = {0, 0};
    for (uint32_t i = 0; i < t->units[u].n_params; i++) {
      phx_param *p = &t->params[t->units[u].first_param + i];
      uint32_t flat = p->flags & PHX_PARAM_FROZEN ? PHX_FLAT_FROZEN : PHX_FLAT_TRAINABLE;
      p->numel = p->shape[0] * p->shape[1];
      p->offset = at[flat];
      at[flat] += (p->numel + 63) / 64 * 64;
    }
    for (uint32_t f = 0; f < PHX_FLATS; f++) {
      t->units[u].first_block[f] = total[f];
      t->units[u].blocks[f] = (at[f] + PHX_BLOCK - 1) / PHX_BLOCK;
      total[f] += t->units[u].blocks[f];
    }
  }
  for (uint32_t f = 0; f < PHX_FLATS; f++) {
    t->model.total_blocks[f] = total[f];
    t->elements[f] = total[f] * PHX_BLOCK;
    t->owner[f] = zeroed((size_t)t->elements[f] * sizeof(int32_t));
    for (int64_t e = 0; e < t->elements[f]; e++) t->owner[f][e] = -1;
  }
  for (uint32_t p = 0; p < t->model.n_params; p++) {
    uint32_t flat = t->params[p].flags & PHX_PARAM_FROZEN ? PHX_FLAT_FROZEN : PHX_FLAT_TRAINABLE;
    int64_t first = toy_first(t, t->params[p].unit, flat) + t->params[p].offset;
    for (int64_t e = 0; e < t->params[p].numel; e++) t->owner[flat][first + e] = (int32_t)p;
  }
  bool seen[TOY_UNITS] = {false}; /* the first stage that has a unit's gradient is the last one in backward order */
  for (uint32_t i = 0; i < t->model.n_uses; i++) {
    if (!(t->uses[i].flags & PHX_USE_GRADIENT) || seen[t->uses[i].unit]) continue;
    seen[t->uses[i].unit] = true;
    t->uses[i].flags |= PHX_USE_LAST;
  }
  return t;
}

void toy_free(toy *t) {
  if (!t) return;
  for (uint32_t f = 0; f < PHX_FLATS; f++) free(t->owner[f]);
  free(t);
}

toy *toy_plain(int layers, int64_t width) {
  toy *t = toy_new();
  uint32_t embed = toy_unit(t, "embed");
  toy_param(t, 37, width, PHX_PARAM_DECAY);
  for (int i = 0; i < layers; i++) {
    toy_unit(t, "layer");
    toy_param(t, width, width, PHX_PARAM_DECAY);
    toy_param(t, 1, width, 0);
  }
  uint32_t head = toy_unit(t, "head");
  toy_param(t, 29, width, PHX_PARAM_DECAY);
  toy_stage(t, "embed");
  toy_use(t, embed, PHX_USE_FORWARD | PHX_USE_GRADIENT);
  for (int i = 0; i < layers; i++) {
    toy_stage(t, "layer");
    toy_use(t, embed + 1 + (uint32_t)i, TOY_RW);
  }
  toy_stage(t, "head");
  toy_use(t, head, TOY_RW);
  return toy_finish(t);
}

static bool odd_runs(uint32_t stage, int64_t step, int32_t micro_batch, int32_t data_rank) {
  if (stage == 4) return false;                                     /* never used */
  if (stage == 5) return (step + micro_batch + data_rank) % 2 == 0; /* layer drop, different by rank */
  return true;
}

toy *toy_odd(void) {
  toy *t = toy_new();
  uint32_t embed = toy_unit(t, "embed"); /* 3 blocks: the matrix, then a vector at a 256-byte boundary */
  toy_param(t, 31, 67, PHX_PARAM_DECAY);
  toy_param(t, 1, 401, 0);
  uint32_t one = toy_unit(t, "one"); /* 1 block, mostly padding */
  toy_param(t, 1, 5, 0);
  uint32_t big = toy_unit(t, "big"); /* 11 blocks */
  toy_param(t, 100, 101, PHX_PARAM_DECAY);
  toy_param(t, 1, 101, 0);
  uint32_t ice = toy_unit(t, "ice"); /* frozen, 5 blocks */
  toy_param(t, 50, 99, PHX_PARAM_FROZEN);
  uint32_t half = toy_unit(t, "half"); /* a frozen matrix between trainable vectors */
  toy_param(t, 1, 700, 0);
  toy_param(t, 13, 131, PHX_PARAM_FROZEN);
  toy_param(t, 7, 211, PHX_PARAM_DECAY);
  uint32_t idle = toy_unit(t, "idle"); /* its stage never runs */
  toy_param(t, 1, 1030, PHX_PARAM_DECAY);
  uint32_t drop = toy_unit(t, "drop"); /* 5 blocks */
  toy_param(t, 64, 77, PHX_PARAM_DECAY);
  uint32_t tail = toy_unit(t, "tail"); /* 2 blocks, beside the tied embedding in the last stage */
  toy_param(t, 1, 1025, 0);
  toy_param(t, 1, 3, 0);
  toy_stage(t, "embed"), toy_use(t, embed, PHX_USE_FORWARD | PHX_USE_GRADIENT);
  toy_stage(t, "one"), toy_use(t, one, TOY_RW);
  toy_stage(t, "big"), toy_use(t, big, TOY_RW), toy_use(t, ice, PHX_USE_FORWARD | PHX_USE_BACKWARD);
  toy_stage(t, "half"), toy_use(t, half, TOY_RW);
  toy_stage(t, "idle"), toy_use(t, idle, TOY_RW);
  toy_stage(t, "drop"), toy_use(t, drop, TOY_RW);
  toy_stage(t, "head"), toy_use(t, tail, TOY_RW), toy_use(t, embed, TOY_RW);
  t->runs = odd_runs;
  return toy_finish(t);
}

/* ---- values ---- */
int64_t toy_first(const toy *t, uint32_t unit, uint32_t flat) {
  return t->units[unit].first_block[flat] * PHX_BLOCK;
}

float toy_initial(const toy *t, uint64_t seed, uint32_t param, int64_t element) {
  (void)t;
  return 0.05f * unit_float(toy_mix(toy_mix(seed * 1000003u + param) + (uint64_t)element));
}

void toy_data(float out[TOY_BOUNDARY], int64_t step, int32_t micro_batch, int32_t data_rank) {
  uint64_t h = toy_mix(((uint64_t)step * 64u + (uint64_t)micro_batch) * 64u + (uint64_t)data_rank);
  for (uint64_t i = 0; i < TOY_BOUNDARY; i++) out[i] = unit_float(toy_mix(h + i));
}

static const phx_param_view *view_param(const toy_call *c, uint32_t i) {
  return (const phx_param_view *)(const void *)((const char *)c->params + (size_t)i * c->param_stride);
}

/* The use that parameter i of a stage's view belongs to. */
static const phx_use *use_of(const toy_call *c, uint32_t i) {
  const phx_stage *s = &c->t->stages[c->stage];
  for (uint32_t k = 0; k < s->n_uses; k++) {
    const phx_use *u = &c->t->uses[s->first_use + k];
    if (i < c->t->units[u->unit].n_params) return u;
    i -= c->t->units[u->unit].n_params;
  }
  abort();
}

static float weight(const phx_param_view *p, int64_t e) {
  return p->weight_dtype == PHX_BF16 ? toy_from_bf16(((const uint16_t *)p->weight)[e]) : ((const float *)p->weight)[e];
}

void toy_forward(const toy_call *c) {
  double sum[TOY_BOUNDARY] = {0, 0, 0, 0};
  for (uint32_t i = 0; i < c->n_params; i++) {
    const phx_param_view *p = view_param(c, i);
    if (!(use_of(c, i)->flags & PHX_USE_FORWARD)) continue;
    for (int64_t e = 0; e < c->t->params[p->param].numel; e++)
      sum[e % TOY_BOUNDARY] += (double)weight(p, e) * (double)(e % 7 + 1);
  }
  for (int i = 0; i < TOY_BOUNDARY; i++) c->output[i] = 0.75f * c->input[i] + (float)(sum[i] * 0.125);
}

void toy_backward(const toy_call *c) {
  float d_out[TOY_BOUNDARY];
  for (int i = 0; i < TOY_BOUNDARY; i++) d_out[i] = c->d_output ? c->d_output[i] : 0.125f * c->output[i];
  double through = 0;
  for (uint32_t i = 0; i < c->n_params; i++) {
    const phx_param_view *p = view_param(c, i);
    const phx_use *use = use_of(c, i);
    const phx_param *param = &c->t->params[p->param];
    bool reads = (use->flags & PHX_USE_BACKWARD) && p->weight;
    for (int64_t e = 0; reads && e < param->numel; e++) through += (double)weight(p, e);
    if (!(use->flags & PHX_USE_GRADIENT) || (param->flags & PHX_PARAM_FROZEN)) continue;
    float *g = p->gradient;
    uint64_t key = toy_mix((((uint64_t)c->step * 64u + (uint64_t)c->micro_batch) * 64u + (uint64_t)c->data_rank) * 64u +
                           c->stage) +
                   p->param * 0x51ed2701u;
    for (int64_t e = 0; e < param->numel; e++) {
      float noise = 0.03125f * unit_float((key + (uint64_t)e) * 0x9e3779b97f4a7c15u ^ key);
      float x = noise + 0.25f * (d_out[e % TOY_BOUNDARY] * c->input[(e + 1) % TOY_BOUNDARY]);
      if (reads) x += 0.0625f * weight(p, e);
      g[e] = p->gradient_mode == PHX_GRAD_ADD ? g[e] + x : x;
    }
  }
  if (!c->d_input) return;
  for (int i = 0; i < TOY_BOUNDARY; i++) c->d_input[i] = 0.75f * d_out[i] + 0.0625f * (float)through;
}

/* ---- optimizer ---- */
void toy_optim_update(const toy_optim *o, int64_t step, bool decay, float scale, float *w, const float *g, float *m,
                      float *v, int64_t numel) {
  const float b1 = 0.9f, b2 = 0.95f, wd = decay ? o->decay : 0.0f;
  const float c1 = (float)(1.0 - pow(0.9, (double)step)), c2 = (float)(1.0 - pow(0.95, (double)step));
  for (int64_t e = 0; e < numel; e++) {
    float x = g[e] * scale, by;
    if (o->adamw) {
      m[e] = b1 * m[e] + (1.0f - b1) * x;
      v[e] = b2 * v[e] + (1.0f - b2) * (x * x);
      by = m[e] / c1 / (sqrtf(v[e] / c2) + 1e-8f) + wd * w[e];
    } else {
      by = x + wd * w[e];
    }
    w[e] -= o->lr * by;
  }
}

/* ---- the reference ---- */
void toy_tree_f32(float *out, const float *const *src, int32_t lo, int32_t n, int64_t numel) {
  enum { CHUNK = 512 };
  int32_t left = 1;
  if (n == 1) {
    if (out != src[lo]) memcpy(out, src[lo], (size_t)numel * sizeof(float));
    return;
  }
  while (left * 2 < n) left *= 2;
  for (int64_t at = 0; at < numel; at += CHUNK) {
    float a[CHUNK], b[CHUNK];
    const float *part[64];
    int64_t len = numel - at < CHUNK ? numel - at : CHUNK;
    for (int32_t i = 0; i < n; i++) part[i] = src[lo + i] + at;
    toy_tree_f32(a, part, 0, left, len);
    toy_tree_f32(b, part, left, n - left, len);
    for (int64_t e = 0; e < len; e++) out[at + e] = a[e] + b[e];
  }
}

/* One micro-batch of one rank, whole weights in w, gradients written or added into g (modes as a strategy's). */
static double pass(const toy *t, const float *ice, const float *w, float *g, int64_t step, int32_t mb,
                   int32_t rank, bool first) {
  float act[TOY_STAGES + 1][TOY_BOUNDARY], d[2][TOY_BOUNDARY];
  bool touched[TOY_UNITS];
  phx_param_view views[TOY_PARAMS];
  for (uint32_t u = 0; u < t->model.n_units; u++) touched[u] = !first;
  toy_data(act[0], step, mb, rank);
  for (uint32_t i = 0; i < 2 * t->model.n_stages; i++) {
    bool back = i >= t->model.n_stages;
    uint32_t s = back ? 2 * t->model.n_stages - 1 - i : i;
    uint32_t n = 0;
    bool run = !t->runs || t->runs(s, step, mb, rank);
    for (uint32_t k = 0; k < t->stages[s].n_uses; k++) {
      const phx_use *use = &t->uses[t->stages[s].first_use + k];
      const phx_unit *u = &t->units[use->unit];
      for (uint32_t p = u->first_param; p < u->first_param + u->n_params; p++) {
        bool frozen = (t->params[p].flags & PHX_PARAM_FROZEN) != 0;
        int64_t at = toy_first(t, use->unit, frozen) + t->params[p].offset;
        views[n++] = (phx_param_view){.weight = frozen ? ice + at : w + at,
                                      .gradient = frozen ? NULL : g + at,
                                      .gradient_mode = touched[use->unit] ? PHX_GRAD_ADD : PHX_GRAD_WRITE,
                                      .param = p};
      }
      if (!back || !(use->flags & PHX_USE_GRADIENT)) continue;
      if (!touched[use->unit] && !run)
        memset(g + toy_first(t, use->unit, 0), 0, (size_t)(u->blocks[0] * PHX_BLOCK) * sizeof(float));
      touched[use->unit] = true;
    }
    toy_call c = {.t = t,
                  .stage = s,
                  .step = step,
                  .micro_batch = mb,
                  .data_rank = rank,
                  .params = views,
                  .n_params = n,
                  .param_stride = sizeof *views,
                  .input = act[s],
                  .output = act[s + 1],
                  .d_output = s + 1 < t->model.n_stages ? d[(s + 1) % 2] : NULL,
                  .d_input = s ? d[s % 2] : NULL};
    if (run && !back) toy_forward(&c);
    if (run && back) toy_backward(&c);
    if (!run && !back) memcpy(act[s + 1], act[s], sizeof act[s]);
    if (!run && back) memcpy(d[s % 2], d[(s + 1) % 2], sizeof d[0]);
  }
  return (double)act[t->model.n_stages][0];
}

static void reduce_ranks(float *out, float *const *g, int32_t n, int64_t numel, bool tree) {
  if (tree) {
    toy_tree_f32(out, (const float *const *)g, 0, n, numel);
    return;
  }
  memcpy(out, g[0], (size_t)numel * sizeof(float));
  for (int32_t r = 1; r < n; r++)
    for (int64_t e = 0; e < numel; e++) out[e] += g[r][e];
}

toy_reference *toy_reference_run(const toy *t, const toy_run *run, int32_t tree) {
  int64_t n = t->elements[0];
  size_t bytes = (size_t)n * sizeof(float);
  toy_reference *r = zeroed(sizeof *r);
  r->frozen = zeroed((size_t)t->elements[1] * sizeof(float));
  r->weights = zeroed((size_t)(run->steps + 1) * sizeof *r->weights);
  r->gradients = zeroed((size_t)(run->steps + 1) * sizeof *r->gradients);
  r->losses = zeroed((size_t)(run->steps + 1) * sizeof *r->losses);
  r->m = zeroed(bytes), r->v = zeroed(bytes);
  float *g[64], *sum = zeroed(bytes), *read = zeroed(bytes), *ice = zeroed((size_t)t->elements[1] * sizeof(float));
  for (int32_t k = 0; k < run->data_ranks; k++) g[k] = zeroed(bytes);
  r->weights[0] = zeroed(bytes);
  for (uint32_t p = 0; p < t->model.n_params; p++) {
    uint32_t flat = t->params[p].flags & PHX_PARAM_FROZEN ? 1 : 0;
    float *w = (flat ? r->frozen : r->weights[0]) + toy_first(t, t->params[p].unit, flat) + t->params[p].offset;
    for (int64_t e = 0; e < t->params[p].numel; e++) w[e] = toy_initial(t, run->seed, p, e);
  }
  for (int64_t s = 0; s < run->steps; s++) {
    bool whole = run->reduce == PHX_REDUCE_STEP;
    float *w = r->weights[s + 1] = zeroed(bytes), *total = r->gradients[s] = zeroed(bytes);
    memcpy(w, r->weights[s], bytes);
    memcpy(read, w, bytes);
    memcpy(ice, r->frozen, (size_t)t->elements[1] * sizeof(float));
    if (run->low_weights) round_all(read, n), round_all(ice, t->elements[1]);
    for (int32_t mb = 0; mb < run->accumulate; mb++) {
      for (int32_t k = 0; k < run->data_ranks; k++)
        r->losses[s] += pass(t, ice, read, g[k], s + 1, mb, k, mb == 0 || !whole) / run->data_ranks / run->accumulate;
      if (whole && mb + 1 < run->accumulate) continue;
      for (int32_t k = 0; run->low_gradients && k < run->data_ranks; k++) round_all(g[k], n);
      reduce_ranks(sum, g, run->data_ranks, n, tree);
      if (run->low_gradients) round_all(sum, n);
      for (int64_t e = 0; e < n; e++) total[e] = whole || mb == 0 ? sum[e] : total[e] + sum[e];
    }
    if (s + 1 == run->discard_step) continue;
    float scale = (float)(1.0 / ((double)run->data_ranks * run->accumulate));
    for (uint32_t p = 0; p < t->model.n_params; p++) {
      if (t->params[p].flags & PHX_PARAM_FROZEN) continue;
      int64_t at = toy_first(t, t->params[p].unit, 0) + t->params[p].offset;
      toy_optim_update(&run->optim, s + 1, t->params[p].flags & PHX_PARAM_DECAY, scale, w + at, total + at, r->m + at,
                       r->v + at, t->params[p].numel);
    }
  }
  for (int32_t k = 0; k < run->data_ranks; k++) free(g[k]);
  free(sum), free(read), free(ice);
  return r;
}

void toy_reference_free(toy_reference *r, const toy_run *run) {
  if (!r) return;
  for (int32_t s = 0; s <= run->steps; s++) free(r->weights[s]), free(r->gradients[s]);
  free(r->weights), free(r->gradients), free(r->losses), free(r->frozen), free(r->m), free(r->v), free(r);
}
