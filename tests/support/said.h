/* tests/support/said.h - what a plugin logs, kept whole (4 KiB of it), and what its profile's lines say. */
#ifndef PHX__SAID_H
#define PHX__SAID_H
#include <phalanx/host.h>

/* From now on the host keeps its log here, for this process; what was kept is forgotten. */
void said_keep(phx_host *host);
const char *said(void);
/* Of "profile: KIND: 1.234 ms in 5 calls": the milliseconds, and *calls; -1 and 0 without such a line. */
double said_ms(const char *kind, long long *calls);
#endif
