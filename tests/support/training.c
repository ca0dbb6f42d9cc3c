/* tests/support/training.c - see training.h. */
#include "training.h"

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

const char training_odd_model[] =
    "[batch]\nmicro = 1\nsequence = 33\n"
    "[model]\nplugin = gpt\nlayers = 10\nheads = 3\nwidth = 30\ncontext = 33\nvocab = 257\n";

static void write_tokens(const char *dir, const char *name, size_t n, uint32_t seed) {
  uint16_t *tokens = calloc(n, sizeof *tokens);
  for (size_t i = 0; i < n; i++) { /* a noisy cycle: something to learn */
    seed = seed * 1664525u + 1013904223u;
    tokens[i] = (uint16_t)((seed >> 24) < 64 ? (seed >> 8) % 257 : (i * 7) % 257);
  }
  command_write_file(dir, name, tokens, n * sizeof *tokens);
  free(tokens);
}

void training_files(const char *dir, const char *extra) {
  char ini[8192];
  write_tokens(dir, "train.bin", 40000, 1);
  write_tokens(dir, "valid.bin", 4000, 2);
  snprintf(ini, sizeof ini,
           "[run]\nout = out\nsteps = 20\ntimeout = 30\nchecked = yes\n[device]\nthreads = 1\n"
           "[data]\ntrain = train.bin\n"
           "[optimizer]\nlr = 1e-2\nclip = 0.2\nwarmup = 2\n%s",
           extra);
  command_write_file(dir, "run.ini", ini, strlen(ini));
}

cJSON *training_json(const char *dir, const char *name) {
  char *text = command_read_file(dir, name);
  cJSON *o = text ? cJSON_Parse(text) : NULL;
  free(text);
  return o;
}

const cJSON *training_get(const cJSON *o, const char *path) {
  char part[128];
  while (o && *path) {
    const size_t n = strcspn(path, ".");
    snprintf(part, sizeof part, "%.*s", (int)n, path);
    o = cJSON_GetObjectItemCaseSensitive(o, part);
    path += n + (path[n] == '.');
  }
  return o;
}
