/* Finding, trusting, loading and checking plugins: every refusal with its reason. */
#include <criterion/criterion.h>
#include <phalanx/provider.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>
#include "plugin/descriptor.h"
#include "plugin/loader.h"
#include "plugin/loader_search.h"
#include "plugin/suspect.h"
#include "base/nearest.h"
#include "config/option.h"
#include "base/sha256.h"
#include "base/status.h"
#include "base/sys.h"

#define STUBS PHX_TEST_ONLY_PLUGINS "/stubs"
#define BROKEN PHX_TEST_ONLY_PLUGINS "/broken"
#define SHADOW PHX_TEST_ONLY_PLUGINS "/shadow"

static const phx__plugin *expect_open(const char *search, uint32_t kind, const char *name) {
  const phx__plugin *plugin = NULL;
  phx_error err = PHX_ERROR_INIT;
  cr_assert_eq(phx__loader_open(search, kind, name, &plugin, &err), PHX_OK, "%s", err.message);
  return plugin;
}

static void expect_refused(const char *search, uint32_t kind, const char *name, const char *reason) {
  const phx__plugin *plugin = (const phx__plugin *)"unchanged";
  phx_error err = PHX_ERROR_INIT;
  cr_expect_neq(phx__loader_open(search, kind, name, &plugin, &err), PHX_OK, "%s was accepted", name);
  cr_expect(strstr(err.message, reason), "%s: '%s' lacks '%s'", name, err.message, reason);
  cr_expect_null(strchr(err.message, '\n'));
  cr_expect_str_eq((const char *)plugin, "unchanged");
}

Test(loader, by_name_and_by_path) {
  const phx__plugin *named = expect_open(STUBS, PHX_KIND_STRATEGY, "fsdp");
  cr_assert_str_eq(named->descriptor->id, "fsdp");
  cr_assert_eq(strlen(named->sha256), 64);
  cr_assert_eq(expect_open(STUBS, PHX_KIND_STRATEGY, "fsdp"), named);
  cr_assert_eq(expect_open(NULL, PHX_KIND_STRATEGY, STUBS "/../stubs/./phx_strategy_fsdp.so"), named);
  for (uint32_t kind = PHX_KIND_DEVICE; kind <= PHX_KIND_OPTIMIZER; kind++) {
    static const char *const names[] = {"", "", "cpu", "shm", "gpt", "adamw"};
    cr_assert_eq(expect_open(STUBS, kind, names[kind])->descriptor->kind, kind);
  }
}

static void expect_bad_optimizer(const phx_plugin *d, phx_status code, const char *reason) {
  phx_error err = PHX_ERROR_INIT;
  cr_expect_eq(phx__descriptor_check(d, PHX_KIND_OPTIMIZER, NULL, &err), code);
  cr_expect(strstr(err.message, reason), "'%s' lacks '%s'", err.message, reason);
}

Test(loader, optimizers_are_whole) {
  const phx_plugin *good = expect_open(STUBS, PHX_KIND_OPTIMIZER, "adamw")->descriptor;
  phx_plugin d = *good;
  phx_optimizer_table table = *(const phx_optimizer_table *)good->table;
  phx_option option = good->options[0];
  d.table = &table;
  expect_bad_optimizer(&d, PHX_OK, "");
  table.update = NULL;
  expect_bad_optimizer(&d, PHX_INVALID, "its optimizer table lacks the mandatory call update");
  table.struct_size = offsetof(phx_optimizer_table, create); /* what lies behind the table is not looked at */
  expect_bad_optimizer(&d, PHX_INVALID, "its optimizer table lacks the mandatory call create");
  d.table = NULL;
  expect_bad_optimizer(&d, PHX_INVALID, "has no optimizer table");
  d = *good;
  option.name = "lr";
  d.options = &option;
  d.n_options = 1;
  expect_bad_optimizer(&d, PHX_INVALID, "its option 'lr' is one of the core's own keys of [optimizer]");
  d = *good;
  d.needs = PHX_NEED_HOST_MEMORY | PHX_NEED_TWO_RANKS;
  expect_bad_optimizer(&d, PHX_UNSUPPORTED, "needs bit 1, which this phalanx does not know of a plugin of kind");
}

Test(loader, refusals) {
  const struct {
    const char *name, *reason;
  } cases[] = {{"nosymbol", "is not a phalanx plugin: it has no function phx_plugin_v1"},
               {"borrowed", "comes from another file"},
               {"otherabi", "was built for ABI 2, this phalanx speaks ABI 1"},
               {"undefined", "undefined symbol: phx_test_function_that_nobody_has"},
               {"badoption", "'11' is not valid for b: expected a whole number from 0 to 10"},
               {"wrongid", "its id is 'rightid', but its file's name says 'wrongid'"},
               {"unnamed", "its id is not of the form"},
               {"data", "is the name of one of the core's own sections"},
               {"needs17", "needs bit 17"},
               {"needsext", "'phx.nonsense/1'"},
               {"nocall", "lacks the mandatory call update"},
               {"badtable", "12345677 bytes: not plausible"},
               {"otherkind", "is a plugin of kind comm (3), and one of kind strategy was asked for"}};
  for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++)
    expect_refused(BROKEN, PHX_KIND_STRATEGY, cases[i].name, cases[i].reason);
}

Test(loader, names) {
  expect_refused(STUBS, PHX_KIND_STRATEGY, "fspd", "did you mean 'fsdp'?");
  expect_refused(STUBS, PHX_KIND_STRATEGY, "fspd", "(found: ");
  expect_refused(STUBS, PHX_KIND_DEVICE, "vulkan", "there is no device plugin 'vulkan' (found: absent, cpu");
  expect_refused(STUBS, PHX_KIND_STRATEGY, "a.b", "is not a plugin's name");
  expect_refused(STUBS, PHX_KIND_STRATEGY, "", "is not a plugin's name");
  expect_refused(STUBS, PHX_KIND_STRATEGY, "FSDP", "is not a plugin's name");
  expect_refused(STUBS, PHX_KIND_STRATEGY, "a23456789012345678901234567890123", "is not a plugin's name");
  expect_refused(STUBS, PHX_KIND_DEVICE, STUBS "/phx_device_cpu.so", "is not a plugin's name");
  expect_refused(NULL, PHX_KIND_STRATEGY, "/nonexistent/x.so", "No such file");
  expect_refused(NULL, PHX_KIND_STRATEGY, "/etc/passwd", "must end in .so");
  expect_refused(NULL, PHX_KIND_STRATEGY, STUBS "/phx_device_cpu.so", "is a plugin of kind device (2)");
}

Test(loader, search_path) {
  expect_refused("relative/path", PHX_KIND_STRATEGY, "fsdp", "is not an absolute path");
  expect_refused("/nonexistent", PHX_KIND_STRATEGY, "fsdp", "is not a directory");
  char expected[4096];
  cr_assert(realpath(SHADOW "/phx_strategy_fsdp.so", expected));
  cr_assert_str_eq(expect_open(SHADOW ":" STUBS, PHX_KIND_STRATEGY, "fsdp")->path, expected);
  cr_assert(realpath(STUBS "/phx_strategy_fsdp.so", expected));
  cr_assert_str_eq(expect_open(STUBS ":" SHADOW, PHX_KIND_STRATEGY, "fsdp")->path, expected);
}

/* Neither the working directory nor the dynamic loader's own variables are searched. */
Test(loader, never_the_working_directory) {
  cr_assert_eq(chdir(STUBS), 0);
  setenv("LD_LIBRARY_PATH", STUBS, 1);
  setenv("LTDL_LIBRARY_PATH", STUBS, 1);
  expect_refused(NULL, PHX_KIND_STRATEGY, "pair", "there is no strategy plugin 'pair'");
  setenv("PHALANX_PLUGIN_PATH", ":" STUBS ":/nonexistent", 1);
  cr_assert_str_eq(expect_open(NULL, PHX_KIND_STRATEGY, "pair")->descriptor->id, "pair");
}

Test(loader, list_is_sorted_and_marks_shadowed) {
  phx__found *list;
  size_t n, fsdp = 0;
  phx_error err = PHX_ERROR_INIT;
  cr_assert_eq(phx__loader_list(STUBS ":" SHADOW ":" STUBS, &list, &n, &err), PHX_OK);
  for (size_t i = 0; i < n; i++) {
    if (i) {
      cr_assert_leq(list[i - 1].kind, list[i].kind);
      if (list[i - 1].kind == list[i].kind) cr_assert_leq(strcmp(list[i - 1].name, list[i].name), 0);
    }
    if (strcmp(list[i].name, "fsdp") != 0) continue;
    cr_assert_eq(list[i].shadowed, fsdp > 0);
    cr_assert(strstr(list[i].path, fsdp == 0 ? "/stubs/" : fsdp == 1 ? "/shadow/" : "/lib/phalanx/"));
    fsdp++;
  }
  cr_assert_geq(fsdp, 2);
  phx__free(list);
}

/* ---- trust ---- */
static char directory[64], copy[128];
static void copy_plugin(void) {
  char command[1000];
  snprintf(directory, sizeof directory, "/tmp/phx-trust-XXXXXX");
  cr_assert(mkdtemp(directory));
  snprintf(copy, sizeof copy, "%s/phx_strategy_fsdp.so", directory);
  snprintf(command, sizeof command, "cp %s/phx_strategy_fsdp.so %s && chmod 755 %s", STUBS, copy, copy);
  cr_assert_eq(system(command), 0);
}
static void remove_copy(void) {
  char command[200];
  snprintf(command, sizeof command, "rm -rf %s", directory);
  cr_assert_eq(system(command), 0);
}

Test(loader, file_writable_by_others, .init = copy_plugin, .fini = remove_copy) {
  chmod(copy, 0757);
  expect_refused(directory, PHX_KIND_STRATEGY, "fsdp", "can be written by others");
  chmod(copy, 0755);
  expect_open(directory, PHX_KIND_STRATEGY, "fsdp");
}

/* Not the next directory's: a refused file is never passed over silently. */
Test(loader, directory_writable_by_others, .init = copy_plugin, .fini = remove_copy) {
  char search[4096];
  snprintf(search, sizeof search, "%s:%s", directory, STUBS);
  chmod(directory, 0777);
  expect_refused(search, PHX_KIND_STRATEGY, "fsdp", "the directory");
  chmod(directory, 01777);
  expect_refused(directory, PHX_KIND_STRATEGY, "fsdp", "can be written by others");
}

/* A directory further up, which others may rename: they could put their own in its place.  /tmp may stand there. */
Test(loader, a_directory_above_is_looked_at, .init = copy_plugin, .fini = remove_copy) {
  char inner[128], command[400];
  snprintf(inner, sizeof inner, "%s/inner", directory);
  snprintf(command, sizeof command, "mkdir %s && mv %s %s", inner, copy, inner);
  cr_assert_eq(system(command), 0);
  chmod(directory, 0777);
  expect_refused(inner, PHX_KIND_STRATEGY, "fsdp", "can be written by others");
  chmod(directory, 01777);
  expect_open(inner, PHX_KIND_STRATEGY, "fsdp");
}

/* Each link's own directory, not only the first's and the last's. */
Test(loader, a_chain_of_links, .init = copy_plugin, .fini = remove_copy) {
  char command[900], first[128];
  snprintf(first, sizeof first, "%s/first.so", directory);
  snprintf(command, sizeof command, "cd %s && mkdir open && ln -s ../phx_strategy_fsdp.so open/second.so && "
           "ln -s open/second.so first.so", directory);
  cr_assert_eq(system(command), 0);
  snprintf(command, sizeof command, "%s/open", directory);
  chmod(command, 0777);
  const phx__plugin *plugin = NULL;
  phx_error err = PHX_ERROR_INIT;
  cr_assert_neq(phx__loader_open(NULL, PHX_KIND_STRATEGY, first, &plugin, &err), PHX_OK);
  cr_assert(strstr(err.message, "/open can be written by others"), "%s", err.message);
  chmod(command, 0755);
  cr_assert_eq(phx__loader_open(NULL, PHX_KIND_STRATEGY, first, &plugin, &err), PHX_OK, "%s", err.message);
}

/* A group that we are in has other members. */
Test(loader, group_writable, .init = copy_plugin, .fini = remove_copy) {
  if (geteuid() != 0) cr_skip("only root can give a file to another group");
  cr_assert_eq(chown(copy, (uid_t)-1, 12345), 0);
  chmod(copy, 0775);
  cr_assert_eq(setegid(12345), 0);
  expect_refused(directory, PHX_KIND_STRATEGY, "fsdp", "can be written by others (mode 775)");
  cr_assert_eq(setegid(0), 0);
  chmod(copy, 0755);
  expect_open(directory, PHX_KIND_STRATEGY, "fsdp");
}

/* Another file takes the name between the check and the load. */
static int (*real_fstat)(int fd, struct stat *out);
static int swapping_fstat(int fd, struct stat *out) {
  char command[800];
  snprintf(command, sizeof command, "cp %s %s.new && mv %s.new %s", copy, copy, copy, copy);
  if (system(command) != 0) abort();
  return real_fstat(fd, out);
}
Test(loader, what_was_checked_is_what_is_loaded, .init = copy_plugin, .fini = remove_copy) {
  real_fstat = phx__sys.fstat;
  phx__sys.fstat = swapping_fstat;
  expect_refused(directory, PHX_KIND_STRATEGY, "fsdp", "changed while it was loaded");
  phx__sys.fstat = real_fstat;
}

Test(loader, pins, .init = copy_plugin, .fini = remove_copy) {
  static const char *const none = "0000000000000000000000000000000000000000000000000000000000000000";
  char sha256[65], both[200];
  phx_error err = PHX_ERROR_INIT;
  cr_assert_eq(phx__sha256_file(copy, sha256, &err), PHX_OK);
  cr_assert_eq(phx__loader_guard(directory, NULL, none, &err), PHX_OK);
  expect_refused(directory, PHX_KIND_STRATEGY, "fsdp", sha256);
  expect_open(directory, PHX_KIND_DEVICE, "cpu"); /* from elsewhere */
  for (int i = 0; i < PHX__GUARDED_FILES; i++) {
    const char *files[PHX__GUARDED_FILES] = {NULL};
    files[i] = copy;
    cr_assert_eq(phx__loader_guard(NULL, files, none, &err), PHX_OK);
    expect_refused(NULL, PHX_KIND_STRATEGY, copy, sha256);
  }
  snprintf(both, sizeof both, "%s, %s", none, sha256);
  cr_assert_eq(phx__loader_guard(directory, (const char *const[PHX__GUARDED_FILES]){copy}, both, &err), PHX_OK);
  expect_open(directory, PHX_KIND_STRATEGY, "fsdp");
  cr_assert_eq(phx__loader_guard(NULL, NULL, NULL, &err), PHX_OK);
}

Test(loader, owner, .init = copy_plugin, .fini = remove_copy) {
  if (geteuid() != 0) cr_skip("only root can give a file away");
  cr_assert_eq(chown(copy, 12345, 0), 0);
  expect_refused(directory, PHX_KIND_STRATEGY, "fsdp", "belongs to user 12345");
  cr_assert_eq(chown(copy, 0, 12345), 0);
  chmod(copy, 0775);
  expect_refused(directory, PHX_KIND_STRATEGY, "fsdp", "can be written by others (mode 775)");
}

/* A link is judged where it stands and where it leads to. */
Test(loader, link, .init = copy_plugin, .fini = remove_copy) {
  unlink(copy);
  cr_assert_eq(symlink(STUBS "/phx_strategy_fsdp.so", copy), 0);
  cr_assert_eq(expect_open(directory, PHX_KIND_STRATEGY, "fsdp"), expect_open(STUBS, PHX_KIND_STRATEGY, "fsdp"));
  chmod(directory, 0777);
  expect_refused(directory, PHX_KIND_STRATEGY, "fsdp", "can be written by others");
}

/* libltdl would read a .la file beside the .so and load what it names. */
Test(loader, stray_la_file, .init = copy_plugin, .fini = remove_copy) {
  char la[200], real[4096];
  snprintf(la, sizeof la, "%s/phx_strategy_fsdp.la", directory);
  FILE *f = fopen(la, "w");
  fprintf(f, "dlname='phx_strategy_other.so'\nlibrary_names=''\nold_library=''\ninstalled=no\n");
  fclose(f);
  cr_assert(realpath(copy, real));
  cr_assert_str_eq(expect_open(directory, PHX_KIND_STRATEGY, "fsdp")->path, real);
}

Test(loader, damaged_files, .init = copy_plugin, .fini = remove_copy) {
  FILE *f = fopen(copy, "w");
  fprintf(f, "not an ELF file, but long enough to be read as the header of one, perhaps\n");
  fclose(f);
  expect_refused(directory, PHX_KIND_STRATEGY, "fsdp", "cannot be loaded:");
  cr_assert_eq(truncate(copy, 0), 0);
  expect_refused(directory, PHX_KIND_STRATEGY, "fsdp", "file too short");
  unlink(copy);
  cr_assert_eq(mkdir(copy, 0755), 0);
  expect_refused(directory, PHX_KIND_STRATEGY, "fsdp", "is not a regular file");
}

/* ---- option tables ---- */
typedef struct fields {
  int64_t a, b;
  double r;
  const char *s;
  int32_t e, f;
} fields;
static const char *const one[] = {"x", NULL}, *const none[] = {NULL};
static const phx_option good_row = PHX_INT(fields, a, "3", 0, 10, NULL, 0, "First.");

static void expect_row(phx_option row, const char *reason) {
  phx_error err = PHX_ERROR_INIT;
  cr_expect_neq(phx__options_check(&row, 1, sizeof row, sizeof(fields), &err), PHX_OK, "%s", reason);
  cr_expect(strstr(err.message, reason), "'%s' lacks '%s'", err.message, reason);
}
#define WITH(change, reason)   \
  do {                         \
    phx_option row = good_row; \
    change;                    \
    expect_row(row, reason);   \
  } while (0)

Test(options, rows) {
  phx_error err = PHX_ERROR_INIT;
  cr_assert_eq(phx__options_check(&good_row, 1, sizeof good_row, sizeof(fields), &err), PHX_OK);
  WITH(row.name = NULL, "has no name");
  WITH(row.name = "Big", "has no name");
  WITH(row.name = "a234567890123456789012345678901234567890123456789", "has no name");
  WITH(row.doc = NULL, "full stop");
  WITH(row.doc = "No stop", "full stop");
  WITH(row.type = 7, "type 7");
  WITH(row.size = 4, "4 bytes where its type takes 8");
  WITH(row.offset = sizeof(fields), "outside");
  WITH(row.offset = sizeof(fields) - 4, "outside");
  WITH(row.offset = UINT32_MAX - 7, "outside");
  WITH(row.offset = 4, "unaligned");
  WITH(row.imin = 11, "empty");
  WITH(row.dflt = "11", "default");
  WITH(row.dflt = "", "default");
  WITH(row.dflt = NULL, "no default");
  WITH(row.flags = PHX_OPTF_REQUIRED, "required and has a default");
  WITH(row.flags = 1u << 20, "flags 0x100000");
  WITH((row.flags = PHX_OPTF_AUTO, row.imin = -1), "stands for auto");
  WITH((row.type = PHX_OPT_REAL, row.flags = PHX_OPTF_AUTO, row.rmax = 9), "may be auto only");
  WITH((row.type = PHX_OPT_REAL, row.rmin = 1), "endless range");
  WITH((row.type = PHX_OPT_ENUM, row.size = 4), "no choices");
  WITH((row.type = PHX_OPT_ENUM, row.size = 4, row.choices = none), "no choices");
  WITH((row.type = PHX_OPT_ENUM, row.size = 4, row.choices = one), "default");
}

Test(options, tables) {
  phx_error err = PHX_ERROR_INIT;
  phx_option two[2] = {good_row, PHX_INT(fields, b, "3", 0, 10, NULL, 0, "Second.")};
  cr_assert_eq(phx__options_check(two, 2, sizeof two[0], sizeof(fields), &err), PHX_OK);
  two[1].offset = two[0].offset;
  cr_assert_eq(phx__options_check(two, 2, sizeof two[0], sizeof(fields), &err), PHX_INVALID);
  cr_assert(strstr(err.message, "share bytes"));
  two[1].name = "a";
  cr_assert_eq(phx__options_check(two, 2, sizeof two[0], sizeof(fields), &err), PHX_INVALID);
  cr_assert(strstr(err.message, "twice"));
  cr_assert_eq(phx__options_check(two, 2, sizeof two[0] - 8, sizeof(fields), &err), PHX_INVALID);
  cr_assert_eq(phx__options_check(NULL, 2, sizeof two[0], sizeof(fields), &err), PHX_INVALID);
  cr_assert_eq(phx__options_check(NULL, 0, 0, 0, &err), PHX_OK);
}

/* ---- values ---- */
static void expect_value(const phx_option *o, const char *text, const char *printed) {
  phx__value value = {.i = 77};
  char why[400] = "", scratch[PHX__VALUE_TEXT];
  bool good = phx__option_parse(o, text, &value, why, sizeof why);
  cr_expect_eq(good, printed != NULL, "'%s': %s", text, why);
  if (!good) {
    cr_expect_eq(value.i, 77);
    cr_expect(strstr(why, "expected"), "%s", why);
  } else if (printed) {
    cr_expect_str_eq(phx__option_text(o, value, scratch), printed);
  }
}

Test(options, numbers_are_strict) {
  const phx_option whole = PHX_INT(fields, a, "0", -5, 1000000, NULL, 0, "A number.");
  const phx_option automatic = PHX_INT(fields, a, "auto", 0, 9, NULL, PHX_OPTF_AUTO, "A number.");
  const phx_option any = PHX_INT(fields, a, "0", INT64_MIN, INT64_MAX, NULL, 0, "A number.");
  static const char *const bad[] = {"", " 1", "1 ", "+1", "1e6", "0x10", "1.0", "one", "-", "--1", "-6", "1000001",
                                    "99999999999999999999", "auto", "1 # one", "1,5"};
  for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) expect_value(&whole, bad[i], NULL);
  expect_value(&whole, "010", "10");
  expect_value(&whole, "-5", "-5");
  expect_value(&automatic, "auto", "auto");
  expect_value(&automatic, "-1", NULL);
  expect_value(&any, "-9223372036854775808", "-9223372036854775808");
  expect_value(&any, "9223372036854775807", "9223372036854775807");
  expect_value(&any, "9223372036854775808", NULL);
}

Test(options, reals_are_strict) {
  const phx_option real = PHX_REAL(fields, r, "0", -1e300, 1e300, "A number.");
  static const char *const bad[] = {"", "nan", "inf", "-inf", "0x1p3", "1,5", "+1", " 1", "1 ", "1e", "1e999", "1e-999",
                                    "1.2.3", "e5", ".", "1e301"};
  for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) expect_value(&real, bad[i], NULL);
  expect_value(&real, "3e-4", "0.0003");
  expect_value(&real, "0.1", "0.1");
  expect_value(&real, "0.10000000000000001", "0.1");
  expect_value(&real, "0.30000000000000004", "0.30000000000000004");
  expect_value(&real, "-0", "0");
  expect_value(&real, "1e-8", "1e-08");
}

Test(options, bytes_words_and_text) {
  const phx_option bytes = PHX_BYTES(fields, a, "0", 0, INT64_MAX, 0, "Bytes.");
  const phx_option yes = PHX_BOOL(fields, e, "no", "A switch.");
  const phx_option choice = {"e", "One.", "x", NULL, one, 0, 0, 0, 0, PHX_OPT_ENUM, 0, PHX_FIELD_(fields, e)};
  const phx_option text = PHX_STRING(fields, s, "", 0, "Text.");
  expect_value(&bytes, "25MiB", "25MiB");
  expect_value(&bytes, "25 MiB", "25MiB");
  expect_value(&bytes, "1024B", "1KiB");
  expect_value(&bytes, "1000", "1000");
  expect_value(&bytes, "8388607TiB", "8388607TiB");
  static const char *const bad[] = {"8388608TiB", "1MB", "1mib", "1.5MiB", "-1", "25  MiB", "25MiB ", "MiB", "1 ", ""};
  for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) expect_value(&bytes, bad[i], NULL);
  static const char *const switches[] = {"yes", "true", "on", "1", "no", "false", "off", "0"};
  for (size_t i = 0; i < 8; i++) expect_value(&yes, switches[i], i < 4 ? "yes" : "no");
  expect_value(&yes, "YES", NULL);
  expect_value(&yes, "2", NULL);
  expect_value(&choice, "x", "x");
  expect_value(&choice, "y", NULL);
  expect_value(&text, "a b;c", "a b;c");
  expect_value(&text, "a ;c", NULL);
  expect_value(&text, ";c", NULL);
  expect_value(&text, "a\nb", NULL);
  expect_value(&text, " a", NULL);
}

Test(nearest, distances) {
  cr_assert_eq(phx__edit_distance("", ""), 0);
  cr_assert_eq(phx__edit_distance("abc", ""), 3);
  cr_assert_eq(phx__edit_distance("kitten", "sitting"), 3);
  cr_assert_eq(phx__edit_distance("fspd", "fsdp"), 1);
  cr_assert_eq(phx__edit_distance("step", "steps"), 1);
  phx__nearest nearest = {.word = "bucket_byte"};
  phx__nearest_offer(&nearest, "prefetch");
  cr_assert_null(nearest.best);
  phx__nearest_offer(&nearest, "bucket_bytes");
  cr_assert_str_eq(nearest.best, "bucket_bytes");
  nearest = (phx__nearest){.word = "xx"};
  phx__nearest_offer(&nearest, "lr");
  cr_assert_null(nearest.best);
}

/* ---- a plugin that does not come back ---- */
#define HOSTILE PHX_TEST_ONLY_PLUGINS "/phx_strategy_hostile.so"

/* Its standard error is `said`. */
static void load_hanging(int said, const char *load) {
  const phx__plugin *plugin;
  phx_error err = PHX_ERROR_INIT;
  dup2(said, STDERR_FILENO);
  setenv("PHX_HOSTILE_LOAD", load, 1);
  phx__suspect_patience_ms = 300;
  alarm(20);
  _exit(phx__loader_open_file(PHX_KIND_STRATEGY, HOSTILE, "hostile", &plugin, &err) ? 98 : 99);
}

static void expect_hang(const char *load, const char *says) {
  char text[1024] = "";
  int ends[2], state = 0;
  size_t used = 0;
  cr_assert_eq(pipe(ends), 0);
  fflush(NULL);
  const pid_t pid = fork();
  if (pid == 0) load_hanging(ends[1], load);
  close(ends[1]);
  for (ssize_t n = 1; n > 0 && used < sizeof text - 1; used += n > 0 ? (size_t)n : 0)
    n = read(ends[0], text + used, sizeof text - 1 - used);
  close(ends[0]);
  cr_assert_eq(waitpid(pid, &state, 0), pid);
  cr_expect(WIFEXITED(state) && WEXITSTATUS(state) == 2, "%s: wait status %x: %s", load, (unsigned)state, text);
  cr_expect(strstr(text, "/phx_strategy_hostile.so hangs ") && strstr(text, says), "no '%s' in: %s", says, text);
}

Test(loader, a_hang_is_named, .timeout = 60) {
  expect_hang("hang", "while it was loaded: it has not come back for 0.3 s\n");
  expect_hang("endless", "while its descriptor was read: it has not come back for 0.3 s\n");
}

/* Slow and not lost: the patience begins anew with each call. */
Test(loader, a_call_that_comes_back_is_no_hang, .timeout = 60) {
  phx__suspect_patience_ms = 400;
  for (int i = 0; i < 5; i++) {
    phx__suspect_begin("slow", "in a test", PHX__SUSPECT_LOADS);
    usleep(150000);
    cr_assert_eq(phx__suspect_end(PHX_OK, NULL), PHX_OK);
  }
  usleep(500000);
}
