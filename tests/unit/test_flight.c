/* The report on a failed job, from hand-made liveness pages. */
#include <criterion/criterion.h>
#include <phalanx/comm.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include "job/flight.h"
#include "base/job_calls.h"
#include "base/sys.h"
#include "plugin/where.h"

#define SECOND INT64_C(1000000000)
#define NOW (UINT64_C(100) * SECOND)

static phx_liveness pages[PHX_RANKS_MAX];
static phx__rank_end ends[PHX_RANKS_MAX];

static void record(int rank, uint64_t comm, uint64_t sequence, int op, int64_t begin, int64_t end) {
  phx_liveness *p = &pages[rank];
  p->ring[p->n_flights++ % PHX_FLIGHT_RING] = (phx_flight){
      .sequence = sequence, .comm = comm, .bytes = 512, .begin_ns = begin, .end_ns = end, .op = op, .unit = -1};
}

static char *text_of(int size, int first_failed) {
  phx__flight_report report = {.size = size,
                               .ends = ends,
                               .pages = pages,
                               .now_ns = NOW,
                               .cause = "a cause",
                               .first_failed = first_failed,
                               .run_dir = "runs/x"};
  char *text = phx__flight_text(&report);
  cr_assert_not_null(text);
  return text;
}

#define EXPECT(text, what) cr_expect(strstr(text, what), "no '%s' in:\n%s", what, text)

Test(flight, conditions_and_collectives) {
  ends[0] = (phx__rank_end){.pid = 11, .condition = PHX__RANK_ALIVE};
  ends[1] = (phx__rank_end){.pid = 12, .condition = PHX__RANK_EXITED, .number = 7};
  ends[2] = (phx__rank_end){.pid = 13, .condition = PHX__RANK_KILLED, .number = SIGKILL};
  ends[3] = (phx__rank_end){.pid = 14, .condition = PHX__RANK_STOPPED, .number = SIGTSTP};
  ends[4] = (phx__rank_end){.pid = 15, .condition = PHX__RANK_NEVER};
  pages[0].step = 12;
  record(0, 9, 1, PHX_OP_BARRIER, 90 * SECOND, 91 * SECOND);
  record(0, 9, 2, PHX_OP_ALL_GATHER, 98 * SECOND, 0);
  record(1, 9, 1, PHX_OP_BARRIER, 90 * SECOND, 91 * SECOND);
  record(2, 9, 1, PHX_OP_BARRIER, 90 * SECOND, 92 * SECOND);
  record(3, 9, 1, PHX_OP_BARRIER, 90 * SECOND, 92 * SECOND);
  record(3, 9, 2, PHX_OP_ALL_GATHER, 99 * SECOND, 0);
  strcpy(pages[1].message, "no space\nleft");
  char *text = text_of(5, 1);
  EXPECT(text, "the job of 5 ranks failed: a cause");
  EXPECT(text, "   0       11  alive                        12  in all_gather 2, 512 bytes, for 2.00 s");
  EXPECT(text, "exited with status 7");
  EXPECT(text, "finished barrier 1, 512 bytes, 9.00 s ago");
  EXPECT(text, "was killed by SIGKILL");
  EXPECT(text, "is stopped (SIGTSTP)");
  EXPECT(text, "never came");
  EXPECT(text, "in no collective yet");
  EXPECT(text, "absent: rank 1, 2, 4; all_gather 2 waits, entered by rank 0, 3");
  EXPECT(text, "first failure: rank 1: no space left");
  EXPECT(text, "runs/x/rank-R.log");
  cr_expect_null(strstr(strstr(text, "absent") + 1, "absent"), "told twice");
  phx__free(text);
}

Test(flight, says_which_call_of_a_plugin_a_rank_is_in) {
  ends[0] = ends[1] = (phx__rank_end){.condition = PHX__RANK_ALIVE};
  for (int r = 0; r < 2; r++) strcpy(pages[r].plugins[PHX_KIND_STRATEGY], "fsdp");
  phx__enter(&(phx_job){.mine = &pages[0]}, PHX_KIND_STRATEGY, PHX_IN_ACQUIRE, 12);
  phx__enter(&(phx_job){.mine = &pages[1]}, PHX_KIND_STRATEGY, PHX_IN_UPDATE, -1);
  char *text = text_of(2, -1), small[12];
  EXPECT(text, "; [main] is in strategy fsdp: acquire, stage 12\n");
  EXPECT(text, "; [main] is in strategy fsdp: update\n");
  phx__free(text);
  cr_expect(phx__where_text(&pages[0], small, sizeof small));
  cr_expect_str_eq(small, "strategy fs");
  cr_expect_eq(phx__leave(&(phx_job){.mine = &pages[0]}, PHX_COMM), PHX_COMM);
  cr_expect(phx__where_text(&pages[0], small, sizeof small), "a call that failed stays");
  cr_expect_eq(phx__leave(&(phx_job){.mine = &pages[0]}, PHX_OK), PHX_OK);
  cr_expect_not(phx__where_text(&pages[0], small, sizeof small));
  cr_expect_str_empty(small);
}

Test(flight, other_communicators_are_not_absent) {
  record(0, 5, 3, PHX_OP_ALL_REDUCE, 98 * SECOND, 0); /* of ranks 0 and 1 */
  record(1, 5, 2, PHX_OP_ALL_REDUCE, 97 * SECOND, 98 * SECOND);
  record(2, 6, 8, PHX_OP_ALL_REDUCE, 97 * SECOND, 98 * SECOND); /* of rank 2 and others */
  char *text = text_of(3, -1);
  EXPECT(text, "absent: rank 1; all_reduce 3 waits, entered by rank 0");
  phx__free(text);
}

Test(flight, divergence_is_named) {
  record(0, 1, 4, PHX_OP_ALL_REDUCE, 98 * SECOND, 0);
  record(1, 1, 4, PHX_OP_BROADCAST, 98 * SECOND, 0);
  char *text = text_of(2, -1);
  EXPECT(text, "diverged: rank 1 is in broadcast where rank 0 is in all_reduce (number 4)");
  phx__free(text);
}

Test(flight, a_full_ring_and_scribbled_pages) {
  for (int r = 0; r < PHX_RANKS_MAX; r++) { /* nothing of it is trusted */
    unsigned char *bytes = (unsigned char *)&pages[r];
    for (size_t i = 0; i < sizeof pages[r]; i++) bytes[i] = (unsigned char)(i * 37 + (size_t)r * 11 + 0x81);
  }
  memset(pages[3].message, 'm', sizeof pages[3].message);
  char *text = text_of(PHX_RANKS_MAX, 3);
  cr_assert_lt(strlen(text), 64 * 1024);
  EXPECT(text, "the job of 64 ranks");
  phx__free(text);
}

static void *no_memory(size_t n, size_t bytes) {
  (void)n, (void)bytes;
  return NULL;
}
Test(flight, no_memory_is_no_crash) {
  phx__flight_report report = {.size = 1, .ends = ends, .pages = pages, .cause = "x", .first_failed = -1};
  phx__sys.calloc = no_memory;
  cr_assert_null(phx__flight_text(&report));
}
