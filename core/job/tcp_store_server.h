/* core/job/tcp_store_server.h - the store's server: a thread in rank 0's process.  For tcp_store.c only. */
#ifndef PHX__TCP_STORE_SERVER_H
#define PHX__TCP_STORE_SERVER_H
#include <phalanx/base.h>

#include "job/tcp_store_place.h"

typedef struct phx__store_server phx__store_server;
phx_status phx__store_serve(const phx__store_place *place, phx__store_server **out, phx_error *err);
void phx__store_serve_end(phx__store_server *server); /* when all have left or know of the failure; NULL is fine */
#endif
