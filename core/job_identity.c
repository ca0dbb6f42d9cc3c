/* core/job_identity.c - who this process is: PHALANX_*, torchrun's, mpirun's or srun's variables, or alone.
 *
 * What it does not do: start or find anybody.  A variable that is half there or not a number is refused, never
 * guessed around: a rank with a wrong number would train on the wrong data.
 * Under another launcher all ranks must be on this machine: the shared-memory communicator is one machine's.
 * Threads: [main]; reads the environment only. */
#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "job_segment.h"
#include "status.h"

/* A decimal number of lowest..highest and nothing else. */
static phx_status read_number(const char *name, int32_t lowest, int32_t highest, int32_t *out, phx_error *err) {
  const char *text = getenv(name);
  if (!text) return phx__fail(err, PHX_INVALID, "the environment has no %s, but variables that go with it", name);
  char *end = NULL;
  errno = 0;
  long value = strtol(text, &end, 10);
  if (text[0] < '0' || text[0] > '9' || *end || errno || value < lowest || value > highest)
    return phx__fail(err, PHX_INVALID, "the environment has %s=%s; expected a number from %d to %d", name, text, lowest,
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

static phx_status check_one_host(const phx__identity *me, const char *launcher, phx_error *err) {
  if (me->local_size == me->size) return PHX_OK;
  return phx__fail(
      err, PHX_UNSUPPORTED,
      "%s placed %d of %d ranks on this machine: the shm communicator is one machine's; start all ranks on "
      "one machine",
      launcher, me->local_size, me->size);
}

/* Identities go into a socket's name: printable and short. */
static phx_status set_key(phx__identity *me, const char *kind, const char *variable, const char *more, phx_error *err) {
  const char *text = getenv(variable);
  if (!text || !*text)
    return phx__fail(err, PHX_INVALID, "the environment has no %s: the ranks of this job cannot be told from others'",
                     variable);
  const char *text2 = more ? getenv(more) : NULL;
  int used = snprintf(me->key, sizeof me->key, "%s-%s%s%s", kind, text, text2 ? "-" : "", text2 ? text2 : "");
  if (used < 0 || (size_t)used >= sizeof me->key)
    return phx__fail(err, PHX_INVALID, "the environment's %s is longer than %zu characters", variable,
                     sizeof me->key - 16);
  return PHX_OK;
}

static phx_status read_own(phx__identity *me, phx_error *err) {
  phx_status status;
  PHX__TRY(read_place(me, "PHALANX_RANK", "PHALANX_WORLD_SIZE", err));
  PHX__TRY(read_local(me, "PHALANX_LOCAL_RANK", "PHALANX_LOCAL_SIZE", err));
  PHX__TRY(read_number("PHALANX_JOB_FD", 0, INT_MAX, &me->fd, err));
  PHX__TRY(check_one_host(me, "the launcher", err));
done:
  return status;
}

static phx_status read_torchrun(phx__identity *me, phx_error *err) {
  phx_status status;
  PHX__TRY(read_place(me, "RANK", "WORLD_SIZE", err));
  if (getenv("LOCAL_WORLD_SIZE")) {
    PHX__TRY(read_local(me, "LOCAL_RANK", "LOCAL_WORLD_SIZE", err));
  } else { /* started by hand in torchrun's manner: on one machine the local rank is the rank */
    PHX__TRY(read_number("LOCAL_RANK", 0, me->size - 1, &me->local_rank, err));
    me->local_size = me->size;
    if (me->local_rank != me->rank) {
      status =
          phx__fail(err, PHX_UNSUPPORTED,
                    "RANK=%d and LOCAL_RANK=%d: the ranks are on several machines, and the shm communicator is one "
                    "machine's",
                    me->rank, me->local_rank);
      goto done;
    }
  }
  PHX__TRY(check_one_host(me, "torchrun", err));
  PHX__TRY(set_key(me, "torchrun", "MASTER_PORT", "TORCHELASTIC_RESTART_COUNT", err));
done:
  return status;
}

static phx_status read_mpirun(phx__identity *me, phx_error *err) {
  phx_status status;
  PHX__TRY(read_place(me, "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", err));
  PHX__TRY(read_local(me, "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE", err));
  PHX__TRY(check_one_host(me, "mpirun", err));
  /* Open MPI 4 names the job in the first, 5 in the second. */
  PHX__TRY(set_key(me, "mpirun", getenv("OMPI_MCA_ess_base_jobid") ? "OMPI_MCA_ess_base_jobid" : "PMIX_NAMESPACE", NULL,
                   err));
done:
  return status;
}

static phx_status read_srun(phx__identity *me, phx_error *err) {
  phx_status status;
  PHX__TRY(
      read_place(me, "SLURM_PROCID", getenv("SLURM_STEP_NUM_TASKS") ? "SLURM_STEP_NUM_TASKS" : "SLURM_NTASKS", err));
  int32_t hosts = 1;
  if (getenv(getenv("SLURM_STEP_NUM_NODES") ? "SLURM_STEP_NUM_NODES" : "SLURM_NNODES"))
    PHX__TRY(
        read_number(getenv("SLURM_STEP_NUM_NODES") ? "SLURM_STEP_NUM_NODES" : "SLURM_NNODES", 1, INT_MAX, &hosts, err));
  if (hosts > 1) {
    status = phx__fail(err, PHX_UNSUPPORTED,
                       "srun placed %d ranks on %d machines: the shm communicator is one machine's; use --nodes=1",
                       me->size, hosts);
    goto done;
  }
  me->local_size = me->size;
  PHX__TRY(read_number("SLURM_LOCALID", 0, me->local_size - 1, &me->local_rank, err));
  PHX__TRY(set_key(me, "srun", "SLURM_JOB_ID", "SLURM_STEP_ID", err));
done:
  return status;
}

int32_t phx__identity_kind(void) {
  if (getenv("PHALANX_RANK") || getenv("PHALANX_JOB_FD") || getenv("PHALANX_WORLD_SIZE")) return PHX__BY_PHALANX;
  if (getenv("OMPI_COMM_WORLD_RANK")) return PHX__BY_MPIRUN;
  if (getenv("RANK") && (getenv("WORLD_SIZE") || getenv("MASTER_PORT"))) return PHX__BY_TORCHRUN;
  /* A batch script also has SLURM_PROCID, but is no step: only srun's children are ranks. */
  if (getenv("SLURM_PROCID") && getenv("SLURM_STEP_ID")) return PHX__BY_SRUN;
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
