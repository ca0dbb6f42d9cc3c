/* One run in one directory, through the command: a second one is refused and changes nothing, a dead one's directory is
 * free, who lost the lock stops, of many that start at once one runs; links, mount points, the working directory. */
#include <criterion/criterion.h>
#include <dirent.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "root.h"
#include "base/status.h"
#include "training.h"

static const char tiny[] = "[checkpoint]\nevery = 5\n[batch]\nmicro = 1\nsequence = 9\n"
                           "[model]\nplugin = gpt\nlayers = 1\nheads = 2\nwidth = 18\ncontext = 9\nvocab = 257\n";

/* The words of a command line, `phalanx` first; what it says goes to DIR/said. */
static pid_t begin(const char *dir, const char *said, const char *format, ...) {
  char line[1024];
  static char command[] = "phalanx";
  char *argv[64] = {command};
  int n = 1;
  va_list args;
  va_start(args, format);
  vsnprintf(line, sizeof line, format, args);
  va_end(args);
  for (char *word = strtok(line, " "); word; word = strtok(NULL, " ")) argv[n++] = word;
  const pid_t pid = fork();
  if (pid) return pid;
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  if (chdir(dir)) _exit(126);
  const int out = open(said, O_WRONLY | O_CREAT | O_TRUNC, 0644);
  dup2(out, 1);
  dup2(out, 2);
  execv(test_path("bin/phalanx"), argv);
  _exit(127);
}

static int finish(pid_t pid) {
  int status = 0;
  cr_assert_eq(waitpid(pid, &status, 0), pid);
  return WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status);
}

static int exists(const char *dir, const char *name) {
  char path[1024];
  struct stat st;
  snprintf(path, sizeof path, "%s/%s", dir, name);
  return lstat(path, &st) == 0;
}

static void await(const char *dir, const char *name) {
  for (int i = 0; i < 4000 && !exists(dir, name); i++) usleep(5000);
  cr_assert(exists(dir, name), "%s does not come", name);
}

static void expect_refused(const char *dir, pid_t pid, const char *said, const char *text) {
  const int status = finish(pid);
  char *what = command_read_file(dir, said);
  cr_assert_eq(status, PHX__EXIT_REFUSED, "status %d: %s", status, what);
  cr_assert(strstr(what, text), "no '%s' in: %s", text, what);
  free(what);
}

static long inode_of(const char *dir, const char *name) {
  char path[1024];
  struct stat st;
  snprintf(path, sizeof path, "%s/%s", dir, name);
  cr_assert_eq(stat(path, &st), 0);
  return (long)st.st_ino;
}

Test(run_dir, a_live_run_is_left_alone, .timeout = 120) {
  for (int ranks = 1; ranks <= 2; ranks++) {
    char *dir = command_temp_dir(), process[40];
    training_files(dir, tiny);
    const pid_t live = begin(dir, "live", "train run.ini -n %d --set run.steps=1000000", ranks);
    snprintf(process, sizeof process, "process %d on host", (int)live);
    await(dir, "out/checkpoints/latest");
    const long before = inode_of(dir, "out");
    expect_refused(dir, begin(dir, "said", "train run.ini"), "said", process);
    expect_refused(dir, begin(dir, "said", "train run.ini --resume"), "said", process);
    expect_refused(dir, begin(dir, "said", "train --resume out"), "said", process);
    expect_refused(dir, begin(dir, "said", "compare run.ini --strategies ddp --steps 1"), "said", process);
    cr_assert_eq(inode_of(dir, "out"), before, "it is still the same directory");
    cr_assert(!exists(dir, "out.1"));
    kill(live, SIGTERM);
    const int status = finish(live);
    char *said = command_read_file(dir, "live");
    cr_assert(strstr(said, "stopped by SIGTERM"), "status %d: %s", status, said);
    free(said);
    cr_assert(!exists(dir, "out/lock"), "the lock goes with the run");
    cr_assert_eq(finish(begin(dir, "said", "train run.ini -n 1 --set run.steps=2")), 0);
    cr_assert(exists(dir, "out.1/checkpoints/latest") && exists(dir, "out/run.json"));
    command_remove_dir(dir);
  }
}

/* Everything killed at once, and the next one started in the same moment, as a requeue does. */
Test(run_dir, a_dead_run_is_no_hindrance, .timeout = 120) {
  char *dir = command_temp_dir();
  training_files(dir, tiny);
  const pid_t dead = begin(dir, "dead", "train run.ini -n 2 --set run.steps=1000000");
  await(dir, "out/checkpoints/latest");
  kill(dead, SIGKILL);
  const pid_t next = begin(dir, "said", "train run.ini -n 2 --resume --set run.steps=1000000");
  finish(dead);
  for (int i = 0; i < 2000; i++) {
    char *said = command_read_file(dir, "said");
    const int runs = said && strstr(said, "step ");
    free(said);
    if (runs) break;
    usleep(5000);
  }
  kill(next, SIGTERM);
  finish(next);
  char *said = command_read_file(dir, "said");
  cr_assert(strstr(said, "stopped by SIGTERM"), "%s", said);
  free(said);
  command_remove_dir(dir);
}

static void check_lost(const char *dir, pid_t live) {
  char path[512];
  await(dir, "out/checkpoints/latest");
  snprintf(path, sizeof path, "%s/out/lock", dir);
  cr_assert_eq(unlink(path), 0);
  const int status = finish(live);
  char *said = command_read_file(dir, "live");
  cr_assert_eq(status, PHX__EXIT_RANK, "status %d: %s", status, said);
  cr_assert(strstr(said, "lock is gone: another run may be in this directory"), "%s", said);
  cr_assert(!exists(dir, "out/model.safetensors"));
  free(said);
}

Test(run_dir, who_lost_its_lock_stops, .timeout = 120) {
  for (int ranks = 1; ranks <= 2; ranks++) {
    char *dir = command_temp_dir();
    training_files(dir, tiny);
    check_lost(dir, begin(dir, "live", "train run.ini -n %d --set run.steps=100000000", ranks));
    command_remove_dir(dir);
  }
  static const char *const launcher[][2] = {{"RANK", "0"}, {"WORLD_SIZE", "1"}, {"LOCAL_RANK", "0"},
                                            {"LOCAL_WORLD_SIZE", "1"}, {"MASTER_ADDR", "127.0.0.1"},
                                            {"MASTER_PORT", "29513"}, {"TORCHELASTIC_RUN_ID", "run_dir"}};
  for (size_t i = 0; i < sizeof launcher / sizeof *launcher; i++) setenv(launcher[i][0], launcher[i][1], 1);
  char *dir = command_temp_dir();
  training_files(dir, tiny);
  const pid_t live = begin(dir, "live", "train run.ini -n 1 --set run.steps=100000000");
  await(dir, "out/checkpoints/latest");
  expect_refused(dir, begin(dir, "said", "train run.ini -n 1"), "said", "is in use by another run");
  check_lost(dir, live);
  command_remove_dir(dir);
}

/* Over an earlier run, which is moved aside once. */
Test(run_dir, of_many_that_start_at_once_one_runs, .timeout = 120) {
  enum { MANY = 4 };
  char *dir = command_temp_dir(), name[32];
  pid_t pids[MANY];
  int done = 0;
  training_files(dir, tiny);
  cr_assert_eq(finish(begin(dir, "said", "train run.ini -n 1 --set run.steps=2")), 0);
  for (int i = 0; i < MANY; i++) {
    snprintf(name, sizeof name, "said%d", i);
    pids[i] = begin(dir, name, "train run.ini -n 1 --set run.steps=1000000");
  }
  await(dir, "out.1/run.json");
  for (int left = MANY; left > 1;) { /* all but one are refused */
    int status;
    const pid_t pid = waitpid(-1, &status, 0);
    for (int i = 0; i < MANY; i++)
      if (pids[i] == pid) {
        snprintf(name, sizeof name, "said%d", i);
        char *said = command_read_file(dir, name);
        cr_assert(WIFEXITED(status) && WEXITSTATUS(status) == PHX__EXIT_REFUSED, "%s", said);
        free(said);
        pids[i] = 0;
        left--;
      }
  }
  for (int i = 0; i < MANY; i++)
    if (pids[i]) {
      await(dir, "out/checkpoints/latest");
      kill(pids[i], SIGTERM);
      finish(pids[i]);
      done++;
    }
  cr_assert_eq(done, 1);
  cr_assert(exists(dir, "out.1/model.safetensors") && !exists(dir, "out.2"));
  command_remove_dir(dir);
}

Test(run_dir, a_link_is_followed, .timeout = 60) {
  char *dir = command_temp_dir(), path[512];
  training_files(dir, tiny);
  snprintf(path, sizeof path, "%s/real", dir);
  cr_assert_eq(mkdir(path, 0755), 0);
  snprintf(path, sizeof path, "%s/linked", dir);
  cr_assert_eq(symlink("real", path), 0);
  for (int i = 0; i < 2; i++)
    cr_assert_eq(finish(begin(dir, "said", "train run.ini -n 2 --set run.out=linked --set run.steps=2")), 0);
  struct stat st;
  cr_assert(!lstat(path, &st) && S_ISLNK(st.st_mode), "the link stays");
  cr_assert(exists(dir, "real/run.json") && exists(dir, "real.1/run.json") && !exists(dir, "linked.1"));
  cr_assert_eq(unlink(path), 0);
  cr_assert_eq(symlink("nowhere", path), 0);
  expect_refused(dir, begin(dir, "said", "train run.ini --set run.out=linked"), "said",
                 "is a link to a directory that is not there");
  command_remove_dir(dir);
}

Test(run_dir, the_working_directory_and_a_mount_point, .timeout = 60) {
  char *dir = command_temp_dir(), inner[512];
  training_files(dir, tiny);
  snprintf(inner, sizeof inner, "%s/inner", dir);
  cr_assert_eq(mkdir(inner, 0755), 0);
  static const char *const words =
      "train ../run.ini -n 1 --set run.out=. --set run.steps=2 --set data.train=../train.bin "
      "--set data.valid=../valid.bin";
  cr_assert_eq(finish(begin(inner, "said", "%s", words)), 0);
  expect_refused(inner, begin(inner, "said", "%s", words), "said", "is the directory you work in");
  cr_assert(exists(inner, "model.safetensors") && !exists(dir, "inner.1"));

  char line[2048];
  snprintf(line, sizeof line,
           "cd %s && mkdir m && mount -t tmpfs none m && "
           "P='%s train run.ini -n 1 --set run.out=m --set run.steps=2' && $P >/dev/null 2>&1 && test -e m/run.json && "
           "{ $P >said 2>&1; test $? = 2; } && grep -q 'a mount point' said",
           dir, test_path("bin/phalanx"));
  command_result r = command_run(dir, 30, (const char *const[]){"/usr/bin/unshare", "-rm", "true", NULL});
  const int can = r.status == 0;
  command_free(&r);
  if (can) {
    r = command_run(dir, 30, (const char *const[]){"/usr/bin/unshare", "-rm", "/bin/sh", "-c", line, NULL});
    cr_assert_eq(r.status, 0, "%s", r.out);
    command_free(&r);
  }
  command_remove_dir(dir);
  if (!can) cr_skip("no mount namespaces here");
}

/* ---- what somebody else has prepared ---- */
/* Each file that a run writes is a link to one of ours before: it is not written through. */
Test(run_dir, no_link_is_written_through, .timeout = 60) {
  static const char *const names[] = {"config.ini.part", "run.json.part", "weights.safetensors.part",
                                      "model.safetensors.part", "metrics.jsonl", "rank-1.log", "lock", "config.ini"};
  char *dir = command_temp_dir(), path[512];
  training_files(dir, tiny);
  for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
    snprintf(path, sizeof path, "%s/out%zu", dir, i);
    cr_assert_eq(mkdir(path, 0755), 0);
    command_write_file(dir, "victim", "kept", 4);
    snprintf(path, sizeof path, "%s/out%zu/%s", dir, i, names[i]);
    cr_assert_eq(symlink("../victim", path), 0);
    const int status = finish(begin(dir, "said", "train run.ini -n 2 --set run.out=out%zu --set run.steps=2", i));
    char *said = command_read_file(dir, "said"), *kept = command_read_file(dir, "victim");
    cr_assert_str_eq(kept, "kept", "%s: status %d: %s", names[i], status, said);
    cr_assert(status == PHX__EXIT_OK || status == PHX__EXIT_REFUSED || status == PHX__EXIT_RANK, "%s: status %d: %s",
              names[i], status, said);
    cr_assert(status == PHX__EXIT_OK || strstr(said, "symbolic link") || strstr(said, "a link"), "%s: %s", names[i],
              said);
    free(said);
    free(kept);
  }
  command_remove_dir(dir);
}

Test(run_dir, of_another_user, .timeout = 60) {
  if (geteuid() != 0) cr_skip("only root can give a directory away");
  char *dir = command_temp_dir(), path[512];
  training_files(dir, tiny);
  snprintf(path, sizeof path, "%s/out", dir);
  cr_assert_eq(mkdir(path, 0777), 0);
  cr_assert_eq(chown(path, 12345, 12345), 0);
  expect_refused(dir, begin(dir, "said", "train run.ini"), "said", "belongs to user 12345");
  cr_assert(!exists(dir, "out/config.ini") && !exists(dir, "out/lock"));
  snprintf(path, sizeof path, "%s/theirs", dir);
  cr_assert_eq(symlink("mine", path), 0);
  cr_assert_eq(lchown(path, 12345, 12345), 0);
  expect_refused(dir, begin(dir, "said", "train run.ini --set run.out=theirs"), "said",
                 "is a link that user 12345 made");
  cr_assert_eq(finish(begin(dir, "said", "train run.ini -n 1 --set run.out=mine --set run.steps=2")), 0);
  snprintf(path, sizeof path, "cd %s && mv mine/checkpoints elsewhere && ln -s ../elsewhere mine/checkpoints && "
           "chown -h 12345 mine/checkpoints", dir);
  cr_assert_eq(system(path), 0);
  cr_assert_eq(finish(begin(dir, "said", "train run.ini -n 1 --resume --set run.out=mine --set run.steps=4")),
               PHX__EXIT_RANK);
  cr_assert(!exists(dir, "elsewhere/step-00000004"), "nothing is saved through it");
  command_remove_dir(dir);
}
