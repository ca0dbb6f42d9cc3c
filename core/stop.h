/* core/stop.h - SIGTERM and SIGUSR1 as a wish: save at the next step boundary, then stop with status 0.
 *
 * The launcher passes both on to the ranks, which start with them blocked, so that none is lost before it can be
 * heeded. */
#ifndef PHX__STOP_H
#define PHX__STOP_H
#include <signal.h>

void phx__stop_signals(sigset_t *out); /* the two */
/* [main] From here on the two only leave a note; also takes them out of the thread's signal mask. */
void phx__stop_install(void);
int phx__stop_asked(void);               /* [any] the first one that came, or 0 */
const char *phx__stop_name(int number);  /* "SIGTERM" */
#endif
