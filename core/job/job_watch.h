/* core/job/job_watch.h - the thread that watches [main] and the other ranks of this machine; see job_watch.c. */
#ifndef PHX__JOB_WATCH_H
#define PHX__JOB_WATCH_H
#include "job/job_segment.h"

/* [main] once per process, after the rank has joined; a second call does nothing. */
phx_status phx__watch_start(const phx_job *job, phx__segment *segment, phx_error *err);
/* [main] It has failed, and ends this process by itself: it gets time for that. */
void phx__watch_leaving(void);
/* [any] Somebody calls _exit(status): in the middle of a run this does not return where the status means something. */
void phx__watch_exits(int status);
#endif
