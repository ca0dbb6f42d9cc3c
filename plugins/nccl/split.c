/* split.c - a new communicator on some of the ranks.
 *
 * The members gather what each brings (colour, key, a free slot, the next id it would give), so that all know the
 * same: who is in which part, in which order, and whether everybody has a slot; only then NCCL splits.  ncclCommSplit
 * orders by (key, rank) as phx_comm does, and takes NCCL_SPLIT_NOCOLOR for those who join none.  [main]. */
#include "comm_nccl.h"

typedef struct proposal {
  int32_t color, key, slot, reserved0; /* slot -1: none is free */
  uint64_t next_id;
} proposal;

static int32_t free_slot(const nccl_world *w) {
  for (int32_t k = 0; k < w->config.communicators; k++)
    if (!(w->slots >> k & 1)) return k;
  return -1;
}

/* Members of the colour in order of (key, rank). */
static int32_t members_of(const proposal *all, int32_t n, int32_t color, int32_t *out) {
  int32_t count = 0;
  for (int32_t p = 0; p < n; p++) {
    if (all[p].color != color) continue;
    int32_t at = count++;
    for (; at > 0 && all[out[at - 1]].key > all[p].key; at--) out[at] = out[at - 1];
    out[at] = p;
  }
  return count;
}

static phx_status gather(const nccl_call *call, const proposal *mine, proposal *all, phx_error *err) {
  nccl_call inner = *call;
  inner.op = PHX_OP_ALL_GATHER;
  inner.dtype = PHX_U8;
  inner.src = mine;
  inner.dst = all;
  inner.numel = (int64_t)sizeof *mine;
  inner.src_host = inner.dst_host = 1;
  return nccl_run(&inner, err);
}

static phx_status join(const nccl_call *call, int32_t color, int32_t key, ncclComm_t *nccl, phx_error *err) {
  nccl_comm *c = call->comm;
  ncclConfig_t config = nccl_library_config();
  ncclResult_t r = ncclInvalidUsage;
  pthread_mutex_lock(&c->world->calls);
  if (c->nccl) r = ncclCommSplit(c->nccl, color < 0 ? NCCL_SPLIT_NOCOLOR : color, key, nccl, &config);
  pthread_mutex_unlock(&c->world->calls);
  PHX_TRY(nccl_check_alive(c, err));
  return nccl_settle(c, &call->shown, r, err); /* the parent's state says when the child is there */
}

static void fill(nccl_comm *child, const nccl_comm *parent, const proposal *all, const int32_t *local, int32_t n) {
  child->n = n;
  for (int32_t i = 0; i < n; i++) {
    child->ranks[i] = parent->ranks[local[i]];
    child->slots[i] = all[local[i]].slot;
    if (local[i] == parent->me) child->me = i;
  }
  nccl_comm_table(child);
  nccl_lane *lanes = child->world->lanes[child->ranks[child->me]];
  if (!lanes) return;
  __atomic_store_n(&lanes[child->slot].begun, 0, __ATOMIC_RELEASE);
  __atomic_store_n(&lanes[child->slot].comm, child->id, __ATOMIC_RELEASE);
}

phx_status nccl_split(nccl_call *call, int32_t color, int32_t key, phx_comm **out, phx_error *err) {
  nccl_comm *c = call->comm, *child = NULL;
  nccl_world *w = c->world;
  proposal all[PHX_RANKS_MAX];
  const proposal mine = {color < 0 ? -1 : color, key, color < 0 ? 0 : free_slot(w), 0, w->next_id};
  int32_t local[PHX_RANKS_MAX];
  uint64_t id = 0, lowest = 0;
  ncclComm_t nccl = NULL;
  PHX_TRY(gather(call, &mine, all, err));
  for (int32_t p = 0; p < c->n; p++) id = all[p].next_id > id ? all[p].next_id : id;
  w->next_id = id + (uint64_t)c->n; /* one id per possible colour: the lowest member's rank is added */
  for (int32_t p = 0; p < c->n; p++)
    if (all[p].slot < 0)
      return phx_fail(err, PHX_UNSUPPORTED, "split: all %lld communicators of rank %d are in use; destroy some, or "
                      "raise `communicators` in [nccl]", (long long)w->config.communicators, c->ranks[p]);
  if (color >= 0) PHX_TRY(nccl_comm_new(w, mine.slot, &child, err)); /* a failure ends the job: see nccl_end */
  phx_status status = join(call, color, key, &nccl, err);
  if (status == PHX_OK && color < 0) {
    *out = NULL;
    return PHX_OK;
  }
  if (status == PHX_OK) {
    while (all[lowest].color != color) lowest++;
    child->id = id + lowest;
    pthread_mutex_lock(&w->calls);
    child->nccl = nccl;
    pthread_mutex_unlock(&w->calls);
    const int32_t n = members_of(all, c->n, color, local);
    fill(child, c, all, local, n);
    status = nccl_settle(child, &call->shown, ncclInProgress, err);
  }
  if (status == PHX_OK) status = nccl_comm_register(child, err);
  if (status == PHX_OK)
    *out = &child->table;
  else
    nccl_comm_free(child);
  return status;
}
