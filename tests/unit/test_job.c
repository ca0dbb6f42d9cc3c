/* The job's memory and meetings: real processes, forked here, 1 to 7 of them; and every malformed environment. */
#include <criterion/criterion.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>
#include "base/clock.h"
#include "job/job.h"
#include "base/job_calls.h"
#include "job_ranks.h"
#include "job/job_segment.h"
#include "base/status.h"
#include "base/sys.h"
#include "sys_faults.h"

static int meet(int rank, int size) {
  const phx_job *job = job_ranks_open(20);
  phx_error err = PHX_ERROR_INIT;
  NEED(phx__job_is_rank());
  NEED(job->rank == rank && job->size == size && job->local_rank == rank && job->local_size == size);
  NEED(job->mine == job->ranks[rank] && job->mine->pid == getpid() && job->mine->state == PHX_RANK_JOINED);
  NEED((fcntl(atoi(getenv("PHALANX_JOB_FD")), F_GETFD) & FD_CLOEXEC) != 0);
  for (int round = 0; round < 50; round++) {
    int64_t largest = 0;
    NEED(phx__job_agree(job, (uint64_t)round * 77, "round", &err) == PHX_OK);
    /* negative values, and a different winner every time */
    NEED(phx__job_max(job, -1000 + (rank + round) % size, &largest, &err) == PHX_OK);
    NEED(largest == -1000 + size - 1);
  }
  return 0;
}
Test(job, ranks_meet, .timeout = 60) {
  static const int sizes[] = {1, 2, 3, 4, 5, 7};
  for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) job_ranks_run(sizes[i], meet);
}

static int64_t resident(void) {
  struct rusage use;
  getrusage(RUSAGE_SELF, &use);
  return use.ru_minflt + use.ru_majflt;
}

static int share_parts(int rank, int size) {
  static const int64_t sizes[] = {1, 4096, 4097, 1 << 20, 123457};
  const phx_job *job = job_ranks_open(20);
  phx_error err = PHX_ERROR_INIT;
  unsigned char *bases[5][PHX_RANKS_MAX];
  for (int k = 0; k < 5; k++) {
    char name[32];
    snprintf(name, sizeof name, "part %d", k);
    NEED(job->share(job->ctx, name, sizes[k], (void **)bases[k], &err) == PHX_OK);
    int64_t before = resident();
    for (int64_t i = 0; i < sizes[k]; i++) {
      NEED(bases[k][rank][i] == 0);
      bases[k][rank][i] = (unsigned char)(i * 7 + rank * 31 + k);
    }
    if (k == 3) NEED(resident() - before < 64); /* 256 pages, in already */
    for (int r = 0; r < size; r++) NEED((uintptr_t)bases[k][r] % 4096 == 0);
  }
  NEED(phx__job_agree(job, 1, "written", &err) == PHX_OK);
  for (int k = 0; k < 5; k++)
    for (int r = 0; r < size; r++)
      for (int64_t i = 0; i < sizes[k]; i++) NEED(bases[k][r][i] == (unsigned char)(i * 7 + r * 31 + k));
  return 0;
}
Test(job, share_gives_everybody_every_part, .timeout = 60) {
  for (int size = 1; size <= 7; size += size == 4 ? 3 : 1) job_ranks_run(size, share_parts);
}

static int exchange_bytes(int rank, int size) {
  static const int64_t sizes[] = {1, 47, 48, 49, 300, PHX_EXCHANGE_MAX};
  static unsigned char mine[PHX_EXCHANGE_MAX], all[7 * PHX_EXCHANGE_MAX + 1];
  const phx_job *job = job_ranks_open(20);
  phx_error err = PHX_ERROR_INIT;
  for (int k = 0; k < 6; k++) {
    for (int64_t i = 0; i < sizes[k]; i++) mine[i] = (unsigned char)(i * 7 + rank * 31 + k);
    all[size * sizes[k]] = 0xA5;
    NEED(job->exchange(job->ctx, "bytes", mine, sizes[k], all, &err) == PHX_OK);
    for (int r = 0; r < size; r++)
      for (int64_t i = 0; i < sizes[k]; i++) NEED(all[r * sizes[k] + i] == (unsigned char)(i * 7 + r * 31 + k));
    NEED(all[size * sizes[k]] == 0xA5);
  }
  NEED(job->exchange(job->ctx, "none", mine, 0, all, &err) == PHX_INVALID);
  NEED(job->exchange(job->ctx, "much", mine, PHX_EXCHANGE_MAX + 1, all, &err) == PHX_INVALID);
  if (size < 2) return 0;
  NEED(job->exchange(job->ctx, "size", mine, rank == 1 ? 9 : 8, all, &err) == PHX_COMM &&
       strstr(err.message, "'size'"));
  NEED(job->exchange(job->ctx, rank == 1 ? "left" : "right", mine, 8, all, &err) == PHX_COMM);
  NEED(job->exchange(job->ctx, "fine", mine, 8, all, &err) == PHX_OK);
  return 0;
}
Test(job, exchange_gives_everybody_every_ranks_bytes, .timeout = 60) {
  for (int size = 1; size <= 7; size += size == 4 ? 3 : 1) job_ranks_run(size, exchange_bytes);
}

static int disagree_bytes(int rank, int size) {
  const phx_job *job = job_ranks_open(20);
  phx_error err = PHX_ERROR_INIT;
  void *bases[PHX_RANKS_MAX] = {0};
  (void)size;
  NEED(job->share(job->ctx, "arena", rank == 2 ? 8192 : 4096, bases, &err) == PHX_COMM);
  NEED(strstr(err.message, "'arena'") && strstr(err.message, "rank 2 asks for 8192 bytes, rank 0 for 4096"));
  NEED(bases[0] == NULL);
  NEED(job->share(job->ctx, rank == 1 ? "gradients" : "weights", 64, bases, &err) == PHX_COMM);
  NEED(strstr(err.message, "rank 1 asks for shared memory 'gradients', rank 0 for 'weights'"));
  NEED(job->share(job->ctx, "none", 0, bases, &err) == PHX_INVALID);
  NEED(job->share(job->ctx, "much", INT64_MAX, bases, &err) == PHX_INVALID);
  NEED(job->share(job->ctx, "more than there is", INT64_C(1) << 45, bases, &err) == PHX_NOMEM);
  NEED(strstr(err.message, "rank 0 cannot grow the file of shared memory 'more than there is', 35184372088832 bytes"));
  NEED(job->share(job->ctx, "fine", 64, bases, &err) == PHX_OK); /* a refused request leaves the job usable */
  return 0;
}
Test(job, share_names_the_rank_that_differs, .timeout = 60) {
  job_ranks_run(3, disagree_bytes);
}

static int disagree_value(int rank, int size) {
  const phx_job *job = job_ranks_open(20);
  phx_error err = PHX_ERROR_INIT;
  (void)size;
  NEED(phx__job_agree(job, rank == 0 ? 5 : 6, "configuration", &err) == PHX_INVALID);
  NEED(strstr(err.message, "about configuration: rank 0 has 0000000000000005, rank 1 has 0000000000000006"));
  NEED(phx__job_agree(job, rank == 3 ? 5 : 6, "configuration", &err) == PHX_INVALID);
  NEED(strstr(err.message, "rank 3 has 0000000000000005"));
  int64_t unused;
  phx_status status = rank == 1 ? phx__job_max(job, 1, &unused, &err) : phx__job_agree(job, 1, "plan", &err);
  NEED(status == PHX_COMM && strstr(err.message, "rank 1 is in bytes 'largest'"));
  return 0;
}
Test(job, agree_names_the_rank_that_differs, .timeout = 60) {
  job_ranks_run(4, disagree_value);
}

static int absent(int rank, int size) {
  const phx_job *job = job_ranks_open(0.5);
  phx_error err = PHX_ERROR_INIT;
  (void)size;
  if (rank == 1) {
    usleep(1500000);
    return 0;
  }
  uint64_t start = phx__now_ns();
  NEED(phx__job_agree(job, 1, "configuration", &err) == PHX_COMM);
  double seconds = (double)(phx__now_ns() - start) * 1e-9;
  NEED(seconds > 0.4 && seconds < 1.4);
  NEED(strstr(err.message, "rank 1 (") && strstr(err.message, "'configuration' within 0.5 s"));
  return 0;
}
Test(job, an_absent_rank_is_named_in_time, .timeout = 60) {
  job_ranks_run(3, absent);
}

static int never_came(int rank, int size) {
  (void)size;
  if (rank == 2) return 0;
  const phx_job *job = job_ranks_open(0.5);
  phx_error err = PHX_ERROR_INIT;
  NEED(phx__job_agree(job, 1, "configuration", &err) == PHX_COMM);
  NEED(strstr(err.message, "rank 2 (never came) did not come"));
  return 0;
}
Test(job, a_rank_that_never_came_is_named, .timeout = 60) {
  job_ranks_run(3, never_came);
}

static int dead(int rank, int size) {
  const phx_job *job = job_ranks_open(30);
  phx_error err = PHX_ERROR_INIT;
  (void)size;
  NEED(phx__job_agree(job, 1, "start", &err) == PHX_OK);
  if (rank == 0) return 0;
  uint64_t start = phx__now_ns();
  NEED(phx__job_agree(job, 1, "configuration", &err) == PHX_COMM);
  NEED(strstr(err.message, "rank 0") && strstr(err.message, "is dead"));
  NEED(phx__now_ns() - start < UINT64_C(5000000000)); /* far from the timeout */
  return 0;
}
Test(job, a_dead_rank_is_found_before_the_timeout, .timeout = 60) {
  job_ranks_run(3, dead);
}

/* Stopped for longer than its timeout, a waiting rank goes on waiting: Ctrl-Z, then fg. */
static int suspended(int rank, int size) {
  phx_error err = PHX_ERROR_INIT;
  const phx_job *job = job_ranks_open(rank == 0 ? 1.5 : 20);
  pid_t me = getpid();
  (void)size;
  if (rank == 1) {
    usleep(2600000);
    NEED(phx__job_agree(job, 1, "configuration", &err) == PHX_OK);
    return 0;
  }
  pid_t helper = fork();
  NEED(helper >= 0);
  if (helper == 0) {
    usleep(300000);
    kill(me, SIGSTOP);
    usleep(2000000);
    kill(me, SIGCONT);
    _exit(0);
  }
  phx_status status = phx__job_agree(job, 1, "configuration", &err);
  waitpid(helper, NULL, 0);
  NEED(status == PHX_OK);
  return 0;
}
Test(job, time_in_suspension_does_not_count, .timeout = 60) {
  job_ranks_run(2, suspended);
}

static int fails(int rank, int size) {
  const phx_job *job = job_ranks_open(30);
  phx_error err = PHX_ERROR_INIT;
  char longer[2000];
  memset(longer, 'x', sizeof longer - 1);
  longer[sizeof longer - 1] = 0;
  (void)size;
  if (rank == 1) {
    usleep(200000);
    job->fail(job->ctx, "the disk is full");
    job->fail(job->ctx, longer); /* the first one counts */
    phx__job_state(job, 3, 9);   /* and stays */
    NEED(job->mine->state == PHX_RANK_FAILED && job->mine->step == 9);
    NEED(strcmp(job->mine->message, "the disk is full") == 0);
    return 0;
  }
  uint64_t start = phx__now_ns();
  NEED(phx__job_agree(job, 1, "configuration", &err) == PHX_COMM);
  NEED(phx__now_ns() - start < UINT64_C(3000000000));
  NEED(strstr(err.message, "rank 1: the disk is full"));
  NEED(*job->failed == 2);
  return 0;
}
Test(job, a_failure_wakes_the_waiters, .timeout = 60) {
  job_ranks_run(3, fails);
}

static void *fail_from_thread(void *job) {
  ((const phx_job *)job)->fail(((const phx_job *)job)->ctx, "a thread's failure");
  return NULL;
}
static int threads_fail(int rank, int size) {
  const phx_job *job = job_ranks_open(30);
  phx_error err = PHX_ERROR_INIT;
  pthread_t threads[4];
  (void)size;
  if (rank == 0) {
    for (int i = 0; i < 4; i++) NEED(pthread_create(&threads[i], NULL, fail_from_thread, (void *)job) == 0);
    for (int i = 0; i < 1000; i++) phx__job_state(job, 2, i);
    NEED(phx__job_agree(job, 1, "configuration", &err) == PHX_COMM);
    for (int i = 0; i < 4; i++) pthread_join(threads[i], NULL);
    phx__job_state(job, 2, 1);
    NEED(job->mine->state == PHX_RANK_FAILED);
  } else {
    while (!__atomic_load_n(job->failed, __ATOMIC_ACQUIRE)) usleep(1000);
  }
  NEED(*job->failed == 1 && strcmp(job->ranks[0]->message, "a thread's failure") == 0);
  return 0;
}
Test(job, any_thread_may_fail, .timeout = 60) {
  job_ranks_run(2, threads_fail);
}

static int twice(int rank, int size) {
  const phx_job *job = NULL;
  phx_error err = PHX_ERROR_INIT;
  job_ranks_open(10);
  NEED(phx__job_open(10, &job, &err) == PHX_STATE && job == NULL);
  (void)rank, (void)size;
  return 0;
}
Test(job, a_process_has_one_job, .timeout = 60) {
  job_ranks_run(1, twice);
}

static int same_number(int rank, int size) {
  const phx_job *job = NULL;
  phx_error err = PHX_ERROR_INIT;
  (void)size;
  setenv("PHALANX_RANK", "0", 1);
  setenv("PHALANX_LOCAL_RANK", "0", 1);
  if (rank == 1) usleep(300000);
  phx_status status = phx__job_open(10, &job, &err);
  NEED(rank == 0 ? status == PHX_OK : status == PHX_INVALID && strstr(err.message, "rank 0 of this job is process"));
  if (rank == 0) usleep(600000);
  return 0;
}
Test(job, two_processes_cannot_be_one_rank, .timeout = 60) {
  job_ranks_run(2, same_number);
}

Test(job, alone, .timeout = 20) {
  const phx_job *job = NULL;
  phx_error err = PHX_ERROR_INIT;
  void *bases[1] = {NULL};
  int64_t largest = 0;
  cr_assert_not(phx__job_is_rank());
  cr_assert_eq(phx__job_open(1, &job, &err), PHX_OK, "%s", err.message);
  cr_assert_eq(job->size, 1);
  cr_assert_eq(phx__job_agree(job, 3, "x", &err), PHX_OK);
  cr_assert_eq(phx__job_max(job, INT64_MIN, &largest, &err), PHX_OK);
  cr_assert_eq(largest, INT64_MIN);
  cr_assert_eq(job->share(job->ctx, "mine", 10000, bases, &err), PHX_OK);
  memset(bases[0], 1, 10000);
  phx__job_state(job, 2, 17);
  cr_assert_eq(job->mine->step, 17);
  cr_assert_eq(job->mine->state, PHX_RANK_RUNNING);
}

/* ---- the environment ---- */

static phx_status open_with(const char *name, const char *value, phx_error *err) {
  const phx_job *job = NULL;
  int fd = phx__job_create_segment(2, err);
  job_ranks_be(0, 2, fd);
  if (value)
    setenv(name, value, 1);
  else
    unsetenv(name);
  phx_status status = phx__job_open(1, &job, err);
  close(fd);
  return status;
}

Test(job, malformed_environment_is_refused, .timeout = 20) {
  static const char *const cases[][2] = {
      {"PHALANX_RANK", "2"},        {"PHALANX_RANK", "-1"},       {"PHALANX_RANK", ""},
      {"PHALANX_RANK", "0x"},       {"PHALANX_RANK", " 0"},       {"PHALANX_RANK", "99999999999999999999"},
      {"PHALANX_RANK", NULL},       {"PHALANX_WORLD_SIZE", "0"},  {"PHALANX_WORLD_SIZE", "65"},
      {"PHALANX_WORLD_SIZE", NULL}, {"PHALANX_LOCAL_RANK", "2"},  {"PHALANX_LOCAL_RANK", NULL},
      {"PHALANX_LOCAL_SIZE", "x"},  {"PHALANX_LOCAL_SIZE", NULL}, {"PHALANX_JOB_FD", "-3"},
      {"PHALANX_JOB_FD", "1.5"},    {"PHALANX_JOB_FD", NULL}};
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    phx_error err = PHX_ERROR_INIT;
    cr_expect_eq(open_with(cases[i][0], cases[i][1], &err), PHX_INVALID, "%s=%s", cases[i][0], cases[i][1]);
    cr_expect(strstr(err.message, cases[i][0]), "message '%s' for %s", err.message, cases[i][0]);
  }
}

Test(job, a_wrong_file_is_refused, .timeout = 20) {
  phx_error err = PHX_ERROR_INIT;
  cr_expect_eq(open_with("PHALANX_JOB_FD", "999", &err), PHX_INVALID);
  cr_expect(strstr(err.message, "PHALANX_JOB_FD=999 is not an open file"), "%s", err.message);
  int zero = open("/dev/zero", O_RDWR);
  char text[16];
  snprintf(text, sizeof text, "%d", zero);
  cr_expect_eq(open_with("PHALANX_JOB_FD", text, &err), PHX_INVALID);
  cr_expect(strstr(err.message, "is not a job's memory"), "%s", err.message);
  int big = memfd_create("other", 0); /* long enough, but something else */
  cr_assert_eq(ftruncate(big, 4 << 20), 0);
  snprintf(text, sizeof text, "%d", big);
  cr_expect_eq(open_with("PHALANX_JOB_FD", text, &err), PHX_INVALID);
  cr_expect(strstr(err.message, "this version"), "%s", err.message);
  int three = phx__job_create_segment(3, &err); /* another job's size */
  snprintf(text, sizeof text, "%d", three);
  cr_expect_eq(open_with("PHALANX_JOB_FD", text, &err), PHX_INVALID);
  cr_expect(strstr(err.message, "told of 2 ranks, but the job's memory is for 3"), "%s", err.message);
}

/* ---- other launchers ---- */

static int by_torchrun(int rank, int size) {
  job_ranks_forget();
  job_ranks_set("RANK", rank);
  job_ranks_set("WORLD_SIZE", size);
  job_ranks_set("LOCAL_RANK", rank);
  job_ranks_set("MASTER_PORT", (long)getppid()); /* any number that no other job has */
  if (rank == 0) usleep(150000);              /* the others must wait for it */
  return share_parts(rank, size);
}
Test(job, torchrun_ranks_meet, .timeout = 60) {
  job_ranks_run(1, by_torchrun);
  job_ranks_run(3, by_torchrun);
}

static int by_mpirun(int rank, int size) {
  job_ranks_forget();
  job_ranks_set("OMPI_COMM_WORLD_RANK", rank);
  job_ranks_set("OMPI_COMM_WORLD_SIZE", size);
  job_ranks_set("OMPI_COMM_WORLD_LOCAL_RANK", rank);
  job_ranks_set("OMPI_COMM_WORLD_LOCAL_SIZE", size);
  job_ranks_set("OMPI_MCA_ess_base_jobid", (long)getppid());
  return share_parts(rank, size);
}
Test(job, mpirun_ranks_meet, .timeout = 60) {
  job_ranks_run(4, by_mpirun);
}

static int by_srun(int rank, int size) {
  job_ranks_forget();
  job_ranks_set("SLURM_PROCID", rank);
  job_ranks_set("SLURM_LOCALID", rank);
  job_ranks_set("SLURM_NTASKS", size);
  job_ranks_set("SLURM_JOB_ID", (long)getppid());
  job_ranks_set("SLURM_STEP_ID", 0);
  return share_parts(rank, size);
}
Test(job, srun_ranks_meet, .timeout = 60) {
  job_ranks_run(2, by_srun);
}

static int one_short(int rank, int size) {
  phx_error err = PHX_ERROR_INIT;
  const phx_job *job = NULL;
  job_ranks_forget();
  job_ranks_set("RANK", rank);
  job_ranks_set("WORLD_SIZE", size);
  job_ranks_set("LOCAL_RANK", rank);
  job_ranks_set("MASTER_PORT", (long)getppid());
  if (rank == 1) return 0;
  phx_status status = phx__job_open(0.6, &job, &err);
  if (rank == 0)
    NEED(status == PHX_COMM && strstr(err.message, "rank(s) 1 of job") &&
         strstr(err.message, "did not come within 0.6 s, rank(s) 0, 2 did: they did not start, or ended before"));
  else if (status == PHX_OK)
    NEED(phx__job_agree(job, 1, "configuration", &err) == PHX_COMM);
  return 0;
}
Test(job, a_missing_rank_of_torchrun_is_named, .timeout = 60) {
  job_ranks_run(3, one_short);
}

/* A container that refuses pidfd_open: the watch sees a lost rank in /proc, a stopped one and one that has ended. */
static int lost_signal;
static int without_pidfds(int rank, int size) {
  job_ranks_forget();
  job_ranks_set("RANK", rank);
  job_ranks_set("WORLD_SIZE", size);
  job_ranks_set("LOCAL_RANK", rank);
  job_ranks_set("MASTER_PORT", (long)getppid());
  phx__sys.pidfd_open = fail_pidfd_open;
  const phx_job *job = job_ranks_open(20);
  phx_error err = PHX_ERROR_INIT;
  NEED(phx__job_watch(job, &err) == PHX_OK && phx__job_agree(job, 1, "start", &err) == PHX_OK);
  usleep(500000); /* the watch has looked */
  if (rank == 1) {
    raise(lost_signal);
    pause();
  }
  for (int i = 0; i < 800 && !__atomic_load_n(job->failed, __ATOMIC_ACQUIRE); i++) usleep(10000);
  NEED(*job->failed == 2);
  NEED(strstr(job->ranks[1]->message, lost_signal == SIGSTOP ? "its process has been stopped for"
                                                             : "its process has ended without saying"));
  if (rank == 0) kill(job->ranks[1]->pid, SIGKILL);
  _exit(0);
}
static void lose_without_pidfds(int number) {
  pid_t pids[3], parent = getpid();
  int state = 0;
  lost_signal = number;
  for (int r = 0; r < 3; r++) {
    pids[r] = fork();
    if (pids[r]) continue;
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (getppid() != parent) _exit(98);
    _exit(without_pidfds(r, 3));
  }
  for (int r = 0; r < 3; r++) {
    cr_assert_eq(waitpid(pids[r], &state, 0), pids[r]);
    if (r == 1) cr_expect(WIFSIGNALED(state));
    else cr_expect(WIFEXITED(state) && WEXITSTATUS(state) == 0, "rank %d: wait status %x", r, (unsigned)state);
  }
}
Test(job, a_killed_rank_is_found_without_pidfds, .timeout = 60) {
  lose_without_pidfds(SIGKILL);
}
Test(job, a_stopped_rank_is_found_without_pidfds, .timeout = 60) {
  lose_without_pidfds(SIGSTOP);
}

static int no_leader(int rank, int size) {
  phx_error err = PHX_ERROR_INIT;
  const phx_job *job = NULL;
  if (rank == 0) return 0;
  job_ranks_forget();
  job_ranks_set("RANK", rank);
  job_ranks_set("WORLD_SIZE", size);
  job_ranks_set("LOCAL_RANK", rank);
  job_ranks_set("MASTER_PORT", (long)getppid());
  NEED(phx__job_open(0.4, &job, &err) == PHX_COMM && strstr(err.message, "rank 0 of job torchrun-"));
  return 0;
}
Test(job, a_missing_rank_0_of_torchrun_is_named, .timeout = 60) {
  job_ranks_run(2, no_leader);
}

Test(job, nobody_can_cut_the_jobs_memory, .timeout = 20) {
  phx_error err = PHX_ERROR_INIT;
  struct stat info;
  const int fd = phx__job_create_segment(2, &err);
  cr_assert_geq(fd, 0, "%s", err.message);
  cr_assert_eq(fstat(fd, &info), 0);
  cr_expect(ftruncate(fd, 4096) == -1 && errno == EPERM, "it was cut");
  cr_expect_eq(ftruncate(fd, info.st_size + 4096), 0); /* share() appends */
  cr_expect(fcntl(fd, F_ADD_SEALS, F_SEAL_WRITE | F_SEAL_GROW) == -1 && errno == EPERM, "another seal was set");
  close(fd);
}

/* ---- failing system calls ---- */

static void *fail_calloc(size_t n, size_t bytes) {
  (void)n, (void)bytes;
  return NULL;
}
static int open_files(void) {
  int count = 0;
  for (int fd = 0; fd < 256; fd++) count += fcntl(fd, F_GETFD) >= 0;
  return count;
}

Test(job, failing_calls_are_clear_errors, .timeout = 20) {
  const phx__sys_table real = phx__sys;
  const phx_job *job = NULL;
  phx_error err = PHX_ERROR_INIT;
  int before = open_files();
  phx__sys.memfd_create = fail_memfd;
  cr_expect_eq(phx__job_open(1, &job, &err), PHX_NOMEM);
  cr_expect(strstr(err.message, "memfd_create") && err.cause == EMFILE, "%s", err.message);
  phx__sys = real;
  phx__sys.ftruncate = fail_ftruncate;
  cr_expect_eq(phx__job_open(1, &job, &err), PHX_NOMEM);
  cr_expect(strstr(err.message, "ftruncate") && err.cause == ENOSPC, "%s", err.message);
  phx__sys = real;
  phx__sys.mmap = fail_mmap;
  cr_expect_eq(phx__job_open(1, &job, &err), PHX_NOMEM);
  cr_expect(strstr(err.message, "mmap") && err.cause == ENOMEM, "%s", err.message);
  phx__sys = real;
  phx__sys.calloc = fail_calloc;
  cr_expect_eq(phx__job_open(1, &job, &err), PHX_NOMEM);
  phx__sys = real;
  cr_expect_null(job);
  cr_expect_eq(open_files(), before);
  cr_expect_eq(phx__job_open(1, &job, &err), PHX_OK); /* a failed open leaves nothing behind */
}

static int share_fails(int rank, int size) {
  const phx__sys_table real = phx__sys;
  const phx_job *job = job_ranks_open(20);
  phx_error err = PHX_ERROR_INIT;
  void *bases[PHX_RANKS_MAX] = {0};
  (void)size;
  if (rank == 0) phx__sys.ftruncate = fail_ftruncate;
  NEED(job->share(job->ctx, "arena", 4096, bases, &err) == PHX_NOMEM);
  NEED(strstr(err.message, "rank 0 cannot grow") && err.cause == ENOSPC);
  phx__sys = real;
  if (rank == 2) phx__sys.mmap = fail_mmap;
  NEED(job->share(job->ctx, "arena", 4096, bases, &err) == PHX_NOMEM);
  NEED(strstr(err.message, "rank 2 cannot map") && err.cause == ENOMEM);
  NEED(bases[0] == NULL);
  phx__sys = real;
  NEED(job->share(job->ctx, "arena", 4096, bases, &err) == PHX_OK);
  return 0;
}
Test(job, share_fails_on_all_when_it_fails_on_one, .timeout = 60) {
  job_ranks_run(3, share_fails);
}

/* Three ranks, and beside them two of other jobs with the same MASTER_PORT: they are told so, and disturb nobody. */
static int *turn; /* shared; whose it is */
static void await_turn(int number) {
  while (__atomic_load_n(turn, __ATOMIC_ACQUIRE) < number) usleep(2000);
}
static int one_of_three_jobs(int process, int processes) {
  static const struct {
    int rank, size, turn;
    const char *refusal;
  } places[] = {{0, 3, 0, NULL},
                {1, 3, 0, NULL},
                {2, 4, 1, "rank 2 of 4, but job torchrun-"},
                {1, 3, 2, "rank 1 of job torchrun-"},
                {2, 3, 3, NULL}};
  const phx_job *job = NULL;
  phx_error err = PHX_ERROR_INIT;
  (void)processes;
  job_ranks_forget();
  job_ranks_set("RANK", places[process].rank);
  job_ranks_set("WORLD_SIZE", places[process].size);
  job_ranks_set("LOCAL_RANK", places[process].rank);
  job_ranks_set("MASTER_PORT", (long)getppid());
  await_turn(places[process].turn);
  const phx_status status = phx__job_open(30, &job, &err);
  if (process > 0) __atomic_fetch_add(turn, 1, __ATOMIC_RELEASE);
  if (!places[process].refusal) {
    NEED(status == PHX_OK && job->rank == places[process].rank);
    return 0;
  }
  NEED(status == PHX_INVALID && strstr(err.message, places[process].refusal));
  NEED(strstr(err.message, "does another job have the same name") && strstr(err.message, "MASTER_PORT"));
  return 0;
}
Test(job, a_rank_of_another_job_on_the_port_is_told_so, .timeout = 60) {
  turn = mmap(NULL, sizeof *turn, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  cr_assert_neq(turn, MAP_FAILED);
  job_ranks_run(5, one_of_three_jobs);
}
