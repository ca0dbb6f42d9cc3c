/* far.h - a device as a GPU looks from the host, without one: what the files of the plugin share.
 *
 * Memory    A device pointer is the real address plus FAR_AWAY, which no process can map: the CPU crashes on it.  Only
 *           the device's own work takes FAR_AWAY off.  An allocation ends at an unmapped page, and is unmapped when
 * freed. Streams   All of them, the compute stream (NULL) too, are threads; `delay` makes each wait when it wakes up.
 * Checks    Free with work pending on the compute stream, leaks at destroy, foreign pointers, copies beyond an
 *           allocation or from memory that is not pinned: the first two end the process, since nothing could return
 *           them; the others are errors. */
#ifndef FAR_H
#define FAR_H
#include <phalanx/error.h>
#include <phalanx/provider.h>
#include <pthread.h>

#define FAR_AWAY ((uintptr_t)1 << 60)
enum { FAR_ALLOCATIONS = 4096 };

typedef struct far_config {
  int64_t delay; /* ms */
} far_config;

typedef struct far_block {
  char *map; /* what was mapped */
  size_t map_bytes;
  uintptr_t at; /* as the owner knows it */
  int64_t bytes;
  int32_t space, registered; /* registered: pinned later, memory of somebody else */
} far_block;

typedef struct far_entry {
  struct far_entry *next;
  phx_stream_fn *run;
  phx_event *event; /* RECORD or WAIT, by `record` */
  uint64_t number;
  int32_t record;
  int32_t reserved0;
  _Alignas(16) char arguments[];
} far_entry;

struct phx_stream {
  struct phx_device_self *far;
  pthread_t thread;
  pthread_cond_t change; /* something was put, or finished */
  far_entry *first, **last;
  uint64_t put, finished;
  int32_t stop;
  phx_status status; /* the first failure since the last synchronize */
  phx_error failure;
};

struct phx_event {
  uint64_t recorded, done;
  phx_status status; /* the stream's, when the last record was reached */
  phx_error failure;
};

struct phx_device_self {
  const phx_device_table *cpu;
  phx_device_self *cpu_self;
  const phx_device *inner;
  const phx_ops *inner_ops;
  far_config config;
  phx_device device;
  phx_ops ops;
  pthread_mutex_t lock; /* all streams, events and blocks */
  pthread_cond_t done;  /* an event was reached */
  pthread_mutex_t compute; /* the cpu's operations share one scratch */
  phx_stream *null;
  far_block blocks[FAR_ALLOCATIONS];
  size_t n_blocks;
  char name[128];
};

void far_die(const char *format, ...) __attribute__((format(printf, 1, 2), noreturn));

/* stream.c */
phx_status far_stream_new(phx_device_self *self, phx_stream **out, phx_error *err);
void far_stream_end(phx_stream *s); /* after its work */
void far_stream_calls(phx_device_self *self); /* fills self->device */
/* run(a copy of `arguments`) in stream order. */
phx_status far_submit(phx_device_self *self, phx_stream *s, phx_stream_fn *run, const void *arguments, size_t bytes,
                      phx_error *err);

/* memory.c */
phx_status far_alloc(phx_device_self *self, int32_t space, int64_t bytes, void **out, phx_error *err);
void far_free(phx_device_self *self, int32_t space, void *p, int64_t bytes);
void far_check_leaks(const phx_device_self *self);
phx_status far_pin(void *ctx, void *p, int64_t bytes, phx_error *err);
void far_unpin(void *ctx, void *p);
int32_t far_space(void *ctx, const void *p);
/* Is [p, p + bytes) inside one allocation of the device (or pinned)?  device: 1 must be, 0 must be pinned, -1 either.
 */
phx_status far_check(phx_device_self *self, const char *who, const void *p, int64_t bytes, int32_t device,
                     phx_error *err);
static inline void *far_near(const void *p) { return (void *)((uintptr_t)p & ~FAR_AWAY); }

void far_ops(phx_device_self *self); /* ops.c: fills self->ops */
#endif
