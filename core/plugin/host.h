/* core/plugin/host.h - what plugins call: log, accounted memory, extensions, metrics.
 *
 * One phx__host per plugin of the run; they share one phx__memory_book, which is the memory table.  [main] except log.
 */
#ifndef PHX__HOST_H
#define PHX__HOST_H
#include <phalanx/provider.h>
#include <stdbool.h>

typedef struct phx__allocation {
  void *p;
  int64_t bytes; /* aligned, as accounted */
  int32_t kind, space;
  bool arena;
  const struct phx__host *owner;
} phx__allocation;

typedef struct phx__memory_book {
  int64_t now[PHX_MEM_KINDS], peak[PHX_MEM_KINDS];
  int64_t now_all, peak_all;
  int64_t now_in[3], peak_in[3]; /* by PHX_SPACE_* */
  int64_t calls; /* of alloc, ever: a steady step makes none */
  phx__allocation *list;
  size_t n, room;
  char *arena; /* the communicator's memory; carved in order, given back when it is the last; NULL: it has none, and
                  the device gives what is asked for with a communicator */
  int64_t arena_bytes, arena_used;
  const phx_device_table *device_table;
  phx_device_self *device_self;
  const phx_device *device; /* NULL: it is not open yet, and what is allocated is the CPU's memory */
} phx__memory_book;
/* Bytes that a provider holds for itself (a communicator's staging, a device's scratch): in the table, not in the list.
 */
void phx__memory_book_hold(phx__memory_book *book, int32_t kind, int32_t space, int64_t bytes);
void phx__memory_book_clear(phx__memory_book *book); /* frees what is left */

typedef void phx__metric_fn(void *arg, const char *plugin, const char *name, double value);
typedef struct phx__host {
  phx_host table; /* what the plugin gets */
  const char *plugin;
  phx__memory_book *book;
  const phx_job *job;
  const phx_device *device;
  const phx_ops *ops;
  phx_comm *comm;
  const phx_optim *optim;
  phx__metric_fn *metric; /* or NULL */
  void *metric_arg;
} phx__host;
/* Fills h->table; the other members may be set before or later. */
void phx__host_init(phx__host *h, const char *plugin, const phx_job *job, phx__memory_book *book);
/* Bytes the plugin still holds; when there are any, text says how many of which kinds. */
int64_t phx__host_held(const phx__host *h, char *text, size_t bytes);

const char *phx__memory_name(int32_t kind); /* "weights", "gradients", ... */
/* One line on stderr, unless it is below the level of PHALANX_LOG=error|warn|info|debug (default: info on rank 0, warn
 * on the others). */
void phx__log(int32_t rank, const char *who, int32_t level, const char *message);
#endif
