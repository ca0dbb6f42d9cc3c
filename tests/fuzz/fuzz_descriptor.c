/* Fuzz target: what a plugin may say about itself, put together from the input's bytes: strings from a few that are
 * right, wrong or borderline, numbers of any value.
 *
 * Properties: what is accepted has an id of the form, every mandatory call, and options whose defaults can be stored
 * into config_size bytes, printed, and parsed again with the same value.  What the struct_size does not count is not
 * read.  With libFuzzer:
 *   build-clang/tests/fuzz_descriptor tests/fuzz/descriptor      The corpus is replayed by tests/unit/test_corpus.c. */
#include "../../core/plugin/descriptor.h"
#include "../../core/config/option.h"
#include "check.h"

#include <phalanx/provider.h>
#include <phalanx/strategy.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes);

typedef struct says {
  const uint8_t *at, *end;
} says;
static uint8_t say_byte(says *s) { return s->at < s->end ? *s->at++ : 0; }
static uint64_t say_number(says *s) { /* small, at an edge, or anything */
  static const uint64_t edges[] = {0, 1, UINT64_MAX, INT64_MAX, (uint64_t)INT64_MIN, UINT32_MAX, INT32_MAX, 65536};
  uint64_t value = 0;
  const uint8_t how = say_byte(s);
  if (how < 128) return how;
  if (how < 160) return edges[how % 8];
  for (int i = 0; i < 8; i++) value = value << 8 | say_byte(s);
  return value;
}
static double say_real(says *s) {
  const uint64_t bits = say_number(s);
  double value = (double)(int64_t)bits;
  if (bits > 1000000) memcpy(&value, &bits, sizeof value);
  return value;
}
static const char *say_word(says *s) {
  static const char *const words[] = {NULL, "", "plain", "run", "a_b_9", "Upper", "two words", "1", "0", "-1", "auto",
                                      "yes", "1e400", "nan", "10KiB", "9223372036854775807", "A doc.", "no stop", ".",
                                      "0123456789012345678901234567890123456789012345678901234567890", "phx.job/1",
                                      "phx.nothing/9", "one"};
  return words[say_byte(s) % (sizeof words / sizeof *words)];
}

enum { OPTIONS = 4, STRIDE = sizeof(phx_option) + 16 };

static void say_option(says *s, phx_option *o) {
  static const char *const none[] = {NULL}, *const two[] = {"one", "auto", NULL};
  static const char *const *const choices[] = {NULL, none, two};
  *o = (phx_option){.name = say_word(s), .doc = say_word(s), .dflt = say_word(s), .choices = choices[say_byte(s) % 3]};
  o->type = say_byte(s) % 8;
  o->flags = say_byte(s);
  o->offset = (uint32_t)say_number(s);
  o->size = (uint32_t)say_number(s);
  o->imin = (int64_t)say_number(s);
  o->imax = (int64_t)say_number(s);
  o->rmin = say_real(s);
  o->rmax = say_real(s);
}

static void check_options(const phx_plugin *d) {
  char *config = calloc(d->config_size ? d->config_size : 1, 1);
  CHECK(config);
  for (uint32_t i = 0; i < d->n_options; i++) {
    const phx_option *o = phx__option_at(d->options, d->option_stride, i);
    phx__value value = {0}, again = {0};
    char why[400], text[600], scratch[PHX__VALUE_TEXT];
    phx__option_describe(o, text, sizeof text);
    CHECK(phx__name_is_plain(o->name, 48));
    if (!o->dflt) continue;
    CHECK(phx__option_parse(o, o->dflt, &value, why, sizeof why));
    phx__option_store(o, value, config);
    snprintf(text, sizeof text, "%s", phx__option_text(o, value, scratch));
    CHECK(phx__option_parse(o, text, &again, why, sizeof why));
    CHECK(o->type == PHX_OPT_STRING ? strcmp(value.s, again.s) == 0 : value.i == again.i);
  }
  free(config);
}

static void call(void) {}
/* A table of exactly the bytes it says, or of one word. */
static void **say_table(says *s) {
  size_t bytes = (size_t)say_number(s);
  if (say_byte(s) % 4) bytes = sizeof(phx_strategy_table) + 64;
  const size_t words = bytes >= 8 && bytes <= 65536 ? bytes / 8 : 1;
  void **table = calloc(words, sizeof *table);
  CHECK(table);
  memcpy(table, &bytes, sizeof bytes);
  void (*const some)(void) = call;
  const uint8_t hole = say_byte(s);
  for (size_t i = 1; i < words; i++)
    if (i != hole) memcpy(&table[i], &some, sizeof some);
  return table;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes) {
  says s = {data, data + bytes};
  const char *extensions[3] = {NULL, NULL, NULL};
  char *options = calloc(OPTIONS, STRIDE);
  phx_plugin d = {.struct_size = sizeof d, .kind = say_byte(&s) % 6, .table_major = PHX_ABI_MAJOR};
  phx_error err = {sizeof err, 0, 0, {0}};
  CHECK(options);
  if (say_byte(&s) % 4 == 0) d.struct_size = (size_t)say_number(&s);
  if (say_byte(&s) % 4 == 0) d.table_major = (uint32_t)say_number(&s);
  d.id = say_word(&s);
  d.version = say_word(&s), d.summary = say_word(&s), d.vendor = say_word(&s);
  d.license = say_word(&s), d.build = say_word(&s);
  d.provides = say_number(&s);
  d.needs = say_number(&s);
  extensions[0] = say_word(&s), extensions[1] = say_word(&s);
  d.extensions = say_byte(&s) % 2 ? extensions : NULL;
  d.n_options = say_byte(&s) % (OPTIONS + 1);
  d.options = say_byte(&s) % 8 ? (const phx_option *)(const void *)options : NULL;
  d.option_stride = say_byte(&s) % 4 ? STRIDE : (uint32_t)say_number(&s);
  if (d.option_stride > STRIDE) d.option_stride = STRIDE; /* rows that are there */
  d.config_size = (size_t)say_number(&s);
  void **table = say_table(&s);
  d.table = say_byte(&s) % 8 ? table : NULL;
  for (uint32_t i = 0; i < OPTIONS; i++) {
    phx_option o;
    say_option(&s, &o);
    memcpy(options + (size_t)i * STRIDE, &o, sizeof o);
  }
  const char *word = say_word(&s);
  const uint32_t asked = say_byte(&s) % 8 ? d.kind : 1 + say_byte(&s) % 4u;
  const size_t there = d.struct_size < sizeof d ? d.struct_size : sizeof d;
  phx_plugin *exact = malloc(there < sizeof d.struct_size ? sizeof d.struct_size : there);
  CHECK(exact);
  memcpy(exact, &d, there < sizeof d.struct_size ? sizeof d.struct_size : there);
  if (asked >= 1 && asked <= 4) {
    const phx_status status = phx__descriptor_check(exact, asked, say_byte(&s) % 2 ? word : NULL, &err);
    CHECK(status == PHX_OK || ((status == PHX_INVALID || status == PHX_UNSUPPORTED) && err.message[0]));
    if (status == PHX_OK) {
      CHECK(d.kind == asked && d.table == table && phx__name_is_plain(d.id, 32) && strcmp(d.id, "run") != 0);
      check_options(exact);
    }
  }
  free(exact);
  free(table);
  free(options);
  return 0;
}
