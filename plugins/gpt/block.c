/* plugins/gpt/block.c - one transformer block, forward and backward.  [main] only.
 *
 *   res2 = x + c_proj(attention(c_attn(ln_1(x))))        out = res2 + c_proj(gelu(c_fc(ln_2(res2))))
 *
 * x stays with the caller until backward.  d_input serves as scratch for the gradient of res2 and must not be
 * d_output. */
#include "gpt.h"

phx_status gpt_block_forward(phx_model_self *self, const phx_stage_call *call, phx_error *err) {
  const phx_ops *o = self->ops;
  const phx_view *w = call->view;
  phx_stream *st = call->stream;
  const int64_t b = call->batch, t = call->sequence, n = b * t, c = self->sizes.width, heads = self->sizes.heads;
  gpt_block_plan p;
  gpt_block_layout(&self->sizes, self->dtype, b, t, 0, &p);
  void *const saved = call->saved, *const space = call->workspace;
  void *const one = gpt_at(space, p.a), *const two = gpt_at(space, p.b); /* (N, C) each */
  void *const qkv = gpt_at(saved, p.qkv), *const att = gpt_at(saved, p.att), *const res2 = gpt_at(saved, p.res2);
  void *const act = gpt_at(saved, p.act);

  PHX_TRY(o->layer_norm(o->ctx, self->dtype, one, NULL, gpt_at(saved, p.mean1), gpt_at(saved, p.rstd1), call->input,
                        NULL, gpt_weight(w, GPT_LN1_W), gpt_weight(w, GPT_LN1_B), n, c, self->eps, st, err));
  PHX_TRY(o->linear(o->ctx, self->dtype, qkv, 0, NULL, one, gpt_weight(w, GPT_QKV_W), gpt_weight(w, GPT_QKV_B), n, c,
                    3 * c, 0, st, err));
  PHX_TRY(o->attention(o->ctx, self->dtype, att, gpt_at(saved, p.lse), qkv, b, t, c, heads, st, err));
  PHX_TRY(o->linear(o->ctx, self->dtype, one, 0, NULL, att, gpt_weight(w, GPT_ATT_W), gpt_weight(w, GPT_ATT_B), n, c, c,
                    0, st, err));
  PHX_TRY(o->layer_norm(o->ctx, self->dtype, two, res2, gpt_at(saved, p.mean2), gpt_at(saved, p.rstd2), call->input,
                        one, gpt_weight(w, GPT_LN2_W), gpt_weight(w, GPT_LN2_B), n, c, self->eps, st, err));
  PHX_TRY(o->linear(o->ctx, self->dtype, act, 0, gpt_at(saved, p.pre), two, gpt_weight(w, GPT_FC_W),
                    gpt_weight(w, GPT_FC_B), n, c, 4 * c, 1, st, err));
  PHX_TRY(o->linear(o->ctx, self->dtype, call->output, 0, NULL, act, gpt_weight(w, GPT_OUT_W), gpt_weight(w, GPT_OUT_B),
                    n, 4 * c, c, 0, st, err));
  return o->add(o->ctx, self->dtype, call->output, call->output, res2, n * c, st, err);
}

/* Gradient of a linear's weight and bias from d(N, oc) and its input x(N, ic); nothing when both are frozen. */
static phx_status weight_gradient(const phx_model_self *self, const phx_stage_call *call, uint32_t weight, float *drop,
                                  const void *d, const void *x, int64_t ic, int64_t oc, phx_error *err) {
  const gpt_gradient g = gpt_gradient_of(call->view, weight, drop);
  if (!g.w) return PHX_OK;
  return self->ops->linear_backward_weight(self->ops->ctx, self->dtype, g.w, g.b, d, 0, x, call->batch * call->sequence,
                                           ic, oc, g.w_mode, g.b_mode, call->stream, err);
}

/* d_out -> gradient of res2, in d_input.  wide(N, 4C) and narrow(N, C) are scratch. */
static phx_status mlp_backward(const phx_model_self *self, const phx_stage_call *call, const gpt_block_plan *p,
                               phx_error *err) {
  const phx_ops *o = self->ops;
  const phx_view *w = call->view;
  phx_stream *st = call->stream;
  const int64_t n = call->batch * call->sequence, c = self->sizes.width;
  void *const saved = call->saved, *const space = call->workspace;
  void *const wide = gpt_at(space, p->wide), *const narrow = gpt_at(space, p->narrow);
  void *const res2 = gpt_at(saved, p->res2);
  float *const drop = gpt_at(space, p->drop);
  float *const mean = gpt_at(saved, p->mean2), *const rstd = gpt_at(saved, p->rstd2);

  PHX_TRY(weight_gradient(self, call, GPT_OUT_W, drop, call->d_output, gpt_at(saved, p->act), 4 * c, c, err));
  PHX_TRY(o->linear_backward_input(o->ctx, self->dtype, wide, call->d_output, 0, gpt_weight(w, GPT_OUT_W),
                                   gpt_at(saved, p->pre), n, 4 * c, c, PHX_GRAD_WRITE, st, err));
  PHX_TRY(o->layer_norm(o->ctx, self->dtype, narrow, NULL, mean, rstd, res2, NULL, gpt_weight(w, GPT_LN2_W),
                        gpt_weight(w, GPT_LN2_B), n, c, self->eps, st, err));
  PHX_TRY(weight_gradient(self, call, GPT_FC_W, drop, wide, narrow, c, 4 * c, err));
  PHX_TRY(o->linear_backward_input(o->ctx, self->dtype, narrow, wide, 0, gpt_weight(w, GPT_FC_W), NULL, n, c, 4 * c,
                                   PHX_GRAD_WRITE, st, err));
  gpt_gradient g = gpt_gradient_of(w, GPT_LN2_W, drop);
  if (g.w && !g.b) g.b = drop, g.b_mode = PHX_GRAD_WRITE;
  return o->layer_norm_backward(o->ctx, self->dtype, call->d_input, call->d_output, g.w, g.w_mode, g.b, g.b_mode,
                                narrow, res2, gpt_weight(w, GPT_LN2_W), mean, rstd, n, c, st, err);
}

/* Gradient of res2 (in d_input) -> gradient of x, in d_input. */
static phx_status attention_backward(const phx_model_self *self, const phx_stage_call *call, const gpt_block_plan *p,
                                     phx_error *err) {
  const phx_ops *o = self->ops;
  const phx_view *w = call->view;
  phx_stream *st = call->stream;
  const int64_t b = call->batch, t = call->sequence, n = b * t, c = self->sizes.width;
  void *const saved = call->saved, *const space = call->workspace;
  void *const dqkv = gpt_at(space, p->wide), *const narrow = gpt_at(space, p->narrow);
  void *const att = gpt_at(saved, p->att);
  float *const drop = gpt_at(space, p->drop);
  float *const mean = gpt_at(saved, p->mean1), *const rstd = gpt_at(saved, p->rstd1);

  PHX_TRY(weight_gradient(self, call, GPT_ATT_W, drop, call->d_input, att, c, c, err));
  PHX_TRY(o->linear_backward_input(o->ctx, self->dtype, narrow, call->d_input, 0, gpt_weight(w, GPT_ATT_W), NULL, n, c,
                                   c, PHX_GRAD_WRITE, st, err));
  PHX_TRY(o->attention_backward(o->ctx, self->dtype, dqkv, narrow, gpt_at(saved, p->qkv), att, gpt_at(saved, p->lse),
                                gpt_at(space, p->rows), b, t, c, self->sizes.heads, st, err));
  PHX_TRY(o->layer_norm(o->ctx, self->dtype, narrow, NULL, mean, rstd, call->input, NULL, gpt_weight(w, GPT_LN1_W),
                        gpt_weight(w, GPT_LN1_B), n, c, self->eps, st, err));
  PHX_TRY(weight_gradient(self, call, GPT_QKV_W, drop, dqkv, narrow, c, 3 * c, err));
  PHX_TRY(o->linear_backward_input(o->ctx, self->dtype, narrow, dqkv, 0, gpt_weight(w, GPT_QKV_W), NULL, n, c, 3 * c,
                                   PHX_GRAD_WRITE, st, err));
  gpt_gradient g = gpt_gradient_of(w, GPT_LN1_W, drop);
  if (g.w && !g.b) g.b = drop, g.b_mode = PHX_GRAD_WRITE;
  return o->layer_norm_backward(o->ctx, self->dtype, call->d_input, call->d_input, g.w, g.w_mode, g.b, g.b_mode, narrow,
                                call->input, gpt_weight(w, GPT_LN1_W), mean, rstd, n, c, st, err);
}

phx_status gpt_block_backward(phx_model_self *self, const phx_stage_call *call, phx_error *err) {
  if (call->d_input == call->d_output)
    return phx_fail(err, PHX_INTERNAL, "a block's d_input and d_output are one buffer: give it two");
  gpt_block_plan p;
  gpt_block_layout(&self->sizes, self->dtype, call->batch, call->sequence, 0, &p);
  PHX_TRY(mlp_backward(self, call, &p, err));
  return attention_backward(self, call, &p, err);
}
