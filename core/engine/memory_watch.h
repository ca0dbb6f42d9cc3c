/* core/engine/memory_watch.h - memory that a strategy takes beside its plan.  [main]
 *
 * What goes through host->alloc is in the memory book.  What malloc or mmap give directly is in no book, but it is in
 * the process: its anonymous pages are counted around every call of the strategy until the first step is over, when
 * libraries are still getting under way, and then around all that follows, when nothing should grow any more.
 * Not seen: pages that are never touched, files, shared memory, memory of a GPU. */
#ifndef PHX__MEMORY_WATCH_H
#define PHX__MEMORY_WATCH_H
#include "engine/rank_report.h"
#include "plugin/host.h"

/* Before the strategy's create.  One at a time in a process; where the system does not say how much memory a process
 * has, or a sanitizer takes memory of its own, nothing is watched and all numbers stay 0. */
void phx__memory_watch_begin(const phx__memory_book *book);
/* The first step is over: from now on all of the process. */
void phx__memory_watch_steady(void);
/* Keeps what was found until now, where it is more than before; threads: of the device; planned: bytes by kind. */
void phx__memory_watch_note(int32_t threads, const int64_t planned[PHX_MEM_KINDS], phx__rank_report *mine);
/* The book is about to go. */
void phx__memory_watch_end(void);
#endif
