/* sdk/kit/views.c - what a stage computes with, from where its units are now.
 *
 * Invariant: of all uses of a unit since the gradient began anew, the first writes and the others add, whether or not
 * stages are skipped. */
#include <phalanx/kit.h>
#include <stdlib.h>
#include <string.h>

phx_status phx_kit_views_create(const phx_model *m, phx_kit_views *out, phx_error *err) {
  uint32_t n = 0;
  for (uint32_t i = 0; i < m->n_uses; i++) n += phx_model_unit(m, phx_model_use(m, i)->unit)->n_params;
  phx_kit_views v = {.weight_dtype = PHX_F32,
                     .model = m,
                     .places = calloc(m->n_units + 1u, sizeof *v.places),
                     .written = calloc(m->n_units + 1u, 1),
                     .told = calloc(m->n_uses + 1u, 1),
                     .params = calloc(n + 1u, sizeof *v.params),
                     .views = calloc(m->n_stages + 1u, sizeof *v.views)};
  if (!v.places || !v.written || !v.told || !v.params || !v.views) {
    phx_kit_views_destroy(&v);
    return phx_fail(err, PHX_NOMEM, "no memory for the views of %u stages", m->n_stages);
  }
  uint32_t at = 0;
  for (uint32_t s = 0; s < m->n_stages; s++) {
    const phx_stage *stage = phx_model_stage(m, s);
    phx_view *view = &v.views[s];
    *view = (phx_view){.struct_size = sizeof *view, .params = v.params + at, .param_stride = sizeof *v.params};
    for (uint32_t i = 0; i < stage->n_uses; i++)
      view->n_params += phx_model_unit(m, phx_model_use(m, stage->first_use + i)->unit)->n_params;
    at += view->n_params;
  }
  *out = v;
  return PHX_OK;
}

void phx_kit_views_destroy(phx_kit_views *v) {
  free(v->places);
  free(v->written);
  free(v->told);
  free(v->params);
  free(v->views);
  memset(v, 0, sizeof *v);
}

void phx_kit_views_begin(phx_kit_views *v, bool anew) {
  memset(v->told, 0, v->model->n_uses);
  if (anew) memset(v->written, 0, v->model->n_units);
}

static int32_t tell(phx_kit_views *v, uint32_t use_index, const phx_use *use) {
  int32_t mode = v->written[use->unit] ? PHX_GRAD_ADD : PHX_GRAD_WRITE;
  v->written[use->unit] = 1;
  v->told[use_index] = (uint8_t)mode;
  return mode;
}

const phx_view *phx_kit_view(phx_kit_views *v, uint32_t s, int32_t pass, phx_event *ready) {
  const phx_model *m = v->model;
  const phx_stage *stage = phx_model_stage(m, s);
  const int64_t bytes = (int64_t)phx_dtype_bytes(v->weight_dtype);
  uint32_t reads = pass == PHX_PASS_BACKWARD ? PHX_USE_BACKWARD : PHX_USE_FORWARD;
  phx_param_view *out = v->params + (v->views[s].params - v->params);
  for (uint32_t i = 0; i < stage->n_uses; i++) {
    const phx_use *use = phx_model_use(m, stage->first_use + i);
    const phx_unit *unit = phx_model_unit(m, use->unit);
    const phx_kit_place *place = &v->places[use->unit];
    bool gradients = pass == PHX_PASS_BACKWARD && (use->flags & PHX_USE_GRADIENT) && place->gradient;
    int32_t mode = gradients ? tell(v, stage->first_use + i, use) : PHX_GRAD_NONE;
    for (uint32_t k = 0; k < unit->n_params; k++, out++) {
      const phx_param *param = phx_model_param(m, unit->first_param + k);
      bool frozen = (param->flags & PHX_PARAM_FROZEN) != 0;
      const char *weight = place->weight[frozen ? PHX_FLAT_FROZEN : PHX_FLAT_TRAINABLE];
      *out = (phx_param_view){.weight = (use->flags & reads) && weight ? weight + param->offset * bytes : NULL,
                              .weight_dtype = v->weight_dtype,
                              .gradient_dtype = PHX_F32,
                              .param = unit->first_param + k};
      if (gradients && !frozen) {
        out->gradient = place->gradient + param->offset;
        out->gradient_mode = mode;
      }
    }
  }
  v->views[s].ready = ready;
  return &v->views[s];
}

phx_status phx_kit_view_unused(phx_kit_views *v, const phx_device *device, uint32_t s, phx_stream *stream,
                               phx_error *err) {
  const phx_stage *stage = phx_model_stage(v->model, s);
  for (uint32_t i = 0; i < stage->n_uses; i++) {
    uint32_t index = stage->first_use + i;
    const phx_use *use = phx_model_use(v->model, index);
    if (!(use->flags & PHX_USE_GRADIENT) || !v->places[use->unit].gradient) continue;
    int32_t mode = v->told[index] ? v->told[index] : tell(v, index, use);
    if (mode != PHX_GRAD_WRITE) continue;
    int64_t numel = phx_model_unit(v->model, use->unit)->blocks[PHX_FLAT_TRAINABLE] * PHX_BLOCK;
    PHX_TRY(device->zero(device->ctx, v->places[use->unit].gradient, numel * 4, stream, err));
  }
  return PHX_OK;
}

phx_status phx_kit_zero_gaps(const phx_device *device, const phx_model *m, uint32_t u, float *gradient,
                             phx_stream *stream, phx_error *err) {
  const phx_unit *unit = phx_model_unit(m, u);
  int64_t end = 0; /* of the parameter before */
  for (uint32_t k = 0; k <= unit->n_params; k++) {
    int64_t begin = unit->blocks[PHX_FLAT_TRAINABLE] * PHX_BLOCK, next = begin;
    if (k < unit->n_params) {
      const phx_param *param = phx_model_param(m, unit->first_param + k);
      if (param->flags & PHX_PARAM_FROZEN) continue;
      begin = param->offset;
      next = param->offset + param->numel;
    }
    if (begin > end) PHX_TRY(device->zero(device->ctx, gradient + end, (begin - end) * 4, stream, err));
    end = next;
  }
  return PHX_OK;
}
