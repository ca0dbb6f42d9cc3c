/* core/plugin/loader.c - loading one plugin: the only file that knows libltdl.
 *
 * libltdl reports every failure as "file not found" and binds lazily, so a loader vtable of our own stands in for its
 * dlopen one: RTLD_NOW (an undefined symbol is found here, not in the middle of a run), RTLD_LOCAL (plugins do not see
 * each other), RTLD_NODELETE (nothing is ever unmapped), and dlerror's text is kept.  libltdl knows a module by its
 * path string: it is always given a real path that ends in .so, so a stray .la file is never read.
 *
 * A file is opened once: what is trusted and hashed is that open file, and after it was loaded its path must still lead
 * to it, unchanged.
 *
 * Invariant: what is in `loaded` was checked whole; a plugin stays for the life of the process.  [main] only: libltdl
 * is not thread-safe. */
#include "plugin/loader.h"
#include "base/nearest.h"
#include "base/sha256.h"
#include "base/status.h"
#include "base/sys.h"
#include "config/option.h"
#include "plugin/descriptor.h"
#include "plugin/loader_search.h"
#include "plugin/suspect.h"

#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <ltdl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

typedef struct loaded_plugin {
  phx__plugin plugin;
  int fd;           /* until it is identified, else -1 */
  struct stat info; /* when it was loaded */
  struct loaded_plugin *next;
} loaded_plugin;
static loaded_plugin *loaded;

static struct { /* what a configuration names by path, and what of it may be loaded: phx__loader_guard */
  char *directories, *files[PHX__GUARDED_FILES], *pins;
} guard;

static char dlopen_error[400]; /* of the last failed open, one line */

static lt_module vtable_open(lt_user_data data, const char *path, lt_dladvise advise) {
  (void)data;
  (void)advise;
  void *module = dlopen(path, RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE);
  if (module) return module;
  const char *text = dlerror();
  if (!text) text = "the dynamic loader gives no reason";
  size_t length = strlen(path); /* it begins with the path, which the caller says too */
  if (strncmp(text, path, length) == 0 && strncmp(text + length, ": ", 2) == 0) text += length + 2;
  snprintf(dlopen_error, sizeof dlopen_error, "%s", text);
  for (char *p = dlopen_error; *p; p++)
    if (*p == '\n') *p = ' ';
  return NULL;
}

static int vtable_close(lt_user_data data, lt_module module) {
  (void)data;
  return dlclose(module);
}

static void *vtable_symbol(lt_user_data data, lt_module module, const char *name) {
  (void)data;
  return dlsym(module, name);
}

/* Once; libltdl is never shut down, and our vtable lives as long as it. */
static phx_status ltdl_start(phx_error *err) {
  static bool started;
  if (started) return PHX_OK;
  if (lt_dlinit() != 0) return phx_fail(err, PHX_INTERNAL, "libltdl does not start: %s", lt_dlerror());
  static const lt_dlvtable prototype = {.name = "phx_dlopen",
                                        .sym_prefix = "",
                                        .module_open = vtable_open,
                                        .module_close = vtable_close,
                                        .find_sym = vtable_symbol,
                                        .priority = LT_DLLOADER_PREPEND};
  static lt_dlvtable vtable;
  vtable = prototype;
  free(lt_dlloader_remove("lt_dlopen")); /* else a failed open is tried again lazily, and "succeeds" */
  if (lt_dlloader_add(&vtable) != 0) return phx_fail(err, PHX_INTERNAL, "libltdl takes no loader: %s", lt_dlerror());
  started = true;
  return PHX_OK;
}

/* The entry of this very file, not of a library that it links. */
static phx_status find_entry(lt_dlhandle module, const char *path, phx_plugin_entry **out, phx_error *err) {
  struct stat ours, theirs;
  Dl_info info;
  void *symbol = lt_dlsym(module, PHX_ENTRY_SYMBOL);
  if (!symbol)
    return phx_fail(err, PHX_INVALID, "%s is not a phalanx plugin: it has no function " PHX_ENTRY_SYMBOL, path);
  if (!dladdr(symbol, &info) || !info.dli_fname || stat(path, &ours) != 0 || stat(info.dli_fname, &theirs) != 0 ||
      ours.st_dev != theirs.st_dev || ours.st_ino != theirs.st_ino)
    return phx_fail(err, PHX_INVALID, "%s is not a phalanx plugin: its " PHX_ENTRY_SYMBOL " comes from another file",
                    path);
  memcpy(out, &symbol, sizeof symbol);
  return PHX_OK;
}

static const phx__plugin *find_loaded(const char *path) {
  for (loaded_plugin *p = loaded; p; p = p->next)
    if (strcmp(p->plugin.path, path) == 0) return &p->plugin;
  return NULL;
}

static phx_status check(const phx_plugin *descriptor, uint32_t kind, const char *name, const char *path,
                        phx_error *err) {
  phx_error reason = PHX_ERROR_INIT;
  phx_status status = phx__descriptor_check(descriptor, kind, name, &reason);
  return status == PHX_OK ? PHX_OK : phx_fail(err, status, "%s: %s", path, reason.message);
}

/* ---- pins ---- */
static bool lies_in(const char *path, const char *directories) {
  char one[PATH_MAX], real[PATH_MAX];
  const char *slash = strrchr(path, '/');
  for (const char *at = directories; at && *at;) {
    const size_t n = strcspn(at, ":");
    snprintf(one, sizeof one, "%.*s", (int)n, at);
    if (n < sizeof one && realpath(one, real) && strlen(real) == (size_t)(slash - path) &&
        !strncmp(real, path, (size_t)(slash - path)))
      return true;
    at += n + (at[n] == ':');
  }
  return false;
}

static bool is_named(const char *path) {
  char real[PATH_MAX];
  for (size_t i = 0; i < PHX__GUARDED_FILES; i++)
    if (guard.files[i] && realpath(guard.files[i], real) && !strcmp(real, path)) return true;
  return false;
}

static bool is_pinned(const char *sha256) {
  for (const char *at = guard.pins; at && *at;) {
    const size_t n = strcspn(at, ", ");
    if (n == 64 && !strncasecmp(at, sha256, 64)) return true;
    at += n;
    at += strspn(at, ", ");
  }
  return false;
}

/* Before any code of it runs. */
static phx_status check_pin(const loaded_plugin *mine, const char *path, phx_error *err) {
  char sha256[65];
  if (!guard.pins) return PHX_OK;
  if (!is_named(path) && !lies_in(path, guard.directories)) return PHX_OK;
  const phx_status status = phx__sha256_fd(mine->fd, path, sha256, err);
  if (status || is_pinned(sha256)) return status;
  return phx_fail(err, PHX_INVALID, "%s has the SHA-256 %s, which is not in [plugins] pin: refused", path, sha256);
}

static char *copy_of(const char *text, bool *lost) {
  char *copy = text && *text ? phx__strdup(text) : NULL;
  *lost = *lost || (text && *text && !copy);
  return copy;
}

phx_status phx__loader_guard(const char *directories, const char *const files[PHX__GUARDED_FILES], const char *pins,
                             phx_error *err) {
  bool lost = false;
  phx__free(guard.directories);
  phx__free(guard.pins);
  guard.directories = copy_of(directories, &lost);
  for (size_t i = 0; i < PHX__GUARDED_FILES; i++) {
    phx__free(guard.files[i]);
    guard.files[i] = copy_of(files ? files[i] : NULL, &lost);
  }
  guard.pins = copy_of(pins, &lost);
  return lost ? phx_fail(err, PHX_NOMEM, "no memory for [plugins] pin") : PHX_OK;
}

/* ---- loading ---- */
static bool unchanged(const loaded_plugin *mine, const char *path) {
  struct stat now;
  return !stat(path, &now) && now.st_dev == mine->info.st_dev && now.st_ino == mine->info.st_ino &&
         now.st_size == mine->info.st_size && now.st_mtim.tv_sec == mine->info.st_mtim.tv_sec &&
         now.st_mtim.tv_nsec == mine->info.st_mtim.tv_nsec;
}

static phx_status load(const char *path, uint32_t kind, const char *name, const phx__plugin **out, phx_error *err) {
  phx_plugin_entry *entry = NULL;
  phx_status status;
  loaded_plugin *mine = phx__calloc(1, sizeof *mine);
  if (!mine) return phx_fail(err, PHX_NOMEM, "out of memory");
  mine->fd = phx__sys.open(path, O_RDONLY | O_NOFOLLOW | O_NONBLOCK, 0);
  if (mine->fd < 0) {
    status = phx_fail_errno(err, PHX_INVALID, errno, "%s", path);
    goto done;
  }
  PHX_TRY_GOTO(phx__file_trusted(mine->fd, path, &mine->info, err), status, done);
  PHX_TRY_GOTO(check_pin(mine, path, err), status, done);
  PHX_TRY_GOTO(ltdl_start(err), status, done);
  snprintf(dlopen_error, sizeof dlopen_error, "libltdl gives no reason");
  phx__suspect_begin(path, "while it was loaded", PHX__SUSPECT_LOADS);
  lt_dlhandle module = lt_dlopen(path);
  phx__suspect_end(PHX_OK, NULL);
  if (!module) {
    status = phx_fail(err, PHX_INVALID, "%s cannot be loaded: %s", path, dlopen_error);
    goto done;
  }
  if (!unchanged(mine, path)) {
    status = phx_fail(err, PHX_INVALID, "%s changed while it was loaded: refused", path);
    goto done;
  }
  PHX_TRY_GOTO(find_entry(module, path, &entry, err), status, done);
  phx__suspect_begin(path, "while its descriptor was read", PHX__SUSPECT_LOADS);
  const phx_plugin *descriptor = entry();
  PHX_TRY_GOTO(phx__suspect_end(check(descriptor, kind, name, path, err), err), status, done);
  mine->plugin.descriptor = descriptor;
  snprintf(mine->plugin.path, sizeof mine->plugin.path, "%s", path);
  mine->next = loaded;
  loaded = mine;
  *out = &mine->plugin;
  mine = NULL;
done:
  if (mine && mine->fd >= 0) phx__sys.close(mine->fd);
  phx__free(mine);
  return status;
}

phx_status phx__loader_open_file(uint32_t kind, const char *path, const char *name, const phx__plugin **out,
                                 phx_error *err) {
  char real[PATH_MAX];
  size_t length = strlen(path);
  if (length < 4 || strcmp(path + length - 3, ".so") != 0)
    return phx_fail(err, PHX_INVALID, "%s: the path of a plugin must end in .so", path);
  if (!realpath(path, real)) return phx_fail_errno(err, PHX_INVALID, errno, "plugin %s", path);
  phx_status trusted = phx__path_trusted(path, err); /* each link's directory too, not only what it leads to */
  if (trusted != PHX_OK) return trusted;
  length = strlen(real);
  if (length < 4 || strcmp(real + length - 3, ".so") != 0)
    return phx_fail(err, PHX_INVALID, "%s leads to %s: the path of a plugin must end in .so", path, real);
  const phx__plugin *known = find_loaded(real);
  if (known) {
    phx_status status = check(known->descriptor, kind, name, real, err);
    if (status == PHX_OK) *out = known;
    return status;
  }
  return load(real, kind, name, out, err);
}

/* No such name: say what there is. */
static phx_status not_found(const char *search, uint32_t kind, const char *name, phx_error *err) {
  phx__found *list = NULL;
  size_t n = 0, used = 0;
  char names[200] = "", hint[80];
  phx__nearest nearest = {.word = name};
  PHX_TRY(phx__loader_list(search, &list, &n, err));
  for (size_t i = 0; i < n; i++) {
    if (list[i].kind != kind || list[i].shadowed) continue;
    phx__nearest_offer(&nearest, list[i].name);
    if (used < sizeof names)
      used += (size_t)snprintf(names + used, sizeof names - used, "%s%s", used ? ", " : "", list[i].name);
  }
  phx_status status = phx_fail(err, PHX_INVALID, "there is no %s plugin '%s' (found: %s)%s", phx__kind_name(kind), name,
                               used ? names : "none", phx__nearest_hint(&nearest, hint, sizeof hint));
  phx__free(list);
  return status;
}

phx_status phx__loader_identify(const phx__plugin *plugin, phx_error *err) {
  loaded_plugin *mine = loaded;
  while (&mine->plugin != plugin) mine = mine->next; /* what callers hold is in the list */
  if (mine->plugin.sha256[0]) return PHX_OK;
  struct stat now;
  phx_status status = phx__sha256_fd(mine->fd, mine->plugin.path, mine->plugin.sha256, err);
  if (!status && (phx__sys.fstat(mine->fd, &now) || now.st_size != mine->info.st_size ||
                  now.st_mtim.tv_sec != mine->info.st_mtim.tv_sec || now.st_mtim.tv_nsec != mine->info.st_mtim.tv_nsec))
    status = phx_fail(err, PHX_INVALID, "%s changed since it was loaded: refused", mine->plugin.path);
  if (status) {
    mine->plugin.sha256[0] = 0;
    return status;
  }
  phx__sys.close(mine->fd);
  mine->fd = -1;
  return PHX_OK;
}

static phx_status find_and_open(const char *search, uint32_t kind, const char *name, const phx__plugin **out,
                                phx_error *err) {
  phx__search where;
  char path[PATH_MAX + 128] = "";
  bool found = false;
  const bool may_be_path = kind == PHX_KIND_STRATEGY || kind == PHX_KIND_OPTIMIZER;
  if (strchr(name, '/') && may_be_path) return phx__loader_open_file(kind, name, NULL, out, err);
  if (!phx__name_is_plain(name, 32))
    return phx_fail(err, PHX_INVALID, "'%s' is not a plugin's name: expected [a-z0-9_]{1,32}%s", name,
                    may_be_path ? ", or the path of a .so with a '/' in it" : "");
  PHX_TRY(phx__search_open(search, &where, err));
  for (size_t i = 0; i < where.n && !found; i++) {
    snprintf(path, sizeof path, "%s/phx_%s_%s.so", where.directories[i], phx__kind_name(kind), name);
    found = access(path, F_OK) == 0;
  }
  phx__search_close(&where);
  return found ? phx__loader_open_file(kind, path, name, out, err) : not_found(search, kind, name, err);
}

phx_status phx__loader_open(const char *search, uint32_t kind, const char *name, const phx__plugin **out,
                            phx_error *err) {
  const phx_status status = find_and_open(search, kind, name, out, err);
  return status == PHX_OK ? phx__loader_identify(*out, err) : status;
}
