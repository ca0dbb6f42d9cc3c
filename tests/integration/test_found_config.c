/* Opening a run that somebody else made runs no code of theirs: its config.ini may name plugins by id only, unless the
 * user names the path or pins the file. */
#include <criterion/criterion.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <xxhash.h>

#include "checkpoint/manifest.h"
#include "root.h"
#include "base/status.h"
#include "expect.h"
#include "training.h"

static const char tiny[] = "[checkpoint]\nevery = 2\n[batch]\nmicro = 1\nsequence = 9\n"
                           "[model]\nplugin = gpt\nlayers = 1\nheads = 2\nwidth = 18\ncontext = 9\nvocab = 257\n";

/* A whole run in DIR/out. */
static char *make_run(void) {
  char *dir = command_temp_dir();
  training_files(dir, tiny);
  expect(RUN(dir, 60, "train", "run.ini", "-n", "1", "--set", "run.steps=4"), 0, NULL);
  return dir;
}

static void set_value(const char *dir, const char *key, const char *value) {
  char line[2048];
  snprintf(line, sizeof line, "sed -i 's|^%s = .*|%s = %s|' %s/out/config.ini && grep -q '^%s = %s' %s/out/config.ini",
           key, key, value, dir, key, value, dir);
  cr_assert_eq(system(line), 0);
}

/* Its constructor ends the process: nothing that loads it goes on. */
Test(found_config, a_strategy_by_its_path, .timeout = 60) {
  char *dir = make_run(), hostile[512];
  snprintf(hostile, sizeof hostile, "%s/phx_strategy_crash.so", test_path("lib/phalanx-test/broken"));
  set_value(dir, "strategy", hostile);
  expect(RUN(dir, 60, "sample", "out", "--tokens", "4"), 0, NULL);
  expect(RUN(dir, 60, "train", "--resume", "out"), 2, "comes with a run");
  expect(RUN(dir, 60, "train", "--resume", "out", "--strategy", "ddp", "-n", "1", "--steps", "6"), 0, NULL);
  command_remove_dir(dir);
}

/* A plugin of an installed name, in a directory that would be searched first. */
Test(found_config, a_directory_of_plugins, .timeout = 60) {
  char *dir = make_run(), theirs[512], line[2048];
  snprintf(theirs, sizeof theirs, "%s/out/theirs", dir);
  snprintf(line, sizeof line, "mkdir %s && for name in device_cpu comm_shm strategy_ddp model_gpt; do "
           "cp %s/phx_strategy_crash.so %s/phx_$name.so; done", theirs, test_path("lib/phalanx-test/broken"), theirs);
  cr_assert_eq(system(line), 0);
  set_value(dir, "path", theirs);
  expect(RUN(dir, 60, "sample", "out", "--tokens", "4"), 0, "is not followed");
  expect(RUN(dir, 60, "train", "--resume", "out", "--steps", "6"), 0, "is not followed");
  command_remove_dir(dir);
}

/* The user's own words count: the path, or the sum of the file. */
Test(found_config, what_the_user_names_is_loaded, .timeout = 90) {
  char *dir = command_temp_dir(), path[512], pin[128], wrong[128], line[1600];
  snprintf(path, sizeof path, "%s/phx_strategy_fsdp.so", test_path("lib/phalanx"));
  training_files(dir, tiny);
  expect(RUN(dir, 60, "train", "run.ini", "-n", "1", "--strategy", path, "--set", "run.steps=4"), 0, NULL);
  cJSON *run = training_json(dir, "out/run.json");
  snprintf(pin, sizeof pin, "plugins.pin=%s", training_get(run, "plugins.strategy.sha256")->valuestring);
  cJSON_Delete(run);
  memcpy(wrong, pin, sizeof pin);
  wrong[20] = wrong[20] == '0' ? '1' : '0';
  expect(RUN(dir, 60, "train", "--resume", "out", "--steps", "6"), 2, "comes with a run");
  expect(RUN(dir, 60, "train", "--resume", "out", "--steps", "6", "--set", wrong), 2, "is not in [plugins] pin");
  expect(RUN(dir, 60, "train", "--resume", "out", "--steps", "6", "--set", pin), 0, NULL);
  /* the pin was printed, too */
  expect(RUN(dir, 60, "train", "--resume", "out", "--steps", "8"), 2, "comes with a run");
  expect(RUN(dir, 60, "train", "--resume", "out", "--steps", "8", "--strategy", path), 0, NULL);
  expect(RUN(dir, 60, "checkpoint", "export", "out", "hf"), 0, NULL);
  snprintf(line, sizeof line, "mkdir %s/in && cp %s/out/config.ini %s/in/", dir, dir, dir);
  cr_assert_eq(system(line), 0);
  expect(RUN(dir, 60, "checkpoint", "import", "hf", "-o", "in"), 2, "comes with a run");
  command_remove_dir(dir);
}

/* A run reads its own config.ini back: paths are long. */
Test(found_config, long_values_are_read_back, .timeout = 60) {
  char *dir = command_temp_dir(), pin[4200] = "plugins.pin=";
  training_files(dir, tiny);
  for (size_t at = strlen(pin), n = 0; n < 60 * 65 - 1; at++, n++) pin[at] = n % 65 == 64 ? ',' : 'f';
  expect(RUN(dir, 60, "train", "run.ini", "-n", "1", "--set", "run.steps=4", "--set", pin), 0,
         "[plugins] pin guards nothing: there is neither a [plugins] path nor a strategy's path");
  expect(RUN(dir, 60, "train", "--resume", "out", "--steps", "6"), 0, NULL);
  command_remove_dir(dir);
}

/* Two checkpoints with each other's names are each whole. */
Test(found_config, swapped_checkpoints, .timeout = 60) {
  char *dir = make_run(), line[600];
  expect(RUN(dir, 60, "checkpoint", "verify", "out/checkpoints/step-00000002"), 0, NULL);
  snprintf(line, sizeof line, "cd %s/out/checkpoints && mv step-00000002 x && mv step-00000004 step-00000002 && "
           "mv x step-00000004", dir);
  cr_assert_eq(system(line), 0);
  expect(RUN(dir, 60, "checkpoint", "verify", "out/checkpoints/step-00000002"), PHX__EXIT_DAMAGED, "holds step 4");
  expect(RUN(dir, 60, "train", "--resume", "out", "--steps", "6"), PHX__EXIT_DAMAGED, "holds step 2");
  command_remove_dir(dir);
}

/* Gives two tensors of one size each other's names in a shard's header, with the checksums that then hold. */
static void exchange_names(const char *checkpoint) {
  phx_error err = PHX_ERROR_INIT;
  phx__manifest *m = NULL;
  phx__safetensors *st = NULL;
  char path[700];
  cr_assert_eq(phx__manifest_read(checkpoint, &m, &err), PHX_OK, "%s", err.message);
  snprintf(path, sizeof path, "%s/%s", checkpoint, m->files[0].name);
  cr_assert_eq(phx__safetensors_open(path, &st, &err), PHX_OK, "%s", err.message);
  uint32_t a = 0, b = 1;
  while (b < st->n && (strlen(st->tensors[a].name) != strlen(st->tensors[b].name) ||
                       st->tensors[a].numel != st->tensors[b].numel))
    if (++b == st->n && ++a + 1 < st->n) b = a + 1;
  cr_assert_lt(b, st->n, "two tensors with names of one length");
  static char bytes[PHX__CHUNK_BYTES];
  FILE *f = fopen(path, "r+b");
  cr_assert_not_null(f);
  const size_t n = fread(bytes, 1, sizeof bytes, f), length = strlen(st->tensors[a].name);
  char *first = memmem(bytes, n, st->tensors[a].name, length), *second = memmem(bytes, n, st->tensors[b].name, length);
  cr_assert(first && second);
  memcpy(first, st->tensors[b].name, length);
  memcpy(second, st->tensors[a].name, length);
  rewind(f);
  cr_assert_eq(fwrite(bytes, 1, n, f), n);
  cr_assert_eq(fclose(f), 0);
  m->files[0].chunks[0] = XXH3_64bits(bytes, n);
  cr_assert_eq(phx__manifest_write(checkpoint, m, &err), PHX_OK, "%s", err.message);
  phx__safetensors_close(st);
  phx__manifest_free(m);
}

/* Every checksum holds, and other tools would take one tensor for another. */
Test(found_config, a_header_that_is_not_the_manifests, .timeout = 60) {
  char *dir = make_run(), path[600];
  snprintf(path, sizeof path, "%s/out/checkpoints/step-00000004", dir);
  exchange_names(path);
  expect(RUN(dir, 60, "checkpoint", "verify", "out/checkpoints/step-00000004"), PHX__EXIT_DAMAGED,
         "is not where the manifest says");
  expect(RUN(dir, 60, "train", "--resume", "out/checkpoints/step-00000004", "--set", "run.out=other", "--steps", "6"),
         PHX__EXIT_DAMAGED, "is not where the manifest says");
  expect(RUN(dir, 60, "train", "--resume", "out", "--steps", "6"), 0, "the one before is tried");
  command_remove_dir(dir);
}

/* Something made folders in what a dead attempt left: the next saves remove it all the same. */
Test(found_config, a_stray_folder_in_a_leftover, .timeout = 60) {
  char *dir = make_run(), line[600];
  snprintf(line, sizeof line, "mkdir -p %s/out/checkpoints/.step-00000009.0123456789abcdef.part/a/b/c/d", dir);
  cr_assert_eq(system(line), 0);
  expect(RUN(dir, 60, "train", "--resume", "out", "--steps", "6"), 0, NULL);
  snprintf(line, sizeof line, "ls -A %s/out/checkpoints | grep -q part", dir);
  cr_assert_neq(system(line), 0);
  command_remove_dir(dir);
}
