/* tests/support/reference_gpt.h - GPT-2 forward and backward in double precision, one thread, the simplest way.
 *
 * Shares nothing with plugins/gpt or its operations: what they compute is compared with this.  Tensors are found by
 * Hugging Face's names; linear weights are (out, in). */
#ifndef PHX__REFERENCE_GPT_H
#define PHX__REFERENCE_GPT_H
#include <stddef.h>
#include <stdint.h>

typedef struct reference_tensor {
  char name[40];
  int64_t numel;
  double *value, *gradient; /* (numel) each */
} reference_tensor;

typedef struct reference_gpt {
  int layers, heads, width, context, vocab;
  double eps; /* of the layer norms; 1e-5 unless the test sets it */
  int n_tensors;
  reference_tensor *tensors; /* wte, wpe, 12 of each block, ln_f.weight, ln_f.bias */
} reference_gpt;

reference_gpt *reference_gpt_create(int layers, int heads, int width, int context, int vocab);
void reference_gpt_destroy(reference_gpt *g);
reference_tensor *reference_gpt_find(reference_gpt *g, const char *name); /* NULL: no such tensor */
/* Mean loss of (batch, length) tokens; ADDS its gradients when backward = 1.  runs[layer] = 0 skips a block (NULL: all
 * run).  logits (batch * length, vocab) or NULL. */
double reference_gpt_run(reference_gpt *g, const int32_t *tokens, const int32_t *targets, int batch, int length,
                         const int *runs, int backward, double *logits);
#endif
