/* The fuzz targets' seeds, and every seed with each byte changed and at every length, under every compiler. */
#include <criterion/criterion.h>
#include <stdio.h>

#include "corpus.h"

#define LLVMFuzzerTestOneInput fuzz_safetensors
#include "../fuzz/fuzz_safetensors.c"
#undef LLVMFuzzerTestOneInput
#define LLVMFuzzerTestOneInput fuzz_manifest
#include "../fuzz/fuzz_manifest.c"
#undef LLVMFuzzerTestOneInput
#define LLVMFuzzerTestOneInput fuzz_tokens
#include "../fuzz/fuzz_tokens.c"
#undef LLVMFuzzerTestOneInput
#define LLVMFuzzerTestOneInput fuzz_tokenize
#include "../fuzz/fuzz_tokenize.c"
#undef LLVMFuzzerTestOneInput
#define LLVMFuzzerTestOneInput fuzz_gpt2
#include "../fuzz/fuzz_gpt2.c"
#undef LLVMFuzzerTestOneInput
#define LLVMFuzzerTestOneInput fuzz_slurm
#include "../fuzz/fuzz_slurm.c"
#undef LLVMFuzzerTestOneInput
#define LLVMFuzzerTestOneInput fuzz_descriptor
#include "../fuzz/fuzz_descriptor.c"
#undef LLVMFuzzerTestOneInput
#define LLVMFuzzerTestOneInput fuzz_flight
#include "../fuzz/fuzz_flight.c"
#undef LLVMFuzzerTestOneInput
#define LLVMFuzzerTestOneInput fuzz_wire
#include "../fuzz/fuzz_wire.c"
#undef LLVMFuzzerTestOneInput

Test(corpus, safetensors, .timeout = 120) { cr_assert_geq(corpus_replay("safetensors", fuzz_safetensors), 5); }
Test(corpus, manifest, .timeout = 120) { cr_assert_geq(corpus_replay("manifest", fuzz_manifest), 3); }
Test(corpus, tokens, .timeout = 120) { cr_assert_geq(corpus_replay("tokens", fuzz_tokens), 5); }
/* The command tells of every file it makes, and of every text it refuses. */
Test(corpus, tokenize, .timeout = 120) {
  cr_assert(freopen("/dev/null", "w", stdout) && freopen("/dev/null", "w", stderr));
  cr_assert_geq(corpus_replay("tokenize", fuzz_tokenize), 4);
}
Test(corpus, gpt2, .timeout = 120) { cr_assert_geq(corpus_replay("gpt2", fuzz_gpt2), 5); }
Test(corpus, slurm, .timeout = 120) { cr_assert_geq(corpus_replay("slurm", fuzz_slurm), 6); }
Test(corpus, descriptor, .timeout = 120) { cr_assert_geq(corpus_replay("descriptor", fuzz_descriptor), 6); }
Test(corpus, flight, .timeout = 120) { cr_assert_geq(corpus_replay("flight", fuzz_flight), 3); }
Test(corpus, wire, .timeout = 120) { cr_assert_geq(corpus_replay("wire", fuzz_wire), 4); }
