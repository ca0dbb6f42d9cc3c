/* ops.c - the cpu device's operations, issued in stream order.
 *
 * One list of arguments per operation makes its record, its call and its run: P are arrays of the device, V is anything
 * else, H is pinned memory.  A bound that an operation oversteps is the allocation's: the next page cannot be touched.
 */
#include "far.h"

#define FIELD(type, name) type name;
#define PARAMETER(type, name) type name,
#define KEEP(type, name) .name = name,
#define PASS(type, name) a->name,
#define NEAR(type, name) far_near(a->name),
#define CHECK(type, name) \
  if (name && !status) status = far_check(ctx, #name, name, 1, 1, err);
#define CHECK_PINNED(type, name) \
  if (!status) status = far_check(ctx, #name, name, 8, 0, err);
#define NOTHING(type, name)

#define DEFINE(op, LIST)                                                                                  \
  typedef struct op##_call {                                                                              \
    phx_device_self *self;                                                                                \
    LIST(FIELD, FIELD, FIELD)                                                                             \
  } op##_call;                                                                                            \
  static phx_status run_##op(void *arguments, phx_error *err) {                                           \
    const op##_call *a = arguments;                                                                       \
    const phx_ops *o = a->self->inner_ops;                                                                \
    pthread_mutex_lock(&a->self->compute);                                                                \
    const phx_status status = o->op(o->ctx, LIST(PASS, NEAR, PASS) NULL, err);                            \
    pthread_mutex_unlock(&a->self->compute);                                                              \
    return status;                                                                                        \
  }                                                                                                       \
  static phx_status far_##op(void *ctx, LIST(PARAMETER, PARAMETER, PARAMETER) phx_stream *s, phx_error *err) { \
    const op##_call a = {.self = ctx, LIST(KEEP, KEEP, KEEP)};                                            \
    phx_status status = PHX_OK;                                                                           \
    LIST(NOTHING, CHECK, CHECK_PINNED)                                                                    \
    return status ? status : far_submit(ctx, s, run_##op, &a, sizeof a, err);                             \
  }

#define LINEAR(V, P, H)                                                                                         \
  V(int32_t, dtype) P(void *, out) V(int64_t, out_ld) P(void *, pre) P(const void *, x) P(const void *, w)      \
  P(const void *, bias) V(int64_t, n) V(int64_t, ic) V(int64_t, oc) V(int32_t, gelu)
DEFINE(linear, LINEAR)
#define LINEAR_INPUT(V, P, H)                                                                                   \
  V(int32_t, dtype) P(void *, dx) P(const void *, dout) V(int64_t, dout_ld) P(const void *, w) P(const void *, pre) \
  V(int64_t, n) V(int64_t, ic) V(int64_t, oc) V(int32_t, mode)
DEFINE(linear_backward_input, LINEAR_INPUT)
#define LINEAR_WEIGHT(V, P, H)                                                                                  \
  V(int32_t, dtype) P(float *, dw) P(float *, db) P(const void *, dout) V(int64_t, dout_ld) P(const void *, x)  \
  V(int64_t, n) V(int64_t, ic) V(int64_t, oc) V(int32_t, w_mode) V(int32_t, b_mode)
DEFINE(linear_backward_weight, LINEAR_WEIGHT)
#define EMBEDDING(V, P, H)                                                                                      \
  V(int32_t, dtype) P(void *, out) P(const int32_t *, tokens) P(const void *, wte) P(const void *, wpe)         \
  V(int64_t, b) V(int64_t, t) V(int64_t, c)
DEFINE(embedding, EMBEDDING)
#define EMBEDDING_BACKWARD(V, P, H)                                                                             \
  V(int32_t, dtype) P(float *, dwte) V(int32_t, wte_mode) P(float *, dwpe) V(int32_t, wpe_mode)                 \
  P(const void *, dout) P(const int32_t *, tokens) V(int64_t, b) V(int64_t, t) V(int64_t, c) V(int64_t, v)      \
  V(int64_t, max_t)
DEFINE(embedding_backward, EMBEDDING_BACKWARD)
#define LAYER_NORM(V, P, H)                                                                                     \
  V(int32_t, dtype) P(void *, out) P(void *, sum) P(float *, mean) P(float *, rstd) P(const void *, x)          \
  P(const void *, y) P(const void *, w) P(const void *, bias) V(int64_t, n) V(int64_t, c) V(float, eps)
DEFINE(layer_norm, LAYER_NORM)
#define LAYER_NORM_BACKWARD(V, P, H)                                                                            \
  V(int32_t, dtype) P(void *, dx) P(const void *, more) P(float *, dw) V(int32_t, w_mode) P(float *, db)        \
  V(int32_t, b_mode) P(const void *, dout) P(const void *, x) P(const void *, w) P(const float *, mean)         \
  P(const float *, rstd) V(int64_t, n) V(int64_t, c)
DEFINE(layer_norm_backward, LAYER_NORM_BACKWARD)
#define ADD(V, P, H) V(int32_t, dtype) P(void *, out) P(const void *, x) P(const void *, y) V(int64_t, numel)
DEFINE(add, ADD)
#define ATTENTION(V, P, H)                                                                                      \
  V(int32_t, dtype) P(void *, out) P(float *, lse) P(const void *, qkv) V(int64_t, b) V(int64_t, t) V(int64_t, c) \
  V(int64_t, heads)
DEFINE(attention, ATTENTION)
#define ATTENTION_BACKWARD(V, P, H)                                                                             \
  V(int32_t, dtype) P(void *, dqkv) P(const void *, dout) P(const void *, qkv) P(const void *, out)             \
  P(const float *, lse) P(float *, work) V(int64_t, b) V(int64_t, t) V(int64_t, c) V(int64_t, heads)
DEFINE(attention_backward, ATTENTION_BACKWARD)
#define CROSS_ENTROPY(V, P, H)                                                                                  \
  V(int32_t, dtype) P(void *, logits) P(float *, losses) P(const int32_t *, targets) V(int64_t, n) V(int64_t, v) \
  V(int64_t, vp) V(int32_t, gradient) V(float, scale)
DEFINE(cross_entropy, CROSS_ENTROPY)
#define ADAMW(V, P, H)                                                                                          \
  P(float *, w) P(const float *, g) P(float *, m) P(float *, v) P(void *, low) V(int32_t, low_dtype)            \
  V(int64_t, numel) V(float, scale) V(float, lr) V(float, beta1) V(float, beta2) V(float, c1) V(float, c2)      \
  V(float, eps) V(float, decay)
DEFINE(adamw, ADAMW)
#define SGD(V, P, H)                                                                                            \
  P(float *, w) P(const float *, g) P(void *, low) V(int32_t, low_dtype) V(int64_t, numel) V(float, scale)      \
  V(float, lr) V(float, decay)
DEFINE(sgd, SGD)
#define BLOCK_NORMS(V, P, H) H(double *, sums) P(const float *, x) V(int64_t, blocks)
DEFINE(block_norms, BLOCK_NORMS)
#define MEAN(V, P, H) H(double *, out) P(const float *, x) V(int64_t, n)
DEFINE(mean, MEAN)

void far_ops(phx_device_self *self) {
  self->ops = (phx_ops){.struct_size = sizeof(phx_ops), .ctx = self, .scratch_bytes = self->inner_ops->scratch_bytes,
                        .linear = far_linear, .linear_backward_input = far_linear_backward_input,
                        .linear_backward_weight = far_linear_backward_weight, .embedding = far_embedding,
                        .embedding_backward = far_embedding_backward, .layer_norm = far_layer_norm,
                        .layer_norm_backward = far_layer_norm_backward, .add = far_add, .attention = far_attention,
                        .attention_backward = far_attention_backward, .cross_entropy = far_cross_entropy,
                        .adamw = far_adamw, .sgd = far_sgd, .block_norms = far_block_norms, .mean = far_mean};
}
