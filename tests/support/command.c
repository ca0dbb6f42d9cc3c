/* tests/support/command.c - see command.h. */
#include "command.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <ftw.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "root.h"

enum { OUT_MAX = 1 << 20 };

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void child(const char *dir, int out, const char *const *argv) {
  setpgid(0, 0);
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  signal(SIGINT, SIG_DFL); /* whoever runs the tests may ignore them */
  signal(SIGHUP, SIG_DFL);
  dup2(out, STDOUT_FILENO);
  dup2(out, STDERR_FILENO);
  const int null = open("/dev/null", O_RDONLY);
  if (null >= 0) dup2(null, STDIN_FILENO);
  if (dir && chdir(dir)) _exit(126);
  const char *path = strcmp(argv[0], "phalanx") ? argv[0] : test_path("bin/phalanx");
  execv(path, (char *const *)(unsigned long)argv);
  _exit(127);
}

/* What is there within `ms`; 0: nothing, or nobody writes any more (*open_end is 0 then). */
static int take(int end, int ms, command_result *r, size_t *used, int *open_end) {
  char drop[4096];
  struct pollfd p = {.fd = end, .events = POLLIN};
  if (!*open_end || poll(&p, 1, ms) <= 0) return 0;
  const ssize_t n = *used < OUT_MAX ? read(end, r->out + *used, OUT_MAX - *used) : read(end, drop, sizeof drop);
  if (n > 0 && *used < OUT_MAX) *used += (size_t)n;
  if (n == 0) *open_end = 0;
  return n > 0;
}

command_result command_run(const char *dir, double timeout_s, const char *const *argv) {
  command_result r = {.status = -1, .out = calloc(1, OUT_MAX + 1)};
  int ends[2];
  size_t used = 0;
  const double begin = now();
  if (!r.out || pipe2(ends, O_CLOEXEC)) return r;
  const pid_t pid = fork();
  if (pid == 0) child(dir, ends[1], argv);
  close(ends[1]);
  if (pid > 0) setpgid(pid, pid);
  int open_end = 1, ended = 0, status = 0;
  while (pid > 0 && !ended && now() - begin < timeout_s) {
    if (take(ends[0], 20, &r, &used, &open_end)) continue;
    if (waitpid(pid, &status, WNOHANG) == pid) ended = 1;
    else if (!open_end) usleep(2000);
  }
  if (pid > 0 && !ended) {
    kill(-pid, SIGKILL);
    waitpid(pid, &status, 0);
  } else if (pid > 0) {
    r.status = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
    kill(-pid, SIGKILL); /* nothing of it may stay */
  }
  while (take(ends[0], 0, &r, &used, &open_end)) continue; /* written between the last look and the end */
  close(ends[0]);
  r.seconds = now() - begin;
  return r;
}

void command_free(command_result *r) {
  free(r->out);
  r->out = NULL;
}

char *command_temp_dir(void) {
  char name[] = "/tmp/phalanx-test-XXXXXX";
  return mkdtemp(name) ? strdup(name) : NULL;
}

static int remove_one(const char *path, const struct stat *st, int kind, struct FTW *ftw) {
  (void)st, (void)kind, (void)ftw;
  return remove(path);
}

void command_remove_dir(char *dir) {
  if (dir) nftw(dir, remove_one, 16, FTW_DEPTH | FTW_PHYS);
  free(dir);
}

void command_write_file(const char *dir, const char *name, const void *data, size_t bytes) {
  char path[4096];
  snprintf(path, sizeof path, "%s/%s", dir, name);
  FILE *f = fopen(path, "we");
  if (!f || fwrite(data, 1, bytes, f) != bytes) abort();
  fclose(f);
}

char *command_read_file(const char *dir, const char *name) {
  char path[4096];
  snprintf(path, sizeof path, "%s/%s", dir, name);
  FILE *f = fopen(path, "re");
  if (!f) return NULL;
  char *text = calloc(1, OUT_MAX * 4 + 1);
  if (text && fread(text, 1, OUT_MAX * 4, f) == 0) text[0] = 0;
  fclose(f);
  return text;
}

int command_shared_memory(void) {
  int n = 0;
  DIR *dir = opendir("/dev/shm");
  for (struct dirent *e; dir && (e = readdir(dir));)
    n += e->d_type != DT_DIR && (strstr(e->d_name, "phx") || strstr(e->d_name, "phalanx"));
  if (dir) closedir(dir);
  return n;
}
