/* Whole runs on the cuda device's own sources, emulated on the processor (tests/emulation): every strategy, two ranks that
 * share the device, and checkpoints there and back.  On a GPU: gpu/test_gpu_runs.c. */
#include <criterion/criterion.h>

#include "cuda_runs.h"

static const char *const strategies[] = {"ddp", "fsdp", "zero.stage=2", "zero.stage=3", NULL};
static const cuda_where emulated = {.plugins = "lib/phalanx-emulated", .comm = "comm.plugin=shm", .steps = 2,
                                    .strategies = strategies, .smaller = "model.layers=1"};

Test(cuda_runs, fp32_on_one_rank, .timeout = 300) { cuda_runs_compare(&emulated, "1", "fp32", 1e-4); }
Test(cuda_runs, fp32_on_two_ranks, .timeout = 300) { cuda_runs_compare(&emulated, "2", "fp32", 1e-4); }
Test(cuda_runs, bf16_on_two_ranks, .timeout = 300) { cuda_runs_compare(&emulated, "2", "bf16", 0.02); }
Test(cuda_runs, checkpoints_there_and_back, .timeout = 300) { cuda_runs_checkpoints(&emulated); }
Test(cuda_runs, profile, .timeout = 300) { cuda_runs_profile(&emulated); }
