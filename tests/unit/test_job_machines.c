/* Jobs on several machines: here two "machines" of two ranks each, real processes that meet over 127.0.0.1; and the
 * variables by which torchrun, mpirun and srun say it. */
#include <arpa/inet.h>
#include <criterion/criterion.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>
#include "job.h"
#include "job_ranks.h"
#include "job_segment.h"
#include "status.h"

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

static void refuses(const char *text) {
  const phx_job *job = NULL;
  phx_error err = PHX_ERROR_INIT;
  cr_expect_eq(phx__job_open(1, &job, &err), PHX_INVALID);
  cr_expect(strstr(err.message, text), "not '%s', but: %s", text, err.message);
}
Test(job, several_machines_need_clear_variables, .timeout = 20) {
  setenv("RANK", "1", 1);
  setenv("WORLD_SIZE", "4", 1);
  setenv("LOCAL_RANK", "1", 1);
  setenv("LOCAL_WORLD_SIZE", "2", 1);
  setenv("MASTER_PORT", "29500", 1);
  cr_assert(phx__job_is_rank());
  refuses("MASTER_ADDR is not set, and 2 of 4 ranks are on this machine");
  setenv("MASTER_ADDR", "10.0.0.1", 1);
  setenv("MASTER_PORT", "70000", 1);
  refuses("MASTER_PORT=70000; expected a number from 1 to 65535");
  unsetenv("LOCAL_WORLD_SIZE");
  setenv("LOCAL_RANK", "0", 1);
  refuses("set LOCAL_WORLD_SIZE");
  unsetenv("WORLD_SIZE");
  refuses("WORLD_SIZE");
  unsetenv("RANK");
  unsetenv("MASTER_PORT");
  unsetenv("MASTER_ADDR");
  setenv("SLURM_PROCID", "0", 1); /* a batch script of Slurm is no rank */
  setenv("SLURM_NTASKS", "4", 1);
  cr_expect_not(phx__job_is_rank());
  setenv("SLURM_STEP_ID", "0", 1);
  setenv("SLURM_LOCALID", "0", 1);
  setenv("SLURM_NNODES", "2", 1);
  refuses("SLURM_NODEID");
  setenv("SLURM_NODEID", "1", 1);
  refuses("SLURM_STEP_TASKS_PER_NODE=(nothing)");
  setenv("SLURM_STEP_TASKS_PER_NODE", "4", 1);
  refuses("SLURM_STEP_TASKS_PER_NODE=4");
  setenv("SLURM_STEP_TASKS_PER_NODE", "2(x2)", 1);
  refuses("MASTER_ADDR is not set");
}

static void identity_is(const char *address, const char *port, int local_size) {
  phx__identity me;
  phx_error err = PHX_ERROR_INIT;
  cr_assert_eq(phx__identity_read(&me, &err), PHX_OK, "%s", err.message);
  cr_expect(me.several);
  cr_expect_str_eq(me.address, address);
  cr_expect_str_eq(me.port, port);
  cr_expect_eq(me.local_size, local_size);
}
Test(job, where_machines_meet, .timeout = 20) {
  setenv("SLURM_PROCID", "5", 1);
  setenv("SLURM_NTASKS", "7", 1);
  setenv("SLURM_STEP_ID", "0", 1);
  setenv("SLURM_JOB_ID", "12", 1);
  setenv("SLURM_LOCALID", "0", 1);
  setenv("SLURM_NNODES", "4", 1);
  setenv("SLURM_NODEID", "2", 1);
  setenv("SLURM_STEP_TASKS_PER_NODE", "2(x2),1,2", 1);
  setenv("SLURM_STEP_NODELIST", "node[07-09,12],gpu1", 1);
  identity_is("node07", "29500", 1);
  setenv("SLURM_NODEID", "3", 1);
  setenv("SLURM_STEP_NODELIST", "gpu1,gpu2", 1);
  identity_is("gpu1", "29500", 2);
  setenv("MASTER_ADDR", "10.0.0.9", 1);
  setenv("MASTER_PORT", "1234", 1);
  identity_is("10.0.0.9", "1234", 2);
  setenv("RANK", "1", 1);
  setenv("WORLD_SIZE", "4", 1);
  setenv("LOCAL_RANK", "1", 1);
  setenv("LOCAL_WORLD_SIZE", "3", 1);
  identity_is("10.0.0.9", "1234", 3);
  setenv("TORCHELASTIC_USE_AGENT_STORE", "True", 1); /* torchrun itself listens at MASTER_PORT */
  identity_is("10.0.0.9", "1235", 3);
  unsetenv("TORCHELASTIC_USE_AGENT_STORE");
  setenv("OMPI_COMM_WORLD_RANK", "1", 1);
  setenv("OMPI_COMM_WORLD_SIZE", "8", 1);
  setenv("OMPI_COMM_WORLD_LOCAL_RANK", "1", 1);
  setenv("OMPI_COMM_WORLD_LOCAL_SIZE", "4", 1);
  setenv("PMIX_NAMESPACE", "job-1", 1);
  identity_is("10.0.0.9", "1234", 4);
}
