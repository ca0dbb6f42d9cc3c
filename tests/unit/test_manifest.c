/* Manifests: text and back, every rule, every bit; and reading that verifies. */
#include <criterion/criterion.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "checkpoint_fixture.h"
#include "command.h"
#include "engine/layout.h"
#include "checkpoint/manifest.h"
#include "base/status.h"
#include "base/sys.h"

static char *dir;
static void set_up(void) {
  dir = command_temp_dir();
  char path[600];
  checkpoint_fixture f = checkpoint_fixture_small();
  f.pieces = 2;
  f.privates = true;
  snprintf(path, sizeof path, "%s/c", dir);
  checkpoint_fixture_write(&f, path);
}
static void tear_down(void) { command_remove_dir(dir); }
TestSuite(manifest, .init = set_up, .fini = tear_down, .timeout = 120);

static char *text_of(size_t *bytes) {
  char *text = command_read_file(dir, "c/manifest.json");
  cr_assert_not_null(text);
  *bytes = strlen(text);
  return text;
}

static phx_status parse(const char *text, size_t bytes, phx_error *err) {
  phx__manifest *m = NULL;
  phx_status status = phx__manifest_parse("RUN/manifest.json", text, bytes, &m, err);
  phx__manifest_free(m);
  return status;
}

Test(manifest, text_and_back) {
  char path[600], *again = NULL;
  size_t n, m_bytes;
  phx_error err = PHX_ERROR_INIT;
  phx__manifest *m = NULL;
  snprintf(path, sizeof path, "%s/c", dir);
  char *text = text_of(&n);
  cr_assert_eq(phx__manifest_read(path, &m, &err), PHX_OK, "%s", err.message);
  cr_assert_eq(m->data_seed, UINT64_MAX - 1);
  cr_assert_str_eq(phx__manifest_config_of(m, "run", "out"), "a \"name\"\twith \\ all \x01 of it");
  cr_assert_str_eq(phx__manifest_plugin_of(m, "strategy")->id, "zero");
  cr_assert_eq(m->n_privates, 2);
  cr_assert_eq(phx__manifest_print(path, m, &again, &m_bytes, &err), PHX_OK, "%s", err.message);
  cr_assert_eq(n, m_bytes);
  cr_assert_str_eq(text, again);
  phx__free(again);
  phx__manifest_free(m);
  free(text);
}

Test(manifest, every_bit_and_every_length) {
  size_t n;
  phx_error err = PHX_ERROR_INIT;
  char *text = text_of(&n);
  cr_assert_eq(parse(text, n, &err), PHX_OK, "%s", err.message);
  for (size_t bit = 0; bit < n * 8; bit++) {
    text[bit / 8] = (char)(text[bit / 8] ^ 1 << bit % 8);
    cr_assert_eq(parse(text, n, &err), PHX_IO, "bit %zu flipped and not found", bit);
    cr_assert(strstr(err.message, "RUN/manifest.json"), "%s", err.message);
    text[bit / 8] = (char)(text[bit / 8] ^ 1 << bit % 8);
  }
  for (size_t length = 0; length < n; length++) {
    char *cut = malloc(length + 1); /* its own memory: reading over the end is seen */
    memcpy(cut, text, length);
    cr_assert_eq(parse(cut, length, &err), PHX_IO, "cut at %zu and not found", length);
    free(cut);
  }
  free(text);
}

/* Replaces the first `from` by `to` and repairs the checksum: what somebody did on purpose. */
static phx_status forged(const char *from, const char *to, phx_error *err) {
  size_t n;
  char *text = text_of(&n), digits[33];
  char *at = strstr(text, from), *sum = strstr(text, ",\n\"checksum\":");
  cr_assert(at && sum, "no %s", from);
  *sum = 0;
  const size_t room = n + strlen(to) + 200;
  char *out = calloc(1, room);
  snprintf(out, room, "%.*s%s%s", (int)(at - text), text, to, at + strlen(from));
  phx__manifest_checksum(out, strlen(out), digits);
  snprintf(out + strlen(out), 100, ",\n\"checksum\":\"%s\"}\n", digits);
  char *exact = malloc(strlen(out));
  memcpy(exact, out, strlen(out));
  phx_status status = parse(exact, strlen(out), err);
  free(exact);
  free(out);
  free(text);
  return status;
}

Test(manifest, every_rule) {
  static const struct {
    const char *from, *to, *says;
    phx_status status;
  } cases[] = {
      {"\"step\":3", "\"step\":4", NULL, PHX_OK},
      {"\"version\":1", "\"version\":2", "version 2", PHX_UNSUPPORTED},
      {"phalanx-checkpoint", "another", "format", PHX_IO},
      {"\"step\":3", "\"step\":-3", "step", PHX_IO},
      {"\"step\":3", "\"step\":3.0", "integer", PHX_IO},
      {"\"step\":3", "\"step\":\"3\"", "step", PHX_IO},
      {"\"step\":3", "\"step\":3,\"step\":3", "'step' stands twice", PHX_IO},
      {"\"step\":3", "\"stop\":3", "step is missing", PHX_IO},
      {"\"step\":3", "\"step\":3,\"more\":[]", "other members", PHX_IO},
      {"\"step\":3", "\"step\":[[[[[[[[[[[[]]]]]]]]]]]]", "levels", PHX_IO},
      {"\"ranks\":2", "\"ranks\":0", "ranks", PHX_IO},
      {"\"ranks\":2", "\"ranks\":1", "private", PHX_IO},
      {"18446744073709551614", "18446744073709551616", "seed", PHX_IO},
      {"18446744073709551614", "0x1", "seed", PHX_IO},
      {"rank-00000.safetensors", "../rank-00000.safetensors", "plain file name", PHX_IO},
      {"rank-00000.safetensors", "/etc/passwd", "plain file name", PHX_IO},
      {"rank-00000.safetensors", "..", "plain file name", PHX_IO},
      {"rank-00000.safetensors", "", "plain file name", PHX_IO},
      {"rank-00000.safetensors", "a\\u001b[2J", "plain file name", PHX_IO},
      {"rank-00000.safetensors", "manifest.json", "plain file name", PHX_IO},
      {"rank-00000.safetensors", "rank-00001.safetensors", "stands twice", PHX_IO},
      {"\"first_block\":0,\"blocks\":2", "\"first_block\":0,\"blocks\":1", "missing", PHX_IO},
      {"\"first_block\":0,\"blocks\":2", "\"first_block\":1,\"blocks\":2", "missing", PHX_IO},
      {"\"first_block\":0,\"blocks\":2", "\"first_block\":0,\"blocks\":3", "", PHX_IO},
      {"\"first_block\":0,\"blocks\":2", "\"first_block\":0,\"blocks\":9007199254740992", "no such blocks", PHX_IO},
      {"\"first_block\":2,\"blocks\":2", "\"first_block\":0,\"blocks\":2", "twice", PHX_IO},
      {"\"index\":0,\"unit\":0,\"flat\":0", "\"index\":0,\"unit\":0,\"flat\":1", "no such blocks", PHX_IO},
      {"\"kind\":\"weight\",\"index\":0", "\"kind\":\"weight\",\"index\":1", "no state", PHX_IO},
      {"\"kind\":\"weight\"", "\"kind\":\"buffer\"", "missing", PHX_IO},
      {"\"kind\":\"weight\"", "\"kind\":\"wight\"", "kind is unknown", PHX_IO},
      {"\"dtype\":\"F32\",\"file\":0,\"offset\":", "\"dtype\":\"F32\",\"file\":7,\"offset\":", "file 7 of 2", PHX_IO},
      {"\"dtype\":\"F32\",\"file\":0,\"offset\":", "\"dtype\":\"F16\",\"file\":0,\"offset\":", "no state", PHX_IO},
      {"\"dtype\":\"F32\",\"file\":0,\"offset\":", "\"dtype\":\"F32\",\"file\":0,\"offset\":9007199254", "inside",
       PHX_IO},
      {"\"dtype\":\"F32\",\"file\":0,\"offset\":", "\"dtype\":\"F32\",\"file\":0,\"offset\":1", "", PHX_IO},
      {"\"shape\":[257,12]", "\"shape\":[257,16]", "does not lie in its unit", PHX_IO},
      {"\"shape\":[257,12]", "\"shape\":[257]", "blocks", PHX_IO},
      {"\"shape\":[257,12]", "\"shape\":[]", "shape", PHX_IO},
      {"\"shape\":[257,12]", "\"shape\":[1,1,1,1,1,1,1,257,12]", "too many", PHX_IO},
      {"\"shape\":[257,12]", "\"shape\":[9007199254740992,9007199254740992]", "overflows", PHX_IO},
      {"\"name\":\"wpe.weight\"", "\"name\":\"wte.weight\"", "stands twice", PHX_IO},
      {"\"name\":\"wpe.weight\"", "\"name\":\"\"", "usable name", PHX_IO},
      {"\"blocks\":[4,0]", "\"blocks\":[5,0]", "blocks", PHX_IO},
      {"\"blocks\":[4,0]", "\"blocks\":[9007199254740992,0]", "blocks", PHX_IO},
      {"{\"name\":\"v\",", "{\"name\":\"m\",", "stands twice", PHX_IO},
      {"{\"name\":\"v\",", "{\"name\":\"weight\",", "usable name", PHX_IO},
      {"{\"name\":\"v\",\"dtype\":\"F32\"}", "{\"name\":\"v\",\"dtype\":\"F32\"},{\"name\":\"w\",\"dtype\":\"F32\"}",
       "w of unit wte are missing", PHX_IO},
      {"\"chunks\":[\"", "\"chunks\":[\"0123456789abcdef\",\"", "checksum for each MiB", PHX_IO},
      {"\"chunks\":[\"", "\"chunks\":[\"Z", "hexadecimal", PHX_IO},
      {"\"config\":{", "\"config\":{\"a\":1,", "a is not an object", PHX_IO},
      {"\"plugins\":[", "\"plugins\":[{\"kind\":\"strategy\",\"id\":\"x\",\"version\":\"\",\"sha256\":\"\"},", "second",
       PHX_IO},
  };
  for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
    phx_error err = PHX_ERROR_INIT;
    const phx_status status = forged(cases[i].from, cases[i].to, &err);
    cr_expect_eq(status, cases[i].status, "%s -> %s: status %d: %s", cases[i].from, cases[i].to, status, err.message);
    if (!cases[i].says) continue;
    cr_expect(strstr(err.message, cases[i].says), "%s -> %s: said '%s', not '%s'", cases[i].from, cases[i].to,
              err.message, cases[i].says);
    cr_expect(strstr(err.message, "RUN/manifest.json"), "the file is not named: %s", err.message);
  }
}

Test(manifest, reading_gives_what_was_written) {
  checkpoint_fixture f = checkpoint_fixture_small();
  phx_model *model = checkpoint_fixture_model(&f);
  phx_error err = PHX_ERROR_INIT;
  phx__checkpoint_reader *r = NULL;
  char path[600];
  snprintf(path, sizeof path, "%s/c", dir);
  cr_assert_eq(phx__checkpoint_reader_open(path, &r, &err), PHX_OK, "%s", err.message);
  cr_assert_eq(phx__manifest_match(path, r->manifest, model, &err), PHX_OK, "%s", err.message);
  for (int state = -1; state < 2; state++)
    for (uint32_t u = 0; u < model->n_units; u++) {
      const int64_t blocks = phx_model_unit(model, u)->blocks[0];
      for (int64_t from = 0; from < blocks; from++)
        for (int64_t n = 1; from + n <= blocks; n++) {
          float *data = malloc((size_t)n * PHX_BLOCK * sizeof *data);
          phx__range range = {0};
          int64_t logical = 0, zero = 0;
          cr_assert_eq(phx__checkpoint_reader_blocks(r, state < 0 ? PHX_STATE_WEIGHT : PHX_STATE_OPTIM,
                                                     state < 0 ? 0 : (uint32_t)state, u, 0, from, n, data, &err),
                       PHX_OK, "%s", err.message);
          while (phx__layout_next(model, u, 0, from * PHX_BLOCK, n * PHX_BLOCK, &range))
            for (int64_t i = 0; i < range.numel; i++, logical++) {
              const float want = checkpoint_fixture_value(
                  &f, state, (uint32_t)(range.param - phx_model_param(model, 0)), range.in_param + i);
              cr_assert_eq(data[range.first - from * PHX_BLOCK + i], want);
            }
          for (int64_t i = 0; i < n * PHX_BLOCK; i++) zero += data[i] == 0;
          cr_assert_geq(zero, n * PHX_BLOCK - logical);
          free(data);
        }
    }
  float data[PHX_BLOCK];
  cr_assert_eq(phx__checkpoint_reader_private(r, &r->manifest->privates[1], data, &err), PHX_OK);
  cr_assert_eq(data[2], 3.0f);
  cr_assert_eq(phx__checkpoint_reader_blocks(r, PHX_STATE_BUFFER, 0, 0, 0, 0, 1, data, &err), PHX_INVALID);
  phx__checkpoint_reader_close(r);

  checkpoint_fixture other = f;
  other.width = 15;
  phx_model *wider = checkpoint_fixture_model(&other);
  phx__manifest *m = NULL;
  cr_assert_eq(phx__manifest_read(path, &m, &err), PHX_OK);
  cr_assert_eq(phx__manifest_match(path, m, wider, &err), PHX_INVALID);
  cr_assert(strstr(err.message, "wte.weight"), "%s", err.message);
  phx__manifest_free(m);
  phx__layout_free(wider);
  phx__layout_free(model);
}

/* ---- allocations that fail, each in its turn ---- */
static int64_t turn, calls;
static void *failing_calloc(size_t n, size_t bytes) { return ++calls == turn ? NULL : calloc(n, bytes); }
static void *failing_realloc(void *p, size_t bytes) { return ++calls == turn ? NULL : realloc(p, bytes); }

Test(manifest, every_allocation_of_reading_and_printing_fails_once) {
  size_t n;
  char *text = text_of(&n);
  phx__sys_table saved = phx__sys;
  int failed = 0;
  phx__sys.calloc = failing_calloc;
  phx__sys.realloc = failing_realloc;
  for (turn = 1; turn < 100000; turn++) {
    phx_error err = PHX_ERROR_INIT;
    phx__manifest *m = NULL;
    char *again = NULL;
    size_t bytes = 0;
    calls = 0;
    phx_status status = phx__manifest_parse("f", text, n, &m, &err);
    if (!status) status = phx__manifest_print("f", m, &again, &bytes, &err);
    phx__manifest_free(m);
    phx__free(again);
    if (calls < turn) {
      cr_assert_eq(status, PHX_OK, "%s", err.message);
      break;
    }
    cr_assert_eq(status, PHX_NOMEM, "allocation %lld failed, status %d: %s", (long long)turn, status, err.message);
    failed++;
  }
  phx__sys = saved;
  cr_assert_gt(failed, 100);
  free(text);
}
