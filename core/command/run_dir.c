/* core/command/run_dir.c - see run_dir.h.
 *
 * What it does not do: look into checkpoints, or write anything but config.ini and the lock.
 * Invariant: everything that is moved, written or taken back lies under the lock; without it only missing directories
 * are made.  Whose directory it is decides whether it is written to: a file that somebody else has prepared may be a
 * link to one of ours. */
#include "command/run_dir.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/complain.h"
#include "base/json.h"
#include "base/output.h"
#include "base/status.h"
#include "base/sys.h"
#include "checkpoint/checkpoint_dir.h"
#include "job/run_lock.h"

enum { RUN_DIR_MAX = 4000, /* PATH_MAX, with room for the names below it */ CONFIG_MAX = 16 << 20 };

struct phx__run_dir {
  char dir[RUN_DIR_MAX];          /* as it was asked for, or what a link, "." or ".." leads to */
  char aside[RUN_DIR_MAX + 32];   /* where the earlier run is now, or "" */
  int made;                       /* the last so many parts of the path are new */
  bool began, continues;
  char *config;                   /* config.ini's text before, or NULL */
  int64_t logs[PHX_RANKS_MAX];    /* lengths of rank-R.log before, or -1 */
};

/* ---- directories ---- */
/* The name of a new directory is on the disk when its parent was flushed: else a power cut may take it, with every
 * checkpoint that was committed in it since. */
static phx_status flush_parent(const char *path, phx_error *err) {
  char parent[RUN_DIR_MAX];
  snprintf(parent, sizeof parent, "%s", path);
  char *slash = strrchr(parent, '/');
  if (!slash) return phx__dir_flush(".", err);
  *(slash == parent ? slash + 1 : slash) = 0;
  return phx__dir_flush(parent, err);
}

/* Makes path and its parents; *made of them, the last ones of the path, are new. */
static phx_status make_dirs(const char *path, int *made, phx_error *err) {
  char part[RUN_DIR_MAX];
  *made = 0;
  snprintf(part, sizeof part, "%s", path);
  for (char *slash = strchr(part + 1, '/');; slash = strchr(slash + 1, '/')) {
    if (slash) *slash = 0;
    if (!phx__sys.mkdir(part, 0755)) {
      ++*made;
      PHX_TRY(flush_parent(part, err));
    } else if (errno != EEXIST) {
      return phx_fail_errno(err, PHX_IO, errno, "cannot create the directory %s (run.out)", part);
    }
    if (!slash) return PHX_OK;
    *slash = '/';
  }
}

/* Takes new directories back, the deepest first; those that are not there or not empty end it. */
static void unmake_dirs(const char *path, int made) {
  char part[RUN_DIR_MAX];
  snprintf(part, sizeof part, "%s", path);
  while (made > 0 && *part) {
    if (!phx__sys.rmdir(part)) made--;
    else if (errno == ENOTEMPTY || errno == EEXIST) return;
    char *slash = strrchr(part, '/');
    if (!slash) return;
    *slash = 0;
  }
}

static bool is_ours(const struct stat *st) { return st->st_uid == geteuid() || st->st_uid == 0; }

/* On some file systems (FAT, shares of other systems) all files are of one user: one that we make there, too. */
static bool has_no_owners(const char *dir, const struct stat *st) {
  char path[RUN_DIR_MAX + 64];
  struct stat made;
  snprintf(path, sizeof path, "%s/.owner-%ld.part", dir, (long)getpid());
  const int fd = phx__sys.open(path, O_WRONLY | O_CREAT | O_EXCL, 0600);
  if (fd < 0) return false;
  const bool same = !phx__sys.fstat(fd, &made) && made.st_uid == st->st_uid;
  phx__sys.close(fd);
  phx__sys.unlink(path);
  return same;
}

static bool has_no_name(const char *path) {
  const char *slash = strrchr(path, '/'), *leaf = slash ? slash + 1 : path;
  return !strcmp(leaf, ".") || !strcmp(leaf, "..");
}

/* The directory that run.out leads to, with a name that can be moved. */
static phx_status resolve(const phx__config *config, char dir[RUN_DIR_MAX], phx_error *err) {
  char real[PATH_MAX], asked[RUN_DIR_MAX];
  struct stat st, link;
  if (snprintf(asked, sizeof asked, "%s", config->s.run.out) >= RUN_DIR_MAX)
    return phx_fail(err, PHX_INVALID, "run.out has %zu characters: more than %d are too long for a path",
                    strlen(config->s.run.out), RUN_DIR_MAX - 1);
  for (size_t n = strlen(asked); n > 1 && asked[n - 1] == '/'; n--) asked[n - 1] = 0;
  memcpy(dir, asked, sizeof asked);
  if (lstat(asked, &link)) return PHX_OK; /* made below, or refused there */
  if (S_ISLNK(link.st_mode) && !is_ours(&link))
    return phx_fail(err, PHX_INVALID, "run.out = %s is a link that user %ld made: name the directory itself", asked,
                    (long)link.st_uid);
  if (!realpath(asked, real) || stat(real, &st)) {
    if (S_ISLNK(link.st_mode) && errno == ENOENT)
      return phx_fail(err, PHX_INVALID, "run.out = %s is a link to a directory that is not there: make it, or change "
                      "run.out", asked);
    return phx_fail_errno(err, PHX_INVALID, errno, "run.out = %s", asked);
  }
  if (!S_ISDIR(st.st_mode)) return phx_fail(err, PHX_INVALID, "run.out = %s is not a directory", asked);
  if (!is_ours(&st) && !has_no_owners(asked, &st))
    return phx_fail(err, PHX_INVALID,
                    "run.out = %s belongs to user %ld, neither to you nor to root: name a directory of your own, or a "
                    "new one in it", asked, (long)st.st_uid);
  if (!S_ISLNK(link.st_mode) && !has_no_name(asked)) return PHX_OK;
  if (snprintf(dir, RUN_DIR_MAX, "%s", real) >= RUN_DIR_MAX)
    return phx_fail(err, PHX_INVALID, "run.out = %.200s...: its real path is too long", asked);
  return PHX_OK;
}

/* ---- an earlier run ---- */
static bool holds_a_run(const char *dir) {
  static const char *const names[] = {"run.json", "compare.json", "compare", PHX__CHECKPOINTS};
  char name[RUN_DIR_MAX + 32];
  struct stat st;
  for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
    snprintf(name, sizeof name, "%s/%s", dir, names[i]);
    if (!stat(name, &st)) return true;
  }
  return false;
}

/* Where an earlier run in dir goes: "" when there is none. */
static phx_status aside_name(const char *dir, char name[RUN_DIR_MAX + 32], phx_error *err) {
  struct stat st;
  name[0] = 0;
  if (!holds_a_run(dir)) return PHX_OK;
  for (int n = 1; n < 100000; n++) {
    snprintf(name, RUN_DIR_MAX + 32, "%s.%d", dir, n);
    if (lstat(name, &st)) return PHX_OK;
  }
  return phx_fail(err, PHX_IO, "%s has too many earlier runs beside it: remove some, or change run.out", dir);
}

static bool work_is_in(const char *dir) {
  char here[PATH_MAX], real[PATH_MAX];
  if (!getcwd(here, sizeof here) || !realpath(dir, real)) return false;
  const size_t n = strlen(real);
  return !strncmp(here, real, n) && (!here[n] || here[n] == '/');
}

static phx_status check_aside(const char *dir, char name[RUN_DIR_MAX + 32], phx_error *err) {
  const phx_status status = aside_name(dir, name, err);
  if (status || !name[0] || !work_is_in(dir)) return status;
  return phx_fail(err, PHX_INVALID,
                  "run.out = %s holds an earlier run, and is the directory you work in: go to another one, or name a "
                  "new one in it", dir);
}

/* Two that start at once: both have seen the earlier run's lock, and one of them holds it; while the name is free a
 * third may take it, with a lock of its own. */
static phx_status move_aside(phx__run_dir *d, phx_error *err) {
  char name[RUN_DIR_MAX + 32];
  phx_status status = check_aside(d->dir, name, err);
  if (status || !name[0]) return status;
  if (phx__sys.rename(d->dir, name)) {
    const bool stuck = errno == EBUSY || errno == EXDEV;
    return phx_fail_errno(err, stuck ? PHX_INVALID : PHX_IO, errno,
                          "%s holds an earlier run, and cannot be moved to %s%s", d->dir, name,
                          stuck ? " (a mount point?): name a new directory in it as run.out" : "");
  }
  memcpy(d->aside, name, sizeof name);
  d->made = 1;
  if (phx__sys.mkdir(d->dir, 0755))
    return phx_fail_errno(err, PHX_IO, errno, "cannot create the directory %s (run.out)", d->dir);
  status = flush_parent(d->dir, err);
  if (!status) status = phx__run_lock_move(d->dir, name, err);
  if (!status) phx__complain("%s holds an earlier run: it is now %s", d->dir, name);
  return status;
}

/* ---- config.ini ---- */
static phx_status write_config(const phx__config *config, const char *dir, phx_error *err) {
  char path[RUN_DIR_MAX + 32];
  phx__text text;
  FILE *f = phx__text_stream(&text);
  if (!f) return phx_fail_errno(err, PHX_NOMEM, errno, "cannot write %s/config.ini", dir);
  phx__config_print(config, f, true);
  phx_status status = PHX_OK;
  snprintf(path, sizeof path, "%s/config.ini", dir);
  if (fclose(f) || text.failed) status = phx_fail(err, PHX_NOMEM, "no memory to write %s", path);
  else status = phx__text_write(path, text.data, err);
  phx__free(text.data);
  return status;
}

/* NULL: none that could be read. */
static char *read_config(const char *dir) {
  char path[RUN_DIR_MAX + 32], *text = NULL;
  struct stat st;
  snprintf(path, sizeof path, "%s/config.ini", dir);
  const int fd = phx__sys.open(path, O_RDONLY | O_NOFOLLOW | O_NONBLOCK, 0);
  if (fd < 0) return NULL;
  if (!phx__sys.fstat(fd, &st) && S_ISREG(st.st_mode) && st.st_size < CONFIG_MAX)
    text = phx__calloc(1, (size_t)st.st_size + 1);
  if (text && phx__sys.pread(fd, text, (size_t)st.st_size, 0) != st.st_size) {
    phx__free(text);
    text = NULL;
  }
  phx__sys.close(fd);
  return text;
}

/* ---- there and back ---- */
static void log_path(const phx__run_dir *d, int32_t rank, char path[RUN_DIR_MAX + 32]) {
  snprintf(path, RUN_DIR_MAX + 32, "%s/rank-%d.log", d->dir, rank);
}

static void remember(phx__run_dir *d) {
  char path[RUN_DIR_MAX + 32];
  struct stat st;
  d->config = read_config(d->dir);
  for (int32_t r = 0; r < PHX_RANKS_MAX; r++) {
    log_path(d, r, path);
    d->logs[r] = stat(path, &st) ? -1 : st.st_size;
  }
}

phx_status phx__run_dir_open(const phx__config *config, phx__run_dir **out, phx_error *err) {
  phx__run_dir *d = phx__calloc(1, sizeof *d);
  if (!d) return phx_fail(err, PHX_NOMEM, "no memory to remember what run.out holds");
  phx_status status = resolve(config, d->dir, err);
  if (!status) {
    status = make_dirs(d->dir, &d->made, err);
    if (!status) status = phx__run_lock_take(d->dir, err);
    if (status) unmake_dirs(d->dir, d->made);
  }
  if (status) {
    phx__free(d);
    return status;
  }
  remember(d);
  *out = d;
  return PHX_OK;
}

/* Would make_dirs succeed?  The first part that is not there tells. */
static phx_status check_parents(const char *path, phx_error *err) {
  char part[RUN_DIR_MAX], above[RUN_DIR_MAX] = ".";
  struct stat st;
  snprintf(part, sizeof part, "%s", path);
  for (char *slash = strchr(part + 1, '/');; slash = strchr(slash + 1, '/')) {
    if (slash) *slash = 0;
    errno = 0;
    if (stat(part, &st)) {
      if (errno == ENOENT) errno = access(above, W_OK | X_OK) ? errno : 0;
      if (!errno) return PHX_OK;
      return phx_fail_errno(err, PHX_IO, errno, "cannot create the directory %s (run.out)", part);
    }
    if (!slash) return PHX_OK;
    snprintf(above, sizeof above, "%s", part);
    *slash = '/';
  }
}

phx_status phx__run_dir_check(const phx__config *config, phx_error *err) {
  char dir[RUN_DIR_MAX], name[RUN_DIR_MAX + 32];
  phx_status status = resolve(config, dir, err);
  if (!status) status = check_parents(dir, err);
  return status ? status : check_aside(dir, name, err);
}

phx_status phx__run_dir_begin(phx__run_dir *d, const phx__config *config, bool continues, phx_error *err) {
  d->continues = continues;
  d->began = true;
  /* beside and renamed: the run may be going on from this very file */
  phx_status status = continues ? PHX_OK : move_aside(d, err);
  if (!status) status = write_config(config, d->dir, err);
  if (status) phx__run_dir_undo(d);
  return status;
}

static int cut_file(const char *path, int64_t bytes) {
  const int fd = phx__sys.open(path, O_WRONLY | O_NOFOLLOW, 0);
  if (fd < 0) return -1;
  const int failed = phx__sys.ftruncate(fd, bytes);
  const int cause = errno;
  phx__sys.close(fd);
  errno = cause;
  return failed;
}

void phx__run_dir_undo(phx__run_dir *d) {
  char path[RUN_DIR_MAX + 32];
  struct stat st;
  if (!d || !d->began) return;
  d->began = false;
  const bool fresh = !d->continues && (d->aside[0] || d->made > 0);
  for (int32_t r = 0; r < PHX_RANKS_MAX; r++) {
    log_path(d, r, path);
    if (fresh || d->logs[r] < 0) phx__sys.unlink(path);
    else if (!stat(path, &st) && st.st_size > d->logs[r] && cut_file(path, d->logs[r]))
      phx__complain("%s could not be cut to what it was: %s", path, strerror(errno));
  }
  snprintf(path, sizeof path, "%s/config.ini", d->dir);
  if (fresh || !d->config) phx__sys.unlink(path);
  else if (phx__text_write(path, d->config, NULL))
    phx__complain("%s could not be written back", path);
  if (!d->aside[0]) return; /* close takes new directories back */
  phx__run_lock_release();
  unmake_dirs(d->dir, d->made);
  d->made = 0;
  if (!phx__sys.rename(d->aside, d->dir)) phx__complain("%s is %s again", d->aside, d->dir);
  else phx__complain("cannot move %s back to %s: %s", d->aside, d->dir, strerror(errno));
}

void phx__run_dir_close(phx__run_dir *d) {
  if (!d) return;
  phx__run_lock_release();
  if (!d->began) unmake_dirs(d->dir, d->made);
  phx__free(d->config);
  phx__free(d);
}

phx_status phx__run_dir_create(const phx__config *config, phx_error *err) {
  phx__run_dir *d = NULL;
  PHX_TRY(phx__run_dir_open(config, &d, err));
  phx_status status = phx__run_dir_begin(d, config, false, err);
  if (status) {
    phx__run_dir_close(d);
    return status;
  }
  phx__free(d->config);
  phx__free(d);
  return PHX_OK;
}

phx_status phx__run_dir_inherit(const phx__config *config, phx_error *err) {
  char *end;
  const char *text = getenv(PHX__LOCK_VARIABLE);
  if (!text) return PHX_OK;
  errno = 0;
  const long fd = strtol(text, &end, 10);
  if (errno || end == text || *end || fd < 0 || fd > INT_MAX)
    return phx_fail(err, PHX_INVALID, PHX__LOCK_VARIABLE " = %s is no descriptor", text);
  return phx__run_lock_adopt(config->s.run.out, (int)fd, err);
}
