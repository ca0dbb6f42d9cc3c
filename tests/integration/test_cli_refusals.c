/* Bad input on the command line, in the configuration and among plugins: exit status 2, one clear message for each
 * mistake, nothing on disk.  And the commands that need no run: check, plugins, help. */
#include <criterion/criterion.h>
#include <dirent.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include "command.h"

#define BROKEN PHX_TEST_ONLY_PLUGINS "/broken/"
#define GOOD "[data]\ntrain = corpus.bin\n"

static char *dir;
static void set_up(void) { cr_assert_not_null(dir = command_temp_dir()); }
static void tear_down(void) { command_remove_dir(dir); }
TestSuite(refusals, .init = set_up, .fini = tear_down, .timeout = 120);
TestSuite(commands, .init = set_up, .fini = tear_down, .timeout = 120);

static int files(void) {
  int n = 0;
  DIR *d = opendir(dir);
  for (struct dirent *e; (e = readdir(d));) n += e->d_name[0] != '.';
  closedir(d);
  return n;
}

static size_t lines(const char *text) {
  size_t n = 0;
  for (; *text; text++) n += *text == '\n';
  return n;
}

static void expect_result(command_result r, const char *what, const char *message) {
  cr_expect_eq(r.status, 2, "%s: status %d: %s", what, r.status, r.out);
  cr_expect(strstr(r.out, message), "%s: '%s' lacks '%s'", what, r.out, message);
  cr_expect_eq(lines(r.out), 1, "%s: %s", what, r.out);
  cr_expect_eq(strncmp(r.out, "phalanx: ", 9), 0, "%s: %s", what, r.out);
  cr_expect_leq(files(), 1, "%s left files behind", what);
  command_free(&r);
}

/* The same answer from check, which does not run, and from train, which would. */
static void expect_ini(const char *ini, size_t bytes, const char *message) {
  command_write_file(dir, "a.ini", ini, bytes);
  expect_result(RUN(dir, 20, "check", "a.ini"), ini, message);
  expect_result(RUN(dir, 20, "train", "a.ini"), ini, message);
}
#define EXPECT_INI(ini, message) expect_ini(ini, strlen(ini), message)

Test(refusals, configuration) {
  char overlong[10000];
  snprintf(overlong, sizeof overlong, GOOD "valid = %09000d\n", 1);
  static const char nul[] = GOOD "valid = a\0b\n";
  EXPECT_INI(GOOD "[run]\nstpes = 3\n", "a.ini:4: [run] has no key 'stpes': did you mean 'steps'?");
  EXPECT_INI(GOOD "[zreo]\nstage = 3\n", "a.ini:3: there is no section [zreo], in the core or of an installed plugin: "
                                         "did you mean 'zero'?");
  EXPECT_INI(GOOD "[run]\nstrategy = fspd\n", "a.ini:4: [run] strategy: there is no strategy plugin 'fspd' (found: ");
  EXPECT_INI(GOOD "[model]\nplugin = bert\n", "there is no model plugin 'bert' (found: gpt)\n");
  EXPECT_INI(GOOD "[device]\nplugin = tpu\n", "a.ini:4: [device] plugin: there is no device plugin 'tpu' (found: cpu");
  EXPECT_INI(GOOD "[comm]\nplugin = gloo\n", "a.ini:4: [comm] plugin: there is no comm plugin 'gloo' (found: ");
  EXPECT_INI(GOOD "[model]\nplugin = llama\n", "a.ini:4: [model] plugin: there is no model plugin 'llama' (found: gpt");
  EXPECT_INI(GOOD "[run]\nsteps = 1e6\n", "a.ini:4: [run] '1e6' is not valid for steps: expected a whole number");
  EXPECT_INI(GOOD "[run]\nranks = 65\n",
             "a.ini:4: [run] '65' is not valid for ranks: expected a whole number from 1 to 64");
  EXPECT_INI(GOOD "[optimizer]\nlr = nan\n", "a.ini:4: [optimizer] 'nan' is not valid for lr");
  EXPECT_INI(GOOD "[optimizer]\nlr = 1e-3 # low\n", "(a comment begins with ' ;')");
  EXPECT_INI(GOOD "[run]\nsteps = 3\nsteps = 3\n", "a.ini:5: [run] steps is given twice: first on line 4");
  EXPECT_INI(GOOD "[run]\nsteps = 3\n  seed = 4\n", "a.ini:5: an indented line would continue the one above");
  EXPECT_INI(overlong, "a.ini:3: the line is too long");
  expect_ini(nul, sizeof nul - 1, "a.ini:3: the line holds a NUL byte");
  EXPECT_INI(GOOD "[run\nsteps = 3\n", "a.ini:3: a section needs a closing ']'");
  EXPECT_INI("[run]\nsteps = 3\n", "a.ini: [data] train is missing");
  EXPECT_INI("steps = 3\n" GOOD, "a.ini:1: a key before the first [section]");
  EXPECT_INI(GOOD "[zero]\nstage = 4\n", "a.ini:4: [zero] '4' is not valid for stage");
  EXPECT_INI(GOOD "[batch]\ntotal = 7\n", "ranks x micro x accumulate = 1 x 4 x 1 = 4");
  EXPECT_INI(GOOD "[precision]\ncompute = fp16\n", "a.ini:4: [precision] compute = fp16: its range ends at 65504");
  EXPECT_INI(GOOD "[precision]\nreduce = fp16\n", "needs loss scaling, which is not offered; bf16 has fp32's range");
  EXPECT_INI(GOOD "[checkpoint]\nevery = -5\n", "a.ini:4: [checkpoint] '-5' is not valid for every");
}

Test(refusals, all_at_once) {
  static const char ini[] = "[run]\nstpes = 3\nranks = 0\n[batch]\nreduce = never\n[gtp]\n";
  command_write_file(dir, "a.ini", ini, strlen(ini));
  command_result r = RUN(dir, 20, "train", "a.ini", "--set", "run.seed=-1");
  cr_expect_eq(r.status, 2);
  cr_expect_eq(lines(r.out), 6, "%s", r.out);
  static const char *const expected[] = {"a.ini:2:", "a.ini:3:", "a.ini:5:", "a.ini:6:", "a.ini: [data] train",
                                         "--set run.seed=-1:"};
  for (size_t i = 0; i < 6; i++) cr_expect(strstr(r.out, expected[i]), "%s in %s", expected[i], r.out);
  cr_expect_eq(files(), 1);
  command_free(&r);
}

Test(refusals, broken_plugins) {
  static const struct {
    const char *file, *message;
  } cases[] = {{"nosymbol", "is not a phalanx plugin: it has no function phx_plugin_v1"},
               {"otherabi", "was built for ABI 2, this phalanx speaks ABI 1"},
               {"undefined", "undefined symbol: phx_test_function_that_nobody_has"},
               {"badoption", "the default of an option is wrong"},
               {"needs17", "needs bit 17"},
               {"nocall", "lacks the mandatory call update"},
               {"otherkind", "is a plugin of kind comm"},
               {"borrowed", "comes from another file"},
               {"missing", "No such file or directory"}};
  command_write_file(dir, "a.ini", GOOD, strlen(GOOD));
  for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
    char path[400];
    snprintf(path, sizeof path, BROKEN "phx_strategy_%s.so", cases[i].file);
    expect_result(RUN(dir, 20, "train", "a.ini", "--strategy", path), cases[i].file, cases[i].message);
  }
  setenv("PHALANX_PLUGIN_PATH", BROKEN, 1);
  expect_result(RUN(dir, 20, "train", "a.ini", "--strategy", "wrongid"), "wrongid", "its id is 'rightid'");
  expect_result(RUN(dir, 20, "check", "a.ini", "--strategy", "data"), "data", "one of the core's own sections");
}

Test(refusals, plugin_writable_by_others) {
  char from[400], to[1000];
  snprintf(from, sizeof from, "%s/phx_strategy_ddp.so", PHX_TEST_ONLY_PLUGINS "/stubs");
  snprintf(to, sizeof to, "cp %s %s/mine.so && chmod 757 %s/mine.so", from, dir, dir);
  cr_assert_eq(system(to), 0);
  command_write_file(dir, "a.ini", GOOD, strlen(GOOD));
  command_result r = RUN(dir, 20, "train", "a.ini", "--strategy", "./mine.so");
  cr_expect_eq(r.status, 2);
  cr_expect(strstr(r.out, "can be written by others (mode 757): refused") && lines(r.out) == 1, "%s", r.out);
  cr_expect_eq(files(), 2);
  command_free(&r);
}

Test(refusals, command_line) {
  command_write_file(dir, "a.ini", GOOD, strlen(GOOD));
  expect_result(RUN(dir, 20, "trian", "a.ini"), "command", "unknown command 'trian': did you mean 'train'?");
  expect_result(RUN(dir, 20, "--verison"), "flag", "unknown flag '--verison': did you mean '--version'?");
  expect_result(RUN(dir, 20, "train", "a.ini", "--stratgy", "ddp"), "flag", "did you mean '--strategy'?");
  expect_result(RUN(dir, 20, "check", "a.ini", "--resume"), "resume", "unknown flag '--resume'");
  expect_result(RUN(dir, 20, "train", "a.ini", "--strategies", "ddp"), "flag", "unknown flag '--strategies'");
  expect_result(RUN(dir, 20, "train", "a.ini", "-n"), "value", "-n needs a value");
  expect_result(RUN(dir, 20, "train", "a.ini", "--set="), "value", "--set needs a value");
  expect_result(RUN(dir, 20, "train", "a.ini", "--strategy", "--steps", "3"), "value",
                "--strategy needs a value, and --steps is another flag");
  expect_result(RUN(dir, 20, "sample", "run", "--tokens", "--seed"), "value",
                "--tokens needs a value, and --seed is another flag");
  expect_result(RUN(dir, 20, "checkpoint", "import", "a", "-o", "--bogus"), "value",
                "-o needs a value, and --bogus is an option");
  expect_result(RUN(dir, 20, "train", "a.ini", "--resume", "x", "--resume=y"), "resume", "--resume is given twice");
  expect_result(RUN(dir, 20, "check", "a.ini", "--set", "plugins.pin=abc"), "pin",
                "[plugins] pin: 'abc' is no SHA-256 sum, which has 64 hexadecimal digits");
  expect_result(RUN(dir, 20, "check", "a.ini", "--set", "data.valid_windows=3"), "set",
                "[data] has no key 'valid_windows': [run] has it");
  expect_result(RUN(dir, 20, "train", "a.ini", "-n", "0"), "range", "-n 0: [run] '0' is not valid for ranks");
  expect_result(RUN(dir, 20, "check", "a.ini", "--set", "run.steps"), "set", "expected section.key=value");
  expect_result(RUN(dir, 20, "check", "a.ini", "--set", "run.stesp=1"), "set", "did you mean 'steps'?");
  expect_result(RUN(dir, 20, "check", "a.ini", "b.ini"), "files", "two files: 'a.ini' and 'b.ini'");
  expect_result(RUN(dir, 20, "check"), "file", "check needs a FILE.ini");
  expect_result(RUN(dir, 20, "check", "none.ini"), "file", "none.ini: No such file or directory");
  expect_result(RUN(dir, 20, "check", "."), "file", ".: not a regular file");
  expect_result(RUN(dir, 20, "help", "fsdpp"), "help", "there is no section or plugin 'fsdpp': did you mean 'fsdp'?");
  expect_result(RUN(dir, 20, "help", "a", "b"), "help", "help takes a NAME, PATH.so or --markdown, and a FILE.ini");
  expect_result(RUN(dir, 20, "plugins", "x", "y"), "plugins", "plugins takes a FILE.ini at most");
  command_result r = RUN(dir, 20, "--help");
  cr_expect(r.status == 0 && strstr(r.out, "usage: phalanx") == r.out);
  command_free(&r);
}

/* Of every command, wherever it stands; nothing is opened or made. */
Test(commands, help_of_each) {
  static const char *const names[] = {"train", "compare", "check", "plugins", "help", "data", "sample", "checkpoint"};
  for (size_t i = 0; i < sizeof names / sizeof *names; i++)
    for (int k = 0; k < 4; k++) {
      const char *flag = k % 2 ? "-h" : "--help";
      command_result r = k < 2 ? RUN(dir, 20, names[i], flag) : RUN(dir, 20, names[i], "tokenize", "--resume", flag);
      char usage[64];
      snprintf(usage, sizeof usage, "usage: phalanx %s", names[i]);
      if (k < 2 || strcmp(names[i], "data")) /* which has flags of its own */
        cr_expect(r.status == 0 && strstr(r.out, usage) == r.out, "%s %s: status %d: %s", names[i], flag, r.status,
                  r.out);
      cr_expect_eq(files(), 0);
      command_free(&r);
    }
  command_result r = RUN(dir, 20, "train", "-h");
  cr_expect(strstr(r.out, "--resume [DIR]") && strstr(r.out, "--set section.key=value"), "%s", r.out);
  command_free(&r);
  r = RUN(dir, 20, "sample", "nowhere", "--prompt", "-h"); /* a text to go on from */
  cr_expect_eq(r.status, 2, "%s", r.out);
  command_free(&r);
}

static void put_corpus(void) {
  uint16_t tokens[6000];
  for (int i = 0; i < 6000; i++) tokens[i] = (uint16_t)(i % 250);
  command_write_file(dir, "corpus.bin", tokens, sizeof tokens);
}

/* check's output is an INI that gives the same output again. */
Test(commands, check_round_trip) {
  command_write_file(dir, "a.ini", GOOD, strlen(GOOD));
  expect_result(RUN(dir, 20, "check", "a.ini"), "sizes", "layers, heads, width, context, vocab not set");
  put_corpus();
  command_result first = RUN(dir, 20, "check", "a.ini", "-n", "2", "--strategy", "fsdp", "--set", "fsdp.prefetch=2",
                             "--set", "model.size=tiny");
  cr_assert_eq(first.status, 0, "%s", first.out);
  cr_expect(strstr(first.out, "\n; The plan: memory of each rank") && strstr(first.out, "\n;  0 to 1 "), "%s",
            first.out);
  cr_expect(strstr(first.out, "; -n\n") && strstr(first.out, "; --strategy\n") && strstr(first.out, "; a.ini:2\n"));
  command_write_file(dir, "b.ini", first.out, strlen(first.out));
  command_result second = RUN(dir, 20, "check", "b.ini");
  cr_assert_eq(second.status, 0, "%s", second.out);
  char *a = first.out, *b = second.out, *save_a, *save_b;
  for (a = strtok_r(a, "\n", &save_a), b = strtok_r(b, "\n", &save_b); a && b;
       a = strtok_r(NULL, "\n", &save_a), b = strtok_r(NULL, "\n", &save_b)) {
    size_t n = strcspn(a, ";");
    cr_expect(n == strcspn(b, ";") && strncmp(a, b, n) == 0, "'%s' and '%s'", a, b);
  }
  cr_expect(!a && !b);
  command_free(&first);
  command_free(&second);
}

/* A crash, an exit and a refusal of one candidate do not keep the others from being listed. */
Test(commands, plugins_survives_broken_ones) {
  setenv("PHALANX_PLUGIN_PATH", BROKEN ":" PHX_TEST_ONLY_PLUGINS "/stubs", 1);
  command_result r = RUN(dir, 60, "plugins");
  cr_expect_eq(r.status, 0);
  cr_expect(
      strstr(r.out, "broken: crashes when it is loaded: signal 6 (Aborted)") ||
          strstr(r.out, "broken: ends the process when it is loaded: exit status 1\n"), /* AddressSanitizer's way */
      "%s", r.out);
  cr_expect(strstr(r.out, "broken: ends the process when it is loaded: exit status 7"), "%s", r.out);
  cr_expect(strstr(r.out, "was built for ABI 2"));
  cr_expect(strstr(r.out, "absent        1.0  ABI 1.2  not available here: absent is for tests"), "%s", r.out);
  cr_expect(strstr(r.out, "pair          1.0  ABI 1.2  available"), "%s", r.out);
  cr_expect(strstr(r.out, "new           9.0  ABI 1.9  available"), "%s", r.out);
  cr_expect(strstr(r.out, "phx_device_cpu.so  (shadowed: an earlier directory has it too)"), "%s", r.out);
  command_free(&r);
}

Test(commands, plugins_says_which_library_is_missing) {
  setenv("PHALANX_PLUGIN_PATH", PHX_TEST_ONLY_PLUGINS "/lost", 1);
  command_result r = RUN(dir, 60, "plugins");
  cr_expect_eq(r.status, 0);
  cr_expect(strstr(r.out, "libphx-is-nowhere.so: cannot open shared object"), "%s", r.out);
  cr_expect(strstr(r.out, "cpu "), "the others are listed: %s", r.out);
  command_free(&r);
}

/* Ten seconds, then it is killed and said so. */
Test(commands, plugins_survives_a_hanging_one) {
  setenv("PHALANX_PLUGIN_PATH", PHX_TEST_ONLY_PLUGINS "/hang", 1);
  command_result r = RUN(dir, 60, "plugins");
  cr_expect(r.status == 0 && r.seconds >= 10 && r.seconds < 25, "%.1f s", r.seconds);
  cr_expect(strstr(r.out, "broken: hangs: no answer within 10 s"), "%s", r.out);
  cr_expect(strstr(r.out, "cpu "), "the others are listed: %s", r.out);
  command_free(&r);
}

/* Every sample that help prints, of sections and of every plugin, is a configuration. */
Test(commands, help_samples_can_be_read) {
  static const char *const names[] = {"run", "batch", "model", "optimizer", "precision", "device", "comm", "checkpoint",
                                      "plugins", "data", "ddp", "fsdp", "zero", "shm"};
  char ini[60000] = "";
  for (size_t i = 0; i < sizeof names / sizeof names[0]; i++) {
    command_result r = RUN(dir, 20, "help", names[i]);
    char *sample = strstr(r.out, "\nSample:\n");
    cr_assert(r.status == 0 && sample, "%s: %s", names[i], r.out);
    strncat(ini, sample + 9, sizeof ini - strlen(ini) - 1);
    if (strcmp(names[i], "data") == 0) strncat(ini, "train = corpus.bin\n", sizeof ini - strlen(ini) - 1);
    command_free(&r);
  }
  command_write_file(dir, "a.ini", ini, strlen(ini));
  put_corpus();
  command_result r = RUN(dir, 20, "check", "a.ini", "--set", "model.size=tiny");
  cr_expect_eq(r.status, 0, "%s", r.out);
  command_free(&r);
  r = RUN(dir, 20, "help", PHX_TEST_ONLY_PLUGINS "/stubs/phx_strategy_pair.so");
  cr_expect(r.status == 0 && strstr(r.out, "note                         default none: must be given"), "%s", r.out);
  command_free(&r);
}
