/* phalanx/base.h - words that every table shares: status, error, dtypes, memory kinds, opaque handles.
 *
 * C11 (and C++17); needs only <stddef.h> and <stdint.h>.  No CUDA, NCCL, MPI or libc-owned object crosses the ABI.
 *
 * Growth    A struct that is passed alone begins with struct_size, set by whoever owns its memory.  An array of structs
 *           travels with a stride.  Fields are only appended; a later field is read only under PHX_HAS; a missing
 *           field means zero.  No struct has tail padding (tests/unit/test_abi.c pins sizes and offsets).
 *           A struct that the caller owns and the callee fills in: the caller sets struct_size and zeroes the rest; the
 *           callee never changes struct_size and writes nothing behind it (phx_struct_give does both).
 *           An array inside a struct has a fixed length with room to grow (PHX_..._ROOM).  A field named reserved is 0.
 * Memory    Whoever allocates frees, through the function named beside the pointer.
 *           [borrow:call] valid until this call returns; [borrow:self] until destroy(); [static] as long as the
 *           process.  Strings are UTF-8 and never NULL unless the comment says "or NULL".
 * Threads   [main] only the thread that called create(); [any] any thread at any time;
 *           [collective] every rank of the communicator calls it, in the same order, or the job ends with a report.
 * Errors    An int32_t status, plus a message in a phx_error owned by the caller (it may be NULL).  Outputs are
 *           written only on PHX_OK.  <phalanx/error.h> has how to fill one in and how to pass it on. */
#ifndef PHALANX_BASE_H
#define PHALANX_BASE_H
#include <stddef.h>
#include <stdint.h>
#ifdef __cplusplus
extern "C" {
#endif

#define PHX_ABI_MAJOR 1 /* a break is a new entry symbol, phx_plugin_v2 */
#define PHX_ABI_MINOR 2 /* an append is +1 and one line in sdk/abi-changelog.md */
#define PHX_ABI_MINOR_OLDEST 2 /* plugins of earlier minors are refused: until 1.2 structs and calls still changed */
#if defined(__GNUC__)
#define PHX_EXPORT __attribute__((visibility("default")))
#else
#define PHX_EXPORT
#endif

/* True when *p, as filled by the other side, is long enough to hold `field`. */
#define PHX_HAS(p, type, field) ((p)->struct_size >= offsetof(type, field) + sizeof(((type *)0)->field))

/* The callee's side of a struct that the caller owns: copies what both know of *mine into *out, keeps the caller's
 * struct_size, and zeroes what only the caller knows.  Both begin with a size_t struct_size, which is set. */
static inline void phx_struct_give(void *out, const void *mine) {
  const size_t room = *(const size_t *)out, have = *(const size_t *)mine;
  unsigned char *to = (unsigned char *)out;
  const unsigned char *from = (const unsigned char *)mine;
  for (size_t i = sizeof(size_t); i < room; i++) to[i] = i < have ? from[i] : 0;
}
/* The reader's side of a struct that the other side owns: a copy of our size; what the other side does not know is
 * zero.  mine->struct_size is set to our size before. */
static inline void phx_struct_take(void *mine, const void *theirs) { phx_struct_give(mine, theirs); }

/* ---- status: the code is for programs and says who must act ---- */
typedef int32_t phx_status;
enum {
  PHX_OK = 0,
  PHX_INVALID = 1,     /* a value is wrong: fix the configuration or the argument */
  PHX_UNSUPPORTED = 2, /* a legal wish that this part cannot honour: choose another */
  PHX_NOMEM = 3,       /* memory ran out: make it smaller */
  PHX_COMM = 4,        /* a peer or the transport failed, or did not come in time */
  PHX_DEVICE = 5,      /* the device failed: see cause */
  PHX_IO = 6,          /* a file could not be read or written */
  PHX_STATE = 7,       /* calls came in the wrong order */
  PHX_INTERNAL = 8     /* a bug: report it */
};
typedef struct phx_error {
  size_t struct_size;
  phx_status code;
  int32_t cause;     /* the failing library's own number (errno, cudaError_t, ...) or 0 */
  char message[496]; /* what failed, with which value, where; what to do about it */
} phx_error;

/* ---- element types ---- */
enum {
  PHX_F32 = 1,
  PHX_F16 = 2,
  PHX_BF16 = 3,
  PHX_F64 = 4,
  PHX_I32 = 5,
  PHX_I64 = 6,
  PHX_U8 = 7,
  PHX_U16 = 8,
  PHX_U32 = 9,
  PHX_U64 = 10
};
/* Bytes of one element; 0 for a number that is no dtype. */
static inline size_t phx_dtype_bytes(int32_t dtype) {
  static const unsigned char bytes[11] = {0, 4, 2, 2, 8, 4, 8, 1, 2, 4, 8};
  return dtype >= 1 && dtype <= 10 ? bytes[dtype] : 0;
}

/* ---- where memory is, and what it is for ---- */
enum {
  PHX_SPACE_DEVICE = 0, /* where the device computes; on the cpu device this is ordinary memory */
  PHX_SPACE_HOST = 1,   /* ordinary host memory */
  PHX_SPACE_PINNED = 2  /* host memory that the device copies from and to asynchronously */
};
enum {
  PHX_MEM_WEIGHT = 0,    /* weights a rank keeps: whole (ddp) or its shard */
  PHX_MEM_MASTER = 1,    /* fp32 master copies of low-precision weights */
  PHX_MEM_GRADIENT = 2,  /* gradients, whole or sharded */
  PHX_MEM_OPTIMIZER = 3, /* optimizer states */
  PHX_MEM_GATHERED = 4,  /* windows that gathered weights (and gradients before they are reduced) pass through */
  PHX_MEM_BUFFER = 5,    /* staging and communication buffers */
  PHX_MEM_ACTIVATION = 6,
  PHX_MEM_WORKSPACE = 7, /* scratch of operations and libraries */
  PHX_MEM_KINDS = 8,
  PHX_MEM_KINDS_ROOM = 16 /* length of arrays by kind in structs; the rest is zero */
};
#define PHX_ALIGN 256 /* every allocation and every parameter in a flat begins at a multiple of this many bytes */
/* Bytes that an allocation of `bytes` is accounted as: rounded up to PHX_ALIGN. */
static inline int64_t phx_align_bytes(int64_t bytes) { return (bytes + PHX_ALIGN - 1) / PHX_ALIGN * PHX_ALIGN; }

/* ---- opaque handles ---- */
typedef struct phx_stream phx_stream; /* work in order; NULL is the compute stream */
typedef struct phx_event phx_event;   /* a point in a stream */

enum { PHX_LOG_ERROR = 0, PHX_LOG_WARN = 1, PHX_LOG_INFO = 2, PHX_LOG_DEBUG = 3 };

#ifdef __cplusplus
}
#endif
#endif
