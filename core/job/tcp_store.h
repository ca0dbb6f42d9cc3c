/* core/job/tcp_store.h - where the ranks of a job on several machines meet: a small store at rank 0, over TCP.
 *
 * Every rank has one connection to it, which stays open: whoever dies is noticed by it.  A barrier is an exchange of
 * one byte.  With a secret, ranks and store prove to each other that they know it before anybody is let in.  What
 * travels afterwards is neither encrypted nor signed: the network is trusted, as with MPI, NCCL and torchrun. */
#ifndef PHX__TCP_STORE_H
#define PHX__TCP_STORE_H
#include <phalanx/job.h>

#include "job/tcp_store_place.h"

typedef struct phx__store phx__store;

/* [main][collective] returns when all ranks have come; else who did not, and to which address. */
phx_status phx__store_open(const phx__store_place *place, phx__store **out, phx_error *err);
/* [main][collective] every rank brings `bytes` (1 to PHX_EXCHANGE_MAX) and gets everybody's, in the order of ranks. */
phx_status phx__store_exchange(phx__store *store, const char *name, const void *mine, int64_t bytes, void *all,
                               phx_error *err);
/* [any], and safe in a signal handler: every rank learns that this one failed, and why. */
void phx__store_fail(phx__store *store, const char *message);
/* "rank 3 (node7, 10.0.0.7, pid 123)"; [any] */
void phx__store_who(const phx__store *store, int32_t rank, char *text, size_t bytes);
/* [any] this process now ends by itself, with this exit status (not 0), and has a minute for it. */
void phx__store_ends(phx__store *store, int exit_status);
/* [main] leaves; NULL is fine.  Rank 0 stays until the others have left too, or know of the failure, or the timeout. */
void phx__store_close(phx__store *store);
#endif
