/* core/plugin/comm_watch.h - what a rank's watch asks of the communicator: is it well, and give up waiting.
 *
 * A plugin's call may hang, whatever it promises.  So each is made by a thread of its own, for which the watch never
 * waits; a crash in one is the process's, and says that it was in it. */
#ifndef PHX__COMM_WATCH_H
#define PHX__COMM_WATCH_H
#include <phalanx/comm.h>
#include <stdbool.h>

/* [main] The world's communicator is there; one at a time, another one replaces it. */
void phx__comm_watch_open(const phx_comm *world);
/* [main] Before it is destroyed.  False: a call of health or abort does not come back, and it may not be destroyed. */
bool phx__comm_watch_close(void);

/* The rest is the watch's.  Starts a call of health, unless one is under way or has failed. */
void phx__comm_ask_health(void);
/* What a call of health has failed with; false: none did. */
bool phx__comm_health_failed(char *text, size_t bytes);
/* Starts the call of abort; the first time only. */
void phx__comm_abort(void);
/* [any] "health" or "abort" where this thread is in one of the two, else NULL.  Safe in a signal handler. */
const char *phx__comm_watch_inside(void);
#endif
