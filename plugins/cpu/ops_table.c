/* plugins/cpu/ops_table.c - one instruction set's functions, as a constant table. */
#include "cpu.h"

#ifndef PHX__CPU_HAVE_ATTENTION
static phx_status no_attention(void *ctx, float *out, float *lse, const float *qkv, int64_t b, int64_t t, int64_t c,
                               int64_t heads, phx_stream *s, phx_error *err) {
  (void)ctx, (void)out, (void)lse, (void)qkv, (void)b, (void)t, (void)c, (void)heads, (void)s;
  return phx__cpu_fail(err, PHX_UNSUPPORTED, "cpu: built without attention");
}
static phx_status no_attention_backward(void *ctx, float *dqkv, const float *dout, const float *qkv, const float *out,
                                        const float *lse, float *work, int64_t b, int64_t t, int64_t c, int64_t heads,
                                        phx_stream *s, phx_error *err) {
  (void)ctx, (void)dqkv, (void)dout, (void)qkv, (void)out, (void)lse, (void)work, (void)b, (void)t, (void)c;
  (void)heads, (void)s;
  return phx__cpu_fail(err, PHX_UNSUPPORTED, "cpu: built without attention");
}
static int64_t no_attention_scratch(int32_t threads) { return threads * 0; }
#undef phx__cpu_attention
#undef phx__cpu_attention_backward
#undef phx__cpu_attention_scratch
#define phx__cpu_attention no_attention
#define phx__cpu_attention_backward no_attention_backward
#define phx__cpu_attention_scratch no_attention_scratch
#endif
#ifndef PHX__CPU_HAVE_CROSS_ENTROPY
static phx_status no_cross_entropy(void *ctx, float *logits, float *losses, const int32_t *targets, int64_t n,
                                   int64_t v, int64_t vp, int32_t gradient, float scale, phx_stream *s,
                                   phx_error *err) {
  (void)ctx, (void)logits, (void)losses, (void)targets, (void)n, (void)v, (void)vp, (void)gradient, (void)scale, (void)s;
  return phx__cpu_fail(err, PHX_UNSUPPORTED, "cpu: built without cross entropy");
}
#undef phx__cpu_cross_entropy
#define phx__cpu_cross_entropy no_cross_entropy
#endif

const phx__cpu_kernels phx__cpu_this_kernels = {
    .ops = {.struct_size = sizeof(phx_ops),
            .linear = phx__cpu_linear,
            .linear_backward_input = phx__cpu_linear_backward_input,
            .linear_backward_weight = phx__cpu_linear_backward_weight,
            .embedding = phx__cpu_embedding,
            .embedding_backward = phx__cpu_embedding_backward,
            .layer_norm = phx__cpu_layer_norm,
            .layer_norm_backward = phx__cpu_layer_norm_backward,
            .add = phx__cpu_add,
            .attention = phx__cpu_attention,
            .attention_backward = phx__cpu_attention_backward,
            .cross_entropy = phx__cpu_cross_entropy,
            .adamw = phx__cpu_adamw,
            .sgd = phx__cpu_sgd,
            .block_norms = phx__cpu_block_norms},
    .attention_scratch = phx__cpu_attention_scratch,
    .cast = phx__cpu_slice_cast,
    .add = phx__cpu_slice_add,
    .scale = phx__cpu_slice_scale};
