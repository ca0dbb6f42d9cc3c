/* p2p.c - send and recv.
 *
 * One channel per ordered pair of ranks, in the lanes: the sender counts the chunks it posted, the receiver those it
 * took; both words only grow.  A buffer in the sender's arena is one chunk, read in place; other memory goes through
 * the sender's pipe (two chunks of its own, since peers may still read the collectives' halves).  The receiver does the
 * reading, so the payload is the receiver's.
 *
 * A send ends when the receiver took everything, so two ranks that both send first wait for each other; that is found
 * and named (wait.c: crossed), as is a collective against a send.  Threads: the one that runs the call. */
#include "shm.h"

static char *pipe_of(const shm_comm *c, int32_t rank, uint32_t chunk) {
  return c->staging[rank] + c->world->config.staging + (int64_t)(chunk % SHM_PIPE) * (c->world->config.staging / 4);
}

phx_status shm_send(shm_call *call, phx_error *err) {
  shm_comm *c = call->comm;
  shm_lane *lane = c->lane[c->me];
  int32_t peer = call->root;
  shm_pair *mine = &lane->pair[c->ranks[peer]];
  const uint32_t *taken = &c->lane[peer]->pair[c->ranks[c->me]].taken;
  int64_t bytes = call->numel * (int64_t)phx_dtype_bytes(call->dtype), room = c->world->config.staging / 4;
  int64_t src = bytes > 0 ? shm_arena_offset(c, call->src, bytes) : 0;
  int64_t chunks = src >= 0 ? 1 : (bytes + room - 1) / room;
  uint32_t first = mine->posted;
  mine->record = (shm_record){mine->sends + 1, call->numel, src, -1, PHX_OP_SEND, call->dtype, -1, c->me};
  __atomic_store_n(&mine->sends, mine->sends + 1, __ATOMIC_RELEASE);
  phx_status status = PHX_OK;
  for (int64_t k = 0; k < chunks && status == PHX_OK; k++) {
    if (k >= SHM_PIPE) status = shm_await(call, peer, taken, first + (uint32_t)(k - SHM_PIPE) + 1, err);
    if (status != PHX_OK) break;
    if (src < 0)
      c->world->kernels->copy(pipe_of(c, c->me, (uint32_t)k), (const char *)call->src + k * room,
                              bytes - k * room < room ? bytes - k * room : room, 0);
    shm_post(lane, &mine->posted, first + (uint32_t)k + 1);
  }
  return status == PHX_OK ? shm_await(call, peer, taken, first + (uint32_t)chunks, err) : status;
}

phx_status shm_recv(shm_call *call, phx_error *err) {
  shm_comm *c = call->comm;
  shm_lane *lane = c->lane[c->me];
  int32_t peer = call->root;
  shm_pair *mine = &lane->pair[c->ranks[peer]];
  const shm_pair *theirs = &c->lane[peer]->pair[c->ranks[c->me]];
  int64_t bytes = call->numel * (int64_t)phx_dtype_bytes(call->dtype), room = c->world->config.staging / 4;
  uint32_t first = mine->taken;
  __atomic_store_n(&mine->recvs, mine->recvs + 1, __ATOMIC_RELEASE);
  phx_status status = shm_await(call, peer, &theirs->posted, first + 1, err);
  if (status != PHX_OK) return status;
  shm_record r = theirs->record;
  if (r.numel != call->numel || r.dtype != call->dtype) return shm_report_mismatch(call, peer, &r, err);
  int64_t chunks = r.src >= 0 ? 1 : (bytes + room - 1) / room;
  for (int64_t k = 0; k < chunks && status == PHX_OK; k++) {
    status = shm_await(call, peer, &theirs->posted, first + (uint32_t)k + 1, err);
    if (status != PHX_OK) break;
    int64_t at = r.src >= 0 ? 0 : k * room, count = r.src >= 0 || bytes - at < room ? bytes - at : room;
    const char *from = r.src >= 0 ? c->arena[peer] + r.src : pipe_of(c, peer, (uint32_t)k);
    c->world->kernels->copy((char *)call->dst + at, from, count, count >= SHM_STREAM);
    call->moved += count;
    shm_post(lane, &mine->taken, first + (uint32_t)k + 1);
  }
  return status;
}
