/* tests/support/power_cut.h - the states in which a power cut may leave a directory, from a recording (sys_record.h).
 *
 * After the method of ALICE (Pillai et al., "All File Systems Are Not Created Equal", OSDI 2014), with a model that is
 * weaker than any file system in use.  What the file system may do:
 *   - a write is blocks of 512 or 4096 bytes of the file; until an fsync of the file has returned, each of them is on
 * the disk or not, in any order, whatever became of the others;
 *   - the length of a file is on the disk or not, independently of its data until the fsync; where the length is there
 *     and the data is not, zeros or anything else may be read;
 *   - making, renaming and removing a name is a change of its directory; until an fsync of that directory has returned,
 *     each change is there or not, whatever became of the others, also across files: the order of the calls means
 *     nothing.  One change is whole or not there: a rename never shows both names, or neither;
 *   - fsync of a file flushes its data and length, not its name; fsync of a directory its names, not their contents;
 *   - what was flushed stays, and nothing is flushed by a close, a rename, or time.
 * Not in the model: disks that lose what they said was flushed, and bits that change by themselves (checksums find
 * them).  The recorded directory itself is there from the beginning.
 *
 * At every point of the recording (the cut falls between two calls; one that is under way is one that is not flushed):
 * every set of unflushed directory changes while they are few, else none, all, each one missing, each one alone and
 * random sets; combined with none and all of the unflushed data, each write missing, alone and torn, and random torn
 * sets.  Equal states are built once. */
#ifndef TEST_POWER_CUT_H
#define TEST_POWER_CUT_H
#include "sys_record.h"

typedef struct power_cut_outcome { /* of one state: what the test's load says */
  int64_t value;
  char why[600]; /* not empty: a violation wherever the state occurs */
} power_cut_outcome;

typedef struct power_cut {
  const sys_record *record;
  const char *scratch;                        /* a directory that is emptied: the states are built here */
  bool without_file_syncs, without_dir_syncs; /* as if they had not been called: the negative control */
  long most_violations;                       /* it ends there; 0: never */
  /* Loads what is in `scratch`; may change it. */
  void (*load)(void *arg, power_cut_outcome *out);
  /* Whether the value is right after the first n entries; else says why. */
  bool (*judge)(void *arg, int32_t n, int64_t value, char why[600]);
  void *arg;
  /* results */
  long states, occurrences, violations;
  char message[1200]; /* the first violation */
} power_cut;

void power_cut_run(power_cut *cut);
/* Whether all entries together come to what the directory holds; else `why` says what differs. */
bool power_cut_compare(const sys_record *record, const char *dir, char why[600]);
#endif
