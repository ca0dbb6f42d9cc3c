/* Configuration: values and their sources, plugin sections, every refusal, the printed form and the hash. */
#include <criterion/criterion.h>
#include <phalanx/strategy.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include "config/config.h"
#include "plugin/config_load.h"
#include "config/settings.h"
#include "config/option.h"
#include "base/status.h"
#include "base/sys.h"

#define STUBS PHX_TEST_ONLY_PLUGINS "/stubs"

/* The fields of tests/plugins/stubs/strategy.c. */
typedef struct strategy_settings {
  int64_t bucket_bytes, prefetch, limit;
  double ratio;
  const char *note;
  int32_t overlap, sharding;
} strategy_settings;

static char file[64], report[16384];

static void set_up(void) {
  setenv("PHALANX_PLUGIN_PATH", STUBS, 1);
  snprintf(file, sizeof file, "/tmp/phx-config-XXXXXX");
  int fd = mkstemp(file);
  cr_assert_geq(fd, 0);
  close(fd);
}
static void tear_down(void) { unlink(file); }
TestSuite(config, .init = set_up, .fini = tear_down, .timeout = 60);

/* "(found: ...)" names real plugins too, as far as they are built. */
static void cut_found(char *line) {
  char *from = strstr(line, " (found: "), *to = from ? strchr(from, ')') : NULL;
  if (to) memmove(from, to + 1, strlen(to));
}

/* Into `report`, without what depends on the real plugins that the stubs stand in front of. */
static phx_status load(const char *ini, const phx__override *overrides, size_t n, phx__config **out) {
  char *all = NULL, *save = NULL;
  size_t bytes;
  FILE *f = fopen(file, "w"), *to = open_memstream(&all, &bytes);
  cr_assert(f && to);
  fputs(ini, f);
  fclose(f);
  phx_status status = phx__config_load(file, overrides, n, to, out);
  fclose(to);
  report[0] = 0;
  for (char *line = strtok_r(all, "\n", &save); line; line = strtok_r(NULL, "\n", &save))
    if (!strstr(line, "is not used")) {
      size_t used = strlen(report);
      cut_found(line);
      cr_expect_eq(strncmp(line, "phalanx: ", 9), 0, "%s", line);
      line += 9;
      const char *short_line = strncmp(line, file, strlen(file)) == 0 ? line + strlen(file) : line;
      snprintf(report + used, sizeof report - used, "%s\n", short_line);
    }
  free(all);
  return status;
}

static phx__config *expect_good(const char *ini) {
  phx__config *config = NULL;
  cr_assert_eq(load(ini, NULL, 0, &config), PHX_OK, "%s", report);
  cr_assert_not_null(config);
  return config;
}

/* Exactly these lines, without the file's name. */
static void expect_report(const char *ini, const char *lines) {
  phx__config *config = (phx__config *)&file;
  cr_expect_eq(load(ini, NULL, 0, &config), PHX_INVALID);
  cr_expect_null(config);
  cr_expect_str_eq(report, lines);
}

#define DATA "[data]\ntrain = corpus.bin\n"

Test(config, defaults) {
  phx__config *c = expect_good(DATA);
  cr_expect_str_eq(report, "");
  cr_expect_str_eq(c->s.run.strategy, "ddp");
  cr_expect_str_eq(c->s.run.out, "runs/demo");
  cr_expect(c->s.run.ranks == 1 && c->s.run.steps == 200 && c->s.run.seed == 1337 && c->s.run.deterministic == 1);
  cr_expect(c->s.run.timeout == 60 && c->s.run.hash_every == 0 && c->s.run.valid_every == 0);
  cr_expect(c->s.run.valid_windows == 0 && c->s.run.log_every == 1 && c->s.run.pin == 0);
  cr_expect(c->s.batch.micro == 4 && c->s.batch.accumulate == 1 && c->s.batch.sequence == 256);
  cr_expect(c->s.batch.reduce == PHX_REDUCE_STEP && c->s.batch.total == 0);
  cr_expect_str_eq(c->s.optimizer.name, "adamw");
  cr_expect(c->s.optimizer.lr == 3e-4 && c->s.optimizer.schedule == 2);
  cr_expect(c->s.optimizer.warmup == 0 && c->s.optimizer.final == 0.1 && c->s.optimizer.weight_decay == 0.1);
  const double *own = c->optimizer.config; /* beta1, beta2, eps */
  cr_expect(c->s.optimizer.clip == 1.0 && own[0] == 0.9 && own[1] == 0.95 && own[2] == 1e-8);
  cr_expect(c->s.precision.compute == 0 && c->s.precision.reduce == 0);
  cr_expect(c->s.device.threads == -1 && c->s.checkpoint.every == 0);
  cr_expect_str_eq(c->s.device.plugin, "cpu");
  cr_expect_str_eq(c->s.comm.plugin, "shm");
  cr_expect_str_eq(c->s.model.plugin, "gpt");
  cr_expect_str_eq(c->s.data.train, "corpus.bin");
  cr_expect_str_eq(c->s.data.valid, "");
  cr_expect_str_eq(c->s.plugins.path, "");
  cr_expect_str_eq(c->model.plugin->descriptor->id, "gpt");
  const strategy_settings *s = c->strategy.config;
  cr_expect(s->bucket_bytes == 25 << 20 && s->prefetch == 1 && s->limit == -1 && s->ratio == 0.5 && s->overlap == 1);
  cr_expect_str_eq(s->note, "");
  phx__config_free(c);
}

Test(config, core_tables_are_fit) {
  phx_error err = PHX_ERROR_INIT;
  const phx__core_table *t;
  uint32_t i = 0;
  for (; (t = phx__core_table_at(i)); i++) {
    cr_expect_eq(phx__options_check(t->options, t->n, sizeof(phx_option), sizeof(phx__settings), &err), PHX_OK,
                 "[%s] %s", t->section, err.message);
    cr_expect_eq(phx__core_section(t->section), t);
  }
  cr_expect_eq(i, 10);
  cr_expect_null(phx__core_section("fsdp"));
}

Test(config, default_file_override) {
  const phx__override overrides[] = {
      {"run.ranks=2", "-n"}, {"batch.micro=8", "--set"}, {"batch.micro=16", "--set"}, {"fsdp.sharding=none", "--set"}};
  phx__config *c;
  cr_assert_eq(load("[run]\nstrategy = fsdp\nranks = 3\nsteps = 7\n" DATA
                    "[fsdp]\nsharding = grad_op\nbucket_bytes = 1 MiB\nlimit = 5\n[model]\nlayers = 3\n",
                    overrides, 4, &c),
               PHX_OK, "%s", report);
  cr_expect(c->s.run.ranks == 2 && c->s.run.steps == 7 && c->s.batch.micro == 16);
  const strategy_settings *s = c->strategy.config;
  cr_expect(s->sharding == 2 && s->bucket_bytes == 1 << 20 && s->limit == 5);
  cr_expect_eq(*(const int64_t *)c->model.config, 3);
  phx__config_free(c);
}

Test(config, unselected_sections_are_validated) {
  expect_report(DATA "[fsdp]\nsharding = half\nprefech = 2\n",
                ":4: [fsdp] 'half' is not valid for sharding: expected full | grad_op | none\n"
                ":5: [fsdp] has no key 'prefech': did you mean 'prefetch'?\n");
  phx__config_free(expect_good(DATA "[pair]\nratio = 0\n")); /* pair's required note is not needed */
}

/* A plugin of the source tree that this build may lack. */
Test(config, the_section_of_a_plugin_that_is_not_built) {
  if (access(PHX_TEST_PLUGINS "/phx_comm_nccl.so", F_OK) == 0) {
    expect_report(DATA "[nccl]\nanything = 1\n", ":4: [nccl] has no key 'anything'\n");
  } else {
    phx__config_free(expect_good(DATA "[nccl]\nanything = 1\n"));
    cr_expect_str_eq(report, ":3: warning: [nccl] is not checked: no plugin of that name is installed\n");
  }
  expect_report(DATA "[mpi]\nanything = 1\n",
                ":3: there is no section [mpi], in the core or of an installed plugin\n");
}

Test(config, strategy_by_path) {
  phx__config *c;
  const phx__override path = {"run.strategy=" STUBS "/phx_strategy_fsdp.so", "--strategy"};
  cr_assert_eq(load(DATA "[fsdp]\nprefetch = 3\n", &path, 1, &c), PHX_OK, "%s", report);
  cr_expect_eq(((const strategy_settings *)c->strategy.config)->prefetch, 3);
  phx__config_free(c);
  const phx__override missing = {"run.strategy=/nonexistent/mine.so", "--strategy"};
  cr_assert_eq(load(DATA "[mine]\nx = 1\n", &missing, 1, &c), PHX_INVALID);
  cr_expect(strstr(report, "--strategy /nonexistent/mine.so: [run] strategy: "), "%s", report);
  cr_expect_null(strstr(report, "[mine]"), "its section cannot be judged: %s", report);
}

/* A plugin from a later header: its options are read with its own stride. */
Test(config, new_plugin) {
  phx__config *c = expect_good("[run]\nstrategy = new\ndeterministic = no\n" DATA "[new]\na = 7\n");
  const int64_t *ab = c->strategy.config;
  cr_expect(ab[0] == 7 && ab[1] == 4);
  phx__config_free(c);
}

Test(config, all_errors_at_once) {
  expect_report(
      "[run]\nstrategy = fspd\nsteps = many\nsteps = 3\nstep = 4\n  x = 1\n"
      "[optimiser]\nlr = 1\n[batch]\nmicro = 0\na:b = 1\n[device]\nplugin = vulkan\n",
      ":2: [run] strategy: there is no strategy plugin 'fspd': "
      "did you mean 'fsdp'?\n"
      ":3: [run] 'many' is not valid for steps: expected a whole number from 1 to 1000000000\n"
      ":4: [run] steps is given twice: first on line 3\n"
      ":5: [run] has no key 'step': did you mean 'steps'?\n"
      ":6: an indented line would continue the one above: begin it in the first column\n"
      ":7: there is no section [optimiser], in the core or of an installed plugin: did you mean 'optimizer'?\n"
      ":10: [batch] '0' is not valid for micro: expected a whole number from 1 to 1048576\n"
      ":11: [batch] has no key 'a' (':' ends a key, like '=')\n"
      ":13: [device] plugin: there is no device plugin 'vulkan'\n"
      ": [data] train is missing: Token file to train on, or a glob of several.\n");
}

#define GPUS "[plugins]\npath = " PHX_TEST_ONLY_PLUGINS "/gpus\n"

Test(config, automatic_plugins) {
  phx__config *c = expect_good(DATA);
  /* a build may have both, nccl alone (under a sanitizer), or none */
  if (access(PHX_TEST_PLUGINS "/phx_device_cuda.so", F_OK) == 0)
    cr_expect(strncmp(c->device_why, "cpu: cuda cannot run here", 25) == 0, "%s", c->device_why);
  else
    cr_expect_str_eq(c->device_why, "cpu: it can run here");
  const bool nccl = access(PHX_TEST_PLUGINS "/phx_comm_nccl.so", F_OK) == 0;
  cr_expect_str_eq(c->comm_why, nccl ? "shm: device cpu is not cuda" : "shm: it can run here");
  phx__config_free(c);
  c = expect_good(DATA "[plugins]\npath = " PHX_TEST_ONLY_PLUGINS "/refusing\n");
  cr_expect_str_eq(c->device_why, "cpu: cuda cannot run here: cuda is for tests of the loader: it cannot run");
  cr_expect_str_eq(c->s.device.plugin, "cpu");
  phx__config_free(c);
  c = expect_good(DATA "[plugins]\npath = " PHX_TEST_ONLY_PLUGINS "/lost\n");
  cr_expect(strstr(c->device_why, "libphx-is-nowhere.so: cannot open shared object"), "%s", c->device_why);
  phx__config_free(c);
  c = expect_good(DATA "[device]\nplugin = cpu\n");
  cr_expect_str_eq(c->device_why, "");
  phx__config_free(c);
  c = expect_good("[device]\nplugin = cpu\n" DATA GPUS);
  cr_expect_str_eq(c->comm_why, "shm: device cpu is not cuda");
  phx__config_free(c);
}

Test(config, automatic_plugins_on_gpus) {
  phx__config *c = expect_good("[run]\nranks = 2\n" DATA GPUS);
  cr_expect_str_eq(c->s.device.plugin, "cuda");
  cr_expect_str_eq(c->s.comm.plugin, "nccl");
  cr_expect_str_eq(c->comm_why, "nccl: no two ranks share a device");
  cr_expect_eq(c->s.run.deterministic, 0);
  cr_expect(strstr(report, "deterministic = auto comes to no on device cuda"), "%s", report);
  phx__config_free(c);
  c = expect_good("[run]\nranks = 3\ndeterministic = yes\n" DATA GPUS "[cuda]\nshare = yes\n");
  cr_expect_str_eq(c->s.comm.plugin, "shm");
  cr_expect_str_eq(c->comm_why, "shm: 3 ranks may share 2 devices");
  cr_expect_eq(c->s.run.deterministic, 1);
  phx__config_free(c);
}

/* A launcher that shows each of four ranks two of eight: the device refuses a second rank on one, so none is shared. */
Test(config, each_rank_may_be_shown_its_own_gpus) {
  const char *const variables[] = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT"};
  for (int i = 0; i < 5; i++) setenv(variables[i], i < 2 ? "3" : "4", 1);
  phx__config *c = expect_good("[run]\nranks = 4\n" DATA GPUS);
  cr_expect_str_eq(c->comm_why, "nccl: no two ranks share a device");
  phx__config_free(c);
  c = expect_good("[run]\nranks = 4\n" DATA GPUS "[cuda]\nshare = yes\n");
  cr_expect_str_eq(c->comm_why, "shm: 4 ranks may share 2 devices");
  phx__config_free(c);
}

Test(config, plugins_that_do_not_fit) {
  expect_report(DATA "[device]\nplugin = absent\n",
                ":4: [device] plugin = absent cannot run here: absent is for tests of the loader: it cannot run\n");
  expect_report("[run]\nstrategy = pair\ndeterministic = yes\n" DATA,
                ":3: strategy pair does not promise the same bits as others: [run] deterministic must be no\n"
                ": [pair] note is missing: A note that must be given.\n"
                ": strategy pair needs at least two ranks: [run] ranks = 1\n");
  expect_report(DATA "[comm]\nplugin = mpi\n", ":4: [comm] plugin: there is no comm plugin 'mpi'\n");
  expect_report(DATA "[model]\nplugin = llama\nlayers = 3\n",
                ":4: [model] plugin: there is no model plugin 'llama'\n");
  expect_report(DATA "[gpt]\nlayers = 3\n", ":3: the options of model gpt stand in [model], not in [gpt]\n");
  expect_report(DATA "[plugins]\npath = lib\n", ":4: plugin directory 'lib' is not an absolute path\n");
}

Test(config, settings_that_do_not_go_together) {
  expect_report("[run]\nranks = 2\n[batch]\nmicro = 3\naccumulate = 5\ntotal = 32\n" DATA,
                ":6: [batch] total = 32, but ranks x micro x accumulate = 2 x 3 x 5 = 30\n");
  phx__config_free(expect_good("[run]\nranks = 2\n[batch]\nmicro = 3\naccumulate = 5\ntotal = 30\n" DATA));
  phx__config_free(expect_good("[run]\nsteps = 9\n[optimizer]\nwarmup = 10\n" DATA)); /* a short trial of a long run */
  /* stubs that do not say that they take bf16 */
  expect_report(DATA "[precision]\ncompute = bf16\n",
                ":4: [precision] compute = bf16: strategy ddp keeps and reduces fp32 only: use fp32\n"
                ":4: [precision] compute = bf16: device cpu computes in fp32 only: use fp32\n"
                ":4: [precision] compute = bf16: model gpt computes in fp32 only: use fp32\n");
  expect_report(
      DATA "[precision]\nreduce = fp16\n",
      ":4: [precision] reduce = fp16: its range ends at 65504 and gradients below 6e-8 vanish, so it needs loss "
      "scaling, which is not offered; bf16 has fp32's range: use bf16\n");
  phx__config_free(expect_good(DATA "[checkpoint]\nevery = 5\nkeep = 0\nkeep_every = 10\n"));
  expect_report("[run]\nout =\n" DATA, ":2: [run] out is empty: name a directory\n");
  expect_report("[data]\ntrain =\n",
                ":2: [data] '' is not valid for train: expected text on one line, not empty, without ' ;' in it\n");
}

Test(config, overrides_are_checked) {
  static const struct {
    const char *text, *line;
  } cases[] = {{"nonsense", "--set nonsense: expected section.key=value\n"},
               {"a=b.c", "--set a=b.c: expected section.key=value\n"},
               {".x=1", "--set .x=1: expected section.key=value\n"},
               {"run.=1", "--set run.=1: expected section.key=value\n"},
               {"run.stesp=1", "--set run.stesp=1: [run] has no key 'stesp': did you mean 'steps'?\n"},
               {"rum.steps=1",
                "--set rum.steps=1: there is no section [rum], in the core or of an installed plugin: did you mean "
                "'run'?\n"},
               {"run.steps=", "--set run.steps=: [run] '' is not valid for steps: expected a whole number from 1 to "
                              "1000000000\n"},
               {"data.valid=a ;b",
                "--set data.valid=a ;b: [data] 'a ;b' is not valid for valid: expected text on one line, without ' ;' "
                "in it\n"}};
  for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
    const phx__override override = {cases[i].text, "--set"};
    phx__config *c;
    cr_expect_eq(load(DATA, &override, 1, &c), PHX_INVALID);
    cr_expect_str_eq(report, cases[i].line);
  }
}

Test(config, missing_file) {
  phx__config *c;
  char *text = NULL;
  size_t bytes;
  FILE *to = open_memstream(&text, &bytes);
  cr_assert_eq(phx__config_load("/nonexistent.ini", NULL, 0, to, &c), PHX_INVALID);
  fclose(to);
  cr_assert_str_eq(text, "phalanx: /nonexistent.ini: No such file or directory\n");
  free(text);
}

Test(config, shadowed_plugins_are_named) {
  char *text = NULL;
  size_t bytes;
  phx__config *c;
  const phx__override path = {"plugins.path=" PHX_TEST_ONLY_PLUGINS "/shadow", "--set"};
  const phx__override both[] = {path, {"run.strategy=fsdp", "--strategy"}};
  cr_assert_eq(load(DATA, both, 2, &c), PHX_OK, "%s", report);
  phx__config_free(c);
  FILE *to = open_memstream(&text, &bytes);
  cr_assert_eq(phx__config_load(file, both, 2, to, &c), PHX_OK);
  fclose(to);
  cr_assert(strstr(text, "/shadow/phx_strategy_fsdp.so; ") && strstr(text, "/stubs/phx_strategy_fsdp.so is not used"),
            "%s", text);
  free(text);
  phx__config_free(c);
}

/* ---- print, each, hash ---- */
static char *printed(const phx__config *c, bool sources) {
  char *text = NULL;
  size_t bytes;
  FILE *to = open_memstream(&text, &bytes);
  phx__config_print(c, to, sources);
  fclose(to);
  return text;
}

#define FULL                                                                                                           \
  "[run]\nstrategy = fsdp\nseed = 9223372036854775807\ntimeout = 0.1\n" DATA                                           \
  "[fsdp]\nratio = 0.30000000000000004\nbucket_bytes = 1025\nnote = a b;c # d\n[optimizer]\nlr = 1e-5\n[pair]\nratio " \
  "= 0\n"

Test(config, print_round_trip) {
  for (int sources = 0; sources < 2; sources++) {
    phx__config *a = expect_good(FULL);
    char *first = printed(a, sources), *plain = printed(a, false);
    uint64_t hash = phx__config_hash(a);
    phx__config_free(a);
    phx__config *b = expect_good(first);
    char *second = printed(b, false);
    cr_expect_str_eq(plain, second);
    cr_expect_eq(hash, phx__config_hash(b));
    phx__config_free(b);
    free(first), free(second), free(plain);
  }
}

Test(config, sources) {
  char expected[200];
  const phx__override ranks = {"run.ranks=2", "-n"};
  phx__config *c;
  cr_assert_eq(load(FULL, &ranks, 1, &c), PHX_OK);
  char *text = printed(c, true);
  cr_expect(strstr(text, "steps = 200                       ; default\n"), "%s", text);
  snprintf(expected, sizeof expected, "; %s:2\n", file);
  cr_expect(strstr(text, "strategy = fsdp ") && strstr(text, expected), "%s", text);
  cr_expect(strstr(text, "ranks = 2 ") && strstr(text, "; -n\n"), "%s", text);
  cr_expect(strstr(text, "; auto, default\n"), "%s", text);
  free(text);
  phx__config_free(c);
}

/* A value so long that no comment fits behind it: the source stands above, and the line can be read again. */
Test(config, long_values_round_trip) {
  char ini[400];
  for (int n = 1; n < 186; n += 23) {
    snprintf(ini, sizeof ini, "[data]\ntrain = %0*d\n", n, 7);
    phx__config *a = expect_good(ini);
    char *text = printed(a, true);
    phx__config *b = expect_good(text);
    cr_expect_eq(strlen(b->s.data.train), (size_t)n);
    phx__config_free(a);
    phx__config_free(b);
    free(text);
  }
}

static void count(void *arg, const char *section, const char *key, const char *value, const char *source) {
  cr_expect(*section && *key && value && *source);
  if (strcmp(section, "fsdp") == 0 && strcmp(key, "bucket_bytes") == 0) cr_expect_str_eq(value, "1025");
  ++*(int *)arg;
}

Test(config, each) {
  phx__config *c = expect_good(FULL);
  int n = 0, core = 0;
  phx__config_each(c, count, &n);
  for (uint32_t i = 0; phx__core_table_at(i); i++) core += (int)phx__core_table_at(i)->n;
  cr_expect_eq(n, core + 7 + 7 + 1 + 2 + 3); /* fsdp, pair, shm, gpt, adamw */
  phx__config_free(c);
}

static uint64_t hash_of(const char *ini) {
  phx__config *c = expect_good(ini);
  uint64_t hash = phx__config_hash(c);
  phx__config_free(c);
  return hash;
}

Test(config, hash) {
  uint64_t base = hash_of(DATA);
  cr_expect_eq(base, hash_of(DATA "[run]\nsteps = 200\n"));          /* the default, said aloud */
  cr_expect_eq(base, hash_of(DATA "[device]\nplugin = cpu\n"));      /* what auto comes to */
  cr_expect_eq(base, hash_of(DATA "[run]\npin = no\n"));             /* may differ between ranks */
  cr_expect_eq(base, hash_of(DATA "[ddp]\nlimit = 3\n"));            /* PER_RANK */
  cr_expect_eq(base, hash_of(DATA "[fsdp]\nratio = 0\n"));           /* not selected */
  cr_expect_neq(base, hash_of(DATA "[run]\nsteps = 201\n"));
  cr_expect_neq(base, hash_of(DATA "[run]\nstrategy = fsdp\n"));
  cr_expect_neq(base, hash_of(DATA "[ddp]\nratio = 0.25\n"));
  cr_expect_neq(base, hash_of(DATA "[model]\nlayers = 4\n"));
  cr_expect_neq(base, hash_of("[data]\ntrain = corpus.bi\nvalid = n\n"));
  cr_expect_neq(hash_of("[data]\ntrain = ab\nvalid = c\n"), hash_of("[data]\ntrain = a\nvalid = bc\n"));
}

/* The same name, version and options in another file: the file's hash tells. */
Test(config, hash_knows_the_file) {
  uint64_t stub = hash_of("[run]\nstrategy = fsdp\n" DATA);
  phx__config *c;
  char copy[] = "/tmp/phx-hash-XXXXXX", command[600], set[200];
  cr_assert(mkdtemp(copy));
  snprintf(command, sizeof command, "cp %s/phx_strategy_fsdp.so %s/ && echo >> %s/phx_strategy_fsdp.so", STUBS, copy,
           copy);
  cr_assert_eq(system(command), 0);
  snprintf(set, sizeof set, "plugins.path=%s", copy);
  const phx__override path = {set, "--set"};
  cr_assert_eq(load("[run]\nstrategy = fsdp\n" DATA, &path, 1, &c), PHX_OK, "%s", report);
  cr_expect_neq(phx__config_hash(c), stub);
  phx__config_free(c);
  snprintf(command, sizeof command, "rm -r %s", copy);
  cr_assert_eq(system(command), 0);
}

/* ---- help ---- */
Test(config, samples_can_be_read) {
  char *text = NULL;
  size_t bytes;
  FILE *to = open_memstream(&text, &bytes);
  const phx__core_table *t;
  for (uint32_t i = 0; (t = phx__core_table_at(i)); i++) {
    char *help = NULL;
    size_t help_bytes;
    FILE *one = open_memstream(&help, &help_bytes);
    phx__config_help(t->section, t->options, t->n, sizeof(phx_option), one);
    fclose(one);
    cr_assert(strstr(help, "\nSample:\n"));
    fputs(strstr(help, "\nSample:\n") + 9, to);
    if (strcmp(t->section, "data") == 0) fputs("train = corpus.bin\n", to);
    free(help);
  }
  fclose(to);
  cr_expect_eq(hash_of(text), hash_of(DATA));
  free(text);
}

/* ---- memory ---- */
static long until_failure;
static void *failing_calloc(size_t n, size_t bytes) { return until_failure-- == 0 ? NULL : calloc(n, bytes); }
static void *failing_realloc(void *p, size_t bytes) { return until_failure-- == 0 ? NULL : realloc(p, bytes); }

/* The n-th allocation fails, for every n until none does: refused with a line, nothing returned. */
Test(config, every_allocation_may_fail) {
  phx__config *c = expect_good(FULL); /* plugins are loaded by now and stay */
  phx__config_free(c);
  phx__sys.calloc = failing_calloc;
  phx__sys.realloc = failing_realloc;
  long n = 0;
  for (; n < 5000; n++) {
    until_failure = n;
    phx_status status = load(FULL, NULL, 0, &c);
    if (until_failure >= 0) {
      cr_assert_eq(status, PHX_OK);
      break;
    }
    cr_assert_neq(status, PHX_OK, "allocation %ld", n);
    cr_assert_null(c);
    cr_assert(strstr(report, "out of memory"), "allocation %ld: %s", n, report);
  }
  cr_assert(n > 100 && n < 5000);
  phx__config_free(c);
}
