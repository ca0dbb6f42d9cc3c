/* tests/support/corpus.h - a fuzz target's seeds, replayed in a test.  It needs Criterion. */
#ifndef TEST_CORPUS_H
#define TEST_CORPUS_H
#include <stddef.h>
#include <stdint.h>

/* Every file of tests/fuzz/FOLDER whole, cut at every place, and with every byte changed in three ways; within a run of
 * more than 16 equal bytes only at its ends, since one of them is like the next.  How many files there were. */
int corpus_replay(const char *folder, int (*target)(const uint8_t *, size_t));
#endif
