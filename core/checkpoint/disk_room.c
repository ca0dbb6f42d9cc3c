/* core/checkpoint/disk_room.c - see disk_room.h.
 *
 * What it does not do: reserve anything; others write to the same disk, and a save that finds none fails as before.
 * Quotas are seen only where the file system counts them as free blocks. */
#include "checkpoint/disk_room.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include "base/bytes_text.h"
#include "base/status.h"
#include "base/sys.h"
#include "checkpoint/checkpoint_dir.h"
#include "engine/layout.h"

int64_t phx__checkpoint_bytes(const phx__prepared *p) {
  const phx_model *model = p->model;
  int64_t bytes = model->total_blocks[PHX_FLAT_FROZEN] * PHX_BLOCK * 4; /* every state is fp32 in a checkpoint */
  bytes += model->total_blocks[PHX_FLAT_TRAINABLE] * PHX_BLOCK * 4;
  for (uint32_t i = 0; i < p->optim.n_states; i++)
    bytes += model->total_blocks[PHX_FLAT_TRAINABLE] * PHX_BLOCK * (int64_t)phx_dtype_bytes(p->optim.states[i].dtype);
  return bytes;
}

/* ---- free ---- */
static bool go_up(char path[PHX__CHECKPOINT_PATH]) {
  char *slash = strrchr(path, '/');
  if (!strcmp(path, "/") || !strcmp(path, ".")) return false;
  if (!slash) snprintf(path, PHX__CHECKPOINT_PATH, ".");
  else if (slash == path) path[1] = 0;
  else *slash = 0;
  return true;
}

/* -1: nobody knows. */
static int64_t free_bytes(const char *dir) {
  char path[PHX__CHECKPOINT_PATH];
  struct statvfs st;
  if (snprintf(path, sizeof path, "%s", dir) >= (int)sizeof path) return -1;
  while (phx__sys.statvfs(path, &st))
    if (errno != ENOENT || !go_up(path)) return -1;
  if (st.f_blocks == 0) return -1;
  const double bytes = (double)st.f_frsize * (double)(geteuid() == 0 ? st.f_bfree : st.f_bavail);
  return bytes < 9e18 ? (int64_t)bytes : INT64_MAX;
}

static phx_status compare(const char *dir, int64_t bytes, int64_t more, const char *what, phx_error *err) {
  char wanted[24], there[24];
  const int64_t left = free_bytes(dir);
  if (left < 0 || left >= bytes - more) return PHX_OK;
  phx__bytes_text(bytes, wanted);
  phx__bytes_text(left + more, there);
  return phx_fail(err, PHX_IO, "%s take %s, and the file system of %.300s has %s free", what, wanted, dir, there);
}

phx_status phx__disk_room_for(const char *dir, int64_t bytes, const char *what, phx_error *err) {
  return compare(dir, bytes, 0, what, err);
}

/* ---- what dead saves left ---- */
static int64_t files_bytes(int parent, const char *name) {
  struct stat st;
  int64_t sum = 0;
  const int fd = openat(parent, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
  DIR *dir = fd < 0 ? NULL : fdopendir(fd);
  if (!dir && fd >= 0) phx__sys.close(fd);
  for (struct dirent *e; dir && (e = readdir(dir));)
    if (!fstatat(fd, e->d_name, &st, AT_SYMLINK_NOFOLLOW) && S_ISREG(st.st_mode)) sum += st.st_blocks * 512;
  if (dir) closedir(dir);
  return sum;
}

static int64_t leftover_bytes(const char *run_dir) {
  char path[PHX__CHECKPOINT_PATH];
  int64_t sum = 0;
  if (phx__path_join(path, run_dir, PHX__CHECKPOINTS, NULL)) return 0;
  DIR *dir = opendir(path);
  for (struct dirent *e; dir && (e = readdir(dir));) {
    const size_t n = strlen(e->d_name);
    if (n > 5 && !strcmp(e->d_name + n - 5, ".part")) sum += files_bytes(dirfd(dir), e->d_name);
  }
  if (dir) closedir(dir);
  return sum;
}

phx_status phx__disk_room_at_start(const phx__prepared *p, phx_error *err) {
  const phx__settings *s = &p->config->s;
  const int64_t weights = 4 * phx__layout_parameters(p->model);
  if (s->checkpoint.every == 0) return compare(s->run.out, weights, 0, "run.out: the final weights", err);
  return compare(s->run.out, weights + phx__checkpoint_bytes(p), leftover_bytes(s->run.out),
                 "run.out: a checkpoint and the final weights", err);
}
