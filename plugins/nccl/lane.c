/* lane.c - who is in which call: records in the job's shared pages.
 *
 * Before a call is launched its rank publishes the call's record and looks at those of its peers with the same
 * number. Nobody waits: whoever comes second sees both, so ranks that disagree are named before NCCL hangs on it.  A
 * record stays for NCCL_PENDING calls, which is as far as ranks can be apart in collectives; of send and recv,
 * NCCL_PAIRS per peer.
 *
 * Does nothing when the ranks are on several machines: there disagreement is found by the deadline.
 * [main]; nccl_say_absent also the watchdog. */
#include "comm_nccl.h"

/* A record is read whole or not at all: its number is taken away first and looked at twice. */
#define LOAD(p) __atomic_load_n(&(p), __ATOMIC_ACQUIRE)
#define STORE(p, v) __atomic_store_n(&(p), (v), __ATOMIC_RELEASE)

static nccl_lane *lane_of(const nccl_comm *c, int32_t member) {
  nccl_lane *lanes = c->world->lanes[c->ranks[member]];
  return lanes ? lanes + c->slots[member] : NULL;
}

static void publish(nccl_record *to, const nccl_record *r) {
  STORE(to->number, 0);
  STORE(to->comm, r->comm);
  STORE(to->numel, r->numel);
  STORE(to->op, r->op);
  STORE(to->dtype, r->dtype);
  STORE(to->reduce, r->reduce);
  STORE(to->root, r->root);
  STORE(to->staged, r->staged);
  /* Then the peers are looked at: either we see theirs, or they ours. */
  __atomic_store_n(&to->number, r->number, __ATOMIC_SEQ_CST);
}
/* 1: there is a whole record of that number. */
static int look(const nccl_record *from, uint64_t number, uint64_t comm, nccl_record *out) {
  if (__atomic_load_n(&from->number, __ATOMIC_SEQ_CST) != number) return 0;
  *out = (nccl_record){number, LOAD(from->comm), LOAD(from->numel), LOAD(from->op), LOAD(from->dtype),
                       LOAD(from->reduce), LOAD(from->root), LOAD(from->staged), 0};
  return LOAD(from->number) == number && out->comm == comm;
}

static phx_status report(const nccl_call *call, int32_t peer, const nccl_record *theirs, int32_t kinds,
                         phx_error *err) {
  char message[496];
  phx_kit_text t = {message, sizeof message};
  const phx_kit_call shown = {theirs->comm, theirs->number, theirs->numel, theirs->op, theirs->dtype, theirs->reduce,
                              theirs->root, -1, 0};
  phx_kit_say(&t, "ranks disagree: ");
  phx_kit_say_own(&t, call->comm->world->job->rank, &call->shown);
  if (kinds) phx_kit_say(&t, " in memory of the %s", theirs->staged ? "device" : "host");
  phx_kit_say(&t, "; rank %d: ", call->comm->ranks[peer]);
  phx_kit_say_call(&t, &shown);
  if (kinds) phx_kit_say(&t, " in memory of the %s", theirs->staged ? "host" : "device");
  phx_kit_say(&t, "; every rank must issue the same collectives in the same order");
  return nccl_end_job(call->comm->world, err, message);
}

static phx_status announce_pair(nccl_call *call, const nccl_record *r, phx_error *err) {
  nccl_comm *c = call->comm;
  const int32_t peer = call->root, they = c->ranks[peer], me = c->ranks[c->me],
                place = (int32_t)(r->number % NCCL_PAIRS);
  nccl_lane *mine = lane_of(c, c->me), *theirs = lane_of(c, peer);
  const int sends = call->op == PHX_OP_SEND;
  nccl_record other;
  if (!mine || !theirs) return PHX_OK;
  publish(sends ? &mine->sent[they][place] : &mine->received[they][place], r);
  if (!look(sends ? &theirs->received[me][place] : &theirs->sent[me][place], r->number, c->id, &other)) return PHX_OK;
  if (other.numel == r->numel && other.dtype == r->dtype) return PHX_OK;
  return report(call, peer, &other, 0, err);
}

phx_status nccl_announce(nccl_call *call, phx_error *err) {
  nccl_comm *c = call->comm;
  nccl_record r = {call->sequence, c->id, call->numel, call->op, call->dtype, call->reduce, call->root,
                   call->src_host || call->dst_host, 0};
  if (call->op == PHX_OP_SEND || call->op == PHX_OP_RECV) {
    r.number = call->op == PHX_OP_SEND ? ++c->sends[call->root] : ++c->recvs[call->root];
    return announce_pair(call, &r, err);
  }
  nccl_lane *mine = lane_of(c, c->me);
  if (!mine) return PHX_OK;
  publish(&mine->ring[r.number % NCCL_PENDING], &r);
  __atomic_store_n(&mine->begun, r.number, __ATOMIC_RELEASE);
  for (int32_t p = 0; p < c->n; p++) {
    nccl_record other;
    const nccl_lane *theirs = lane_of(c, p);
    if (p == c->me || !theirs || !look(&theirs->ring[r.number % NCCL_PENDING], r.number, c->id, &other)) continue;
    const int same = other.numel == r.numel && other.op == r.op && other.dtype == r.dtype &&
                     other.reduce == r.reduce && other.root == r.root;
    const int kinds = r.numel > 0 && other.staged != r.staged;
    if (!same || kinds) return report(call, p, &other, same, err);
  }
  return PHX_OK;
}

static int is_absent(const nccl_call *call, int32_t p) {
  const nccl_lane *theirs = lane_of(call->comm, p);
  if (p == call->comm->me) return 0;
  if (call->op == PHX_OP_SEND || call->op == PHX_OP_RECV) return p == call->root;
  if (!theirs) return 1; /* on another host: not known */
  return __atomic_load_n(&theirs->comm, __ATOMIC_ACQUIRE) != call->comm->id ||
         __atomic_load_n(&theirs->begun, __ATOMIC_ACQUIRE) < call->sequence;
}

void nccl_say_absent(phx_kit_text *t, const nccl_call *call) {
  int n = 0;
  for (int32_t p = 0; p < call->comm->n; p++) {
    if (!is_absent(call, p)) continue;
    if (n++) phx_kit_say(t, "; ");
    phx_kit_say_rank(t, call->comm->world->job, call->comm->ranks[p]);
  }
  if (n == 0) phx_kit_say(t, "no rank (all have begun it: the GPUs or the network between them hang)");
}
