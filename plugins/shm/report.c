/* report.c - the flight record, and what an error says: who is absent, and which collective each of them is in.
 *
 * Every report that ends a collective also ends the job (job->fail): the ranks no longer agree on where they are, and
 * the first message counts.  The pages of other ranks are read with relaxed atomics; a torn record is a wrong line in a
 * report, never more.  Threads: any that runs a call; several communicators may run at once, so the numbers of records
 * are taken with an atomic add. */

#include "shm.h"

void shm_flight_begin(shm_call *call, uint64_t sequence) {
  phx_kit_call shown = {call->comm->id, sequence, call->numel, call->op, call->dtype, call->reduce, call->root,
                        call->unit, 0};
  call->flight = phx_kit_flight_begin(call->comm->world->job, &shown, sequence);
}
void shm_flight_end(shm_call *call) { phx_kit_flight_end(call->comm->world->job, call->flight); }

static void say_record(phx_kit_text *t, const shm_record *r) {
  phx_kit_call shown = {0, 0, r->numel, r->op, r->dtype, r->reduce, r->root, -1, 0};
  phx_kit_say_call(t, &shown);
}
static void say_own(phx_kit_text *t, const shm_call *call) {
  phx_kit_call shown = {call->comm->id, call->ticket + 1, call->numel, call->op, call->dtype, call->reduce, call->root,
                        call->unit, 0};
  phx_kit_say_own(t, call->comm->world->job->rank, &shown);
}

static phx_status end_job(shm_call *call, phx_error *err, const char *message) {
  const phx_job *job = call->comm->world->job;
  job->fail(job->ctx, message);
  return phx_fail(err, PHX_COMM, "%s", message);
}

static int is_absent(const shm_call *call, int32_t p) {
  const shm_comm *c = call->comm;
  if (call->op == PHX_OP_SEND || call->op == PHX_OP_RECV) return p == call->root;
  return !shm_reached(&c->lane[p]->phase, c->base[p] + c->steps);
}

phx_status shm_report_absent(shm_call *call, int64_t waited_ns, phx_error *err) {
  char message[496];
  phx_kit_text t = {message, sizeof message};
  const shm_comm *c = call->comm;
  say_own(&t, call);
  phx_kit_say(&t, ": absent after %.1f s: ", (double)waited_ns * 1e-9);
  for (int32_t p = 0, n = 0; p < c->n; p++) {
    if (p == c->me || !is_absent(call, p)) continue;
    if (n++) phx_kit_say(&t, "; ");
    phx_kit_say_rank(&t, c->world->job, c->ranks[p]);
  }
  return end_job(call, err, message);
}

phx_status shm_report_mismatch(shm_call *call, int32_t peer, const shm_record *theirs, phx_error *err) {
  char message[496];
  phx_kit_text t = {message, sizeof message};
  phx_kit_say(&t, "ranks disagree: ");
  say_own(&t, call);
  phx_kit_say(&t, "; rank %d: ", call->comm->ranks[peer]);
  say_record(&t, theirs);
  phx_kit_say(&t, ", sequence %llu against %llu; every rank must issue the same collectives in the same order",
      (unsigned long long)theirs->sequence, (unsigned long long)call->comm->sequence);
  return end_job(call, err, message);
}

phx_status shm_report_crossed(shm_call *call, int32_t peer, phx_error *err) {
  char message[496];
  phx_kit_text t = {message, sizeof message};
  phx_kit_say(&t, "ranks wait for each other in different calls: ");
  say_own(&t, call);
  phx_kit_say(&t, "; ");
  phx_kit_say_rank(&t, call->comm->world->job, call->comm->ranks[peer]);
  phx_kit_say(&t, "; order them equally, or use split()");
  return end_job(call, err, message);
}

phx_status shm_report_failed(shm_call *call, phx_error *err) {
  char message[496], why[300];
  phx_kit_text t = {message, sizeof message};
  const phx_job *job = call->comm->world->job;
  say_own(&t, call);
  if (__atomic_load_n(job->failed, __ATOMIC_ACQUIRE)) {
    phx_kit_job_failure(job, why, sizeof why);
    phx_kit_say(&t, ": given up, %s", why);
  } else {
    phx_kit_say(&t, ": given up, the communicator was aborted");
  }
  return phx_fail(err, PHX_COMM, "%s", message);
}
