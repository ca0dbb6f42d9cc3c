/* core/job/tcp_store_place.h - where a job's store is, and whose. */
#ifndef PHX__TCP_STORE_PLACE_H
#define PHX__TCP_STORE_PLACE_H
#include <netdb.h>
#include <phalanx/base.h>

#define PHX__STORE_NAME 48      /* bytes of an exchange's name, the zero included; longer ones are cut */

struct phx__secret; /* secret.h */
typedef struct phx__store_place {
  const char *address, *port; /* of rank 0: MASTER_ADDR, MASTER_PORT */
  uint64_t job;               /* equal for the ranks of this job, and for no other job's */
  int32_t rank, size;
  const struct phx__secret *secret; /* during phx__store_open; NULL or empty: whoever comes is believed */
  double timeout_s; /* until all have come, and per exchange; 0: for ever */
  /* [any] once, when the job has failed: of rank `who` (-1: not one rank's doing).  Not called after close. */
  void (*failed)(void *ctx, int32_t who, const char *message);
  void *ctx;
} phx__store_place;

/* MASTER_ADDR, resolved (freeaddrinfo).  An address that means every one of a machine (0.0.0.0, ::) is refused. */
phx_status phx__store_resolve(const phx__store_place *place, struct addrinfo **out, phx_error *err);
#endif
