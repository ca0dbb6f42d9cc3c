/* core/stop.h - SIGTERM, SIGUSR1, SIGINT (Ctrl-C) and SIGHUP as a wish: save at the next step boundary, then stop with
 * status 0.
 *
 * The launcher passes them on to the ranks, which start with them blocked, so that none is lost before it can be
 * heeded; what was ignored before (nohup) stays ignored. */
#ifndef PHX__STOP_H
#define PHX__STOP_H
#include <signal.h>
#include <stdbool.h>

#define PHX__STOP_HEARD "\nphalanx: saving after this step, press Ctrl-C again to end at once\n"

void phx__stop_signals(sigset_t *out); /* the four */
/* [main] From here on they only leave a note; also takes them out of the thread's signal mask.  launched: a launcher
 * watches, and ends the job on a second Ctrl-C; else that ends the process by itself. */
void phx__stop_install(bool launched);
int phx__stop_asked(void);               /* [any] the first one that came, or 0 */
const char *phx__stop_name(int number);  /* "SIGTERM" */
#endif
