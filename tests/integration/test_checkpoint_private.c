/* Private state of a strategy (PHX_STATE_PRIVATE), with the test strategy `private`: restored bit by bit at equal
 * strategy and world size, and left out by name otherwise. */
#include <criterion/criterion.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "checkpoint/safetensors.h"
#include "training.h"

static const char model[] =
    "[plugins]\npath = " PHX_TEST_ONLY_PLUGINS "\n[checkpoint]\nevery = 2\nkeep = 0\n[batch]\nmicro = 1\nsequence = 9\n"
    "[model]\nplugin = gpt\nlayers = 2\nheads = 2\nwidth = 18\ncontext = 9\nvocab = 257\n";

static char *phalanx(const char *dir, int status, const char *const *argv) {
  command_result r = command_run(dir, 60, argv);
  cr_assert_eq(r.status, status, "%s %s: status %d, not %d:\n%s", argv[1], argv[2], r.status, status, r.out);
  return r.out;
}
#define PHALANX(dir, status, ...) phalanx(dir, status, (const char *const[]){"phalanx", __VA_ARGS__, NULL})
#define TRAIN(dir, ranks, strategy, out, steps, ...)                                                               \
  PHALANX(dir, 0, "train", "run.ini", "-n", ranks, "--strategy", strategy, "--set", "run.out=" out, "--set",         \
          "run.steps=" steps, __VA_ARGS__)

/* The bytes of a tensor of a rank's file. */
static unsigned char *tensor_of(const char *dir, const char *checkpoint, int rank, const char *name, int64_t bytes) {
  char path[512];
  phx_error err = {.struct_size = sizeof err};
  phx__safetensors *st = NULL;
  snprintf(path, sizeof path, "%s/%s/rank-%05d.safetensors", dir, checkpoint, rank);
  cr_assert_eq(phx__safetensors_open(path, &st, &err), PHX_OK, "%s", err.message);
  const phx__tensor *t = phx__safetensors_find(st, name);
  cr_assert(t && t->bytes == bytes, "%s: %s is not there with %lld bytes", path, name, (long long)bytes);
  unsigned char *data = malloc((size_t)bytes);
  cr_assert_eq(phx__safetensors_read(st, t, 0, bytes, data, &err), PHX_OK, "%s", err.message);
  phx__safetensors_close(st);
  return data;
}

enum { FLOATS = 300 * 1024 * 4, COUNTS = 3 * 1024 };

static bool equal_private(const char *dir, const char *a, const char *b, int rank) {
  static const struct {
    const char *name;
    int64_t bytes;
  } all[] = {{"private.residue/0/0/0", FLOATS}, {"private.counts/0/0/0", COUNTS}};
  bool equal = true;
  for (int i = 0; i < 2; i++) {
    unsigned char *x = tensor_of(dir, a, rank, all[i].name, all[i].bytes);
    unsigned char *y = tensor_of(dir, b, rank, all[i].name, all[i].bytes);
    equal = equal && !memcmp(x, y, (size_t)all[i].bytes);
    free(x);
    free(y);
  }
  return equal;
}

static int count(const char *text, const char *word) {
  int n = 0;
  for (const char *at = text; (at = strstr(at, word)); at++) n++;
  return n;
}

Test(checkpoint_private, restored_at_equal_strategy_and_ranks, .timeout = 120) {
  char *dir = command_temp_dir(), *out;
  training_files(dir, model);
  free(TRAIN(dir, "2", "private", "whole", "4", NULL));
  free(TRAIN(dir, "2", "private", "again", "4", "--resume", "whole/checkpoints/step-00000002"));
  for (int rank = 0; rank < 2; rank++)
    cr_assert(equal_private(dir, "whole/checkpoints/step-00000004", "again/checkpoints/step-00000004", rank),
              "rank %d: private state is not what it was", rank);
  /* the control: each rank has its own, and every step changes it */
  cr_assert_not(equal_private(dir, "whole/checkpoints/step-00000002", "whole/checkpoints/step-00000004", 0));
  unsigned char *x = tensor_of(dir, "whole/checkpoints/step-00000004", 0, "private.residue/0/0/0", FLOATS);
  unsigned char *y = tensor_of(dir, "whole/checkpoints/step-00000004", 1, "private.residue/0/0/0", FLOATS);
  cr_assert(memcmp(x, y, FLOATS));
  free(x);
  free(y);
  out = PHALANX(dir, 0, "checkpoint", "verify", "whole/checkpoints/step-00000004");
  cr_assert(strstr(out, "whole"), "%s", out);
  free(out);
  command_remove_dir(dir);
}

Test(checkpoint_private, left_out_by_name_otherwise, .timeout = 120) {
  static const char *const names[] = {"state residue is private to strategy private on 2 ranks, and left out",
                                      "state counts is private to strategy private on 2 ranks, and left out"};
  char *dir = command_temp_dir(), *out;
  training_files(dir, model);
  free(TRAIN(dir, "2", "private", "whole", "4", NULL));
  out = TRAIN(dir, "2", "ddp", "other", "4", "--resume", "whole/checkpoints/step-00000002");
  for (int i = 0; i < 2; i++) cr_assert_eq(count(out, names[i]), 1, "%s", out);
  free(out);
  out = TRAIN(dir, "1", "private", "fewer", "4", "--set", "batch.accumulate=2", "--resume",
              "whole/checkpoints/step-00000002");
  for (int i = 0; i < 2; i++) cr_assert_eq(count(out, names[i]), 1, "%s", out);
  free(out);
  /* it began again at zero: two steps instead of four */
  unsigned char *x = tensor_of(dir, "fewer/checkpoints/step-00000004", 0, "private.counts/0/0/0", COUNTS);
  cr_assert(x[0] == 2 && x[1] == 4 && x[4] == 10, "%d %d %d", x[0], x[1], x[4]);
  free(x);
  command_remove_dir(dir);
}

/* ---- what the strategy hears ---- */

/* The strategy's lines in the order of `lines`, and no other one of it. */
static void expect_heard(const char *out, const char *const *lines) {
  const char *at = out;
  int n = 0;
  for (; lines[n]; n++) {
    const char *found = strstr(at, lines[n]);
    cr_assert(found, "no '%s' behind line %d in:\n%s", lines[n], n, out);
    at = found + strlen(lines[n]);
  }
  cr_expect_eq(count(out, "private] prepare ") + count(out, "private] restored "), n, "%s", out);
}

/* PHX_PREPARE_INIT 0, LOAD 1, HASH 2, SAVE 3, FINAL 4, COMPARE 5; PHX_RESTORED_*: what, world size, step, slices. */
Test(checkpoint_private, the_strategy_hears_what_comes_and_what_was_restored, .timeout = 120) {
  char *dir = command_temp_dir(), *out;
  training_files(dir, model);
  out = TRAIN(dir, "2", "private", "whole", "4", "--set", "run.checked=no"); /* saved at 2 and 4 */
  expect_heard(out, (const char *const[]){"private] prepare 0", "private] restored 0 0 0 0", "private] prepare 5",
                                          "private] prepare 3", "private] prepare 3", "private] prepare 2",
                                          "private] prepare 4", NULL});
  free(out);
  out = TRAIN(dir, "2", "private", "again", "3", "--resume", "whole/checkpoints/step-00000002", "--set",
              "run.checked=yes", "--set", "run.drift_every=1");
  expect_heard(out, (const char *const[]){"private] prepare 1", "private] restored 3 2 2 2", "private] prepare 5",
                                          "private] prepare 5", "private] prepare 5", "private] prepare 5",
                                          "private] prepare 3", "private] prepare 2", "private] prepare 4", NULL});
  free(out);
  out = TRAIN(dir, "1", "private", "fewer", "3", "--resume", "whole/checkpoints/step-00000002", "--set",
              "run.checked=no");
  expect_heard(out, (const char *const[]){"private] prepare 1", "private] restored 2 2 2 0", "private] prepare 3",
                                          "private] prepare 2", "private] prepare 4", NULL});
  free(out);
  command_remove_dir(dir);
}

Test(checkpoint_private, damage_is_found, .timeout = 120) {
  char *dir = command_temp_dir(), path[512], *out;
  phx_error err = {.struct_size = sizeof err};
  phx__safetensors *st = NULL;
  training_files(dir, model);
  free(TRAIN(dir, "2", "private", "whole", "2", NULL));
  snprintf(path, sizeof path, "%s/whole/checkpoints/step-00000002/rank-00001.safetensors", dir);
  cr_assert_eq(phx__safetensors_open(path, &st, &err), PHX_OK, "%s", err.message);
  const phx__tensor *t = phx__safetensors_find(st, "private.residue/0/0/0");
  FILE *f = fopen(path, "r+b");
  cr_assert(t && f && !fseek(f, t->begin + t->bytes - 1, SEEK_SET) && fputc(0x55, f) == 0x55 && !fclose(f));
  phx__safetensors_close(st);
  out = PHALANX(dir, 4, "checkpoint", "verify", "whole");
  cr_assert(strstr(out, "rank-00001.safetensors is damaged") && strstr(out, "private.residue/0/0/0"), "%s", out);
  free(out);
  command_remove_dir(dir);
}
