/* plugins/gpt/ends.c - the first and the last stage: embedding, and final norm with the tied head and the loss.
 * [main] only.
 *
 * The head's logits (N, Vp) become their own gradient in place, so there is one array of that size.  Only V columns
 * are computed; the padding is neither read nor state. */
#include "gpt.h"

phx_status gpt_embed_forward(phx_model_self *self, const phx_stage_call *call, phx_error *err) {
  const phx_ops *o = self->ops;
  return o->embedding(o->ctx, self->dtype, call->output, call->tokens, gpt_weight(call->view, 0),
                      gpt_weight(call->view, 1), call->batch, call->sequence, self->sizes.width, call->stream, err);
}

phx_status gpt_embed_backward(phx_model_self *self, const phx_stage_call *call, phx_error *err) {
  const phx_ops *o = self->ops;
  const phx_param_view *wte = phx_view_param(call->view, 0), *wpe = phx_view_param(call->view, 1);
  if (!wte->gradient && !wpe->gradient) return PHX_OK;
  return o->embedding_backward(o->ctx, self->dtype, wte->gradient, wte->gradient_mode, wpe->gradient,
                               wpe->gradient_mode, call->d_output, call->tokens, call->batch, call->sequence,
                               self->sizes.width, self->sizes.vocab, self->sizes.context, call->stream, err);
}

/* logits(B, V) of the last position of each sequence: computed where the head keeps its own, then on their way. */
static phx_status last_logits(const phx_model_self *self, const phx_stage_call *call, const gpt_head_plan *p,
                              phx_error *err) {
  const phx_ops *o = self->ops;
  const phx_device *dev = self->device;
  const int64_t b = call->batch, t = call->sequence, c = self->sizes.width, v = self->sizes.vocab;
  const int64_t row = c * (int64_t)phx_dtype_bytes(self->dtype);
  const char *const x = call->input;
  char *const rows = gpt_at(call->workspace, p->last);
  void *const ln = gpt_at(call->workspace, p->ln), *const logits = gpt_at(call->saved, p->logits);
  for (int64_t i = 0; i < b; i++)
    PHX_TRY(dev->copy(dev->ctx, rows + i * row, x + ((i + 1) * t - 1) * row, row, call->stream, err));
  PHX_TRY(o->layer_norm(o->ctx, self->dtype, ln, NULL, gpt_at(call->saved, p->mean), gpt_at(call->saved, p->rstd), rows,
                        NULL, gpt_weight(call->view, GPT_LNF_W), gpt_weight(call->view, GPT_LNF_B), b, c, self->eps,
                        call->stream, err));
  PHX_TRY(o->linear(o->ctx, self->dtype, logits, 0, NULL, ln, gpt_weight(call->view, GPT_HEAD_WTE), NULL, b, c, v, 0,
                    call->stream, err));
  const void *wide = logits;
  if (self->dtype != PHX_F32) {
    void *const to = gpt_at(call->workspace, p->wide);
    PHX_TRY(dev->cast(dev->ctx, to, PHX_F32, logits, self->dtype, b * v, call->stream, err));
    wide = to;
  }
  return dev->copy(dev->ctx, call->logits, wide, b * v * (int64_t)sizeof(float), call->stream, err);
}

phx_status gpt_head_forward(phx_model_self *self, const phx_stage_call *call, phx_error *err) {
  const phx_ops *o = self->ops;
  const gpt_sizes *s = &self->sizes;
  const int64_t n = call->batch * call->sequence, c = s->width;
  const int32_t evaluate = call->pass == PHX_PASS_EVALUATE;
  gpt_head_plan p;
  gpt_head_layout(s, self->dtype, call->batch, call->sequence, 0, &p);
  if (evaluate && call->logits) PHX_TRY(last_logits(self, call, &p, err));
  if (!call->targets) {
    if (evaluate && call->logits) return PHX_OK;
    return phx_fail(err, PHX_INTERNAL, "the head was called without targets");
  }
  void *const ln = gpt_at(call->workspace, p.ln), *const logits = gpt_at(call->saved, p.logits);
  float *const losses = gpt_at(call->workspace, p.losses);
  PHX_TRY(o->layer_norm(o->ctx, self->dtype, ln, NULL, gpt_at(call->saved, p.mean), gpt_at(call->saved, p.rstd),
                        call->input, NULL, gpt_weight(call->view, GPT_LNF_W), gpt_weight(call->view, GPT_LNF_B), n, c,
                        self->eps, call->stream, err));
  PHX_TRY(o->linear(o->ctx, self->dtype, logits, s->vp, NULL, ln, gpt_weight(call->view, GPT_HEAD_WTE), NULL, n, c,
                    s->vocab, 0, call->stream, err));
  PHX_TRY(o->cross_entropy(o->ctx, self->dtype, logits, losses, call->targets, n, s->vocab, s->vp, !evaluate,
                           (float)(1.0 / (double)n), call->stream, err));
  if (!call->loss) return PHX_OK;
  return o->mean(o->ctx, call->loss, losses, n, call->stream, err);
}

phx_status gpt_head_backward(phx_model_self *self, const phx_stage_call *call, phx_error *err) {
  const phx_ops *o = self->ops;
  const gpt_sizes *s = &self->sizes;
  const phx_view *w = call->view;
  phx_stream *st = call->stream;
  const int64_t n = call->batch * call->sequence, c = s->width;
  gpt_head_plan p;
  gpt_head_layout(s, self->dtype, call->batch, call->sequence, 0, &p);
  void *const ln = gpt_at(call->workspace, p.ln), *const d_logits = gpt_at(call->saved, p.logits);
  float *const drop = gpt_at(call->workspace, p.drop);
  float *const mean = gpt_at(call->saved, p.mean), *const rstd = gpt_at(call->saved, p.rstd);
  const phx_param_view *wte = phx_view_param(w, GPT_HEAD_WTE);
  if (wte->gradient) {
    PHX_TRY(o->layer_norm(o->ctx, self->dtype, ln, NULL, mean, rstd, call->input, NULL, gpt_weight(w, GPT_LNF_W),
                          gpt_weight(w, GPT_LNF_B), n, c, self->eps, st, err));
    PHX_TRY(o->linear_backward_weight(o->ctx, self->dtype, wte->gradient, NULL, d_logits, s->vp, ln, n, c, s->vocab,
                                      wte->gradient_mode, PHX_GRAD_NONE, st, err));
  }
  PHX_TRY(o->linear_backward_input(o->ctx, self->dtype, ln, d_logits, s->vp, gpt_weight(w, GPT_HEAD_WTE), NULL, n, c,
                                   s->vocab, PHX_GRAD_WRITE, st, err));
  gpt_gradient g = gpt_gradient_of(w, GPT_LNF_W, drop);
  if (g.w && !g.b) g.b = drop, g.b_mode = PHX_GRAD_WRITE;
  return o->layer_norm_backward(o->ctx, self->dtype, call->d_input, NULL, g.w, g.w_mode, g.b, g.b_mode, ln, call->input,
                                gpt_weight(w, GPT_LNF_W), mean, rstd, n, c, st, err);
}
