/* core/checkpoint/checkpoint_dir.c - the directory of a run's checkpoints: names, listing, retention, leftovers.
 *
 * What it does not do: look into a checkpoint, but for its manifest when the newest whole one is asked for.
 * Invariant: a directory named step-N is whole or damaged from outside, never half written or half removed: both go
 * through a name that ends in .part.  The order is the step's number; the file `latest` is for people and tools, and a
 * crash between a commit and its update changes nothing.
 * Threads: [main]; retain and remove may run in a saver's thread. */
#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "checkpoint/checkpoint_dir.h"
#include "base/status.h"
#include "base/sys.h"
#include "checkpoint/manifest.h"
#include "plugin/host.h"

/* ---- names ---- */
phx_status phx__path_join(char path[PHX__CHECKPOINT_PATH], const char *dir, const char *name, phx_error *err) {
  const int n = snprintf(path, PHX__CHECKPOINT_PATH, "%s/%s", dir, name);
  if (n >= 0 && n < PHX__CHECKPOINT_PATH) return PHX_OK;
  return phx_fail(err, PHX_INVALID, "%.200s... /%.60s: the path is longer than %d bytes", dir, name,
                  PHX__CHECKPOINT_PATH - 1);
}

static phx_status checkpoints_path(const char *run_dir, char path[PHX__CHECKPOINT_PATH], phx_error *err) {
  return phx__path_join(path, run_dir, PHX__CHECKPOINTS, err);
}

void phx__checkpoint_name(int64_t step, char name[PHX__CHECKPOINT_NAME]) {
  snprintf(name, PHX__CHECKPOINT_NAME, "step-%08" PRId64, step);
}

/* The step, or -1: only names that phx__checkpoint_name makes. */
static int64_t step_of(const char *name) {
  char again[PHX__CHECKPOINT_NAME];
  if (strncmp(name, "step-", 5) != 0 || strlen(name) > 24) return -1;
  for (const char *c = name + 5; *c; c++)
    if (!isdigit((unsigned char)*c)) return -1;
  const int64_t step = strtoll(name + 5, NULL, 10);
  phx__checkpoint_name(step, again);
  return strcmp(again, name) == 0 ? step : -1;
}

static bool is_leftover(const char *name) {
  const size_t n = strlen(name);
  return name[0] == '.' && n > 5 && strcmp(name + n - 5, ".part") == 0;
}

phx_status phx__checkpoint_path(const char *run_dir, int64_t step, char path[PHX__CHECKPOINT_PATH], phx_error *err) {
  char name[PHX__CHECKPOINT_NAME + 16], leaf[PHX__CHECKPOINT_NAME];
  phx__checkpoint_name(step, leaf);
  snprintf(name, sizeof name, "%s/%s", PHX__CHECKPOINTS, leaf);
  return phx__path_join(path, run_dir, name, err);
}

/* ---- small file work ---- */
phx_status phx__dir_flush(const char *path, phx_error *err) {
  const int fd = phx__sys.open(path, O_RDONLY | O_DIRECTORY, 0);
  if (fd < 0) return phx_fail_errno(err, PHX_IO, errno, "cannot open the directory %s", path);
  phx_status status = PHX_OK;
  if (phx__sys.fsync(fd)) status = phx_fail_errno(err, PHX_IO, errno, "cannot flush the directory %s", path);
  phx__sys.close(fd);
  return status;
}

phx_status phx__dir_make(const char *path, phx_error *err) {
  struct stat st;
  if (!phx__sys.mkdir(path, 0755)) return PHX_OK;
  if (errno != EEXIST || lstat(path, &st))
    return phx_fail_errno(err, PHX_IO, errno, "cannot create the directory %s", path);
  if (S_ISLNK(st.st_mode) && st.st_uid != geteuid() && st.st_uid != 0)
    return phx_fail(err, PHX_IO, "%s is a link that user %ld made: not followed", path, (long)st.st_uid);
  if (!stat(path, &st) && S_ISDIR(st.st_mode)) return PHX_OK;
  return phx_fail(err, PHX_IO, "%s is there, and is not a directory", path);
}

enum { REMOVE_DEPTH = 32 }; /* a folder that strayed into a .part goes with it, and a save is not kept from its place */

static phx_status remove_entry(int dir, const char *path, const char *name, int depth, phx_error *err);

static phx_status remove_contents(int fd, const char *path, int depth, phx_error *err) {
  phx_status status = PHX_OK;
  DIR *dir = fdopendir(fd);
  if (!dir) {
    status = phx_fail_errno(err, PHX_IO, errno, "cannot read the directory %s", path);
    phx__sys.close(fd);
    return status;
  }
  for (struct dirent *e; !status && (e = readdir(dir));)
    if (strcmp(e->d_name, ".") != 0 && strcmp(e->d_name, "..") != 0)
      status = remove_entry(dirfd(dir), path, e->d_name, depth, err);
  closedir(dir);
  return status;
}

static phx_status remove_entry(int dir, const char *path, const char *name, int depth, phx_error *err) {
  if (!phx__sys.unlinkat(dir, name, 0) || errno == ENOENT) return PHX_OK;
  if (errno != EISDIR && errno != EPERM) return phx_fail_errno(err, PHX_IO, errno, "cannot remove %s/%s", path, name);
  if (depth == 0) return phx_fail(err, PHX_IO, "%s holds more than 32 directories in each other: not removed", path);
  const int fd = phx__sys.openat(dir, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW);
  if (fd < 0) return phx_fail_errno(err, PHX_IO, errno, "cannot open %s/%s", path, name);
  phx_status status = remove_contents(fd, path, depth - 1, err);
  if (!status && phx__sys.unlinkat(dir, name, AT_REMOVEDIR) && errno != ENOENT)
    status = phx_fail_errno(err, PHX_IO, errno, "cannot remove %s/%s", path, name);
  return status;
}

phx_status phx__checkpoint_remove(const char *path, phx_error *err) {
  const int fd = phx__sys.open(path, O_RDONLY | O_DIRECTORY | O_NOFOLLOW, 0);
  if (fd < 0 && errno == ENOENT) return PHX_OK;
  if (fd < 0) return phx_fail_errno(err, PHX_IO, errno, "cannot open the directory %s", path);
  phx_status status = remove_contents(fd, path, REMOVE_DEPTH, err);
  if (!status && phx__sys.rmdir(path) && errno != ENOENT)
    status = phx_fail_errno(err, PHX_IO, errno, "cannot remove %s", path);
  return status;
}

/* ---- listing ---- */
static int newest_first(const void *a, const void *b) {
  const int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
  return (x < y) - (x > y);
}

static phx_status add_step(phx__checkpoint_list *list, size_t *room, int64_t step, phx_error *err) {
  if (list->n == *room) {
    *room = *room ? *room * 2 : 32;
    int64_t *more = phx__sys.realloc(list->steps, *room * sizeof *more);
    if (!more) return phx_fail(err, PHX_NOMEM, "no memory for the list of checkpoints");
    list->steps = more;
  }
  list->steps[list->n++] = step;
  return PHX_OK;
}

/* run_dir's directory of checkpoints and its path; *dir NULL: there is none. */
static phx_status open_checkpoints(const char *run_dir, char path[PHX__CHECKPOINT_PATH], DIR **dir, phx_error *err) {
  PHX_TRY(checkpoints_path(run_dir, path, err));
  *dir = opendir(path);
  if (!*dir && errno != ENOENT && errno != ENOTDIR)
    return phx_fail_errno(err, PHX_IO, errno, "cannot read the directory %s", path);
  return PHX_OK;
}

phx_status phx__checkpoint_list_read(const char *run_dir, phx__checkpoint_list *out, phx_error *err) {
  char path[PHX__CHECKPOINT_PATH];
  phx__checkpoint_list list = {0};
  size_t room = 0;
  DIR *dir = NULL;
  phx_status status = open_checkpoints(run_dir, path, &dir, err);
  if (status) return status;
  for (struct dirent *e; dir && !status && (e = readdir(dir));) {
    const int64_t step = step_of(e->d_name);
    if (step >= 0) status = add_step(&list, &room, step, err);
  }
  if (dir) closedir(dir);
  if (status) {
    phx__checkpoint_list_free(&list);
    return status;
  }
  if (list.n > 1) qsort(list.steps, list.n, sizeof *list.steps, newest_first);
  *out = list;
  return PHX_OK;
}

void phx__checkpoint_list_free(phx__checkpoint_list *list) {
  phx__free(list->steps);
  *list = (phx__checkpoint_list){0};
}

static bool is_directory(const char *path) {
  struct stat st;
  return stat(path, &st) == 0 && S_ISDIR(st.st_mode);
}

static bool has_file(const char *dir, const char *name) {
  char path[PHX__CHECKPOINT_PATH];
  struct stat st;
  return !phx__path_join(path, dir, name, NULL) && stat(path, &st) == 0;
}

phx_status phx__checkpoint_locate(const char *dir, char run_dir[PHX__CHECKPOINT_PATH], int64_t *step, phx_error *err) {
  char real[PHX__CHECKPOINT_PATH];
  if (strlen(dir) >= sizeof real) return phx_fail(err, PHX_INVALID, "%.200s...: the path is too long", dir);
  if (!realpath(dir, real)) return phx_fail_errno(err, PHX_INVALID, errno, "cannot find the checkpoints of %s", dir);
  if (!is_directory(real))
    return phx_fail(err, PHX_INVALID, "%s is no directory: name a run's directory or one of its checkpoints", dir);
  char *leaf = strrchr(real, '/');
  const int64_t of_name = leaf ? step_of(leaf + 1) : -1;
  if (of_name < 0 && !has_file(real, PHX__MANIFEST_NAME)) { /* a run */
    memcpy(run_dir, real, sizeof real);
    *step = -1;
    return PHX_OK;
  }
  run_dir[0] = 0;
  *step = of_name;
  if (of_name < 0) return phx_fail(err, PHX_INVALID, "%s holds a manifest, but is not named step-NNNNNNNN", dir);
  *leaf = 0;
  char *parent = strrchr(real, '/');
  if (!parent || strcmp(parent + 1, PHX__CHECKPOINTS) != 0) return PHX_OK;
  *parent = 0;
  memcpy(run_dir, real[0] ? real : "/", strlen(real[0] ? real : "/") + 1);
  return PHX_OK;
}

/* The manifest is whole, and the files are there with its lengths. */
static phx_status look_at(const char *path, phx_error *err) {
  phx__manifest *m = NULL;
  char file[PHX__CHECKPOINT_PATH];
  struct stat st;
  phx_status status = phx__manifest_read(path, &m, err);
  for (uint32_t i = 0; !status && i < m->n_files; i++) {
    status = phx__path_join(file, path, m->files[i].name, err);
    if (status) break;
    if (stat(file, &st)) status = phx_fail_errno(err, PHX_IO, errno, "%s", file);
    else if (st.st_size != m->files[i].bytes)
      status = phx_fail(err, PHX_IO, "%s has %lld bytes, and %lld in the manifest", file, (long long)st.st_size,
                        (long long)m->files[i].bytes);
  }
  phx__manifest_free(m);
  return status;
}

phx_status phx__checkpoint_newest(const char *run_dir, int64_t below, int64_t *step, bool *found, phx_error *err) {
  char path[PHX__CHECKPOINT_PATH], text[2 * PHX__CHECKPOINT_PATH];
  phx__checkpoint_list list = {0};
  phx_status status = phx__checkpoint_list_read(run_dir, &list, err);
  *found = false;
  for (size_t i = 0; i < list.n && !*found && !status; i++) {
    phx_error why = PHX_ERROR_INIT;
    if (list.steps[i] >= below) continue;
    status = phx__checkpoint_path(run_dir, list.steps[i], path, err);
    if (status) break;
    const phx_status looked = look_at(path, &why);
    if (looked == PHX_NOMEM) status = phx_fail(err, looked, "%s", why.message);
    *found = !looked;
    if (*found) *step = list.steps[i];
    if (*found || status) continue;
    snprintf(text, sizeof text, "%s cannot be used: %s", path, why.message);
    phx__log(0, "checkpoint", PHX_LOG_WARN, text);
    if (err) *err = why;
  }
  if (!status && !*found && list.n > 0)
    status = phx_fail(err, PHX_IO, "%s/%s holds no whole checkpoint", run_dir, PHX__CHECKPOINTS);
  phx__checkpoint_list_free(&list);
  return status;
}

/* ---- removing ---- */
phx_status phx__checkpoint_retire(const char *run_dir, int64_t step, phx_error *err) {
  char dir[PHX__CHECKPOINT_PATH], from[PHX__CHECKPOINT_PATH], to[PHX__CHECKPOINT_PATH], name[64], gone[96];
  phx__checkpoint_name(step, name);
  snprintf(gone, sizeof gone, ".%s.removed.part", name);
  phx_status status = checkpoints_path(run_dir, dir, err);
  if (!status) status = phx__path_join(from, dir, name, err);
  if (!status) status = phx__path_join(to, dir, gone, err);
  if (!status) status = phx__checkpoint_remove(to, err); /* of a removal that was killed */
  if (status) return status;
  if (phx__sys.rename(from, to)) return phx_fail_errno(err, PHX_IO, errno, "cannot rename %s to %s", from, to);
  status = phx__dir_flush(dir, err); /* else a power cut may bring the name back with some of its files gone */
  return status ? status : phx__checkpoint_remove(to, err);
}

phx_status phx__checkpoint_retain(const char *run_dir, const phx__retention *retention, phx_error *err) {
  phx__checkpoint_list list = {0};
  if (retention->keep <= 0) return PHX_OK;
  phx_status status = phx__checkpoint_list_read(run_dir, &list, err);
  for (size_t i = 0; i < list.n && !status; i++) {
    const bool multiple = retention->keep_every > 0 && list.steps[i] % retention->keep_every == 0;
    if ((int64_t)i >= retention->keep && !multiple) status = phx__checkpoint_retire(run_dir, list.steps[i], err);
  }
  phx__checkpoint_list_free(&list);
  return status;
}

phx_status phx__checkpoint_sweep(const char *run_dir, int64_t *removed, phx_error *err) {
  char path[PHX__CHECKPOINT_PATH], entry[PHX__CHECKPOINT_PATH], again[PHX__CHECKPOINT_NAME + 300];
  int64_t count = 0;
  DIR *dir = NULL;
  phx_status status = open_checkpoints(run_dir, path, &dir, err);
  if (status) return status;
  for (struct dirent *e; dir && !status && (e = readdir(dir));) {
    if (!is_leftover(e->d_name)) continue;
    snprintf(again, sizeof again, "%s", e->d_name);
    status = phx__path_join(entry, path, again, err);
    if (status) break;
    if (is_directory(entry)) status = phx__checkpoint_remove(entry, err);
    else if (phx__sys.unlink(entry) && errno != ENOENT)
      status = phx_fail_errno(err, PHX_IO, errno, "cannot remove %s", entry);
    count += !status;
  }
  if (dir) closedir(dir);
  if (!status && removed) *removed = count;
  return status;
}

phx_status phx__checkpoint_set_aside(const char *run_dir, int64_t above, phx_error *err) {
  char from[PHX__CHECKPOINT_PATH], to[PHX__CHECKPOINT_PATH], text[3 * PHX__CHECKPOINT_PATH];
  phx__checkpoint_list list = {0};
  struct stat st;
  bool moved = false;
  phx_status status = phx__checkpoint_list_read(run_dir, &list, err);
  for (size_t i = 0; i < list.n && !status && list.steps[i] > above; i++) {
    status = phx__checkpoint_path(run_dir, list.steps[i], from, err);
    for (int n = 1; !status; n++) {
      char name[96];
      snprintf(name, sizeof name, "%s/aside-%08" PRId64 ".%d", PHX__CHECKPOINTS, list.steps[i], n);
      status = phx__path_join(to, run_dir, name, err);
      if (!status && lstat(to, &st)) break;
    }
    if (!status && phx__sys.rename(from, to))
      status = phx_fail_errno(err, PHX_IO, errno, "cannot rename %s to %s", from, to);
    if (status) break;
    snprintf(text, sizeof text,
             "step %" PRId64 " was saved after step %" PRId64 ", where the run goes on: it is now %s", list.steps[i],
             above, to);
    phx__log(0, "checkpoint", PHX_LOG_WARN, text);
    moved = true;
  }
  if (!status && moved) { /* else a power cut may bring them back, as the newest */
    status = checkpoints_path(run_dir, from, err);
    if (!status) status = phx__dir_flush(from, err);
  }
  phx__checkpoint_list_free(&list);
  return status;
}

/* ---- the pointer ---- */
phx_status phx__checkpoint_point(const char *run_dir, int64_t step, phx_error *err) {
  char dir[PHX__CHECKPOINT_PATH], part[PHX__CHECKPOINT_PATH], path[PHX__CHECKPOINT_PATH];
  char text[PHX__CHECKPOINT_NAME + 1];
  PHX_TRY(checkpoints_path(run_dir, dir, err));
  PHX_TRY(phx__path_join(part, dir, ".latest.part", err));
  PHX_TRY(phx__path_join(path, dir, "latest", err));
  phx__checkpoint_name(step, text);
  strcat(text, "\n");
  const int fd = phx__sys.open(part, O_WRONLY | O_CREAT | O_TRUNC, 0644);
  if (fd < 0) return phx_fail_errno(err, PHX_IO, errno, "cannot create %s", part);
  phx_status status = phx__file_write(fd, part, text, (int64_t)strlen(text), 0, err);
  if (!status && phx__sys.fsync(fd)) status = phx_fail_errno(err, PHX_IO, errno, "cannot flush %s", part);
  phx__sys.close(fd);
  if (!status && phx__sys.rename(part, path))
    status = phx_fail_errno(err, PHX_IO, errno, "cannot rename %s to %s", part, path);
  if (status) phx__sys.unlink(part);
  return status ? status : phx__dir_flush(dir, err);
}
