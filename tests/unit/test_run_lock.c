/* The lock of a run's directory: one holder, whatever the file system has: locks and links, no locks, no links,
 * neither.  Holders are processes of their own, since a lock ends with its process. */
#include <criterion/criterion.h>
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "command.h"
#include "job/run_lock.h"
#include "base/clock.h"
#include "base/status.h"
#include "base/sys.h"

static int no_lock(int fd) {
  (void)fd;
  errno = ENOLCK;
  return -1;
}
static int no_link(const char *from, const char *to) {
  (void)from, (void)to;
  errno = EPERM;
  return -1;
}

/* What a file system lacks. */
static void lacks(int which) {
  if (which & 1) phx__sys.lock = no_lock;
  if (which & 2) phx__sys.link = no_link;
}
enum { LACKS = 4 };

/* A process that takes the lock, says so with a byte, and sleeps. */
static pid_t hold(const char *dir) {
  int ends[2];
  char said = 0;
  cr_assert_eq(pipe(ends), 0);
  const pid_t pid = fork();
  if (pid == 0) {
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    phx_error err = PHX_ERROR_INIT;
    said = phx__run_lock_take(dir, &err) ? 'n' : 'y';
    if (write(ends[1], &said, 1) != 1) _exit(1);
    while (1) pause();
  }
  cr_assert_eq(read(ends[0], &said, 1), 1);
  cr_assert_eq(said, 'y');
  close(ends[0]);
  close(ends[1]);
  return pid;
}

static void end(pid_t pid) {
  kill(pid, SIGKILL);
  waitpid(pid, NULL, 0);
}

static int entries(const char *dir) {
  char line[300];
  int n = -1;
  snprintf(line, sizeof line, "ls -A %s | wc -l", dir);
  FILE *f = popen(line, "re");
  cr_assert(f && fscanf(f, "%d", &n) == 1);
  pclose(f);
  return n;
}

Test(run_lock, a_second_is_refused_and_a_dead_one_is_no_holder, .timeout = 60) {
  for (int which = 0; which < LACKS; which++) {
    char *dir = command_temp_dir(), process[32];
    phx_error err = PHX_ERROR_INIT;
    lacks(which);
    const pid_t holder = hold(dir);
    snprintf(process, sizeof process, "process %d ", (int)holder);
    cr_assert_eq(phx__run_lock_take(dir, &err), PHX_INVALID, "lacks %d", which);
    cr_assert(strstr(err.message, process) && strstr(err.message, "in use"), "%s", err.message);
    cr_assert_eq(entries(dir), 1, "a refusal leaves nothing");
    end(holder);
    cr_assert_eq(phx__run_lock_take(dir, &err), PHX_OK, "lacks %d: %s", which, err.message);
    cr_assert_eq(phx__run_lock_check(&err), PHX_OK, "%s", err.message);
    cr_assert_eq(entries(dir), 1);
    phx__run_lock_release();
    cr_assert_eq(entries(dir), 0, "lacks %d", which);
    command_remove_dir(dir);
  }
}

/* Many at the same moment, over a dead one's file: one, and never another beside it.  Without locks or links the one
 * that came first may lose it again, and is told. */
Test(run_lock, of_many_at_once_one_takes_it, .timeout = 120) {
  enum { MANY = 6, ROUNDS = 12 };
  int *tried = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  for (int which = 0; which < LACKS; which++)
    for (int round = 0; round < ROUNDS; round++) {
      char *dir = command_temp_dir();
      pid_t pids[MANY];
      lacks(which);
      end(hold(dir));
      *tried = 0;
      for (int i = 0; i < MANY; i++) {
        pids[i] = fork();
        if (pids[i]) continue;
        phx_error err = PHX_ERROR_INIT;
        const phx_status status = phx__run_lock_take(dir, &err);
        __atomic_add_fetch(tried, 1, __ATOMIC_SEQ_CST);
        while (__atomic_load_n(tried, __ATOMIC_SEQ_CST) < MANY) usleep(1000); /* a holder that ended is none */
        _exit(status != PHX_OK || phx__run_lock_check(&err) != PHX_OK);
      }
      int whole = 0, status;
      for (int i = 0; i < MANY; i++) {
        waitpid(pids[i], &status, 0);
        whole += WIFEXITED(status) && WEXITSTATUS(status) == 0;
      }
      cr_assert(whole == 1 || (which && !whole), "lacks %d: %d holders", which, whole);
      command_remove_dir(dir);
    }
}

static void write_holder(const char *dir, const char *place, long pid, unsigned beat) {
  char text[300];
  snprintf(text, sizeof text,
           "host elsewhere\nprocess %ld 77\nstarted 2026-01-01T00:00:00Z\nplace %s\nnumber 0000000000000abc\n"
           "beat %016u\n", pid, place, beat);
  command_write_file(dir, "lock", text, strlen(text));
}

/* Of a process on another machine only the count in the file tells. */
Test(run_lock, a_holder_elsewhere_lives_while_it_counts, .timeout = 60) {
  char *dir = command_temp_dir();
  phx_error err = PHX_ERROR_INIT;
  phx__run_lock_patience_ms = 2000;
  write_holder(dir, "another-boot/1", 1, 0);
  const pid_t counter = fork();
  if (counter == 0)
    for (unsigned i = 1; i < 1000; i++) {
      usleep(200000);
      write_holder(dir, "another-boot/1", 1, i);
    }
  cr_assert_eq(phx__run_lock_take(dir, &err), PHX_INVALID);
  cr_assert(strstr(err.message, "host elsewhere"), "%s", err.message);
  end(counter);
  phx__run_lock_patience_ms = 500;
  cr_assert_eq(phx__run_lock_take(dir, &err), PHX_OK, "%s", err.message);
  phx__run_lock_release();
  command_remove_dir(dir);
}

/* Other ranks wait meanwhile: what cannot be told in their time is refused, and the file stays. */
Test(run_lock, no_wait_is_longer_than_the_limit, .timeout = 60) {
  char *dir = command_temp_dir();
  phx_error err = PHX_ERROR_INIT;
  phx__run_lock_patience_ms = 3000;
  phx__run_lock_limit_ms = 500;
  write_holder(dir, "another-boot/1", 1, 0);
  const double began = phx__now();
  cr_assert_eq(phx__run_lock_take(dir, &err), PHX_INVALID);
  cr_expect_lt(phx__now() - began, 1.5);
  cr_expect(strstr(err.message, "lock is of process 1 on host elsewhere, of which nothing more is known here; to wait "
                                "3.0 s for a sign of life is more than [run] timeout allows the other ranks: raise it, "
                                "or remove the file if that run has ended"), "%s", err.message);
  char *text = command_read_file(dir, "lock");
  cr_expect(text && strstr(text, "host elsewhere"));
  free(text);
  command_remove_dir(dir);
}

/* A process number that was given again is another process. */
Test(run_lock, a_number_used_again_is_no_holder) {
  char *dir = command_temp_dir();
  phx_error err = PHX_ERROR_INIT;
  cr_assert_eq(phx__run_lock_take(dir, &err), PHX_OK);
  char *text = command_read_file(dir, "lock"), *place = strstr(text, "place ") + 6;
  phx__run_lock_release();
  place[strcspn(place, "\n")] = 0;
  write_holder(dir, place, (long)getppid(), 0);
  cr_assert_eq(phx__run_lock_take(dir, &err), PHX_OK, "%s", err.message);
  phx__run_lock_release();
  free(text);
  command_remove_dir(dir);
}

Test(run_lock, who_lost_it_is_told, .timeout = 30) {
  char *dir = command_temp_dir(), path[300];
  phx_error err = PHX_ERROR_INIT;
  snprintf(path, sizeof path, "%s/lock", dir);
  cr_assert_eq(phx__run_lock_take(dir, &err), PHX_OK);
  write_holder(dir, "another-boot/1", 42, 0);
  cr_assert_eq(phx__run_lock_check(&err), PHX_STATE);
  cr_assert(strstr(err.message, "process 42 on host elsewhere"), "%s", err.message);
  for (int i = 0; i < 100 && !phx__run_lock_seen(&err); i++) usleep(50000);
  cr_assert_eq(phx__run_lock_seen(&err), PHX_STATE);
  phx__run_lock_release();
  char *left = command_read_file(dir, "lock");
  cr_assert(left && strstr(left, "elsewhere"), "another's lock is not removed");
  free(left);
  unlink(path);
  cr_assert_eq(phx__run_lock_take(dir, &err), PHX_OK);
  unlink(path);
  cr_assert_eq(phx__run_lock_check(&err), PHX_STATE);
  cr_assert(strstr(err.message, "gone"), "%s", err.message);
  phx__run_lock_release();
  command_remove_dir(dir);
}

/* What somebody laid there is neither followed nor waited for. */
Test(run_lock, no_link_and_no_pipe, .timeout = 30) {
  char *dir = command_temp_dir(), path[300];
  phx_error err = PHX_ERROR_INIT;
  snprintf(path, sizeof path, "%s/lock", dir);
  cr_assert_eq(symlink("victim", path), 0);
  cr_assert_eq(phx__run_lock_take(dir, &err), PHX_INVALID);
  cr_assert(strstr(err.message, "is a link"), "%s", err.message);
  unlink(path);
  cr_assert_eq(mkfifo(path, 0600), 0);
  cr_assert_eq(phx__run_lock_take(dir, &err), PHX_INVALID);
  cr_assert(strstr(err.message, "not a regular file"), "%s", err.message);
  cr_assert_null(command_read_file(dir, "victim"));
  command_remove_dir(dir);
}
