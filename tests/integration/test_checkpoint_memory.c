/* The extra memory of a save, a load, an export and an import: buffers of a fixed size and tables, whatever the model's
 * size. */
#include <criterion/criterion.h>
#include <malloc.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include "rank_rig.h"
#include "checkpoint/stream.h"
#include "base/sys.h"
#include "sanitizer.h"
#include "training.h"

/* 5.4 million parameters: 65 MB of weights and optimizer states. */
static const char large[] =
    "[batch]\nmicro = 1\nsequence = 8\n[model]\nplugin = gpt\nlayers = 3\nheads = 4\nwidth = 384\ncontext = 8\n"
    "vocab = 257\n";
/* Tensors of 6.3 MB on each of two ranks, more than is read ahead. */
static const char wide[] =
    "[batch]\nmicro = 1\nsequence = 8\n[model]\nplugin = gpt\nlayers = 1\nheads = 4\nwidth = 512\ncontext = 8\n"
    "vocab = 257\n";
enum { EDGES = 2 << 20 }; /* the file's header and end, the manifest, and what of the first chunk is another's */
enum { STATE_BYTES = 60 << 20, TABLES = 1 << 20, STACKS_AND_HEAP = 3 << 20 };

static atomic_llong held, peak, bytes_read, in_place;
static ssize_t (*real_pread)(int fd, void *buffer, size_t bytes, off_t at);
static struct { /* the stream's */
  const char *at;
  size_t bytes;
} buffers;

static void count(void *p, int sign) {
  const long long now = atomic_fetch_add(&held, sign * (long long)malloc_usable_size(p)) +
                        sign * (long long)malloc_usable_size(p);
  long long before = atomic_load(&peak);
  while (now > before && !atomic_compare_exchange_weak(&peak, &before, now)) continue;
}
static void *my_calloc(size_t n, size_t bytes) {
  void *p = calloc(n, bytes);
  if (p) count(p, 1);
  if (p && n * bytes > PHX__STREAM_CHUNK) buffers.at = p, buffers.bytes = n * bytes;
  return p;
}
static void *my_realloc(void *p, size_t bytes) {
  if (p) count(p, -1);
  void *q = realloc(p, bytes);
  count(q ? q : p, 1);
  return q;
}
static void my_free(void *p) {
  if (p) count(p, -1);
  free(p);
}

static ssize_t my_pread(int fd, void *buffer, size_t bytes, off_t at) {
  const ssize_t n = real_pread(fd, buffer, bytes, at);
  if (n > 0) atomic_fetch_add(&bytes_read, n);
  if (n > 0 && ((const char *)buffer < buffers.at || (const char *)buffer >= buffers.at + buffers.bytes))
    atomic_fetch_add(&in_place, n);
  return n;
}

static long long status_bytes(const char *what) {
  char line[200];
  long long kib = -1;
  FILE *f = fopen("/proc/self/status", "r");
  while (f && fgets(line, sizeof line, f))
    if (!strncmp(line, what, strlen(what))) kib = atoll(line + strlen(what));
  if (f) fclose(f);
  return kib * 1024;
}

/* What `call` takes beyond what is there before it: of the core's own calls, and as the kernel counts. */
static void check(rank_rig *rig, const char *what, phx_status (*call)(rank_rig *, phx_error *)) {
  phx_error err = {.struct_size = sizeof err};
  const phx__sys_table saved = phx__sys;
  FILE *f = fopen("/proc/self/clear_refs", "w"); /* the peak starts again from here */
  RIG_CHECK(rig, f && fputs("5", f) >= 0 && !fclose(f), "clear_refs");
  const long long before = status_bytes("VmRSS:");
  phx__sys.calloc = my_calloc, phx__sys.realloc = my_realloc, phx__sys.free = my_free;
  real_pread = saved.pread, phx__sys.pread = my_pread;
  atomic_store(&bytes_read, 0);
  atomic_store(&in_place, 0);
  atomic_store(&held, 0);
  atomic_store(&peak, 0);
  const phx_status status = call(rig, &err);
  phx__sys = saved;
  const long long grown = status_bytes("VmHWM:") - before;
  RIG_CHECK(rig, status == PHX_OK, "%s: %s", what, err.message);
  RIG_CHECK(rig, peak <= PHX__STREAM_MEMORY + TABLES, "%s: %lld bytes at the peak", what, (long long)peak);
  RIG_CHECK(rig, peak > PHX__STREAM_MEMORY / 2, "%s: only %lld bytes were counted", what, (long long)peak);
  if (SANITIZED) return; /* the sanitizer's own memory is in it */
  RIG_CHECK(rig, grown <= PHX__STREAM_MEMORY + TABLES + STACKS_AND_HEAP, "%s: the process grew by %lld bytes", what,
            grown);
}

static phx_status save(rank_rig *rig, phx_error *err) { return rank_rig_save(rig, 0, err); }
static phx_status load(rank_rig *rig, phx_error *err) {
  phx__resumed at;
  return phx__checkpoint_resume(rig->rt, "out", &at, err);
}

static void save_body(rank_rig *rig, void *arg) {
  const char *strategy = arg;
  phx_error err = {.struct_size = sizeof err};
  RIG_CHECK(rig, rank_rig_open(rig, strategy, "out", &err) == PHX_OK, "%s", err.message);
  check(rig, "save", save);
  rank_rig_close(rig);
}

static phx_status add_slice(void *ctx, const phx_slice *slice, phx_error *err) {
  (void)err;
  *(long long *)ctx += slice->blocks * PHX_BLOCK * (long long)phx_dtype_bytes(slice->dtype);
  return PHX_OK;
}

/* No more is read than this rank's state, an edge and a part of it; and at least an eighth of it to its place. */
static void load_checked(rank_rig *rig, const char *strategy, double part) {
  long long mine = 0;
  phx_error err = {.struct_size = sizeof err};
  const phx_visitor visitor = {.struct_size = sizeof visitor, .ctx = &mine, .slice = add_slice};
  RIG_CHECK(rig, rank_rig_open(rig, strategy, "out2", &err) == PHX_OK, "%s", err.message);
  RIG_CHECK(rig, !rig->rt->prepared->strategy->visit_state(rig->rt->strategy, &visitor, &err), "%s", err.message);
  check(rig, "load", load);
  RIG_CHECK(rig, bytes_read >= mine && (double)bytes_read <= (1 + part) * (double)mine + EDGES,
            "%lld bytes are this rank's, %lld read", mine, (long long)bytes_read);
  RIG_CHECK(rig, in_place > mine / 8, "of %lld bytes only %lld were read to their place", mine,
            (long long)in_place);
  rank_rig_close(rig);
}

/* Of another layout: ranges of 3.5 MB that begin and end inside chunks, and whole chunks are read to be verified. */
static void load_body(rank_rig *rig, void *arg) { load_checked(rig, arg, 0.4); }
/* As it was saved: its own file, and hardly anything more. */
static void load_equal(rank_rig *rig, void *arg) { load_checked(rig, arg, 0); }

static void run_ranks(const char *dir, int size, const char *strategy, void (*body)(rank_rig *, void *)) {
  rank_rig_run run = {.size = size, .dir = dir, .strategy = strategy, .limit_s = 100, .body = body,
                      .arg = (void *)(uintptr_t)strategy};
  cr_assert(rank_rig_ranks(&run), "%s, %d ranks: %s", strategy, size, run.message);
}

/* A folder (on a disk: direct I/O, where there is any) with a checkpoint of the model in out. */
static char *saved(const char *model, int ranks, const char *strategy) {
  char *dir = command_temp_dir(), path[512];
  training_files(dir, model);
  snprintf(path, sizeof path, "%s/out", dir);
  cr_assert_eq(mkdir(path, 0755), 0);
  run_ranks(dir, ranks, strategy, save_body);
  return dir;
}

static void across(const char *from, int from_ranks, const char *to, int to_ranks) {
  char *dir = saved(large, from_ranks, from), path[512];
  struct stat st;
  long long bytes = 0;
  for (int r = 0; r < from_ranks; r++) {
    snprintf(path, sizeof path, "%s/out/checkpoints/step-00000000/rank-%05d.safetensors", dir, r);
    cr_assert_eq(stat(path, &st), 0);
    cr_assert_gt(st.st_size, 2 * (PHX__STREAM_MEMORY + TABLES), "a rank's part is too small to show anything");
    bytes += st.st_size;
  }
  cr_assert_gt(bytes, STATE_BYTES);
  run_ranks(dir, to_ranks, to, load_body);
  command_remove_dir(dir);
}

Test(checkpoint_memory, of_fsdp_as_it_was_saved, .timeout = 240) {
  char *dir = saved(wide, 2, "fsdp");
  run_ranks(dir, 2, "fsdp", load_equal);
  command_remove_dir(dir);
}

/* ---- the tools ---- */
/* Peak memory of a command, in bytes. */
static long long command_peak(const char *dir, const char *const *argv) {
  struct rusage used;
  int status = 0;
  const pid_t pid = fork();
  if (pid == 0) {
    if (chdir(dir) || !freopen("said", "we", stdout) || dup2(STDOUT_FILENO, STDERR_FILENO) < 0) _exit(126);
    execv(PHX_TEST_COMMAND, (char *const *)(uintptr_t)argv);
    _exit(127);
  }
  cr_assert_eq(wait4(pid, &status, 0, &used), pid);
  char *said = command_read_file(dir, "said");
  cr_assert_eq(status, 0, "%s %s: wait status %x: %s", argv[1], argv[2], (unsigned)status, said);
  free(said);
  return 1024LL * used.ru_maxrss;
}
#define PEAK(dir, ...) command_peak(dir, (const char *const[]){"phalanx", "checkpoint", __VA_ARGS__, NULL})

/* Buffers to read and to write, the largest matrix (2.4 MB) twice, and the plugins' code; the weights are 21 MB. */
enum { TOOLS = 16 << 20 };
Test(checkpoint_memory, of_export_and_import, .timeout = 240) {
  char *dir = saved(large, 2, "fsdp"), path[512];
  const long long none = PEAK(dir, "ls", "out");
  const long long exported = PEAK(dir, "export", "out", "published") - none;
  const long long imported = PEAK(dir, "import", "published", "-o", "again") - none;
  struct stat st;
  snprintf(path, sizeof path, "%s/published/model.safetensors", dir);
  cr_assert(!stat(path, &st) && st.st_size > TOOLS + (4 << 20), "the weights are too small to show anything");
  cr_expect_leq(exported, TOOLS, "export: %lld bytes more than ls", exported);
  cr_expect_leq(imported, TOOLS, "import: %lld bytes more than ls", imported);
  command_remove_dir(dir);
}

Test(checkpoint_memory, of_fsdp_on_2_ranks_loaded_by_zero_on_3, .timeout = 240) { across("fsdp", 2, "zero", 3); }
Test(checkpoint_memory, of_zero_on_3_ranks_loaded_by_ddp_on_2, .timeout = 240) { across("zero", 3, "ddp", 2); }
