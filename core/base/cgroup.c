/* core/base/cgroup.c - see cgroup.h.
 *
 * /proc/self/cgroup names the group per hierarchy, /proc/self/mountinfo where a hierarchy is mounted and which group
 * is its root there: a container often sees its own group as the root.  From the group's directory up to that root,
 * every directory may hold a limit. */
#include "base/cgroup.h"

#include <fcntl.h>
#include <inttypes.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/sys.h"

enum { TEXT = 64 << 10, PATH = 4096 };

static bool read_text(const char *path, char *out, size_t room) {
  size_t used = 0;
  const int fd = phx__sys.open(path, O_RDONLY, 0);
  if (fd < 0) return false;
  for (ssize_t n = 1; n > 0 && used < room - 1; used += n > 0 ? (size_t)n : 0)
    n = phx__sys.read(fd, out + used, room - 1 - used);
  phx__sys.close(fd);
  out[used] = 0;
  return used > 0;
}

/* Is `word` one of a list like "cpu,cpuacct"? */
static bool in_list(const char *list, const char *word) {
  const size_t length = strlen(word);
  for (; *list; list += strcspn(list, ","), list += *list == ',')
    if (strcspn(list, ",") == length && strncmp(list, word, length) == 0) return true;
  return false;
}

/* controller NULL: of version 2.  The group's path within the hierarchy. */
static bool find_group(char *text, const char *controller, char group[PATH]) {
  char *rest = text;
  for (char *line; (line = strsep(&rest, "\n"));) {
    char *list = strchr(line, ':'), *path = list ? strchr(list + 1, ':') : NULL;
    if (!path) continue;
    *path++ = 0;
    list++;
    if (controller ? !in_list(list, controller) : *list != 0) continue;
    snprintf(group, PATH, "%s", path);
    return true;
  }
  return false;
}

/* A mount's line: id parent device ROOT MOUNT-POINT options... - TYPE source SUPER-OPTIONS */
static bool find_mount(char *text, const char *controller, char root[PATH], char at[PATH]) {
  char *rest = text;
  for (char *line; (line = strsep(&rest, "\n"));) {
    char type[32], super[512], *behind = strstr(line, " - ");
    if (!behind || sscanf(behind, " - %31s %*s %511s", type, super) != 2) continue;
    if (strcmp(type, controller ? "cgroup" : "cgroup2") != 0 || (controller && !in_list(super, controller))) continue;
    if (sscanf(line, "%*s %*s %*s %4095s %4095s", root, at) == 2) return true;
  }
  return false;
}

typedef struct hierarchy {
  char at[2 * PATH]; /* the directory that is looked at */
  size_t top;        /* at[0 .. top) is the mount point: the last one */
} hierarchy;

static bool find_hierarchy(const char *base, const char *controller, hierarchy *out) {
  char path[PATH], group[PATH], root[PATH], mount[PATH], text[TEXT];
  snprintf(path, sizeof path, "%s/proc/self/cgroup", base);
  bool found = read_text(path, text, TEXT) && find_group(text, controller, group);
  snprintf(path, sizeof path, "%s/proc/self/mountinfo", base);
  found = found && read_text(path, text, TEXT) && find_mount(text, controller, root, mount);
  if (!found) return false;
  const size_t length = strcmp(root, "/") ? strlen(root) : 0;
  const char *below = group;
  if (length && strncmp(group, root, length) == 0 && (group[length] == '/' || !group[length])) below += length;
  else if (length) below = ""; /* the group is above what is mounted: its root is all that can be seen */
  if (strcmp(below, "/") == 0) below = "";
  out->top = strlen(base) + strlen(mount);
  return snprintf(out->at, sizeof out->at, "%s%s%s", base, mount, below) < (int)sizeof out->at;
}

static bool up(hierarchy *h) {
  char *slash = strrchr(h->at, '/');
  if (!slash || (size_t)(slash - h->at) < h->top) return false;
  *slash = 0;
  return true;
}

static bool read_file(const hierarchy *h, const char *name, char *out, size_t room) {
  char path[2 * PATH + 64];
  snprintf(path, sizeof path, "%s/%s", h->at, name);
  return read_text(path, out, room);
}

/* A number in a file of its own; false for "max" and for what is not there. */
static bool read_number(const hierarchy *h, const char *name, int64_t *out) {
  char text[64];
  return read_file(h, name, text, sizeof text) && sscanf(text, "%" SCNd64, out) == 1;
}

/* ---- CPU ---- */
static bool quota_v2(const hierarchy *h, double *cpus) {
  char text[64];
  double quota, period;
  if (!read_file(h, "cpu.max", text, sizeof text) || sscanf(text, "%lf %lf", &quota, &period) != 2 || period <= 0)
    return false;
  *cpus = quota / period;
  return *cpus > 0;
}

static bool quota_v1(const hierarchy *h, double *cpus) {
  int64_t quota, period;
  if (!read_number(h, "cpu.cfs_quota_us", &quota) || !read_number(h, "cpu.cfs_period_us", &period)) return false;
  if (quota <= 0 || period <= 0) return false;
  *cpus = (double)quota / (double)period;
  return true;
}

/* ---- memory ---- */

/* A line "NAME number" of a text; `missing` where there is none. */
static int64_t line_of(const char *text, const char *name, int64_t missing) {
  const size_t length = strlen(name);
  for (const char *line = text; *line; line += strcspn(line, "\n"), line += *line == '\n')
    if (strncmp(line, name, length) == 0 && line[length] == ' ') return strtoll(line + length, NULL, 10);
  return missing;
}

static int64_t number_in(const hierarchy *h, const char *file, const char *name, int64_t missing) {
  char text[TEXT];
  return read_file(h, file, text, TEXT) ? line_of(text, name, missing) : missing;
}

static int64_t stat_of(const hierarchy *h, const char *name) {
  return number_in(h, "memory.stat", name, 0);
}

/* Version 1 has no word for "none": its limit is then about 2^63. */
static bool memory_limit(const hierarchy *h, bool v2, int64_t *limit, int64_t *free_bytes) {
  int64_t used = 0;
  if (!read_number(h, v2 ? "memory.max" : "memory.limit_in_bytes", limit) || *limit > INT64_MAX / 4) return false;
  read_number(h, v2 ? "memory.current" : "memory.usage_in_bytes", &used);
  const int64_t cache = stat_of(h, v2 ? "inactive_file" : "total_inactive_file") +
                        stat_of(h, v2 ? "active_file" : "total_active_file");
  used -= cache < used ? cache : used;
  *free_bytes = *limit > used ? *limit - used : 0;
  return true;
}

static void look(hierarchy *h, bool v2, bool cpu, bool memory, phx__cgroup *out) {
  /* the group itself counts its own, whoever's limit it was */
  if (memory && out->oom_kills < 0)
    out->oom_kills = number_in(h, v2 ? "memory.events" : "memory.oom_control", "oom_kill", -1);
  do {
    double cpus = 0;
    int64_t limit = 0, free_bytes = 0;
    if (cpu && (v2 ? quota_v2(h, &cpus) : quota_v1(h, &cpus)) && (out->cpus <= 0 || cpus < out->cpus))
      out->cpus = cpus;
    if (!memory || !memory_limit(h, v2, &limit, &free_bytes)) continue;
    if (out->memory == 0 || free_bytes < out->memory_free) out->memory_free = free_bytes;
    if (out->memory == 0 || limit < out->memory) out->memory = limit;
  } while (up(h));
}

void phx__cgroup_read(const char *root, phx__cgroup *out) {
  hierarchy h;
  *out = (phx__cgroup){.oom_kills = -1};
  if (find_hierarchy(root, NULL, &h)) look(&h, true, true, true, out);
  if (find_hierarchy(root, "cpu", &h)) look(&h, false, true, false, out);
  if (find_hierarchy(root, "memory", &h)) look(&h, false, false, true, out);
}

int64_t phx__oom_kills(const char *root) {
  phx__cgroup group;
  char path[PATH], text[TEXT];
  phx__cgroup_read(root, &group);
  snprintf(path, sizeof path, "%s/proc/vmstat", root);
  if (group.oom_kills < 0 && read_text(path, text, TEXT)) group.oom_kills = line_of(text, "oom_kill", -1);
  return group.oom_kills;
}
