/* core/plugin/loader_trust.c - which files may be loaded: only what nobody else could have put there, or could change.
 *
 * A path is walked from "/" as the kernel does: each directory on the way, each link, and the file must belong to root
 * or to the user, and be writable by nobody else.  A directory where others may add names but not change ours (sticky,
 * such as /tmp) is no danger above the one that holds the file.  A group counts as nobody else when it is the user's
 * own (its name and its only member are the user), or root's.  A guard against accidents and against other users; not
 * a sandbox.  Access control lists are not looked at.
 * [main] only, no state. */
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <limits.h>
#include <pwd.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/status.h"
#include "base/sys.h"
#include "plugin/loader_search.h"

enum { LINKS_MOST = 40, REST_BYTES = 2 * PATH_MAX };

static bool group_is_ours(gid_t gid) {
  if (gid == 0) return true;
  const struct passwd *me = getpwuid(geteuid());
  char name[256];
  if (!me || me->pw_gid != gid || snprintf(name, sizeof name, "%s", me->pw_name) >= (int)sizeof name) return false;
  const struct group *group = getgrgid(gid);
  if (!group || strcmp(group->gr_name, name) != 0) return false;
  for (char **member = group->gr_mem; member && *member; member++)
    if (strcmp(*member, name) != 0) return false;
  return true;
}

static phx_status check_mode(const char *what, const char *path, const struct stat *info, phx_error *err) {
  if (info->st_uid != 0 && info->st_uid != geteuid())
    return phx_fail(err, PHX_INVALID, "%s %s belongs to user %ld, neither to root nor to you: refused", what, path,
                    (long)info->st_uid);
  if ((info->st_mode & S_IWOTH) || ((info->st_mode & S_IWGRP) && !group_is_ours(info->st_gid)))
    return phx_fail(err, PHX_INVALID, "%s %s can be written by others (mode %03o): refused; chmod o-w,g-w it", what,
                    path, (unsigned)(info->st_mode & 0777));
  return PHX_OK;
}

/* Where root of the machine has no number, its directories belong to the number that stands for all such users. */
static bool is_unmapped(uid_t uid) {
  unsigned first = 1, outside = 1, count = 0;
  long overflow = -1;
  FILE *f = fopen("/proc/self/uid_map", "re");
  if (!f || fscanf(f, "%u %u %u", &first, &outside, &count) != 3) count = UINT_MAX;
  if (f) fclose(f);
  if (count == UINT_MAX) return false; /* every user is there */
  f = fopen("/proc/sys/kernel/overflowuid", "re");
  if (!f || fscanf(f, "%ld", &overflow) != 1) overflow = -1;
  if (f) fclose(f);
  return (long)uid == overflow;
}

/* One that leads there: nobody else may take our names away or put others in their place. */
static phx_status check_above(const char *path, const struct stat *info, phx_error *err) {
  struct stat seen = *info;
  if (seen.st_mode & S_ISVTX) seen.st_mode &= ~(mode_t)(S_IWOTH | S_IWGRP);
  if (seen.st_uid != 0 && seen.st_uid != geteuid() && is_unmapped(seen.st_uid)) seen.st_uid = 0;
  return check_mode("the directory", path, &seen, err);
}

typedef struct walk {
  char at[PATH_MAX], rest[REST_BYTES]; /* at: real, "" for "/" */
  int links;
} walk;

static phx_status follow(walk *w, const char *link, phx_error *err) {
  char target[PATH_MAX], rest[REST_BYTES];
  const ssize_t n = readlink(link, target, sizeof target - 1);
  if (n < 0) return phx_fail_errno(err, PHX_INVALID, errno, "%s", link);
  target[n] = 0;
  if (++w->links > LINKS_MOST) return phx_fail_errno(err, PHX_INVALID, ELOOP, "%s", link);
  if (target[0] == '/') w->at[0] = 0;
  if (snprintf(rest, sizeof rest, "%s/%s", target, w->rest) >= (int)sizeof rest)
    return phx_fail_errno(err, PHX_INVALID, ENAMETOOLONG, "%s", link);
  memcpy(w->rest, rest, sizeof rest);
  return PHX_OK;
}

/* Takes the next name off rest; false: none is left. */
static bool next_name(walk *w, char name[NAME_MAX + 1]) {
  const char *from = w->rest + strspn(w->rest, "/");
  const size_t n = strcspn(from, "/");
  if (n == 0 || n > NAME_MAX) return false;
  memcpy(name, from, n);
  name[n] = 0;
  memmove(w->rest, from + n, strlen(from + n) + 1);
  return true;
}

/* One name; *file: it is what the path leads to. */
static phx_status step(walk *w, const char *name, bool *file, phx_error *err) {
  char next[PATH_MAX + NAME_MAX + 2];
  struct stat info;
  *file = false;
  if (!strcmp(name, ".")) return PHX_OK;
  if (!strcmp(name, "..")) {
    char *slash = strrchr(w->at, '/');
    if (slash) *slash = 0;
    return PHX_OK;
  }
  if (snprintf(next, sizeof next, "%s/%s", w->at, name) >= PATH_MAX)
    return phx_fail_errno(err, PHX_INVALID, ENAMETOOLONG, "%s", w->at);
  if (lstat(next, &info)) return phx_fail_errno(err, PHX_INVALID, errno, "%s", next);
  if (S_ISLNK(info.st_mode)) {
    if (info.st_uid != 0 && info.st_uid != geteuid() && !is_unmapped(info.st_uid))
      return phx_fail(err, PHX_INVALID, "the link %s belongs to user %ld, neither to root nor to you: refused", next,
                      (long)info.st_uid);
    return follow(w, next, err);
  }
  *file = !S_ISDIR(info.st_mode);
  if (*file) return PHX_OK;
  memcpy(w->at, next, strlen(next) + 1);
  return check_above(next, &info, err);
}

phx_status phx__path_trusted(const char *path, phx_error *err) {
  char name[NAME_MAX + 1], here[PATH_MAX] = "";
  struct stat info;
  walk w = {.links = 0};
  bool file = false;
  if (path[0] != '/' && !getcwd(here, sizeof here)) return phx_fail_errno(err, PHX_INVALID, errno, "%s", path);
  if (snprintf(w.rest, sizeof w.rest, "%s/%s", here, path) >= (int)sizeof w.rest)
    return phx_fail_errno(err, PHX_INVALID, ENAMETOOLONG, "%s", path);
  if (stat("/", &info)) return phx_fail_errno(err, PHX_INVALID, errno, "/");
  phx_status status = check_above("/", &info, err);
  while (!status && !file && next_name(&w, name)) status = step(&w, name, &file, err);
  if (status) return status;
  if (!file || w.rest[strspn(w.rest, "/")]) return phx_fail(err, PHX_INVALID, "%s is not a regular file", path);
  if (stat(w.at[0] ? w.at : "/", &info)) return phx_fail_errno(err, PHX_INVALID, errno, "%s", w.at);
  return check_mode("the directory", w.at[0] ? w.at : "/", &info, err);
}

phx_status phx__file_trusted(int fd, const char *path, struct stat *info, phx_error *err) {
  if (phx__sys.fstat(fd, info)) return phx_fail_errno(err, PHX_INVALID, errno, "%s", path);
  if (!S_ISREG(info->st_mode)) return phx_fail(err, PHX_INVALID, "%s is not a regular file", path);
  return check_mode("the file", path, info, err);
}
