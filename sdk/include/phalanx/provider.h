/* phalanx/provider.h - what device, communicator, model and optimizer plugins implement for the core.  Provisional:
 * strategies are not compiled against it.
 *
 * Device: memory, the strategy-facing phx_device, and the operations models are made of.
 * Communicator: the strategy-facing phx_comm, its own memory, and its payload formula.
 * Model: a declaration (before any weight exists), and forward and backward of each stage.
 * Optimizer: its grain and states (before any weight exists), and the update of a piece of one parameter. */
#ifndef PHALANX_PROVIDER_H
#define PHALANX_PROVIDER_H
#include <phalanx/comm.h>
#include <phalanx/device.h>
#include <phalanx/host.h>
#include <phalanx/job.h>
#include <phalanx/model.h>
#include <phalanx/plugin.h>
#include <phalanx/strategy.h>
#ifdef __cplusplus
extern "C" {
#endif

/* ==== operations ("phx.ops/1") =====================================================================================
 * All matrices are row-major.  B sequences of T tokens, N = B * T rows, C channels, H heads, V vocabulary, Vp its
 * padded row length.  `mode` is PHX_GRAD_WRITE or PHX_GRAD_ADD. dtype (PHX_F32 or PHX_BF16; a device refuses what it
 * does not offer) is that of the `void` arrays: activations, their gradients, and weights as the model reads them. What
 * is typed float is fp32 under any dtype: gradients of weights, means, log-sum-exps, losses.  Sums are in fp32 or
 * wider, rounded to dtype once, to nearest even (arXiv 1710.03740). [main], asynchronous on the stream (inline on cpu);
 * arrays are in the device's space unless the comment says host. For a given shape, the bits of a result do not depend
 * on pointers beyond their 256-byte alignment. */
#define PHX_EXT_OPS "phx.ops/1"
typedef struct phx_ops {
  size_t struct_size;
  void *ctx;
  int64_t scratch_bytes; /* per rank, held by the device for its operations: part of the plan */
  /* out(N, OC) = x(N, IC) W(OC, IC)^T + bias(OC); bias may be NULL.  gelu: out = GELU_tanh(pre), pre(N, OC) is kept if
   * pre != NULL.  out_ld: elements between rows of out (>= OC; 0 means OC). */
  phx_status (*linear)(void *ctx, int32_t dtype, void *out, int64_t out_ld, void *pre, const void *x, const void *w,
                       const void *bias, int64_t n, int64_t ic, int64_t oc, int32_t gelu, phx_stream *s,
                       phx_error *err);
  /* dx(N, IC) = dout(N, OC) W(OC, IC), then, if pre != NULL, dx *= GELU_tanh'(pre(N, IC)).  mode for dx;
   * dout_ld as out_ld. */
  phx_status (*linear_backward_input)(void *ctx, int32_t dtype, void *dx, const void *dout, int64_t dout_ld,
                                      const void *w, const void *pre, int64_t n, int64_t ic, int64_t oc, int32_t mode,
                                      phx_stream *s, phx_error *err);
  /* dw(OC, IC) (+)= dout^T x;  db(OC) (+)= column sums of dout (db may be NULL) */
  phx_status (*linear_backward_weight)(void *ctx, int32_t dtype, float *dw, float *db, const void *dout,
                                       int64_t dout_ld, const void *x, int64_t n, int64_t ic, int64_t oc,
                                       int32_t w_mode, int32_t b_mode, phx_stream *s, phx_error *err);
  /* out(B, T, C) = wte[token] + wpe[t] */
  phx_status (*embedding)(void *ctx, int32_t dtype, void *out, const int32_t *tokens, const void *wte, const void *wpe,
                          int64_t b, int64_t t, int64_t c, phx_stream *s, phx_error *err);
  /* dwte(V, C), dwpe(maxT, C) (+)=; a NULL gradient is skipped (frozen).  WRITE clears the whole array first.
   * Deterministic: rows are added in order of (b, t). */
  phx_status (*embedding_backward)(void *ctx, int32_t dtype, float *dwte, int32_t wte_mode, float *dwpe,
                                   int32_t wpe_mode, const void *dout, const int32_t *tokens, int64_t b, int64_t t,
                                   int64_t c, int64_t v, int64_t max_t, phx_stream *s, phx_error *err);
  /* sum(N, C) = a + b (b may be NULL: sum = a and sum may be NULL);
   * out = (sum - mean) * rstd * w + bias;  mean(N), rstd(N) are kept */
  phx_status (*layer_norm)(void *ctx, int32_t dtype, void *out, void *sum, float *mean, float *rstd, const void *a,
                           const void *b, const void *w, const void *bias, int64_t n, int64_t c, float eps,
                           phx_stream *s, phx_error *err);
  /* dx(N, C) = layer norm's input gradient + (add ? add(N, C) : 0);  dw(C), db(C) by mode; both NULL: frozen.
   * x is the norm's input (`sum` above); dx may be add. */
  phx_status (*layer_norm_backward)(void *ctx, int32_t dtype, void *dx, const void *add, float *dw, int32_t w_mode,
                                    float *db, int32_t b_mode, const void *dout, const void *x, const void *w,
                                    const float *mean, const float *rstd, int64_t n, int64_t c, phx_stream *s,
                                    phx_error *err);
  /* out = a + b (N * C elements; out may be a or b) */
  phx_status (*add)(void *ctx, int32_t dtype, void *out, const void *a, const void *b, int64_t numel, phx_stream *s,
                    phx_error *err);
  /* Causal attention.  qkv(B, T, 3C) = q | k | v, each (H, C / H);  out(B, T, C); lse(B, H, T) = log-sum-exp of the
   * scaled scores, kept for backward.  Memory beside the arguments: scratch only, independent of T * T.
   * FlashAttention-2, arXiv 2307.08691. */
  phx_status (*attention)(void *ctx, int32_t dtype, void *out, float *lse, const void *qkv, int64_t b, int64_t t,
                          int64_t c, int64_t heads, phx_stream *s, phx_error *err);
  /* dqkv(B, T, 3C) written; work(B, H, T) floats of scratch from the caller */
  phx_status (*attention_backward)(void *ctx, int32_t dtype, void *dqkv, const void *dout, const void *qkv,
                                   const void *out, const float *lse, float *work, int64_t b, int64_t t, int64_t c,
                                   int64_t heads, phx_stream *s, phx_error *err);
  /* logits(N, Vp), columns V..Vp-1 are ignored on input.  losses(N) = -log softmax(logits)[target].  With gradient = 1
   * logits are replaced in place by (softmax - onehot) * scale, and columns V..Vp-1 by 0.  No second copy. */
  phx_status (*cross_entropy)(void *ctx, int32_t dtype, void *logits, float *losses, const int32_t *targets, int64_t n,
                              int64_t v, int64_t vp, int32_t gradient, float scale, phx_stream *s, phx_error *err);
  /* Decoupled weight decay (arXiv 1711.05101).  g' = g * scale; m, v as in the paper; bias corrections c1 = 1 -
   * beta1^t, c2 = 1 - beta2^t are passed as fp32;  w -= lr * (m / c1 / (sqrt(v / c2) + eps) + decay * w). low (numel,
   * low_dtype) or NULL: a rounded copy of the new weight.  Equal bits under any slicing. */
  phx_status (*adamw)(void *ctx, float *w, const float *g, float *m, float *v, void *low, int32_t low_dtype,
                      int64_t numel, float scale, float lr, float beta1, float beta2, float c1, float c2, float eps,
                      float decay, phx_stream *s, phx_error *err);
  /* w -= lr * (g * scale + decay * w) */
  phx_status (*sgd)(void *ctx, float *w, const float *g, void *low, int32_t low_dtype, int64_t numel, float scale,
                    float lr, float decay, phx_stream *s, phx_error *err);
  /* sums[i] = sum of squares of block i of x (blocks * PHX_BLOCK), in double, in one fixed order per block.
   * sums is host memory (PHX_SPACE_PINNED), complete when the stream is synchronized. */
  phx_status (*block_norms)(void *ctx, double *sums, const float *x, int64_t blocks, phx_stream *s, phx_error *err);
  /* *out (host, complete when the stream is synchronized) = mean of x(n), added in double in one fixed order */
  phx_status (*mean)(void *ctx, double *out, const float *x, int64_t n, phx_stream *s, phx_error *err);
} phx_ops;

/* ==== device =======================================================================================================
 */
typedef struct phx_device_self phx_device_self;
typedef struct phx_device_table {
  size_t struct_size;
  /* [main] pure: can it run here?  PHX_OK, or PHX_UNSUPPORTED with the reason. */
  phx_status (*probe)(phx_error *err);
  /* [main] threads: for operations, >= 1.  The device has no memory of its own before its first alloc. */
  phx_status (*create)(const phx_host *host, const void *config, int32_t threads, phx_device_self **out,
                       phx_error *err);
  void (*destroy)(phx_device_self *self);
  const phx_device *(*device)(phx_device_self *self); /* [borrow:self] */
  const phx_ops *(*ops)(phx_device_self *self);       /* [borrow:self] */
  /* [main] raw memory behind host->alloc: PHX_ALIGN-aligned, zero, pre-faulted */
  phx_status (*alloc)(phx_device_self *self, int32_t space, int64_t bytes, void **out, phx_error *err);
  void (*free)(phx_device_self *self, int32_t space, void *p, int64_t bytes);
  /* [any] optional: bytes of this process on the device as its driver counts them, now; -1: not known */
  int64_t (*driver_bytes)(phx_device_self *self);
  /* [main] pure, optional: devices of this kind on this machine that ranks may use; missing: any number of ranks */
  int32_t (*count)(void);
  /* [main] pure, optional: may several ranks compute on one device?  0: create refuses a second one, so that who comes
   * past it has one of its own, however many each rank is shown.  Missing: they may. */
  int32_t (*shared)(const void *config);
  /* [main] pure, optional: what computing in a dtype that it offers costs on this machine, where that is not what one
   * would expect: said at start, "compute = bf16: " before it.  NULL: nothing to say.  [static] */
  const char *(*cost)(int32_t dtype);
} phx_device_table;

/* ==== communicator =================================================================================================
 */
typedef struct phx_comm_table {
  size_t struct_size;
  phx_status (*probe)(phx_error *err); /* [main] pure */
  /* [any] pure: see phx_topology.payload; what a strategy gives as ctx is this plugin's config */
  int64_t (*payload)(const void *config, int32_t op, int64_t numel, int32_t dtype, int32_t rank, int32_t size,
                     int32_t root);
  /* [main] pure: bytes that create() takes beside the arena (staging), for the plan */
  int64_t (*buffer_bytes)(const void *config, int32_t size);
  /* [main][collective] the communicator of all ranks; arena_bytes (the largest of all ranks) of memory per rank that
   * peers can reach.  host offers "phx.job/1" and "phx.device/1". */
  phx_status (*create)(const phx_host *host, const void *config, int64_t arena_bytes, phx_comm **out, phx_error *err);
  void (*destroy)(phx_comm *world); /* [main] also of all that was split off and not destroyed */
  /* [main] this rank's arena, arena_bytes long, in the device's space; the core carves it for host->alloc(comm !=
   * NULL). NULL: it has none, and such memory comes from the device */
  void *(*arena)(phx_comm *world);
} phx_comm_table;

/* ==== model ========================================================================================================
 */
typedef struct phx_batch_shape {
  size_t struct_size;
  int64_t micro;    /* sequences per micro-batch and rank (B) */
  int64_t sequence; /* tokens per sequence (T) */
  int32_t compute_dtype; /* of activations and of weights as the model reads them: PHX_F32 or PHX_BF16 */
  int32_t reserved0;
} phx_batch_shape;

typedef struct phx_stage_memory { /* bytes on one rank, for one micro-batch */
  size_t struct_size;
  int64_t output;    /* the tensor handed to the next stage; 0 for the last */
  int64_t saved;     /* kept from forward to backward */
  int64_t workspace; /* scratch while the stage runs; shared by all stages */
} phx_stage_memory;

typedef struct phx_model_facts {
  size_t struct_size;
  int64_t vocabulary; /* tokens must be below */
  int64_t context;    /* the longest sequence */
  double flops_per_token; /* of a training step: 6 (12 L C^2 + V C) + 12 L C T for a GPT; recomputation excluded */
  /* What the stages compute beyond what names and shapes of parameters say, as "heads 12, norm_eps 1e-05": a checkpoint
   * is loaded only where this is the same.  NULL: no option of the model may differ then.  Valid until declare is
   * called again. */
  const char *computes;
} phx_model_facts;

typedef struct phx_stage_call { /* [borrow:call] */
  size_t struct_size;
  uint32_t stage;
  int32_t pass;           /* PHX_PASS_* */
  const phx_view *view;
  const void *input;      /* output of the stage before; NULL for the first */
  void *output;           /* NULL for the last */
  const void *d_output;   /* BACKWARD; NULL for the last */
  void *d_input;          /* BACKWARD: written; NULL for the first */
  void *saved, *workspace;
  const int32_t *tokens, *targets; /* (B, T); targets NULL when only logits are wanted */
  int64_t batch, sequence;         /* B, T; at most those of the batch shape */
  double *loss;           /* last stage, FORWARD and EVALUATE with targets: mean over the B * T tokens; host memory
                             (PHX_SPACE_PINNED), complete when the stream is synchronized */
  float *logits;          /* last stage, EVALUATE, or NULL: receives (B, V) of the last position of each sequence; host
                             memory (PHX_SPACE_PINNED), complete when the stream is synchronized */
  phx_stream *stream;
} phx_stage_call;

typedef struct phx_model_self phx_model_self;
typedef struct phx_model_table {
  size_t struct_size;
  /* [main] pure: fills params, units, stages, uses (arrays of its own, valid until declare is called again) and the
   * facts; offsets and blocks are the host's to fill in its copy. */
  phx_status (*declare)(const void *config, phx_model *out, phx_model_facts *facts, const phx_batch_shape *shape,
                        phx_error *err);
  /* [main] pure */
  phx_status (*stage_memory)(const void *config, const phx_batch_shape *shape, uint32_t stage, phx_stage_memory *out,
                             phx_error *err);
  /* [main] host offers "phx.ops/1" and "phx.device/1"; model is the host's copy, [borrow:self] */
  phx_status (*create)(const phx_host *host, const void *config, const phx_model *model, const phx_batch_shape *shape,
                       phx_model_self **out, phx_error *err);
  void (*destroy)(phx_model_self *self);
  /* [main] does the stage run for this micro-batch on this data rank (layer drop)?  A pure function of its arguments
   * and the seed. NULL: always.  A stage that does not run hands its input on unchanged. */
  int32_t (*stage_runs)(phx_model_self *self, uint32_t stage, uint64_t seed, int64_t step, int32_t micro_batch,
                        int32_t data_rank);
  phx_status (*forward)(phx_model_self *self, const phx_stage_call *call, phx_error *err);  /* [main] */
  phx_status (*backward)(phx_model_self *self, const phx_stage_call *call, phx_error *err); /* [main] */
} phx_model_table;

/* ==== optimizer ====================================================================================================
 * The core keeps what all optimizers share: the learning rate's schedule, clipping, which parameters decay, and cutting
 * a strategy's tickets into pieces.  A piece is part of one parameter: the whole of it for PHX_GRAIN_TENSOR, whole rows
 * for PHX_GRAIN_ROW; for PHX_GRAIN_BLOCK it begins and ends at canonical blocks or at the parameter's borders. */
typedef struct phx_optimizer_facts {
  size_t struct_size;
  int32_t grain; /* PHX_GRAIN_*: the finest piece that update() can be given */
  uint32_t n_states;
  phx_optim_state states[PHX_OPTIM_STATES_MAX]; /* all begin as zero */
} phx_optimizer_facts;

typedef struct phx_piece { /* [borrow:call] */
  size_t struct_size;
  uint32_t param;        /* index into phx_model.params: its shape, role, parts and name */
  int32_t place;         /* PHX_SPACE_* of the pointers */
  int64_t first, numel;  /* elements [first, first + numel) of the parameter; numel > 0 */
  float *weight;         /* (numel) the weight, or its fp32 master */
  void *low;             /* (numel) of low_dtype: receives the new weight, rounded to nearest even; or NULL */
  const float *gradient; /* (numel) the unscaled sum over ranks and micro-batches */
  void *states[PHX_OPTIM_STATES_MAX]; /* in the order of the facts, from the piece's first value on */
  int32_t low_dtype;
  float scale;           /* the gradient is multiplied by it: clip / (ranks x micro-batches) */
  double lr, decay;      /* of this step; decoupled weight decay, 0 for a parameter without PHX_PARAM_DECAY */
  int64_t step;          /* from 1 */
  phx_stream *stream;
} phx_piece;

typedef struct phx_optimizer_self phx_optimizer_self;
typedef struct phx_optimizer_table {
  size_t struct_size;
  /* [main] pure: what it is with these options, before a model is known; options that do not fit are refused here */
  phx_status (*describe)(const void *config, phx_optimizer_facts *out, phx_error *err);
  /* [main] pure, optional: bytes that create() takes from host->alloc as PHX_MEM_WORKSPACE, each allocation as
   * phx_align_bytes counts it; missing: none */
  int64_t (*workspace)(const void *config, const phx_model *model);
  /* [main] host offers "phx.ops/1" and "phx.device/1"; config and model are [borrow:self] */
  phx_status (*create)(const phx_host *host, const void *config, const phx_model *model, phx_optimizer_self **out,
                       phx_error *err);
  void (*destroy)(phx_optimizer_self *self);
  /* [main] one piece, inside the strategy's update; asynchronous on the piece's stream.  Over a step each element of
   * each trainable parameter comes once (on every rank that keeps a replica of it). */
  phx_status (*update)(phx_optimizer_self *self, const phx_piece *piece, phx_error *err);
} phx_optimizer_table;

#ifdef __cplusplus
}
#endif
#endif
