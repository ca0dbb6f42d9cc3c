/* core/checkpoint/checkpoint_agree.c - see checkpoint_agree.h.  One all_gather on the core's communicator; no
 * allocation, so that running out of memory can be agreed upon.  [main] */
#include "checkpoint/checkpoint_agree.h"

#include <stdio.h>
#include <string.h>

#include "base/status.h"

typedef struct vote {
  int64_t status, cause, value;
  uint64_t low, high;
  char message[496];
} vote;
_Static_assert(sizeof(vote) % sizeof(int64_t) == 0, "travels as int64");

phx_status phx__agree(phx__runtime *rt, phx_status mine, const phx_error *why, phx__verdict *verdict, phx_error *err) {
  vote all[PHX_RANKS_MAX], my = {.status = mine};
  if (mine && why) {
    my.cause = why->cause;
    memcpy(my.message, why->message, sizeof my.message);
  }
  if (verdict) {
    my.value = verdict->value;
    my.low = verdict->hash.low;
    my.high = verdict->hash.high;
  }
  PHX_TRY(rt->core->all_gather(rt->core->ctx, &my, all, (int64_t)(sizeof my / sizeof(int64_t)), PHX_I64, NULL, err));
  for (int32_t r = 0; r < rt->core->size; r++) {
    if (!all[r].status) continue;
    all[r].message[sizeof all[r].message - 1] = 0;
    if (rt->core->size > 1) phx_fail(err, (phx_status)all[r].status, "rank %d: %.480s", r, all[r].message);
    else phx_fail(err, (phx_status)all[r].status, "%s", all[r].message);
    if (err) err->cause = (int32_t)all[r].cause;
    return (phx_status)all[r].status;
  }
  if (!verdict) return PHX_OK;
  verdict->first = verdict->most = all[0].value;
  verdict->sum = (phx__state_hash){0, 0};
  for (int32_t r = 0; r < rt->core->size; r++) {
    if (all[r].value > verdict->most) verdict->most = all[r].value;
    phx__state_hash_add(&verdict->sum, (phx__state_hash){all[r].low, all[r].high});
  }
  return PHX_OK;
}
