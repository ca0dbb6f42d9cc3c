/* Jobs on several machines: here two "machines" of two ranks each, real processes that meet over 127.0.0.1; and the
 * variables by which torchrun, mpirun and srun say it. */
#include <arpa/inet.h>
#include <criterion/criterion.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>
#include "job/job.h"
#include "base/job_calls.h"
#include "job_ranks.h"
#include "job/job_segment.h"
#include "base/status.h"

static int meeting_port;
static void set_free_port(void) {
  struct sockaddr_in at = {.sin_family = AF_INET, .sin_addr = {htonl(INADDR_LOOPBACK)}};
  socklen_t bytes = sizeof at;
  const int fd = socket(AF_INET, SOCK_STREAM, 0);
  cr_assert(bind(fd, (struct sockaddr *)&at, sizeof at) == 0 && getsockname(fd, (struct sockaddr *)&at, &bytes) == 0);
  meeting_port = ntohs(at.sin_port);
  close(fd);
}
static void set_machines(int rank, int size) {
  job_ranks_forget();
  job_ranks_set("RANK", rank);
  job_ranks_set("WORLD_SIZE", size);
  job_ranks_set("LOCAL_RANK", rank % 2);
  job_ranks_set("LOCAL_WORLD_SIZE", 2);
  job_ranks_set("MASTER_PORT", meeting_port);
  setenv("MASTER_ADDR", "127.0.0.1", 1);
}
static int on_machines(int rank, int size) {
  phx_error err = PHX_ERROR_INIT;
  int64_t mine = 100 * rank, all[4], largest = 0;
  void *bases[4];
  set_machines(rank, size);
  NEED(phx__job_local_size(size) == 2);
  const phx_job *job = job_ranks_open(20);
  NEED(job->rank == rank && job->size == size && job->local_rank == rank % 2 && job->local_size == 2);
  NEED(job->mine == job->ranks[rank] && job->mine->pid == getpid());
  for (int r = 0; r < size; r++) NEED(job->ranks[r]->pid > 1 && job->ranks[r]->state == 1);
  NEED(phx__job_agree(job, 7, "the weather", &err) == PHX_OK);
  NEED(phx__job_max(job, -5 - rank, &largest, &err) == PHX_OK && largest == -5);
  NEED(job->exchange(job->ctx, "places", &mine, sizeof mine, all, &err) == PHX_OK);
  for (int r = 0; r < size; r++) NEED(all[r] == 100 * r);
  NEED(job->share(job->ctx, "arena", 4096, bases, &err) == PHX_UNSUPPORTED && strstr(err.message, "several machines"));
  NEED(phx__job_agree(job, rank == 2, "the weather", &err) == PHX_INVALID);
  NEED(strstr(err.message, "disagree about the weather: rank 2 has"));
  phx__job_leave(job);
  phx__job_leave(job); /* nothing more to leave */
  return 0;
}
Test(job, ranks_of_several_machines_meet, .timeout = 60) {
  set_free_port();
  job_ranks_run(4, on_machines);
}

/* Rank 3 fails, by its own word or without one; the others are in no meeting, and learn it from their job's word. */
static void be_told(const phx_job *job, const char *text) {
  phx_error err = PHX_ERROR_INIT;
  for (int i = 0; i < 1000 && !__atomic_load_n(job->failed, __ATOMIC_ACQUIRE); i++) usleep(10000);
  NEED(__atomic_load_n(job->failed, __ATOMIC_ACQUIRE) == 4);
  NEED(__atomic_load_n(&job->ranks[3]->state, __ATOMIC_ACQUIRE) == 4 && strstr(job->ranks[3]->message, text));
  NEED(phx__job_agree(job, 1, "anything", &err) == PHX_COMM && strstr(err.message, text));
}
static int one_fails(int rank, int size) {
  set_machines(rank, size);
  const phx_job *job = job_ranks_open(20);
  if (rank == 3) job->fail(job->ctx, "no more paper");
  be_told(job, "no more paper");
  phx__job_leave(job);
  return 0;
}
static int one_is_killed(int rank, int size) {
  set_machines(rank, size);
  const phx_job *job = job_ranks_open(20);
  if (rank == 3) _exit(0); /* without a word */
  be_told(job, "rank 3 (");
  be_told(job, "is gone");
  phx__job_leave(job);
  return 0;
}
Test(job, a_failure_reaches_other_machines, .timeout = 60) {
  set_free_port();
  job_ranks_run(4, one_fails);
  set_free_port();
  job_ranks_run(4, one_is_killed);
}

/* "NAME=value" is set, "NAME" alone taken away; the words stand between spaces. */
static void change_variables(const char *changes) {
  char text[400];
  snprintf(text, sizeof text, "%s", changes);
  for (char *rest, *word = strtok_r(text, " ", &rest); word; word = strtok_r(NULL, " ", &rest)) {
    char *value = strchr(word, '=');
    if (value) *value++ = 0;
    cr_assert_eq(value ? setenv(word, value, 1) : unsetenv(word), 0);
  }
}
Test(job, several_machines_need_clear_variables, .timeout = 20) {
  static const struct {
    const char *changes, *refusal; /* one row after the other */
  } rows[] = {{"RANK=1 WORLD_SIZE=4 LOCAL_RANK=1 LOCAL_WORLD_SIZE=2 MASTER_PORT=29500",
               "MASTER_ADDR is not set, and 2 of 4 ranks are on this machine"},
              {"MASTER_ADDR=10.0.0.1 MASTER_PORT=70000", "MASTER_PORT=70000; expected a number from 1 to 65535"},
              {"LOCAL_WORLD_SIZE LOCAL_RANK=0", "set LOCAL_WORLD_SIZE"},
              {"WORLD_SIZE", "WORLD_SIZE"},
              {"RANK MASTER_PORT MASTER_ADDR SLURM_PROCID=0 SLURM_NTASKS=4", NULL}, /* a batch script is no rank */
              {"SLURM_STEP_ID=0 SLURM_LOCALID=0 SLURM_NNODES=2", "SLURM_NODEID"},
              {"SLURM_NODEID=1", "SLURM_STEP_TASKS_PER_NODE=(nothing)"},
              {"SLURM_STEP_TASKS_PER_NODE=4", "SLURM_STEP_TASKS_PER_NODE=4"},
              {"SLURM_STEP_TASKS_PER_NODE=1(x-3),2(x4)", "which does not say how many"},
              {"SLURM_STEP_TASKS_PER_NODE=2(x2)", "MASTER_ADDR is not set"},
              {"SLURM_STEP_NODELIST=node[-", "MASTER_ADDR is not set"}};
  for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
    const phx_job *job = NULL;
    phx_error err = PHX_ERROR_INIT;
    change_variables(rows[i].changes);
    if (i == 0) cr_assert(phx__job_is_rank());
    if (!rows[i].refusal) {
      cr_expect_not(phx__job_is_rank());
      continue;
    }
    cr_expect_eq(phx__job_open(1, &job, &err), PHX_INVALID);
    cr_expect(strstr(err.message, rows[i].refusal), "not '%s', but: %s", rows[i].refusal, err.message);
  }
}

Test(job, where_machines_meet, .timeout = 20) {
  static const struct {
    const char *changes, *address, *port; /* one row after the other */
    int local_size;
  } rows[] = {{"SLURM_PROCID=5 SLURM_NTASKS=7 SLURM_STEP_ID=0 SLURM_JOB_ID=12 SLURM_LOCALID=0 SLURM_NNODES=4 "
               "SLURM_NODEID=2 SLURM_STEP_TASKS_PER_NODE=2(x2),1,2 SLURM_STEP_NODELIST=node[07-09,12],gpu1",
               "node07", "29500", 1},
              {"SLURM_NODEID=3 SLURM_STEP_NODELIST=gpu1,gpu2", "gpu1", "29500", 2},
              {"SLURM_STEP_NODELIST=rack[1-2]node[30,4]-ib,x", "rack1node30-ib", "29500", 2},
              {"MASTER_ADDR=10.0.0.9 MASTER_PORT=1234", "10.0.0.9", "1234", 2},
              {"RANK=1 WORLD_SIZE=4 LOCAL_RANK=1 LOCAL_WORLD_SIZE=3", "10.0.0.9", "1234", 3},
              /* torchrun itself listens at MASTER_PORT */
              {"TORCHELASTIC_USE_AGENT_STORE=True", "10.0.0.9", "1235", 3},
              {"TORCHELASTIC_USE_AGENT_STORE OMPI_COMM_WORLD_RANK=1 OMPI_COMM_WORLD_SIZE=8 "
               "OMPI_COMM_WORLD_LOCAL_RANK=1 OMPI_COMM_WORLD_LOCAL_SIZE=4 PMIX_NAMESPACE=job-1",
               "10.0.0.9", "1234", 4}};
  for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
    phx__identity me;
    phx_error err = PHX_ERROR_INIT;
    change_variables(rows[i].changes);
    cr_assert_eq(phx__identity_read(&me, &err), PHX_OK, "%s", err.message);
    cr_expect(me.several);
    cr_expect_str_eq(me.address, rows[i].address);
    cr_expect_str_eq(me.port, rows[i].port);
    cr_expect_eq(me.local_size, rows[i].local_size);
  }
}
