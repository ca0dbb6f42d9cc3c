/* core/job/stop.h - SIGTERM, SIGUSR1, SIGINT (Ctrl-C) and SIGHUP as a wish: save at the next step boundary, then stop
 * with status 5 (run.stopped_status).
 *
 * Wrappers (`timeout`, mpirun, container engines) signal the process and then its group, so one press of Ctrl-C may
 * come twice at once: a second one counts half a second after the first was announced, and not before.
 * The launcher passes them on to the ranks, which start with them blocked, so that none is lost before it can be
 * heeded; what was ignored before (nohup) stays ignored. */
#ifndef PHX__STOP_H
#define PHX__STOP_H
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>

#define PHX__STOP_HEARD "\nphalanx: saving after this step, press Ctrl-C again to end at once\n"

#define PHX__STOP_TWICE_NS UINT64_C(500000000)
#define PHX__STOP_PATIENCE_NS UINT64_C(1000000000)

/* [any] A Ctrl-C at `now` is a second one; announced_ns 0: none was announced. */
bool phx__stop_twice(uint64_t announced_ns, uint64_t now_ns);
/* [any] A SIGTERM at `now` is a second one, which means: do not save, end; first_ns 0: none came before. */
bool phx__stop_term_twice(uint64_t first_ns, uint64_t now_ns);

typedef enum phx__stop_watch { /* who ends the job at a second one */
  PHX__STOP_LAUNCHED,          /* our launcher */
  PHX__STOP_FOREIGN,           /* another launcher; a second Ctrl-C ends this rank */
  PHX__STOP_ALONE              /* nobody: a second Ctrl-C or SIGTERM ends this process */
} phx__stop_watch;
void phx__stop_signals(sigset_t *out); /* the four */
/* [main] From here on they only leave a note; also takes them out of the thread's signal mask. */
void phx__stop_install(phx__stop_watch watch);
int phx__stop_asked(void);               /* [any] the first one that came, or 0 */
const char *phx__stop_name(int number);  /* "SIGTERM" */
#endif
