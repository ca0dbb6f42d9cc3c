/* split.c - a new communicator on some of the ranks, from the pool that create() shared.
 *
 * Two rounds on the parent.  Round 1 is an arrival: when it ends, every rank has destroyed what it destroyed before.
 * Round 2 publishes, per rank: colour, key, the groups free at this rank, the phase of its lane in each of them, and
 * the next communicator id it would give.  From these all ranks compute the same answer for all colours, so either
 * every colour gets a group or every rank gets the error.  Disjoint communicators may share a group: lanes are per
 * rank.
 *
 * A group is free at a rank once every member of the communicator that had it last has destroyed that one (its lane's
 * `left` says so): a slow member may still be reading.  Phases are never reset, a new communicator starts from where
 * each lane is; ids only grow, so `left` can be compared.  A third step ends it: nobody may use the new lanes before
 * all have reset theirs.  Threads: [main], inline. */
#include <string.h>

#include "shm.h"

typedef struct proposal { /* what a rank publishes in its slot */
  int32_t color, key;
  uint64_t free_groups, next_id;
  uint32_t phase[SHM_GROUPS_MAX];
} proposal;
_Static_assert(sizeof(proposal) <= SHM_SMALL, "a proposal travels in the slot");

static int is_free(const shm_world *w, int32_t group) {
  const shm_group *g = &w->groups[group];
  if (group >= w->config.communicators || g->used) return 0;
  if (g->id == 0) return 1;
  for (int32_t i = 0; i < g->n; i++) {
    const shm_lane *lane = (const shm_lane *)(const void *)(w->base[g->ranks[i]] + group * w->group_bytes);
    if (__atomic_load_n(&lane->left, __ATOMIC_ACQUIRE) < g->id) return 0;
  }
  return 1;
}

static void propose(shm_comm *c, proposal *mine, int32_t color, int32_t key) {
  shm_world *w = c->world;
  *mine = (proposal){.color = color, .key = key, .next_id = w->next_id};
  for (int32_t g = 0; g < SHM_GROUPS_MAX; g++) {
    if (!is_free(w, g)) continue;
    mine->free_groups |= 1ull << g;
    mine->phase[g] = ((shm_lane *)(void *)(w->base[w->job->rank] + g * w->group_bytes))->phase;
  }
}

/* The group that the members of `color` share: the lowest that is free at all of them; -1: none. */
static int32_t group_of(const proposal *const *all, int32_t n, int32_t color) {
  uint64_t common = ~0ull;
  for (int32_t p = 0; p < n; p++) {
    if (all[p]->color == color) common &= all[p]->free_groups;
  }
  return common ? __builtin_ctzll(common) : -1;
}

/* Members of `color` in order of (key, rank), as ranks of the parent. */
static int32_t members_of(const proposal *const *all, int32_t n, int32_t color, int32_t *out) {
  int32_t count = 0;
  for (int32_t p = 0; p < n; p++) {
    if (all[p]->color != color) continue;
    int32_t at = count++;
    while (at > 0 && all[out[at - 1]]->key > all[p]->key) {
      out[at] = out[at - 1];
      at--;
    }
    out[at] = p;
  }
  return count;
}

static phx_status round_of(shm_call *call, const proposal *mine, phx_error *err) {
  shm_comm *c = call->comm;
  shm_record r = {++c->sequence, call->numel, -1, -1, PHX_OP_SPLIT, call->dtype, -1, -1};
  if (mine) memcpy(c->lane[c->me]->slot[r.sequence & 1].data, mine, sizeof *mine);
  return shm_arrive(call, &r, err);
}

static phx_status new_comm(shm_comm *c, const proposal *const *all, int32_t color, uint64_t id, shm_comm **out,
                           phx_error *err) {
  shm_world *w = c->world;
  int32_t local[PHX_RANKS_MAX], ranks[PHX_RANKS_MAX];
  int32_t n = members_of(all, c->n, color, local), g = group_of(all, c->n, color);
  for (int32_t i = 0; i < n; i++) ranks[i] = c->ranks[local[i]];
  shm_comm *child = shm_comm_new(w, g, id, n, ranks);
  if (!child) return phx_fail(err, PHX_NOMEM, "split: no memory for a communicator's %zu bytes", sizeof *child);
  for (int32_t i = 0; i < n; i++) child->base[i] = all[local[i]]->phase[g];
  __atomic_store_n(&child->lane[child->me]->begun, 0, __ATOMIC_RELEASE);
  *out = child;
  return PHX_OK;
}

phx_status shm_split(shm_call *call, int32_t color, int32_t key, phx_comm **out, phx_error *err) {
  shm_comm *c = call->comm, *child = NULL;
  const proposal *all[PHX_RANKS_MAX] = {NULL};
  proposal mine;
  PHX_TRY(round_of(call, NULL, err));
  propose(c, &mine, color < 0 ? -1 : color, key);
  phx_status status = round_of(call, &mine, err);
  if (status != PHX_OK) return status;
  for (int32_t p = 0; p < c->n; p++) all[p] = (const proposal *)(const void *)c->lane[p]->slot[c->sequence & 1].data;
  uint64_t id = 0;
  for (int32_t p = 0; p < c->n; p++) id = all[p]->next_id > id ? all[p]->next_id : id;
  c->world->next_id = id + (uint64_t)c->n; /* one id per possible colour: the lowest member's rank is added */
  for (int32_t p = 0; p < c->n && status == PHX_OK; p++) {
    if (all[p]->color >= 0 && group_of(all, c->n, all[p]->color) < 0)
      status = phx_fail(err, PHX_UNSUPPORTED, "split: all %lld communicators are in use; destroy some, or raise "
                        "`communicators` in [shm]", (long long)c->world->config.communicators);
  }
  if (status == PHX_OK && color >= 0) {
    uint64_t lowest = 0;
    while (all[lowest]->color != color) lowest++;
    status = new_comm(c, all, color, id + lowest, &child, err);
  }
  if (status == PHX_NOMEM) c->world->job->fail(c->world->job->ctx, "split: out of memory");
  phx_status met = shm_barrier(call, status == PHX_OK ? err : NULL);
  if (status == PHX_OK) status = met;
  if (status == PHX_OK)
    *out = child ? &child->table : NULL;
  else
    shm_comm_free(child);
  return status;
}
