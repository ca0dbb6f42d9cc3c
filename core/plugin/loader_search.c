/* core/plugin/loader_search.c - where plugins are looked for.  Loads nothing; which files may be trusted:
 * loader_trust.c.
 *
 * In order: [plugins] path, PHALANX_PLUGIN_PATH (unless AT_SECURE), beside the directory of the command ../lib/phalanx,
 * ../lib64/phalanx and ../lib/<multiarch>/phalanx, and the compiled-in directory.  Never the working directory,
 * LD_LIBRARY_PATH or LTDL_LIBRARY_PATH.
 * [main] only, no state. */
#include "base/status.h"
#include "base/sys.h"
#include "config/config.h"
#include "config/option.h"
#include "plugin/loader_search.h"

#include <dirent.h>
#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/auxv.h>
#include <sys/stat.h>
#include <unistd.h>

/* Real path of each directory once, in order.  A directory that does not exist is left out where it was not asked for
 * by the configuration. */
static phx_status add_directory(phx__search *out, const char *path, size_t length, bool must_exist, phx_error *err) {
  char asked[PATH_MAX], real[PATH_MAX];
  struct stat info;
  if (length == 0) return PHX_OK;
  if (path[0] != '/')
    return phx_fail(err, PHX_INVALID, "plugin directory '%.*s' is not an absolute path", (int)length, path);
  if (length >= sizeof asked) return phx_fail(err, PHX_INVALID, "a plugin directory has a path of %zu bytes", length);
  memcpy(asked, path, length);
  asked[length] = 0;
  if (!realpath(asked, real) || stat(real, &info) != 0 || !S_ISDIR(info.st_mode)) {
    if (!must_exist) return PHX_OK;
    return phx_fail(err, PHX_INVALID, "plugin directory %s is not a directory that can be read", asked);
  }
  for (size_t i = 0; i < out->n; i++)
    if (strcmp(out->directories[i], real) == 0) return PHX_OK;
  if (out->n == PHX__SEARCH_MOST)
    return phx_fail(err, PHX_INVALID, "more than %d plugin directories", PHX__SEARCH_MOST);
  out->directories[out->n] = phx__strdup(real);
  if (!out->directories[out->n]) return phx_fail(err, PHX_NOMEM, "out of memory");
  out->n++;
  return PHX_OK;
}

static phx_status add_list(phx__search *out, const char *list, bool must_exist, phx_error *err) {
  phx_status status = PHX_OK;
  while (list && *list && status == PHX_OK) {
    size_t length = strcspn(list, ":");
    status = add_directory(out, list, length, must_exist, err);
    list += length + (list[length] == ':');
  }
  return status;
}

/* A prefix may have been moved, and every distribution calls its folder of libraries in one of these ways. */
static phx_status add_beside_command(phx__search *out, phx_error *err) {
  static const char *const tails[] = {"../lib/phalanx", "../lib64/phalanx", "../lib/" PHX__MULTIARCH "/phalanx"};
  char path[PATH_MAX];
  ssize_t length = readlink("/proc/self/exe", path, sizeof path);
  phx_status status = PHX_OK;
  while (length > 0 && path[length - 1] != '/') length--;
  for (size_t i = 0; i < sizeof tails / sizeof *tails && length > 0 && status == PHX_OK; i++) {
    const int used = snprintf(path + length, sizeof path - (size_t)length, "%s", tails[i]);
    if (used < 0 || (size_t)used >= sizeof path - (size_t)length) continue;
    status = add_directory(out, path, strlen(path), false, err);
  }
  return status;
}

phx_status phx__search_open(const char *configured, phx__search *out, phx_error *err) {
  phx_status status;
  *out = (phx__search){0};
  PHX_TRY_GOTO(add_list(out, configured, true, err), status, done);
  if (!getauxval(AT_SECURE)) PHX_TRY_GOTO(add_list(out, getenv("PHALANX_PLUGIN_PATH"), false, err), status, done);
  PHX_TRY_GOTO(add_beside_command(out, err), status, done);
  PHX_TRY_GOTO(add_list(out, PHX__PLUGIN_DIR, false, err), status, done);
done:
  if (status != PHX_OK) phx__search_close(out);
  return status;
}

void phx__search_close(phx__search *search) {
  for (size_t i = 0; i < search->n; i++) phx__free(search->directories[i]);
  search->n = 0;
}

/* phx_<kind>_<name>.so -> kind and name; 0: not a plugin's file name. */
static uint32_t kind_of_file(const char *file, char name[40]) {
  for (uint32_t kind = PHX_KIND_STRATEGY; kind <= PHX_KIND_OPTIMIZER; kind++) {
    char prefix[32];
    int n = snprintf(prefix, sizeof prefix, "phx_%s_", phx__kind_name(kind));
    size_t length = strlen(file);
    if (strncmp(file, prefix, (size_t)n) != 0 || length < (size_t)n + 4 || length > (size_t)n + 3 + 32) continue;
    if (strcmp(file + length - 3, ".so") != 0) continue;
    snprintf(name, 40, "%.*s", (int)(length - (size_t)n - 3), file + n);
    if (phx__name_is_plain(name, 32)) return kind;
  }
  return 0;
}

static int by_kind_name(const void *a, const void *b) {
  const phx__found *x = a, *y = b;
  if (x->kind != y->kind) return x->kind < y->kind ? -1 : 1;
  int order = strcmp(x->name, y->name);
  return order ? order : x->order - y->order;
}

static phx_status list_directory(const char *directory, int order, phx__found **list, size_t *n, phx_error *err) {
  DIR *dir = opendir(directory);
  if (!dir) return phx_fail_errno(err, PHX_INVALID, errno, "plugin directory %s cannot be read", directory);
  for (struct dirent *e; (e = readdir(dir));) {
    phx__found found = {.order = order};
    found.kind = kind_of_file(e->d_name, found.name);
    int length = snprintf(found.path, sizeof found.path, "%s/%s", directory, e->d_name);
    if (!found.kind || length < 0 || (size_t)length >= sizeof found.path) continue;
    phx__found *bigger = phx__sys.realloc(*list, (*n + 1) * sizeof **list);
    if (!bigger) {
      closedir(dir);
      return phx_fail(err, PHX_NOMEM, "out of memory");
    }
    *list = bigger;
    bigger[(*n)++] = found;
  }
  closedir(dir);
  return PHX_OK;
}

phx_status phx__loader_list(const char *search, phx__found **out, size_t *out_n, phx_error *err) {
  phx__search where;
  phx__found *list = NULL;
  size_t n = 0;
  phx_status status = phx__search_open(search, &where, err);
  if (status != PHX_OK) return status;
  for (size_t i = 0; i < where.n; i++)
    PHX_TRY_GOTO(list_directory(where.directories[i], (int)i, &list, &n, err), status, done);
  if (n) qsort(list, n, sizeof *list, by_kind_name);
  for (size_t i = 1; i < n; i++)
    list[i].shadowed = list[i].kind == list[i - 1].kind && strcmp(list[i].name, list[i - 1].name) == 0;
  *out = list;
  *out_n = n;
  list = NULL;
done:
  phx__free(list);
  phx__search_close(&where);
  return status;
}
