/* plugins/cuda/attention_graph.h - causal attention as a graph of cuDNN's operations, and the plan that runs it.
 *
 * Nothing here touches a GPU: with the properties of a device as JSON, plans are made on a machine without one. */
#ifndef PHX__CUDNN_GRAPH_H
#define PHX__CUDNN_GRAPH_H
#include <cudnn_graph.h>
#include <stddef.h>
#include <stdint.h>

/* cuDNN 9.10.2: infinities in the mask, accumulators cleared by the engine, backward without known faults */
enum { PHX__CUDNN_LEAST = 91002 };

/* What we call of libcudnn.so.9, found at run time. */
typedef struct phx__cudnn_api {
  void *library;
  int64_t version;
  __typeof__(cudnnGetVersion) *get_version;
  __typeof__(cudnnGetErrorString) *error_string;
  __typeof__(cudnnGetLastErrorString) *last_error;
  __typeof__(cudnnCreate) *create;
  __typeof__(cudnnDestroy) *destroy;
  __typeof__(cudnnSetStream) *set_stream;
  __typeof__(cudnnBackendCreateDescriptor) *descriptor_create;
  __typeof__(cudnnBackendDestroyDescriptor) *descriptor_destroy;
  __typeof__(cudnnBackendFinalize) *finalize;
  __typeof__(cudnnBackendSetAttribute) *set;
  __typeof__(cudnnBackendGetAttribute) *get;
  __typeof__(cudnnBackendExecute) *execute;
} phx__cudnn_api;

/* 1, or 0 and one line of why (reason, size bytes). */
int32_t phx__cudnn_open(phx__cudnn_api *api, char *reason, size_t size);
void phx__cudnn_close(phx__cudnn_api *api);

/* The tensors of a variant pack: what a plan is given at each run. */
enum {
  PHX__CUDNN_Q = 1,
  PHX__CUDNN_K,
  PHX__CUDNN_V,
  PHX__CUDNN_OUT,
  PHX__CUDNN_LSE,   /* natural logarithm: the row's maximum plus log of the sum of exponentials */
  PHX__CUDNN_SCALE, /* by value, as the three below: a pointer to a float of the host */
  PHX__CUDNN_MASKED,
  PHX__CUDNN_ONE, /* backward, as all below */
  PHX__CUDNN_DOUT,
  PHX__CUDNN_DQ,
  PHX__CUDNN_DK,
  PHX__CUDNN_DV,
  PHX__CUDNN_DOTS,   /* (B, H, T) floats */
  PHX__CUDNN_DQ_SUM, /* (B, H, T, D) floats, not in deterministic plans */
  PHX__CUDNN_TENSORS
};

typedef struct phx__cudnn_shape {
  int64_t b, t, heads, width;
  int32_t backward, deterministic;
} phx__cudnn_shape;

typedef struct phx__cudnn_plan {
  cudnnBackendDescriptor_t plan; /* NULL: there is none */
  int64_t workspace;             /* bytes the engine asks for */
  int64_t dq_sum;                /* bytes of PHX__CUDNN_DQ_SUM */
  int64_t engine;                /* its global index, for the log */
  char reason[256];              /* why there is none */
} phx__cudnn_plan;

/* Makes out->plan, or leaves it NULL and says why.  handle may be NULL when device (the properties of a device as JSON)
 * is given; device is NULL for the current one. */
void phx__cudnn_plan_make(const phx__cudnn_api *api, cudnnHandle_t handle, const char *device,
                          const phx__cudnn_shape *shape, phx__cudnn_plan *out);
void phx__cudnn_plan_free(const phx__cudnn_api *api, phx__cudnn_plan *plan);
#endif
