/* core/base/identity.c - who this process is: PHALANX_*, torchrun's, mpirun's or srun's variables, or alone.
 *
 * What it does not do: start or find anybody.  A variable that is half there or not a number is refused, never
 * guessed around: a rank with a wrong number would train on the wrong data.
 * Under another launcher the ranks may be on several machines; they then meet at MASTER_ADDR:MASTER_PORT.
 * Threads: [main]; reads the environment only. */
#include "base/identity.h"

#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <xxhash.h>

#include "base/slurm_list.h"
#include "base/status.h"

/* A decimal number of lowest..highest and nothing else. */
static phx_status read_number(const char *name, int32_t lowest, int32_t highest, int32_t *out, phx_error *err) {
  const char *text = getenv(name);
  if (!text) return phx_fail(err, PHX_INVALID, "the environment has no %s, but variables that go with it", name);
  char *end = NULL;
  errno = 0;
  long value = strtol(text, &end, 10);
  if (text[0] < '0' || text[0] > '9' || *end || errno || value < lowest || value > highest)
    return phx_fail(err, PHX_INVALID, "the environment has %s=%s; expected a number from %d to %d", name, text, lowest,
                    highest);
  *out = (int32_t)value;
  return PHX_OK;
}

static phx_status read_place(phx__identity *me, const char *rank, const char *size, phx_error *err) {
  phx_status status = read_number(size, 1, PHX_RANKS_MAX, &me->size, err);
  return status == PHX_OK ? read_number(rank, 0, me->size - 1, &me->rank, err) : status;
}

static phx_status read_local(phx__identity *me, const char *rank, const char *size, phx_error *err) {
  phx_status status = read_number(size, 1, PHX_RANKS_MAX, &me->local_size, err);
  return status == PHX_OK ? read_number(rank, 0, me->local_size - 1, &me->local_rank, err) : status;
}

/* Where the ranks of several machines meet. */
static phx_status read_meeting(phx__identity *me, phx_error *err) {
  const char *address = getenv("MASTER_ADDR"), *agent = getenv("TORCHELASTIC_USE_AGENT_STORE");
  const char *list = me->by == PHX__BY_SRUN ? getenv("SLURM_STEP_NODELIST") : NULL;
  int32_t port = atoi(PHX__STORE_PORT);
  me->several = true;
  if (address && *address ? snprintf(me->address, sizeof me->address, "%s", address) >= (int)sizeof me->address
                          : !list || !phx__slurm_first_host(list, me->address, sizeof me->address))
    return phx_fail(err, PHX_INVALID,
                    "MASTER_ADDR is not set, and %d of %d ranks are on this machine: set it on every machine to the "
                    "address of the one where rank 0 runs (mpirun: -x MASTER_ADDR=...)", me->local_size, me->size);
  if (getenv("MASTER_PORT")) PHX_TRY(read_number("MASTER_PORT", 1, 65535, &port, err));
  /* torchrun's agent listens at MASTER_PORT itself then */
  if (agent && strcmp(agent, "True") == 0) port += port < 65535 ? 1 : -1;
  snprintf(me->port, sizeof me->port, "%d", port);
  return PHX_OK;
}

/* Identities go into a socket's name: printable and short. */
static phx_status set_key(phx__identity *me, const char *kind, const char *variable, const char *more, phx_error *err) {
  const char *text = getenv(variable);
  if (!text || !*text)
    return phx_fail(err, PHX_INVALID, "the environment has no %s: the ranks of this job cannot be told from others'",
                    variable);
  const char *text2 = more ? getenv(more) : NULL;
  int used = snprintf(me->key, sizeof me->key, "%s-%s%s%s", kind, text, text2 ? "-" : "", text2 ? text2 : "");
  if (used < 0 || (size_t)used >= sizeof me->key)
    return phx_fail(err, PHX_INVALID, "the environment's %s is longer than %zu characters", variable,
                    sizeof me->key - 16);
  return PHX_OK;
}

/* torchrun's --rdzv-id, where it has one: of any length, so its hash.  Two jobs on one port are then told apart. */
static void add_run_id(phx__identity *me) {
  const char *id = getenv("TORCHELASTIC_RUN_ID");
  const size_t used = strlen(me->key);
  if (id && *id && used + 18 < sizeof me->key)
    snprintf(me->key + used, sizeof me->key - used, "-%016llx", (unsigned long long)XXH3_64bits(id, strlen(id)));
}

static phx_status read_own(phx__identity *me, phx_error *err) {
  PHX_TRY(read_place(me, "PHALANX_RANK", "PHALANX_WORLD_SIZE", err));
  PHX_TRY(read_local(me, "PHALANX_LOCAL_RANK", "PHALANX_LOCAL_SIZE", err));
  PHX_TRY(read_number("PHALANX_JOB_FD", 0, INT_MAX, &me->fd, err));
  if (me->local_size != me->size)
    return phx_fail(err, PHX_INVALID, "the environment has PHALANX_LOCAL_SIZE=%d and PHALANX_WORLD_SIZE=%d: our own "
                    "launcher starts all ranks on one machine", me->local_size, me->size);
  return PHX_OK;
}

static phx_status read_torchrun(phx__identity *me, phx_error *err) {
  PHX_TRY(read_place(me, "RANK", "WORLD_SIZE", err));
  if (getenv("LOCAL_WORLD_SIZE")) {
    PHX_TRY(read_local(me, "LOCAL_RANK", "LOCAL_WORLD_SIZE", err));
  } else { /* started by hand in torchrun's manner: on one machine the local rank is the rank */
    PHX_TRY(read_number("LOCAL_RANK", 0, me->size - 1, &me->local_rank, err));
    me->local_size = me->size;
    if (me->local_rank != me->rank)
      return phx_fail(err, PHX_INVALID,
                      "RANK=%d and LOCAL_RANK=%d: the ranks are on several machines; set LOCAL_WORLD_SIZE to the "
                      "number of ranks on this one", me->rank, me->local_rank);
  }
  if (me->local_size != me->size) PHX_TRY(read_meeting(me, err));
  PHX_TRY(set_key(me, "torchrun", me->several && !getenv("MASTER_PORT") ? "MASTER_ADDR" : "MASTER_PORT",
                  "TORCHELASTIC_RESTART_COUNT", err));
  add_run_id(me);
  return PHX_OK;
}

static phx_status read_mpirun(phx__identity *me, phx_error *err) {
  PHX_TRY(read_place(me, "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", err));
  PHX_TRY(read_local(me, "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE", err));
  if (me->local_size != me->size) PHX_TRY(read_meeting(me, err));
  /* Open MPI 4 names the job in the first, 5 in the second. */
  PHX_TRY(set_key(me, "mpirun", getenv("OMPI_MCA_ess_base_jobid") ? "OMPI_MCA_ess_base_jobid" : "PMIX_NAMESPACE", NULL,
                  err));
  return PHX_OK;
}

/* Under srun: how many ranks this machine has. */
static phx_status read_srun_local(phx__identity *me, phx_error *err) {
  const char *step = getenv("SLURM_STEP_NUM_NODES"), *list = getenv("SLURM_STEP_TASKS_PER_NODE");
  int32_t hosts = 1, node = 0;
  me->local_size = me->size;
  if (step || getenv("SLURM_NNODES"))
    PHX_TRY(read_number(step ? "SLURM_STEP_NUM_NODES" : "SLURM_NNODES", 1, INT_MAX, &hosts, err));
  if (hosts == 1) return PHX_OK;
  PHX_TRY(read_number("SLURM_NODEID", 0, hosts - 1, &node, err));
  me->local_size = list ? phx__slurm_tasks(list, node, PHX_RANKS_MAX) : 0;
  if (me->local_size < 1 || me->local_size > me->size)
    return phx_fail(err, PHX_INVALID,
                    "the environment has SLURM_STEP_TASKS_PER_NODE=%s, which does not say how many of %d ranks "
                    "node %d has", list ? list : "(nothing)", me->size, node);
  return PHX_OK;
}

static phx_status read_srun(phx__identity *me, phx_error *err) {
  PHX_TRY(read_place(me, "SLURM_PROCID", getenv("SLURM_STEP_NUM_TASKS") ? "SLURM_STEP_NUM_TASKS" : "SLURM_NTASKS",
                     err));
  PHX_TRY(read_srun_local(me, err));
  PHX_TRY(read_number("SLURM_LOCALID", 0, me->local_size - 1, &me->local_rank, err));
  if (me->local_size != me->size) PHX_TRY(read_meeting(me, err));
  PHX_TRY(set_key(me, "srun", "SLURM_JOB_ID", "SLURM_STEP_ID", err));
  return PHX_OK;
}

static bool is_only_task(void) {
  const char *tasks = getenv("SLURM_STEP_NUM_TASKS");
  return tasks && strcmp(tasks, "1") == 0;
}

int32_t phx__identity_kind(void) {
  if (getenv("PHALANX_RANK") || getenv("PHALANX_JOB_FD") || getenv("PHALANX_WORLD_SIZE")) return PHX__BY_PHALANX;
  if (getenv("OMPI_COMM_WORLD_RANK")) return PHX__BY_MPIRUN;
  if (getenv("RANK") && (getenv("WORLD_SIZE") || getenv("MASTER_PORT"))) return PHX__BY_TORCHRUN;
  /* A batch script also has SLURM_PROCID, but is no step: only srun's children are ranks.  The only task of a step (a
   * shell under srun --pty) is no rank of many, and may start some. */
  if (getenv("SLURM_PROCID") && getenv("SLURM_STEP_ID") && !is_only_task()) return PHX__BY_SRUN;
  return PHX__ALONE;
}

phx_status phx__identity_read(phx__identity *out, phx_error *err) {
  static phx_status (*const readers[])(phx__identity *, phx_error *) = {[PHX__BY_PHALANX] = read_own,
                                                                        [PHX__BY_TORCHRUN] = read_torchrun,
                                                                        [PHX__BY_MPIRUN] = read_mpirun,
                                                                        [PHX__BY_SRUN] = read_srun};
  phx__identity me = {.by = phx__identity_kind(), .size = 1, .local_size = 1, .fd = -1};
  phx_status status = readers[me.by] ? readers[me.by](&me, err) : PHX_OK;
  if (status == PHX_OK) *out = me;
  return status;
}

/* ---- what others ask ---- */
bool phx__job_is_rank(void) {
  return phx__identity_kind() != PHX__ALONE;
}

/* Our own launcher spoke before its ranks came; under another one rank 0 does. */
bool phx__job_speaks(void) {
  phx__identity me;
  const int32_t kind = phx__identity_kind();
  return kind == PHX__ALONE || (kind != PHX__BY_PHALANX && phx__identity_read(&me, NULL) == PHX_OK && me.rank == 0);
}

int32_t phx__job_foreign_size(const char **launcher) {
  static const char *const names[] = {[PHX__BY_TORCHRUN] = "torchrun", [PHX__BY_MPIRUN] = "mpirun",
                                      [PHX__BY_SRUN] = "srun"};
  phx__identity me;
  const int32_t kind = phx__identity_kind();
  if (kind == PHX__ALONE || kind == PHX__BY_PHALANX || phx__identity_read(&me, NULL) != PHX_OK) return 0;
  *launcher = names[kind];
  return me.size;
}

const char *phx__job_half_set(void) {
  if (phx__identity_kind() != PHX__ALONE) return NULL;
  if (getenv("RANK")) return "RANK is set, and neither WORLD_SIZE nor MASTER_PORT";
  if (getenv("WORLD_SIZE")) return "WORLD_SIZE is set, and RANK is not";
  return NULL;
}

int32_t phx__job_local_size(int32_t ranks) {
  phx__identity me;
  return phx__job_is_rank() && phx__identity_read(&me, NULL) == PHX_OK ? me.local_size : ranks;
}
