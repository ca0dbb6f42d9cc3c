/* The host that plugins see: memory by kind and peak, the arena's carving and its return in any order of release, what
 * is left named, refusals, and release of what was never given. */
#include <criterion/criterion.h>
#include <stdlib.h>
#include <string.h>

#include "plugin/host.h"
#include "base/status.h"
#include "base/sys.h"

static int64_t held_by_device;
static int refuse_next;

static phx_status device_alloc(phx_device_self *self, int32_t space, int64_t bytes, void **out, phx_error *err) {
  (void)self, (void)space;
  if (refuse_next) return phx_fail(err, PHX_NOMEM, "the device is full");
  *out = aligned_alloc(PHX_ALIGN, (size_t)bytes);
  held_by_device += bytes;
  return *out ? PHX_OK : PHX_NOMEM;
}
static void device_free(phx_device_self *self, int32_t space, void *p, int64_t bytes) {
  (void)self, (void)space;
  held_by_device -= bytes;
  free(p);
}

static const phx_device_table device = {.struct_size = sizeof device, .alloc = device_alloc, .free = device_free};
static const phx_job job = {.struct_size = sizeof job, .rank = 3, .size = 5, .local_rank = 3, .local_size = 5};
static phx__memory_book book;
static phx__host one, two;
static phx_comm comm;
static _Alignas(PHX_ALIGN) char arena[16 * PHX_ALIGN];

static void setup(void) {
  memset(&book, 0, sizeof book);
  held_by_device = refuse_next = 0;
  book.device_table = &device;
  book.arena = arena;
  book.arena_bytes = sizeof arena;
  phx__host_init(&one, "one", &job, &book);
  phx__host_init(&two, "two", &job, &book);
}
static void teardown(void) {
  phx__memory_book_clear(&book);
  cr_expect_eq(held_by_device, 0);
}
TestSuite(host, .init = setup, .fini = teardown, .timeout = 20);

static void *take(phx__host *h, int64_t bytes, int32_t kind, phx_comm *from) {
  const phx_memory what = {
      .struct_size = sizeof what, .bytes = bytes, .kind = kind, .space = PHX_SPACE_DEVICE, .comm = from};
  void *p = NULL;
  phx_error err = PHX_ERROR_INIT;
  cr_assert_eq(h->table.alloc(h->table.ctx, &what, &p, &err), PHX_OK, "%s", err.message);
  return p;
}
static void give(phx__host *h, void *p) { h->table.release(h->table.ctx, p); }

static phx_error refused(int64_t bytes, int32_t kind, phx_comm *from, phx_status expected) {
  const phx_memory what = {
      .struct_size = sizeof what, .bytes = bytes, .kind = kind, .space = PHX_SPACE_DEVICE, .comm = from};
  void *p = arena;
  phx_error err = PHX_ERROR_INIT;
  const phx__memory_book before = book;
  cr_assert_eq(one.table.alloc(one.table.ctx, &what, &p, &err), expected, "%s", err.message);
  cr_assert_eq(p, arena, "an output was written by a refused call");
  cr_assert(book.now_all == before.now_all && book.n == before.n && book.arena_used == before.arena_used);
  return err;
}

Test(host, identity_comes_from_the_job) {
  cr_assert(one.table.rank == 3 && one.table.world_size == 5 && one.table.abi_major == PHX_ABI_MAJOR);
  cr_assert_eq(one.table.extension(one.table.ctx, PHX_EXT_JOB), &job);
  cr_assert_null(one.table.extension(one.table.ctx, "phx.unheard-of/1"));
}

Test(host, accounts_by_kind_and_keeps_the_peak) {
  void *w = take(&one, 1, PHX_MEM_WEIGHT, NULL), *g = take(&one, 1000, PHX_MEM_GRADIENT, NULL);
  cr_assert_eq((uintptr_t)w % PHX_ALIGN, 0);
  cr_assert(book.now[PHX_MEM_WEIGHT] == 256 && book.now[PHX_MEM_GRADIENT] == 1024 && book.now_all == 1280);
  cr_assert_eq(held_by_device, book.now_all);
  give(&one, w);
  void *o = take(&two, 300, PHX_MEM_OPTIMIZER, NULL);
  cr_assert(book.now[PHX_MEM_WEIGHT] == 0 && book.peak[PHX_MEM_WEIGHT] == 256);
  cr_assert(book.now_all == 1536 && book.peak_all == 1536 && book.calls == 3);
  give(&one, g);
  give(&two, o);
  give(&two, NULL);
  cr_assert(book.now_all == 0 && book.n == 0 && book.peak_all == 1536);
}

Test(host, arena_is_carved_in_order_zeroed_and_returned_in_any_order) {
  memset(arena, 7, sizeof arena);
  char *a = take(&one, 300, PHX_MEM_WEIGHT, &comm), *b = take(&one, 256, PHX_MEM_GRADIENT, &comm);
  char *c = take(&two, 1, PHX_MEM_GATHERED, &comm);
  cr_assert(a == arena && b == arena + 512 && c == arena + 768 && book.arena_used == 1024);
  for (size_t i = 0; i < 1024; i++) cr_assert_eq(arena[i], 0);
  cr_assert_eq(arena[1024], 7);
  give(&one, b); /* a hole: the top is still held */
  cr_assert_eq(book.arena_used, 1024);
  give(&two, c); /* both go back */
  cr_assert_eq(book.arena_used, 512);
  cr_assert_eq(take(&one, 256, PHX_MEM_GRADIENT, &comm), arena + 512);
  give(&one, a);
  cr_assert_eq(book.arena_used, 768);
  cr_assert_eq(held_by_device, 0, "arena memory came from the device");
}

Test(host, refusals_change_nothing) {
  phx_error err = refused(sizeof arena + 1, PHX_MEM_WEIGHT, &comm, PHX_NOMEM);
  cr_assert(strstr(err.message, "one asked for 4352 bytes of shared memory (weights), but its estimate left 4096"),
            "%s", err.message);
  refused(0, PHX_MEM_WEIGHT, NULL, PHX_INVALID);
  refused(-1, PHX_MEM_WEIGHT, NULL, PHX_INVALID);
  refused(INT64_MAX, PHX_MEM_WEIGHT, NULL, PHX_INVALID);
  refused(INT64_MAX, PHX_MEM_WEIGHT, &comm, PHX_INVALID);
  refused(1, PHX_MEM_KINDS, NULL, PHX_INVALID);
  refused(1, -1, NULL, PHX_INVALID);
  refuse_next = 1;
  err = refused(1, PHX_MEM_WEIGHT, NULL, PHX_NOMEM);
  cr_assert_str_eq(err.message, "the device is full");
}

static void *no_realloc(void *p, size_t bytes) {
  (void)p, (void)bytes;
  return NULL;
}

Test(host, no_memory_for_the_book_is_an_error) {
  void *(*real)(void *, size_t) = phx__sys.realloc;
  phx__sys.realloc = no_realloc;
  refused(1, PHX_MEM_WEIGHT, NULL, PHX_NOMEM);
  phx__sys.realloc = real;
}

Test(host, many_blocks_are_all_found_again) {
  enum { N = 200 };
  void *p[N];
  for (int i = 0; i < N; i++) p[i] = take(i % 3 ? &one : &two, 1 + i, i % PHX_MEM_KINDS, NULL);
  for (int i = 0; i < N; i++) give(i % 3 ? &one : &two, p[i * 77 % N]); /* 77 and 200 share no factor */
  cr_assert(book.n == 0 && book.now_all == 0 && held_by_device == 0);
  for (int k = 0; k < PHX_MEM_KINDS; k++) cr_assert_eq(book.now[k], 0);
}

Test(host, what_is_left_is_named_and_freed_by_the_book) {
  char text[128];
  take(&one, 300, PHX_MEM_WEIGHT, NULL);
  take(&one, 300, PHX_MEM_GATHERED, &comm);
  take(&one, 1, PHX_MEM_GATHERED, &comm);
  cr_assert_eq(phx__host_held(&two, text, sizeof text), 0);
  cr_assert_eq(phx__host_held(&one, text, sizeof text), 512 + 768);
  cr_assert_str_eq(text, "destroy() left allocated: 512 bytes of weights 768 bytes of gathered");
  char tiny[8];
  cr_assert_eq(phx__host_held(&one, tiny, sizeof tiny), 1280);
  phx__memory_book_clear(&book);
  cr_assert(book.now_all == 0 && book.arena_used == 0 && held_by_device == 0);
}

Test(host, release_of_a_stranger_changes_nothing) {
  void *p = take(&one, 300, PHX_MEM_WEIGHT, NULL);
  give(&one, (char *)p + 1);
  give(&one, arena);
  cr_assert(book.n == 1 && book.now_all == 512);
}

static double seen;
static void keep(void *arg, const char *plugin, const char *name, double value) {
  cr_assert_eq(arg, &seen);
  cr_assert(!strcmp(plugin, "one") && !strcmp(name, "waited"));
  seen = value;
}

Test(host, metrics_go_to_whoever_listens) {
  one.table.metric(one.table.ctx, "waited", 1); /* nobody: fine */
  one.metric = keep;
  one.metric_arg = &seen;
  one.table.metric(one.table.ctx, "waited", 2.5);
  cr_assert_eq(seen, 2.5);
}
