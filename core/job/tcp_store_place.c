/* core/job/tcp_store_place.c - see tcp_store_place.h. */
#include "job/tcp_store_place.h"

#include <netinet/in.h>
#include <stdbool.h>
#include <string.h>
#include <sys/socket.h>

#include "base/status.h"

static bool is_any_address(const struct sockaddr *a) {
  if (a->sa_family == AF_INET) return ((const struct sockaddr_in *)a)->sin_addr.s_addr == htonl(INADDR_ANY);
  if (a->sa_family != AF_INET6) return false;
  const struct in6_addr *six = &((const struct sockaddr_in6 *)a)->sin6_addr;
  return IN6_IS_ADDR_UNSPECIFIED(six) || (IN6_IS_ADDR_V4MAPPED(six) && !memcmp(six->s6_addr + 12, "\0\0\0\0", 4));
}

phx_status phx__store_resolve(const phx__store_place *place, struct addrinfo **out, phx_error *err) {
  const struct addrinfo hints = {.ai_socktype = SOCK_STREAM, .ai_flags = AI_NUMERICSERV};
  struct addrinfo *found = NULL;
  const int code = getaddrinfo(place->address, place->port, &hints, &found);
  if (code != 0)
    return phx_fail(err, PHX_COMM, "MASTER_ADDR=%s, MASTER_PORT=%s: %s", place->address, place->port,
                    gai_strerror(code));
  for (const struct addrinfo *a = found; a; a = a->ai_next) {
    if (!is_any_address(a->ai_addr)) continue;
    freeaddrinfo(found);
    return phx_fail(err, PHX_INVALID,
                    "MASTER_ADDR=%s means every address of a machine, and rank 0 would listen on all of its networks: "
                    "set it to the one address of rank 0's machine that the others reach, on every machine",
                    place->address);
  }
  *out = found;
  return PHX_OK;
}
