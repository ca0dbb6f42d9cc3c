/* comm_call.c - see kit_comm.h: the arguments of a call, and the counters of a communicator. */
#include <phalanx/kit.h>
#include <phalanx/kit_comm.h>

#define LOAD(p) __atomic_load_n(&(p), __ATOMIC_RELAXED)
#define ADD(p, v) __atomic_fetch_add(&(p), (v), __ATOMIC_RELAXED)

/* ---- arguments ---- */
static phx_status check_reduce(const phx_kit_call *call, const char *name, phx_error *err) {
  if (call->reduce < PHX_SUM || call->reduce > PHX_MAX)
    return phx_fail(err, PHX_INVALID, "%s: %d is no reduction", name, call->reduce);
  if (call->dtype == PHX_F16)
    return phx_fail(err, PHX_UNSUPPORTED, "%s: f16 cannot be reduced; f32, f64, bf16 and integers can", name);
  return PHX_OK;
}

phx_status phx_kit_check_call(const phx_kit_call *call, int32_t me, int32_t size, const void *src, const void *dst,
                              phx_error *err) {
  const char *name = phx_op_name(call->op);
  const int32_t op = call->op, pair = op == PHX_OP_SEND || op == PHX_OP_RECV;
  const int64_t element = (int64_t)phx_dtype_bytes(call->dtype);
  if (op == PHX_OP_BARRIER) return PHX_OK;
  if (element == 0) return phx_fail(err, PHX_INVALID, "%s: %d is no dtype", name, call->dtype);
  if (call->numel < 0 || call->numel > (INT64_MAX >> 2) / (element * size))
    return phx_fail(err, PHX_INVALID, "%s: %lld elements", name, (long long)call->numel);
  if (op == PHX_OP_ALL_REDUCE || op == PHX_OP_REDUCE || op == PHX_OP_REDUCE_SCATTER)
    PHX_TRY(check_reduce(call, name, err));
  if ((pair || op == PHX_OP_REDUCE || op == PHX_OP_BROADCAST) && (call->root < 0 || call->root >= size))
    return phx_fail(err, PHX_INVALID, "%s: rank %d, but ranks are 0 to %d", name, call->root, size - 1);
  if (pair && call->root == me) return phx_fail(err, PHX_INVALID, "%s: rank %d is this rank", name, me);
  const int32_t reads = op != PHX_OP_RECV, writes = op != PHX_OP_SEND && !(op == PHX_OP_REDUCE && call->root != me);
  if (call->numel > 0 && ((reads && !src) || (writes && !dst)))
    return phx_fail(err, PHX_INVALID, "%s: a buffer is NULL, with %lld elements", name, (long long)call->numel);
  if (op == PHX_OP_ALL_TO_ALL && call->numel > 0 && src == dst)
    return phx_fail(err, PHX_INVALID, "all_to_all: src and dst must differ");
  return PHX_OK;
}

/* ---- counters ---- */
void phx_kit_count_call(phx_kit_counters *own, phx_kit_counters *world, int32_t op, int64_t bytes) {
  ADD(own->calls[op], 1);
  if (bytes) ADD(own->bytes[op], bytes);
  if (world != own) phx_kit_count_call(world, world, op, bytes);
}

void phx_kit_count_wait(phx_kit_counters *own, phx_kit_counters *world, int64_t ns) {
  ADD(own->wait_ns, ns);
  if (world != own) ADD(world->wait_ns, ns);
}

void phx_kit_counters_read(const phx_kit_counters *c, phx_comm_stats *out) {
  phx_comm_stats mine = {.struct_size = sizeof mine, .wait_ns = LOAD(c->wait_ns)};
  for (int32_t i = 0; i < PHX_OPS; i++) {
    mine.calls[i] = LOAD(c->calls[i]);
    mine.bytes[i] = LOAD(c->bytes[i]);
  }
  phx_struct_give(out, &mine);
}
