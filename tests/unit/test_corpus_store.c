/* The seeds of the fuzz target that has the store's server in it; see test_corpus.c. */
#include <criterion/criterion.h>

#include "corpus.h"
#include "../fuzz/fuzz_store.c"

Test(corpus, store, .timeout = 120) { cr_assert_geq(corpus_replay("store", LLVMFuzzerTestOneInput), 9); }
