/* `phalanx checkpoint`: ls, verify, export, import and diff on checkpoints of a fixture, whole and damaged; and the
 * Python package, where there is one. */
#include <criterion/criterion.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "checkpoint_fixture.h"
#include "command.h"
#include "root.h"
#include "base/status.h"

static char *dir;
static void set_up(void) {
  dir = command_temp_dir();
}
static void tear_down(void) { command_remove_dir(dir); }
TestSuite(checkpoint_tools, .init = set_up, .fini = tear_down, .timeout = 300);

static const char *at(const char *name) {
  static char paths[8][600];
  static int next;
  char *path = paths[next++ % 8];
  snprintf(path, sizeof paths[0], "%s/%s", dir, name);
  return path;
}

/* Runs, checks the exit status and that the output says every text (NULL-terminated). */
static void expect(int status, const char *const *argv, const char *const *says) {
  command_result r = command_run(dir, 60, argv);
  cr_expect_eq(r.status, status, "phalanx checkpoint %s %s: status %d, not %d\n%s", argv[2], argv[3], r.status, status,
               r.out);
  for (; *says; says++) cr_expect(strstr(r.out, *says), "checkpoint %s: '%s' is not in:\n%s", argv[2], *says, r.out);
  command_free(&r);
}
#define ARGV(...) ((const char *const[]){"phalanx", "checkpoint", __VA_ARGS__, NULL})
#define SAYS(...) ((const char *const[]){__VA_ARGS__, NULL})

Test(checkpoint_tools, ls_and_verify) {
  checkpoint_fixture f = checkpoint_fixture_small();
  for (f.step = 3; f.step <= 12; f.step += 9, f.ranks = 3, f.pieces = 1) checkpoint_fixture_run(&f, at("run"));
  mkdir(at("run/checkpoints/.step-00000021.1.part"), 0755);
  expect(0, ARGV("ls", "run"), SAYS("strategy", "\n         3  zero           2", "\n        12  zero           3",
                                    "3 min  latest", "1 unfinished"));
  expect(0, ARGV("verify", "run/checkpoints/step-00000003"), SAYS("whole: 28 parameters, 2 optimizer states"));
  expect(0, ARGV("verify", "run"), SAYS("step-00000012: whole", "in 3 files"));
  f.masters = f.privates = true;
  checkpoint_fixture_write(&f, at("masters"));
  expect(0, ARGV("verify", "masters"), SAYS("whole"));
  expect(2, ARGV("ls", "nothing"), SAYS("nothing has no checkpoints"));
  expect(2, ARGV("verify", "nothing"), SAYS("neither a checkpoint"));
  expect(2, ARGV("verify"), SAYS("usage"));
  expect(2, ARGV("exprot", "x"), SAYS("did you mean 'export'"));
  command_write_file(dir, "run/checkpoints/latest", "../../etc\n", 10);
  expect(4, ARGV("verify", "run"), SAYS("latest names no checkpoint"));
}

Test(checkpoint_tools, damage_is_named) {
  checkpoint_fixture f = checkpoint_fixture_small();
  f.width = 120; /* several chunks a file */
  f.vocab = 2000;
  checkpoint_fixture_write(&f, at("c"));
  checkpoint_fixture_write(&f, at("c2"));
  const int fd = open(at("c/rank-00001.safetensors"), O_RDWR);
  char byte;
  cr_assert_eq(pread(fd, &byte, 1, 5000), 1);
  byte = (char)(byte ^ 4);
  cr_assert_eq(pwrite(fd, &byte, 1, 5000), 1);
  close(fd);
  expect(4, ARGV("verify", "c"), SAYS("c/rank-00001.safetensors is damaged in bytes 0 to 1048575", "weight/0/0/"));
  expect(4, ARGV("export", "c", "out"),
         SAYS("rank-00001.safetensors is damaged", "weight/0/0/", "parameter wte.weight"));
  expect(4, ARGV("diff", "c", "c2"), SAYS("rank-00001.safetensors is damaged"));
  cr_assert_neq(access(at("out"), F_OK), 0, "a damaged checkpoint was exported, or leftovers");
  unlink(at("c2/rank-00000.safetensors"));
  expect(4, ARGV("verify", "c2"), SAYS("c2/rank-00000.safetensors", "No such file"));
  unlink(at("c2/manifest.json"));
  rename(at("c2"), at("step-00000003"));
  expect(4, ARGV("verify", "step-00000003"), SAYS("step-00000003/manifest.json", "No such file"));
}

/* The exported file has the published layout: (in, out), and the same values. */
static void check_export(const checkpoint_fixture *f, const char *path) {
  phx_error err = PHX_ERROR_INIT;
  phx__safetensors *st = NULL;
  float got;
  cr_assert_eq(phx__safetensors_open(path, &st, &err), PHX_OK, "%s", err.message);
  cr_assert_str_eq(phx__safetensors_metadata(st, "format"), "pt");
  cr_assert_eq((int)st->n, 4 + 12 * f->layers);
  const phx__tensor *t = phx__safetensors_find(st, "h.1.attn.c_attn.weight"); /* parameter 2 + 12 + 2 */
  cr_assert(t && t->shape[0] == f->width && t->shape[1] == 3 * f->width);
  for (int64_t in = 0; in < f->width; in++)
    for (int64_t out = 0; out < 3 * f->width; out++) {
      cr_assert_eq(phx__safetensors_read(st, t, (in * 3 * f->width + out) * 4, 4, &got, &err), PHX_OK);
      cr_assert_eq(got, checkpoint_fixture_value(f, -1, 16, out * f->width + in));
    }
  t = phx__safetensors_find(st, "wte.weight");
  cr_assert(t && t->shape[0] == f->vocab && t->shape[1] == f->width);
  cr_assert_eq(phx__safetensors_read(st, t, 77 * 4, 4, &got, &err), PHX_OK);
  cr_assert_eq(got, checkpoint_fixture_value(f, -1, 0, 77));
  cr_assert_null(phx__safetensors_find(st, "lm_head.weight"));
  phx__safetensors_close(st);
}

Test(checkpoint_tools, export_import_and_diff) {
  checkpoint_fixture f = checkpoint_fixture_small();
  f.pieces = 1;
  f.ranks = 3;
  checkpoint_fixture_run(&f, at("run"));
  expect(0, ARGV("export", "run", "hf"), SAYS("hf/model.safetensors: 28 tensors of step 3"));
  check_export(&f, at("hf/model.safetensors"));
  char *config = command_read_file(dir, "hf/config.json");
  cr_assert(strstr(config, "\"n_head\": 3") && strstr(config, "\"n_embd\": 12") &&
                strstr(config, "\"vocab_size\": 257") && strstr(config, "\"tie_word_embeddings\": true"),
            "%s", config);
  free(config);
  expect(2, ARGV("export", "run", "hf"), SAYS("not overwritten"));
  expect(0, ARGV("import", "hf", "-o", "new"), SAYS("new/checkpoints/step-00000000: 28 parameters"));
  expect(0, ARGV("verify", "new"), SAYS("whole"));
  expect(0, ARGV("ls", "new"), SAYS("ddp", "latest"));
  expect(0, ARGV("diff", "run", "new", "--weights"), SAYS("equal: 28 tensors"));
  expect(1, ARGV("diff", "run", "new"),
         SAYS("step: 3 and 0", "first difference: m of wte.weight: element 0", "56 of 84"));
  expect(0, ARGV("import", "hf", "-o", "step-00000007"), SAYS("step-00000007"));
  expect(0, ARGV("diff", "new", "step-00000007"), SAYS("equal: 84 tensors"));
  expect(0, ARGV("diff", "run", "run"), SAYS("equal: 84 tensors, bit for bit"));
  expect(0, ARGV("diff", "hf/model.safetensors", "hf/model.safetensors"), SAYS("weights only"));
  expect(0, ARGV("diff", "run", "hf/model.safetensors"), SAYS("equal: 28 tensors, bit for bit (weights only)"));
  expect(0, ARGV("diff", "hf/model.safetensors", "new"), SAYS("equal: 28 tensors"));
  expect(2, ARGV("import", "hf", "-o", "new"), SAYS("not overwritten"));
  expect(2, ARGV("import", "hf", "-o", "run"), SAYS("checkpoints of its own"));
  f.step = 4;
  checkpoint_fixture_run(&f, at("run"));
  expect(1, ARGV("diff", "run/checkpoints/step-00000003", "run"), SAYS("first difference: wte.weight: element 0",
                                                                     "84 of 84", "maximum difference"));
  expect(1, ARGV("diff", "hf/model.safetensors", "run"), SAYS("first difference: wte.weight: element 0",
                                                              "28 of 28"));
  /* what does not fit is refused, and leaves nothing */
  config = command_read_file(dir, "hf/config.json");
  *strstr(config, "\"n_layer\": 2") = ' ';
  command_write_file(dir, "hf/config.json", config, strlen(config));
  expect(4, ARGV("import", "hf", "-o", "bad"), SAYS("config.json is not JSON"));
  free(config);
  const char *two =
      "{\"model_type\":\"gpt2\",\"n_layer\":3,\"n_head\":3,\"n_embd\":12,\"n_positions\":9,\"vocab_size\":257}";
  command_write_file(dir, "hf/config.json", two, strlen(two));
  expect(2, ARGV("import", "hf", "-o", "bad"), SAYS("has no tensor h.2."));
  cr_assert_neq(access(at("bad"), F_OK), 0, "a refused import left something");
}

/* No room: no damage, and nothing is left. */
Test(checkpoint_tools, a_full_disk) {
  static const char *const lines[] = {"export run full", "import hf -o full"};
  const checkpoint_fixture f = checkpoint_fixture_small();
  char line[700];
  checkpoint_fixture_run(&f, at("run"));
  expect(0, ARGV("export", "run", "hf"), SAYS("28 tensors"));
  for (int i = 0; i < 2; i++) {
    snprintf(line, sizeof line, "trap '' XFSZ; ulimit -f 8; exec %s checkpoint %s", test_path("bin/phalanx"), lines[i]);
    command_result r = command_run(dir, 60, (const char *const[]){"/bin/sh", "-c", line, NULL});
    cr_assert_eq(r.status, 3, "%s: status %d: %s", lines[i], r.status, r.out);
    cr_assert(strstr(r.out, "File too large"), "%s", r.out);
    cr_assert_neq(access(at("full"), F_OK), 0, "%s left something", lines[i]);
    command_free(&r);
  }
}

/* A file as transformers' save_pretrained writes it: the prefix, masks, a head; half precision. */
Test(checkpoint_tools, import_of_other_spellings) {
  checkpoint_fixture f = checkpoint_fixture_small();
  phx_error err = PHX_ERROR_INIT;
  phx__safetensors *st = NULL;
  phx__safetensors_writer *w = NULL;
  phx__tensor tensors[64] = {0};
  char names[64][80];
  checkpoint_fixture_run(&f, at("run"));
  expect(0, ARGV("export", "run", "hf"), SAYS("28 tensors"));
  cr_assert_eq(phx__safetensors_open(at("hf/model.safetensors"), &st, &err), PHX_OK);
  for (int differs = 0; differs < 2; differs++) {
    const uint32_t n = st->n;
    for (uint32_t i = 0; i < n; i++) {
      snprintf(names[i], sizeof names[0], "transformer.%s", st->tensors[i].name);
      tensors[i] = st->tensors[i];
      tensors[i].name = names[i];
    }
    tensors[n] = *phx__safetensors_find(st, "wte.weight");
    tensors[n].name = "lm_head.weight";
    tensors[n + 1] =
        (phx__tensor){.name = "transformer.h.0.attn.bias", .dtype = PHX_U8, .ndim = 4, .shape = {1, 1, 9, 9}};
    mkdir(at("other"), 0755);
    cr_assert_eq(phx__safetensors_create(at("other/model.safetensors"), tensors, n + 2, NULL, false, &w, &err), PHX_OK);
    for (uint32_t i = 0; i <= n; i++) {
      const phx__tensor *from = i < n ? &st->tensors[i] : phx__safetensors_find(st, "wte.weight");
      float *data = calloc(1, (size_t)from->bytes);
      cr_assert_eq(phx__safetensors_read(st, from, 0, from->bytes, data, &err), PHX_OK);
      if (i == n && differs) data[5] += 1;
      cr_assert_eq(phx__safetensors_write(w, i, 0, from->bytes, data, &err), PHX_OK);
      free(data);
    }
    cr_assert_eq(phx__safetensors_finish(w, NULL, &err), PHX_OK);
    phx__safetensors_writer_close(w);
    char *config = command_read_file(dir, "hf/config.json");
    command_write_file(dir, "other/config.json", config, strlen(config));
    free(config);
    if (differs) expect(2, ARGV("import", "other", "-o", "untied"), SAYS("lm_head.weight differs", "tied"));
    else expect(0, ARGV("import", "other", "-o", "new"), SAYS("28 parameters"));
  }
  expect(0, ARGV("diff", "run", "new", "--weights"), SAYS("equal: 28 tensors"));
  phx__safetensors_close(st);
}

/* 0: harmless (reads as before); 1: found.  Never anything else. */
static int outcome(const char *what) {
  phx_error err = PHX_ERROR_INIT;
  phx__checkpoint_reader *r = NULL;
  phx__safetensors *st = NULL;
  float *data = malloc(PHX_BLOCK * 64 * sizeof *data);
  phx_status status = phx__checkpoint_reader_open(at("c"), &r, &err);
  for (uint32_t i = 0; !status && i < r->manifest->n_slices; i++) {
    const phx__manifest_slice *s = &r->manifest->slices[i];
    status =
        phx__checkpoint_reader_blocks(r, s->kind, s->index, s->unit, s->flat, s->first_block, s->blocks, data, &err);
  }
  phx__checkpoint_reader_close(r);
  cr_assert(status == PHX_OK || status == PHX_IO, "%s: status %d: %s", what, status, err.message);
  if (status)
    cr_assert(strstr(err.message, "rank-0000") || strstr(err.message, "manifest.json"), "%s: %s", what, err.message);
  if (!phx__safetensors_open(at("c/rank-00000.safetensors"), &st, &err)) phx__safetensors_close(st);
  if (!phx__safetensors_open(at("c/rank-00001.safetensors"), &st, &err)) phx__safetensors_close(st); /* no crash */
  free(data);
  return status != PHX_OK;
}

/* Every bit of the length and of what the header says, some of its padding, then `more` of anything. */
static void flip_bits(int fd, const unsigned char *whole, size_t bytes, size_t more, const char *name) {
  uint64_t x = 12345, length;
  memcpy(&length, whole, sizeof length);
  const size_t header = 8 + (size_t)length, text = 8 + strcspn((const char *)whole + 8, " ");
  cr_assert(text <= header && header < bytes);
  for (size_t bit = 0; bit < header * 8 + more; bit += bit < text * 8 || bit >= header * 8 ? 1 : 101) {
    size_t b = bit;
    if (bit >= header * 8) {
      x = x * 6364136223846793005u + 1442695040888963407u;
      b = (size_t)(x >> 20) % (bytes * 8);
    }
    const unsigned char flipped = (unsigned char)(whole[b / 8] ^ 1 << b % 8);
    cr_assert_eq(pwrite(fd, &flipped, 1, (off_t)(b / 8)), 1);
    cr_assert_eq(outcome("a bit"), 1, "bit %zu of %s was not found", b, name);
    cr_assert_eq(pwrite(fd, &whole[b / 8], 1, (off_t)(b / 8)), 1);
  }
  cr_assert_eq(outcome("repaired"), 0);
}

static unsigned char *open_whole(const char *path, int *fd, off_t *bytes) {
  struct stat st;
  *fd = open(path, O_RDWR);
  cr_assert(*fd >= 0 && !fstat(*fd, &st), "%s", path);
  unsigned char *whole = malloc((size_t)st.st_size);
  cr_assert_eq(pread(*fd, whole, (size_t)st.st_size, 0), st.st_size);
  *bytes = st.st_size;
  return whole;
}

Test(checkpoint_tools, hostile_shards) {
  checkpoint_fixture f = checkpoint_fixture_small();
  f.width = 6;
  f.vocab = 100;
  f.layers = 1;
  checkpoint_fixture_write(&f, at("c"));
  f.step = 4;
  checkpoint_fixture_write(&f, at("c4"));
  cr_assert_eq(outcome("whole"), 0);
  char path[600], other[600], kept[600];
  snprintf(path, sizeof path, "%s", at("c/rank-00000.safetensors"));
  snprintf(other, sizeof other, "%s", at("c/rank-00001.safetensors"));
  snprintf(kept, sizeof kept, "%s", at("kept"));
  off_t bytes;
  int fd;
  unsigned char *whole = open_whole(other, &fd, &bytes);
  flip_bits(fd, whole, (size_t)bytes, 0, other);
  free(whole);
  close(fd);
  whole = open_whole(path, &fd, &bytes);
  flip_bits(fd, whole, (size_t)bytes, 10000, path);
  for (off_t length = bytes - 1; length > 0; length -= length % 512 ? length % 512 : 512) {
    cr_assert_eq(ftruncate(fd, length), 0);
    cr_assert_eq(outcome("cut"), 1, "cut at %lld", (long long)length);
  }
  cr_assert_eq(pwrite(fd, whole, (size_t)bytes, 0), bytes);
  cr_assert_eq(outcome("restored"), 0);
  cr_assert_eq(pwrite(fd, "more", 4, bytes), 4);
  cr_assert_eq(outcome("longer"), 1);
  cr_assert_eq(ftruncate(fd, bytes), 0);
  close(fd);
  rename(path, kept);
  cr_assert_eq(outcome("deleted"), 1);
  rename(other, path);
  rename(kept, other);
  cr_assert_eq(outcome("exchanged"), 1);
  rename(other, kept);
  rename(path, other);
  rename(at("c4/rank-00000.safetensors"), path);
  cr_assert_eq(outcome("of another step"), 1);
  rename(kept, path);
  cr_assert_eq(outcome("put back"), 0);
  rename(at("c4/manifest.json"), at("c/manifest.json"));
  cr_assert_eq(outcome("another step's manifest"), 1);
  free(whole);
}

/* ---- Python ---- */
static const char python_test[] =
    "import sys, struct\n"
    "from safetensors import safe_open, numpy as sn\n"
    "import numpy as np\n"
    "with safe_open(sys.argv[1], 'np') as f:\n"
    "    names = list(f.keys())\n"
    "    assert len(names) == 28 and f.metadata() == {'format': 'pt'}, (len(names), f.metadata())\n"
    "    assert f.get_tensor('h.1.mlp.c_fc.weight').shape == (12, 48)\n"
    "tensors = sn.load_file(sys.argv[1])\n"
    "sn.save_file(tensors, sys.argv[2], metadata={'format': 'pt'})\n"
    "shards, elements = sys.argv[3:], 0\n"
    "assert len(shards) == 2\n"
    "for shard in shards:\n"
    "    with safe_open(shard, 'np') as f:\n"
    "        assert len(list(f.keys())) > 0, shard\n"
    "        for name in f.keys():\n"
    "            assert f.get_tensor(name).dtype == np.float32, name\n"
    "            elements += f.get_tensor(name).size\n"
    "whole = sum(t.size for t in tensors.values())\n"
    "assert elements >= 3 * whole, (elements, whole)\n"; /* weights and two states, and padding of blocks */

static int python(const char *code, const char *a, const char *b, const char *c, const char *d) {
  const pid_t pid = fork();
  if (!pid) {
    execlp("python3", "python3", "-c", code, a, b, c, d, (char *)NULL);
    _exit(127);
  }
  int status = -1;
  waitpid(pid, &status, 0);
  return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

Test(checkpoint_tools, python_reads_ours_and_we_read_its) {
  if (python("import importlib.util as u, sys; sys.exit(not (u.find_spec('safetensors') and u.find_spec('numpy')))", "",
             "", "", ""))
    cr_skip("python3 has no package safetensors with numpy\n");
  checkpoint_fixture f = checkpoint_fixture_small();
  checkpoint_fixture_run(&f, at("run"));
  expect(0, ARGV("export", "run", "hf"), SAYS("28 tensors"));
  mkdir(at("py"), 0755);
  cr_assert_eq(python(python_test, at("hf/model.safetensors"), at("py/model.safetensors"),
                      at("run/checkpoints/step-00000003/rank-00000.safetensors"),
                      at("run/checkpoints/step-00000003/rank-00001.safetensors")), 0);
  check_export(&f, at("py/model.safetensors"));
  rename(at("hf/config.json"), at("py/config.json"));
  expect(0, ARGV("import", "py", "-o", "new"), SAYS("28 parameters"));
  expect(0, ARGV("diff", "run", "new", "--weights"), SAYS("equal"));
}
