/* core/job/flight.h - the report on a failed job: who was where. */
#ifndef PHX__FLIGHT_H
#define PHX__FLIGHT_H
#include <phalanx/job.h>
#include <stdbool.h>

#include "base/job_calls.h"

/* How a rank was when the job failed. */
enum { PHX__RANK_ALIVE = 0, PHX__RANK_NEVER = 1, PHX__RANK_STOPPED = 2, PHX__RANK_EXITED = 3, PHX__RANK_KILLED = 4 };
typedef struct phx__rank_end {
  int32_t pid;
  int32_t condition; /* PHX__RANK_* */
  int32_t number;    /* exit status, or the signal's number */
} phx__rank_end;

typedef struct phx__flight_report {
  int32_t size;
  const phx__rank_end *ends; /* (size) */
  const phx_liveness *pages; /* (size) copies, taken when the job failed */
  uint64_t now_ns;           /* when they were taken */
  const char *cause;         /* one line: what ended the job */
  int32_t first_failed;      /* rank whose message counts, or -1 */
  const char *run_dir;       /* where the ranks' logs are, or NULL */
} phx__flight_report;

/* [main] The table, as text owned by the caller (phx__free), or NULL when out of memory. */
char *phx__flight_text(const phx__flight_report *report);
/* Whether the rank was inside a collective. */
bool phx__flight_is_in(const phx_liveness *page);
/* "SIGSEGV" */
const char *phx__signal_name(int number, char *buffer, size_t bytes);
/* "was killed by SIGKILL", "exited with status 7", ... */
void phx__rank_end_text(const phx__rank_end *end, char *buffer, size_t bytes);
#endif
