/* Every system call of the save path fails once, in turn: a clear error that names the file, the checkpoint before is
 * whole, nothing half is left, and the run can be gone on with.
 *
 * Under the address sanitizer: a save that fails leaks nothing. */
#include <criterion/criterion.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/lsan_interface.h>
#endif
#include "plugin/config_load.h"
#include "command/report.h"
#include "command/run_dir.h"
#include "base/status.h"
#include "base/sys.h"
#include "command/train.h"
#include "command/train_check.h"
#include "training.h"

#ifdef __SANITIZE_ADDRESS__
enum { STRIDE = 4 };
#else
enum { STRIDE = 1 };
#endif
static long calls, failing;
static phx__sys_table real;

static int fails(const char *path) {
  if (!strstr(path, "checkpoints") || ++calls != failing) return 0;
  errno = EIO;
  return 1;
}

static int fails_fd(int fd) {
  char link[64], path[4096];
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  const ssize_t n = readlink(link, path, sizeof path - 1);
  path[n > 0 ? n : 0] = 0;
  return fails(path);
}

static int my_open(const char *path, int flags, mode_t mode) { return fails(path) ? -1 : real.open(path, flags, mode); }
static int my_mkdir(const char *path, mode_t mode) { return fails(path) ? -1 : real.mkdir(path, mode); }
static int my_rename(const char *from, const char *to) { return fails(to) ? -1 : real.rename(from, to); }
static int my_fsync(int fd) { return fails_fd(fd) ? -1 : real.fsync(fd); }
static ssize_t my_write(int fd, const void *p, size_t n) { return fails_fd(fd) ? -1 : real.write(fd, p, n); }
static ssize_t my_pwrite(int fd, const void *p, size_t n, off_t at) {
  return fails_fd(fd) ? -1 : real.pwrite(fd, p, n, at);
}
static int my_ftruncate(int fd, off_t n) { return fails_fd(fd) ? -1 : real.ftruncate(fd, n); }

static int run(const char *resume) {
  static const phx__override overrides[] = {{"plugins.path=" PHX_TEST_PLUGINS, "--set"}};
  phx__config *config = NULL;
  phx_error err = PHX_ERROR_INIT;
  int status = PHX__EXIT_REFUSED;
  if (phx__config_load("run.ini", overrides, 1, stderr, &config)) return status;
  if (phx__train_check(config, &err) || (!resume && phx__run_dir_create(config, &err)))
    fprintf(stderr, "%s\n", err.message);
  else status = phx__train_rank(config, resume);
  phx__config_free(config);
  return status;
}

static int in_child(const char *dir, const char *resume, long *made) {
  int ends[2], status = 0;
  cr_assert_eq(pipe2(ends, O_CLOEXEC), 0);
  const pid_t pid = fork();
  if (pid == 0) {
    if (chdir(dir) || !freopen("errors", "we", stderr) || !freopen("/dev/null", "we", stdout)) _exit(100);
    real = phx__sys;
    if (!resume) {
      phx__sys.open = my_open, phx__sys.mkdir = my_mkdir, phx__sys.rename = my_rename, phx__sys.fsync = my_fsync;
      phx__sys.write = my_write, phx__sys.pwrite = my_pwrite, phx__sys.ftruncate = my_ftruncate;
    }
    status = run(resume);
    fflush(stderr);
    if (write(ends[1], &calls, sizeof calls) != (ssize_t)sizeof calls) _exit(101);
#ifdef __SANITIZE_ADDRESS__
    if (__lsan_do_recoverable_leak_check()) _exit(102);
#endif
    _exit(status);
  }
  cr_assert_gt(pid, 0);
  close(ends[1]);
  const ssize_t got = read(ends[0], made, sizeof *made);
  close(ends[0]);
  cr_assert_eq(waitpid(pid, &status, 0), pid);
  cr_assert(WIFEXITED(status) && got == (ssize_t)sizeof *made, "call %ld: it did not end by itself", failing);
  return WEXITSTATUS(status);
}

static int count(const char *dir, const char *part) {
  char path[512];
  int n = 0;
  snprintf(path, sizeof path, "%s/out/checkpoints", dir);
  DIR *d = opendir(path);
  for (struct dirent *e; d && (e = readdir(d));) n += strstr(e->d_name, part) != NULL;
  if (d) closedir(d);
  return n;
}

Test(checkpoint_faults, each_call_fails_once, .timeout = 180) {
  char *dir = command_temp_dir(), rm[300];
  long made = 0, ignored;
  training_files(dir, "[checkpoint]\nevery = 1\nkeep = 1\nbackground = no\n[batch]\nmicro = 1\nsequence = 8\n"
                      "[model]\nplugin = gpt\nlayers = 1\nheads = 1\nwidth = 8\ncontext = 8\nvocab = 257\n");
  char *ini = command_read_file(dir, "run.ini"), *steps = strstr(ini, "steps = 20");
  memcpy(steps, "steps = 2 ", 10);
  command_write_file(dir, "run.ini", ini, strlen(ini));
  free(ini);
  snprintf(rm, sizeof rm, "rm -rf %s/out %s/out.*", dir, dir);
  int failed_saves = 0, final_failures = 0;
  for (failing = 1;; failing += STRIDE) {
    const int status = in_child(dir, NULL, &made);
    char *errors = command_read_file(dir, "errors");
    if (made < failing) { /* there was no such call */
      cr_assert_eq(status, 0, "%s", errors);
      free(errors);
      break;
    }
    cr_assert(status == 0 || status == PHX__EXIT_RANK, "call %ld: status %d\n%s", failing, status, errors);
    cr_assert(strstr(errors, "Input/output error") && strstr(errors, "checkpoints"), "call %ld: no clear error:\n%s",
              failing, errors);
    cr_assert_geq(count(dir, "step-0"), 1, "call %ld: no checkpoint is left\n%s", failing, errors);
    if (status == 0) cr_assert_eq(count(dir, "step-00000002"), 1, "call %ld\n%s", failing, errors);
    failed_saves += strstr(errors, "was not saved") != NULL;
    final_failures += status != 0;
    free(errors);
    cr_assert_eq(in_child(dir, "", &ignored), 0, "call %ld: the resume failed: %s", failing,
                 errors = command_read_file(dir, "errors"));
    cr_assert_eq(count(dir, ".part"), 0, "call %ld: something half is left", failing);
    cr_assert_eq(system(rm), 0);
  }
  cr_assert_gt(failing, 30, "only %ld calls were seen", failing);
  cr_assert(failed_saves > 5 / STRIDE && final_failures > 5 / STRIDE, "%d, %d", failed_saves, final_failures);
  command_remove_dir(dir);
}
