/* One rank of several meets a failure while all save, or load: every system call and every allocation fails once, in
 * turn.  All ranks get the same status and a clear message, or none does; nothing is lost, nothing half stays after the
 * next save, no file stays open, no memory is leaked, nobody hangs, and a failed fsync is never repeated.
 *
 * Save and load map no file: the state is written and read with pwrite and pread (the calls of mmap are counted, and
 * there are none).  Damaged checkpoints are loaded by several ranks: the one before is taken, and said to be.
 * test_creation_faults.c makes the creation of ranks run out of memory; test_checkpoint_faults.c and
 * test_alloc_faults.c do the like to whole runs of one rank, test_manifest.c and test_checkpoint_tools.c flip every bit
 * of manifests and headers. */
#include <criterion/criterion.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "fault_turn.h"
#include "checkpoint/manifest.h"
#include "rank_rig.h"
#include "sanitizer.h"
#include "base/status.h"
#include "training.h"

typedef struct fault_case {
  fault_kind kind;
  int error;
  const char *text; /* what an error says */
} fault_case;
static const fault_case saving[] = {{FAULT_WRITING, ENOSPC, "No space left"},
                                    {FAULT_WRITING, EIO, "Input/output error"},
                                    {FAULT_WRITING, EINTR, "Interrupted"},
                                    {FAULT_SHORT, 0, "no error is allowed"},
                                    {FAULT_MEMORY, 0, "memory"}};
static const fault_case loading[] = {{FAULT_READING, EIO, "Input/output error"},
                                     {FAULT_READING, EINTR, "Interrupted"},
                                     {FAULT_SHORT, 0, "no error is allowed"},
                                     {FAULT_MEMORY, 0, "memory"}};

typedef struct seen { /* by a test */
  long fired, failed, passed_over;
} seen;

typedef struct newest {
  int64_t step;
  char hash[33];
} newest;

static int count(const char *part) {
  int n = 0;
  DIR *d = opendir("out/checkpoints");
  for (struct dirent *e; d && (e = readdir(d));) n += strstr(e->d_name, part) != NULL;
  if (d) closedir(d);
  return n;
}

static void expect_newest(rank_rig *rig, const newest *want, const char *when) {
  phx_error err = PHX_ERROR_INIT;
  phx__resumed resumed;
  char hash[33];
  RIG_CHECK(rig, !phx__checkpoint_resume(rig->rt, "out", &resumed, &err), "%s: %s", when, err.message);
  RIG_CHECK(rig, resumed.at.step == want->step, "%s: step %lld, not %lld", when, (long long)resumed.at.step,
            (long long)want->step);
  RIG_CHECK(rig, !rank_rig_hash(rig, hash, &err), "%s", err.message);
  RIG_CHECK(rig, !strcmp(hash, want->hash), "%s: hash %s, not %s", when, hash, want->hash);
  rig->step = resumed.at.step;
}

/* Trains a step and saves it, with a failure if there is one; *now is the newest checkpoint on success. */
static void step_and_save(rank_rig *rig, int64_t keep, const fault_case *f, long turn, newest *now, phx_status *status,
                          phx_error *err) {
  newest next = {.step = rig->step + 1};
  RIG_CHECK(rig, !rank_rig_step(rig, err), "%s", err->message);
  RIG_CHECK(rig, !rank_rig_hash(rig, next.hash, err), "%s", err->message);
  if (f) fault_begin(f->kind, f->error, turn);
  *status = rank_rig_save(rig, keep, err);
  if (f) fault_end();
  if (!*status) *now = next;
}

/* Every rank was told the same. */
static void check_told(rank_rig *rig, const fault_case *f, phx_status status, const phx_error *err, const char *when) {
  RIG_CHECK(rig, rank_rig_most(rig, status) == status && rank_rig_most(rig, -(int64_t)status) == -(int64_t)status,
            "%s: status %d here, and another elsewhere", when, status);
  if (status) RIG_CHECK(rig, strstr(err->message, f->text), "%s: no clear error: %s", when, err->message);
}

static void save_once(rank_rig *rig, int32_t target, const fault_case *f, long turn, newest *now, seen *s,
                      bool *fired) {
  char when[160];
  phx_error err = PHX_ERROR_INIT;
  phx_status status = PHX_OK;
  const int files = rank_rig_open_files();
  snprintf(when, sizeof when, "saving, rank %d, kind %d, errno %d, call %ld", target, f->kind, f->error, turn);
  step_and_save(rig, 1, f, rig->rank == target ? turn : 0, now, &status, &err);
  if (rig->report[0]) return;
  *fired = rank_rig_most(rig, fault.fired) > 0;
  snprintf(when + strlen(when), sizeof when - strlen(when), " (%s)", fault.call);
  RIG_CHECK(rig, fault.maps == 0, "%s: a save maps files: fail these calls, too", when);
  RIG_CHECK(rig, fault.retried == 0, "%s: a failed fsync was repeated", when);
  check_told(rig, f, status, &err, when);
  s->failed += status != PHX_OK;
  if (!rig->report[0]) expect_newest(rig, now, when);
  if (rig->report[0] || !*fired) return;
  s->fired++;
  step_and_save(rig, 1, NULL, 0, now, &status, &err);
  RIG_CHECK(rig, status == PHX_OK, "the save after %s: %s", when, err.message);
  RIG_CHECK(rig, fault.retried == 0 || fault.kind != FAULT_WRITING, "%s: a failed fsync was repeated later", when);
  if (rig->rank == 0) RIG_CHECK(rig, count(".part") == 0 && count("step-") == 1, "%s: something is left", when);
  RIG_CHECK(rig, rank_rig_open_files() == files, "%s: %d files were open, and now %d", when, files,
            rank_rig_open_files());
}

static void fail_saves(rank_rig *rig, void *arg) {
  const long *stride = arg;
  seen s = {0};
  newest now = {0};
  phx_status status;
  phx_error err = PHX_ERROR_INIT;
  fault_install();
  if (rig->rank == 0) RIG_CHECK(rig, !system("mkdir out"), "no directory");
  rank_rig_most(rig, 0);
  step_and_save(rig, 1, NULL, 0, &now, &status, &err);
  RIG_CHECK(rig, !rig->report[0] && !status, "the first save: %s", err.message);
  for (int32_t target = 0; target < rig->size; target++)
    for (size_t k = 0; k < sizeof saving / sizeof *saving; k++) {
      bool fired = true;
      long turn = 1;
      const long failed = s.failed;
      for (; fired; turn += *stride) {
        save_once(rig, target, &saving[k], turn, &now, &s, &fired);
        if (rig->report[0]) return;
      }
      RIG_CHECK(rig, turn > (target == 0 ? 4 : 2), "kind %d on rank %d: only %ld calls were seen", saving[k].kind,
                target, turn);
      RIG_CHECK(rig, (s.failed > failed) == (saving[k].kind != FAULT_SHORT), "kind %d: %ld saves failed",
                saving[k].kind, s.failed - failed);
    }
  if (rig->rank == 0)
    fprintf(stdout, "%d ranks: %ld failures, %ld saves failed by them\n", rig->size, s.fired, s.failed);
  fflush(stdout);
}

static long log_bytes(void) {
  struct stat st;
  fflush(stderr);
  return stat("errors.0", &st) ? 0 : (long)st.st_size;
}

static bool said_since(long at, const char *text) {
  char said[8192];
  const int fd = open("errors.0", O_RDONLY | O_CLOEXEC);
  const ssize_t n = fd >= 0 ? pread(fd, said, sizeof said - 1, at) : 0;
  if (fd >= 0) close(fd);
  said[n > 0 ? n : 0] = 0;
  return strstr(said, text) != NULL;
}

/* ---- loading: the newest of two, or, where it cannot be read, the one before, with a line that says so ---- */
static void load_once(rank_rig *rig, int32_t target, const fault_case *f, long turn, const newest both[2], seen *s,
                      bool *fired) {
  char when[160], hash[33];
  phx_error err = PHX_ERROR_INIT;
  phx__resumed resumed = {0};
  const int files = rank_rig_open_files();
  const long said = log_bytes();
  rank_rig_most(rig, 0);
  fault_begin(f->kind, f->error, rig->rank == target ? turn : 0);
  const phx_status status = phx__checkpoint_resume(rig->rt, "out", &resumed, &err);
  fault_end();
  *fired = rank_rig_most(rig, fault.fired) > 0;
  snprintf(when, sizeof when, "loading, rank %d, kind %d, errno %d, call %ld (%s)", target, f->kind, f->error, turn,
           fault.call);
  RIG_CHECK(rig, fault.maps == 0, "%s: a load maps files: fail these calls, too", when);
  check_told(rig, f, status, &err, when);
  if (rig->report[0]) return;
  s->fired += *fired;
  s->failed += status != PHX_OK;
  if (!status) {
    const bool newer = resumed.at.step == both[1].step;
    RIG_CHECK(rig, newer || resumed.at.step == both[0].step, "%s: step %lld", when, (long long)resumed.at.step);
    RIG_CHECK(rig, !rank_rig_hash(rig, hash, &err) && !strcmp(hash, both[newer].hash), "%s: hash %s", when, hash);
    s->passed_over += !newer;
    if (!newer && rig->rank == 0) RIG_CHECK(rig, said_since(said, "cannot be used"), "%s: nothing was said", when);
    if (!newer) RIG_CHECK(rig, f->kind == FAULT_READING, "%s: passed over without need", when);
  }
  expect_newest(rig, &both[1], when);
  if (rig->report[0]) return;
  RIG_CHECK(rig, rank_rig_open_files() == files, "%s: %d files were open, and now %d", when, files,
            rank_rig_open_files());
}

static void fail_loads(rank_rig *rig, void *arg) {
  const long *stride = arg;
  seen s = {0};
  newest both[2] = {{0}};
  phx_status status = PHX_OK;
  phx_error err = PHX_ERROR_INIT;
  fault_install();
  if (rig->rank == 0) RIG_CHECK(rig, !system("mkdir out"), "no directory");
  rank_rig_most(rig, 0);
  for (int k = 0; k < 2; k++) {
    step_and_save(rig, 2, NULL, 0, &both[k], &status, &err);
    RIG_CHECK(rig, !rig->report[0] && !status, "a save: %s", err.message);
  }
  for (int32_t target = 0; target < rig->size; target++)
    for (size_t k = 0; k < sizeof loading / sizeof *loading; k++) {
      bool fired = true;
      for (long turn = 1; fired; turn += *stride) {
        load_once(rig, target, &loading[k], turn, both, &s, &fired);
        if (rig->report[0]) return;
      }
    }
  RIG_CHECK(rig, s.fired > 20 / *stride && s.passed_over > 5 / *stride && s.failed > 5 / *stride,
            "%ld failures, %ld passed over, %ld failed", s.fired, s.passed_over, s.failed);
  if (rig->rank == 0)
    fprintf(stdout, "%d ranks: %ld failures, %ld checkpoints passed over, %ld loads failed by them\n", rig->size,
            s.fired, s.passed_over, s.failed);
  fflush(stdout);
}

/* ---- damage ---- */
typedef struct damage { /* of the newest checkpoint: rank 0 does it, all load */
  rank_rig *rig;
  newest both[2];
  char dir[2][80];
  long done;
  bool large;
} damage;
enum { LARGE = 3 * PHX__CHUNK_BYTES }; /* a file: damaged in a few chosen places */

static void expect_fallback(damage *d, const char *file, const char *what) {
  rank_rig *rig = d->rig;
  const long said = log_bytes();
  rank_rig_most(rig, 0); /* it is done */
  expect_newest(rig, &d->both[0], what);
  if (rig->report[0]) return;
  rank_rig_most(rig, 0); /* it is seen */
  if (rig->rank == 0)
    RIG_CHECK(rig, said_since(said, "cannot be used") && said_since(said, file), "%s: %s is not named", what, file);
  d->done++;
}

static void flip(damage *d, FILE *f, const char *name, const char *bytes, size_t bit) {
  char what[200];
  const char flipped = (char)(bytes[bit / 8] ^ 1 << bit % 8);
  if (d->rig->rank == 0) RIG_CHECK(d->rig, pwrite(fileno(f), &flipped, 1, (off_t)(bit / 8)) == 1, "%s", name);
  snprintf(what, sizeof what, "bit %zu of %s", bit, name);
  expect_fallback(d, name, what);
  if (d->rig->rank == 0) RIG_CHECK(d->rig, pwrite(fileno(f), &bytes[bit / 8], 1, (off_t)(bit / 8)) == 1, "%s", name);
}

static void flip_bits(damage *d, FILE *f, const char *name, const char *bytes, size_t n) {
  uint64_t x = 99;
  for (int i = 0; n < LARGE && i < 200 && !d->rig->report[0]; i++) {
    x = x * 6364136223846793005u + 1442695040888963407u;
    flip(d, f, name, bytes, (size_t)(x >> 16) % (8 * (i % 4 ? n : n < 2000 ? n : 2000))); /* some in the header */
  }
  const size_t at[] = {n / 2, (n - 1) / PHX__CHUNK_BYTES * PHX__CHUNK_BYTES, n - 1};
  for (int i = 0; n >= LARGE && i < 3 && !d->rig->report[0]; i++) flip(d, f, name, bytes, 8 * at[i] + 5);
}

/* Flips bits and cuts one file. */
static void damage_file(damage *d, const char *name) {
  char path[160], what[200], *bytes = NULL;
  size_t n = 0;
  snprintf(path, sizeof path, "%s/%s", d->dir[1], name);
  FILE *f = fopen(path, "r+b");
  if (f && !fseek(f, 0, SEEK_END)) n = (size_t)ftell(f);
  if (f) rewind(f);
  bytes = malloc(n + 1);
  RIG_CHECK(d->rig, f && n && bytes && fread(bytes, 1, n, f) == n, "%s", path);
  if (strstr(name, "rank-")) RIG_CHECK(d->rig, !d->large || n >= LARGE, "%s has only %zu bytes", path, n);
  flip_bits(d, f, name, bytes, n);
  const size_t step = n < LARGE ? 512 : n / 2 / 512 * 512;
  for (size_t cut = (n - 1) / 512 * 512; !d->rig->report[0] && !(d->large && n < LARGE); cut -= step) {
    if (d->rig->rank == 0) RIG_CHECK(d->rig, !ftruncate(fileno(f), (off_t)cut), "%s", path);
    snprintf(what, sizeof what, "%s cut at %zu", name, cut);
    expect_fallback(d, name, what);
    if (cut < step) break;
  }
  if (d->rig->rank == 0 && !d->rig->report[0])
    RIG_CHECK(d->rig, pwrite(fileno(f), bytes, n, 0) == (ssize_t)n && !ftruncate(fileno(f), (off_t)n), "%s", path);
  fclose(f);
  free(bytes);
}

static void move(damage *d, const char *from, const char *to) {
  if (d->rig->rank == 0 && !d->rig->report[0]) RIG_CHECK(d->rig, !rename(from, to), "%s to %s", from, to);
}

/* One file is gone, another's, or another step's. */
static void exchange_files(damage *d) {
  char first[160], second[160], before[160];
  const char *name = "rank-00000.safetensors";
  snprintf(first, sizeof first, "%s/%s", d->dir[1], name);
  snprintf(second, sizeof second, "%s/rank-00001.safetensors", d->dir[1]);
  snprintf(before, sizeof before, "%s/%s", d->dir[0], name);
  move(d, first, "kept");
  expect_fallback(d, name, "deleted");
  move(d, second, first);
  move(d, "kept", second);
  expect_fallback(d, name, "exchanged");
  move(d, second, "kept");
  move(d, first, second);
  if (d->rig->rank == 0) RIG_CHECK(d->rig, !link(before, first), "%s", before);
  expect_fallback(d, name, "of another step");
  move(d, "kept", first);
}

static void load_damaged(rank_rig *rig, void *arg) {
  damage d = {.rig = rig, .large = *(const long *)arg > 1};
  phx_status status = PHX_OK;
  phx_error err = PHX_ERROR_INIT;
  if (rig->rank == 0) RIG_CHECK(rig, !system("mkdir out"), "no directory");
  rank_rig_most(rig, 0);
  for (int k = 0; k < 2; k++) {
    step_and_save(rig, 2, NULL, 0, &d.both[k], &status, &err);
    RIG_CHECK(rig, !rig->report[0] && !status, "a save: %s", err.message);
    snprintf(d.dir[k], sizeof d.dir[k], "out/checkpoints/step-%08lld", (long long)d.both[k].step);
  }
  expect_newest(rig, &d.both[1], "undamaged");
  static const char *const files[] = {"manifest.json", "rank-00000.safetensors", "rank-00001.safetensors"};
  for (int i = d.large; i < 3 && !rig->report[0]; i++) {
    damage_file(&d, files[i]);
    if (rig->report[0]) return;
    rank_rig_most(rig, 0); /* it is put back */
    expect_newest(rig, &d.both[1], "repaired");
    rank_rig_most(rig, 0);
  }
  if (!rig->report[0]) exchange_files(&d);
  if (rig->report[0]) return;
  rank_rig_most(rig, 0);
  expect_newest(rig, &d.both[1], "put back");
  if (rig->rank == 0) printf("%ld kinds of damage, each found and passed over\n", d.done);
  fflush(stdout);
}

/* ---- the tests ---- */
static void run_in(char *dir, const char *model, long stride, rank_rig_run run) {
  run.dir = dir;
  run.limit_s = 200;
  run.arg = &stride;
  training_files(dir, model);
  cr_assert(rank_rig_ranks(&run), "%s", run.message);
  command_remove_dir(dir);
}
enum { STRIDE = UNDER_ASAN ? 5 : 1 }; /* each turn looks for leaks there */
#define EACH(...) run_in(rank_rig_dir(), rank_rig_model, STRIDE, (rank_rig_run){__VA_ARGS__})
TestSuite(rank_faults, .timeout = 240);

Test(rank_faults, saves_of_two) { EACH(.size = 2, .strategy = "fsdp", .body = fail_saves); }
Test(rank_faults, saves_of_two_replicas) { EACH(.size = 2, .strategy = "ddp", .body = fail_saves); }
Test(rank_faults, saves_of_three) { EACH(.size = 3, .strategy = "zero", .body = fail_saves); }
Test(rank_faults, damage_seen_by_three) {
  run_in(rank_rig_dir(), rank_rig_model, 1, (rank_rig_run){.size = 3, .strategy = "fsdp", .body = load_damaged});
}
Test(rank_faults, loads_of_two) { EACH(.size = 2, .strategy = "fsdp", .body = fail_loads); }
Test(rank_faults, loads_of_three) { EACH(.size = 3, .strategy = "ddp", .body = fail_loads); }
Test(rank_faults, background_saves_of_two) {
  EACH(.size = 2, .strategy = "zero", .background = true, .body = fail_saves);
}
Test(rank_faults, background_saves_of_two_of_fsdp) {
  EACH(.size = 2, .strategy = "fsdp", .background = true, .body = fail_saves);
}

/* Files of several chunks, on a disk: the stream's threads and direct I/O take part, and reading to the place (that
 * tensors of this size are read so is tested in test_checkpoint_memory.c). */
static const char large_model[] =
    "[batch]\nmicro = 1\nsequence = 8\n"
    "[model]\nplugin = gpt\nlayers = 1\nheads = 4\nwidth = 512\ncontext = 8\nvocab = 257\n";
#define SOME(stride, ...) run_in(command_temp_dir(), large_model, stride, (rank_rig_run){__VA_ARGS__})

Test(rank_faults, large_saves) { SOME(37, .size = 2, .strategy = "fsdp", .body = fail_saves); }
Test(rank_faults, large_loads) { SOME(37, .size = 2, .strategy = "fsdp", .body = fail_loads); }
Test(rank_faults, large_damage) { SOME(2, .size = 2, .strategy = "fsdp", .body = load_damaged); }
