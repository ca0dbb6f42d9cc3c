/* Fuzz target: any bytes as a config.json of Hugging Face's GPT-2.
 *
 * Properties: a refusal names the file and has no control characters; what is accepted has sizes that can be, and the
 * INI that is made of it is one, with the same numbers.  With libFuzzer:
 *   build-clang/tests/fuzz_gpt2 tests/fuzz/gpt2          The corpus is replayed by tests/unit/test_corpus.c. */
#include "../../core/config/config_ini.h"
#include "../../core/checkpoint/gpt2.h"
#include "check.h"

#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes);

static bool gpt2_section(void *arg, int line, const char *name) {
  (void)arg, (void)line;
  CHECK(strcmp(name, "model") == 0 || strcmp(name, "batch") == 0);
  return true;
}
static bool gpt2_error(void *arg, int line, const char *message) {
  const bool never = false; /* a line of ours that the configuration's reader refuses */
  (void)arg, (void)line, (void)message;
  CHECK(never);
  return true;
}
static bool gpt2_entry(void *arg, int line, const char *section, const char *key, const char *value) {
  const phx__gpt2 *g = arg;
  const struct {
    const char *key;
    int64_t value;
  } sizes[] = {{"layers", g->layers}, {"heads", g->heads}, {"width", g->width}, {"context", g->context},
               {"vocab", g->vocab}, {"sequence", g->context}};
  (void)line;
  CHECK(*section && *value);
  for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
    if (strcmp(key, sizes[i].key) == 0) CHECK(strtoll(value, NULL, 10) == sizes[i].value);
  return true;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes) {
  phx_error err = {sizeof err, 0, 0, {0}};
  phx__gpt2 g = {0};
  const phx_status status = phx__gpt2_parse("fuzz", (const char *)data, bytes, &g, &err);
  if (status != PHX_OK) {
    CHECK((status == PHX_IO || status == PHX_INVALID || status == PHX_UNSUPPORTED) && strstr(err.message, "fuzz"));
    for (const char *c = err.message; *c; c++) CHECK((unsigned char)*c >= ' ');
    return 0;
  }
  char ini[PHX__GPT2_INI];
  const phx__ini_sink sink = {&g, gpt2_section, gpt2_entry, gpt2_error};
  CHECK(g.layers > 0 && g.heads > 0 && g.width > 0 && g.width % g.heads == 0 && g.context > 0 && g.vocab > 0);
  CHECK(g.eps > 0 && g.eps <= 1 && memchr(g.dropout, 0, sizeof g.dropout));
  phx__gpt2_ini(&g, ini);
  CHECK(phx__ini_parse(ini, strlen(ini), &sink) == PHX_OK);
  return 0;
}
