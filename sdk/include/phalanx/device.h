/* phalanx/device.h - streams, events, copies and elementwise operations: the device as a strategy sees it.
 *
 * A stream is opaque; NULL is the compute stream.  On the cpu device the compute stream runs inline (a call returns
 * when its work is done) and every other stream is a thread; on cuda all streams are CUDA streams.  Code written for
 * events and waits runs on both.  What copy() is given beside the device's own memory is pinned. */
#ifndef PHALANX_DEVICE_H
#define PHALANX_DEVICE_H
#include <phalanx/base.h>
#ifdef __cplusplus
extern "C" {
#endif

#define PHX_EXT_DEVICE "phx.device/1"

#define PHX_DEVICE_HOST_MEMORY (1u << 0) /* PHX_SPACE_DEVICE memory can be read and written by the CPU */
/* It times each kind of its work and says so in its log when it closes ("profile: adamw: 1.234 ms in 5 calls");
 * a communicator that launches on native streams itself does the same ("profile: comm_all_reduce: ..."). */
#define PHX_DEVICE_TIMED (1u << 1)

/* A function that runs in stream order on a host thread.  A failure is kept by the stream and returned by the next
 * synchronize or wait on it. */
typedef phx_status phx_stream_fn(void *arg, phx_error *err);

typedef struct phx_device {
  size_t struct_size;
  void *ctx;
  const char *name; /* "cpu (avx512, 1 thread)" [borrow:self] */
  uint32_t caps;    /* PHX_DEVICE_* */
  int32_t threads;  /* threads that compute operations on this rank; 0 where it makes no sense */

  phx_status (*stream_create)(void *ctx, const char *name, phx_stream **out, phx_error *err); /* [main] */
  void (*stream_destroy)(void *ctx, phx_stream *s);                                /* [main] waits for its work */
  phx_status (*stream_synchronize)(void *ctx, phx_stream *s, phx_error *err);      /* [main] */
  phx_status (*event_create)(void *ctx, phx_event **out, phx_error *err);          /* [main] */
  void (*event_destroy)(void *ctx, phx_event *e);                                  /* [main] no wait may be pending */
  phx_status (*event_record)(void *ctx, phx_event *e, phx_stream *s, phx_error *err); /* [main] re-recording is fine */
  /* [main] later work of s runs after the event's last record; an event never recorded is complete */
  phx_status (*stream_wait)(void *ctx, phx_stream *s, phx_event *e, phx_error *err);
  phx_status (*event_synchronize)(void *ctx, phx_event *e, phx_error *err); /* [main] the calling thread waits */
  int32_t (*event_done)(void *ctx, phx_event *e);                           /* [any] 1 done, 0 not yet */
  /* [main] fn(arg) in stream order; arg is borrowed until it ran */
  phx_status (*enqueue)(void *ctx, phx_stream *s, phx_stream_fn *fn, void *arg, phx_error *err);
  void *(*native_stream)(void *ctx, phx_stream *s); /* [any] cudaStream_t on cuda, NULL on cpu */

  /* Asynchronous on the stream; any slicing of the arrays gives the same bits.  [main] */
  phx_status (*copy)(void *ctx, void *dst, const void *src, int64_t bytes, phx_stream *s, phx_error *err);
  phx_status (*zero)(void *ctx, void *dst, int64_t bytes, phx_stream *s, phx_error *err);
  phx_status (*cast)(void *ctx, void *dst, int32_t dst_dtype, const void *src, int32_t src_dtype, int64_t numel,
                     phx_stream *s, phx_error *err); /* round to nearest even */
  phx_status (*add)(void *ctx, float *acc, const float *x, int64_t numel, phx_stream *s, phx_error *err); /* acc += x */
  phx_status (*scale)(void *ctx, float *x, float by, int64_t numel, phx_stream *s, phx_error *err);       /* x *= by */

  /* Optional, for devices without PHX_DEVICE_HOST_MEMORY.  [any] where p points: PHX_SPACE_*, pin() included */
  int32_t (*space)(void *ctx, const void *p);
  /* [main] ordinary host memory, page-aligned, becomes as PHX_SPACE_PINNED until unpin(p) */
  phx_status (*pin)(void *ctx, void *p, int64_t bytes, phx_error *err);
  void (*unpin)(void *ctx, void *p);
} phx_device;

#ifdef __cplusplus
}
#endif
#endif
