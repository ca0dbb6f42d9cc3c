/* The file of weights: what is written is read back, and every kind of damage is exit status 4 with the file and the
 * tensor named; a file that is not there is a wrong argument, exit status 2. */
#include <criterion/criterion.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "training.h"

enum { ROOM = 1 << 20 };
static char *dir, *file, *header;
static size_t bytes, header_bytes;

static void setup(void) {
  cr_assert_not_null(dir = command_temp_dir());
  training_files(dir, "[batch]\nmicro = 1\nsequence = 33\n"
                      "[model]\nplugin = gpt\nlayers = 1\nheads = 3\nwidth = 30\ncontext = 33\nvocab = 257\n");
  command_result r = RUN(dir, 60, "train", "run.ini", "--steps", "3", "-n", "3", "--strategy", "fsdp");
  cr_assert_eq(r.status, 0, "%s", r.out);
  command_free(&r);
  char path[300];
  snprintf(path, sizeof path, "%s/out/model.safetensors", dir);
  FILE *f = fopen(path, "r");
  cr_assert_not_null(f);
  file = calloc(1, ROOM);
  bytes = fread(file, 1, ROOM, f);
  fclose(f);
  uint64_t length;
  memcpy(&length, file, 8);
  header_bytes = (size_t)length;
  header = calloc(1, header_bytes + 1);
  memcpy(header, file + 8, header_bytes);
}
static void teardown(void) {
  free(file);
  free(header);
  command_remove_dir(dir);
}
TestSuite(weights, .init = setup, .fini = teardown, .timeout = 120);

static void expect_damaged(const char *what, const char *message) {
  command_result r = RUN(dir, 30, "sample", "out", "--tokens", "2");
  cr_expect_eq(r.status, 4, "%s: status %d: %s", what, r.status, r.out);
  cr_expect(strstr(r.out, message) && strstr(r.out, "out/model.safetensors"), "%s: '%s' lacks '%s'", what, r.out,
            message);
  command_free(&r);
}
static void put(const void *data, size_t n) { command_write_file(dir, "out/model.safetensors", data, n); }

/* The header with one text replaced by another of the same length. */
static void put_replaced(const char *from, const char *to) {
  char *copy = malloc(bytes);
  cr_assert_eq(strlen(from), strlen(to));
  char *at = strstr(header, from);
  cr_assert_not_null(at, "%s", from);
  memcpy(copy, file, bytes);
  memcpy(copy + 8 + (at - header), to, strlen(to));
  put(copy, bytes);
  free(copy);
}

/* Independent of the writer: a plain walk through the JSON and the numbers behind it. */
Test(weights, file_is_as_the_format_says) {
  cJSON *root = cJSON_Parse(header), *t;
  double end = 0;
  int n = 0;
  cr_assert_not_null(root);
  cr_assert_str_eq(root->child->string, "__metadata__");
  cr_assert_str_eq(training_get(root->child, "step")->valuestring, "3");
  for (t = root->child->next; t; t = t->next) {
    double numel = 1;
    const cJSON *d, *offsets = training_get(t, "data_offsets");
    cJSON_ArrayForEach(d, training_get(t, "shape")) numel *= d->valuedouble;
    cr_assert_str_eq(training_get(t, "dtype")->valuestring, "F32");
    cr_assert_eq(cJSON_GetArrayItem(offsets, 0)->valuedouble, end, "%s: a hole", t->string);
    end = cJSON_GetArrayItem(offsets, 1)->valuedouble;
    cr_assert_eq(end - cJSON_GetArrayItem(offsets, 0)->valuedouble, 4 * numel, "%s", t->string);
    for (double at = end - 4 * numel; at < end; at += 4) {
      float x;
      memcpy(&x, file + 8 + header_bytes + (size_t)at, 4);
      cr_assert(x > -10 && x < 10, "%s: %g", t->string, x);
    }
    n++;
  }
  cr_assert(n == 16 && 8 + header_bytes + (size_t)end == bytes, "%d tensors, %zu bytes", n, bytes);
  float first;
  memcpy(&first, file + 8 + header_bytes, 4);
  cr_assert_neq(first, 0, "the embedding was not written");
  cJSON_Delete(root);
}

Test(weights, one_changed_number_is_seen_by_the_sampler) {
  command_result a = RUN(dir, 30, "sample", "out", "--tokens", "20", "--temperature", "0");
  cr_assert_eq(a.status, 0, "%s", a.out);
  const float huge = 50; /* the last norm's bias: the direction of every logit */
  for (size_t at = bytes - 120; at < bytes; at += 8) memcpy(file + at, &huge, 4);
  put(file, bytes);
  command_result b = RUN(dir, 30, "sample", "out", "--tokens", "20", "--temperature", "0");
  cr_assert_eq(b.status, 0, "%s", b.out);
  cr_assert_str_neq(a.out, b.out);
  command_free(&a);
  command_free(&b);
}

Test(weights, damage_is_named) {
  uint64_t length;
  char saved[8];
  memcpy(saved, file, 8);
  put("", 0);
  expect_damaged("empty", "ends too early");
  put(file, 5);
  expect_damaged("cut in the length", "ends too early, at byte 5");
  put(file, 100);
  expect_damaged("cut in the header", "is not a safetensors file");
  for (int i = 0; i < 3; i++) {
    length = (const uint64_t[]){0, 1u << 30, UINT64_MAX}[i];
    memcpy(file, &length, 8);
    put(file, bytes);
    expect_damaged("header length", "is not a safetensors file (header of ");
  }
  memcpy(file, saved, 8);
  file[8] = '[';
  put(file, bytes);
  expect_damaged("JSON", "the header is not JSON");
  file[8] = '{';
  put(file, bytes - 4);
  expect_damaged("one number is missing", "ends at byte");
  cJSON *root = cJSON_Parse(header), *last = root->child;
  while (last->next) last = last->next;
  expect_damaged("one number is missing", last->string);
  const char *const first = root->child->next->string;
  char from[128], to[128];
  snprintf(from, sizeof from, "\"%s\"", first);
  snprintf(to, sizeof to, "\"%s\"", first);
  to[1] = '?';
  put_replaced(from, to);
  expect_damaged("name", "has no tensor ");
  expect_damaged("name", first);
  put_replaced("\"F32\"", "\"F16\"");
  expect_damaged("type", "bytes, and its shape");
  expect_damaged("type", first);
  put_replaced("[257,30]", "[256,30]");
  expect_damaged("shape", "bytes, and its shape");
  put_replaced("[257,30]", "[30,257]");
  expect_damaged("turned", "tensor wte.weight has another shape than config.json says");
  put_replaced("\"data_offsets\":[0,", "\"data_offsets\":[4,");
  expect_damaged("size", "bytes, and its shape");
  cJSON_Delete(root);
}

Test(weights, tensors_that_overlap_are_refused) {
  cJSON *root = cJSON_Parse(header), *first = root->child->next, *second = first->next;
  cr_assert_not_null(second);
  cJSON *a = cJSON_GetObjectItem(first, "data_offsets"), *b = cJSON_GetObjectItem(second, "data_offsets");
  const double size = b->child->next->valuedouble - b->child->valuedouble;
  cJSON_SetNumberHelper(b->child, a->child->valuedouble + 4);
  cJSON_SetNumberHelper(b->child->next, a->child->valuedouble + 4 + size);
  char *text = cJSON_PrintUnformatted(root), *whole = calloc(1, bytes + 64);
  const uint64_t length = strlen(text);
  memcpy(whole, &length, 8);
  memcpy(whole + 8, text, length);
  memcpy(whole + 8 + length, file + 8 + header_bytes, bytes - 8 - header_bytes);
  put(whole, bytes - header_bytes + length);
  expect_damaged("overlap", "overlap");
  expect_damaged("overlap", second->string);
  free(text);
  free(whole);
  cJSON_Delete(root);
}

Test(weights, missing_is_a_wrong_argument) {
  char path[300];
  snprintf(path, sizeof path, "%s/out/model.safetensors", dir);
  cr_assert_eq(remove(path), 0);
  command_result r = RUN(dir, 30, "sample", "out");
  cr_expect(r.status == 2 && strstr(r.out, "out holds no model"), "%d: %s", r.status,
            r.out);
  command_free(&r);
}
