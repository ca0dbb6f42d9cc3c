/* plugins/cpu/ops_embedding.c - token and position embeddings and their gradients.
 *
 * Backward: each column is added by one thread, rows in order of (b, t), so the bits are fixed.  A token outside the
 * table is refused where its size is known (backward); forward trusts the data module.  [main] */
#include <string.h>
#include "cpu.h"
#include "simd.h"

typedef struct forward_args {
  void *out;
  const int32_t *tokens;
  const void *wte, *wpe;
  int64_t t, c;
  int32_t dtype;
} forward_args;
PHX__INLINE void forward_rows(int32_t dtype, const forward_args *a, int64_t first, int64_t last) {
  const int64_t c = a->c;
  for (int64_t row = first; row < last; row++) {
    const void *restrict e = phx__at(dtype, a->wte, a->tokens[row] * c);
    const void *restrict p = phx__at(dtype, a->wpe, row % a->t * c);
    void *restrict out = phx__out_at(dtype, a->out, row * c);
    PHX__IVDEP for (int64_t j = 0; j < c; j++) phx__set(dtype, out, j, phx__get(dtype, e, j) + phx__get(dtype, p, j));
  }
}
static void forward_body(void *arg, int64_t first, int64_t last, int32_t worker) {
  const forward_args *a = arg;
  (void)worker;
  PHX__BY_DTYPE(a->dtype, forward_rows, a, first, last);
}

phx_status phx__cpu_embedding(void *ctx, int32_t dtype, void *out, const int32_t *tokens, const void *wte,
                              const void *wpe, int64_t b, int64_t t, int64_t c, phx_stream *s, phx_error *err) {
  const phx_status status = phx__cpu_begin(ctx, dtype, s, err);
  if (status == PHX_OK)
    phx__cpu_parallel(ctx, b * t, 1, forward_body, &(forward_args){out, tokens, wte, wpe, t, c, dtype});
  return status;
}

static void clear_body(void *arg, int64_t first, int64_t last, int32_t worker) {
  (void)worker;
  memset((float *)arg + first, 0, (size_t)(last - first) * sizeof(float));
}

typedef struct backward_args {
  float *dwte, *dwpe;
  const void *dout;
  const int32_t *tokens;
  int64_t rows, t, c;
  int32_t dtype;
} backward_args;
PHX__INLINE void add_columns(int32_t dtype, float *restrict to, const void *restrict from, int64_t first,
                             int64_t last) {
  PHX__IVDEP for (int64_t j = first; j < last; j++) to[j] += phx__get(dtype, from, j);
}
PHX__INLINE void backward_columns(int32_t dtype, const backward_args *a, int64_t first, int64_t last) {
  for (int64_t row = 0; row < a->rows; row++) {
    const void *dout = phx__at(dtype, a->dout, row * a->c);
    if (a->dwte) add_columns(dtype, a->dwte + a->tokens[row] * a->c, dout, first, last);
    if (a->dwpe) add_columns(dtype, a->dwpe + row % a->t * a->c, dout, first, last);
  }
}
static void backward_body(void *arg, int64_t first, int64_t last, int32_t worker) {
  const backward_args *a = arg;
  (void)worker;
  PHX__BY_DTYPE(a->dtype, backward_columns, a, first, last);
}

phx_status phx__cpu_embedding_backward(void *ctx, int32_t dtype, float *dwte, int32_t wte_mode, float *dwpe,
                                       int32_t wpe_mode, const void *dout, const int32_t *tokens, int64_t b, int64_t t,
                                       int64_t c, int64_t v, int64_t max_t, phx_stream *s, phx_error *err) {
  if (t > max_t)
    return phx_fail(err, PHX_INVALID, "cpu: embedding of %lld positions, the table has %lld", (long long)t,
                    (long long)max_t);
  for (int64_t i = 0; i < b * t; i++)
    if (tokens[i] < 0 || tokens[i] >= v)
      return phx_fail(err, PHX_INVALID, "cpu: token %d at %lld is outside the vocabulary of %lld", tokens[i],
                      (long long)i, (long long)v);
  PHX_TRY(phx__cpu_begin(ctx, dtype, s, err));
  if (dwte && wte_mode == PHX_GRAD_WRITE) phx__cpu_parallel(ctx, v * c, PHX_BLOCK, clear_body, dwte);
  if (dwpe && wpe_mode == PHX_GRAD_WRITE) phx__cpu_parallel(ctx, max_t * c, PHX_BLOCK, clear_body, dwpe);
  phx__cpu_parallel(ctx, c, 64, backward_body, &(backward_args){dwte, dwpe, dout, tokens, b * t, t, c, dtype});
  return PHX_OK;
}
