/* Whole runs on a GPU: every strategy on one rank and on ranks that share the GPU through shared memory, in fp32 and
 * bf16, and checkpoints there and back.  The same on the emulation: integration/test_cuda_runs.c. */
#include <criterion/criterion.h>
#include <stdio.h>
#include <stdlib.h>

#include "cuda_runs.h"

static const char *const strategies[] = {"ddp",          "fsdp",         "fsdp.sharding=grad_op", "fsdp.sharding=none",
                                         "zero.stage=1", "zero.stage=2", "zero.stage=3",          NULL};
static const cuda_where gpu = {.comm = "comm.plugin=shm", .steps = 10, .strategies = strategies};
static const cuda_where with_nccl = {.comm = "comm.plugin=nccl", .steps = 10, .strategies = strategies};

/* every kernel's rows in whole vectors, heads that cuDNN takes */
static const cuda_where wide = {.comm = "comm.plugin=shm", .steps = 10, .strategies = strategies,
                                .model = {"model.width=64", "model.heads=2"}};

static void need_gpu(void) {
  char *reason = cuda_runs_reason(&gpu), text[512];
  if (!reason) return;
  snprintf(text, sizeof text, "%s", reason);
  free(reason);
  cr_skip_test("%s", text);
}

TestSuite(gpu_runs, .init = need_gpu, .timeout = 290);
Test(gpu_runs, fp32_on_one_rank) { cuda_runs_compare(&gpu, "1", "fp32", 1e-3); }
Test(gpu_runs, fp32_on_three_ranks) { cuda_runs_compare(&gpu, "3", "fp32", 1e-3); }
Test(gpu_runs, bf16_on_one_rank) { cuda_runs_compare(&gpu, "1", "bf16", 0.02); }
Test(gpu_runs, bf16_on_two_ranks) { cuda_runs_compare(&gpu, "2", "bf16", 0.02); }
Test(gpu_runs, fp32_of_width_64) { cuda_runs_compare(&wide, "1", "fp32", 1e-3); }
Test(gpu_runs, bf16_of_width_64) { cuda_runs_compare(&wide, "2", "bf16", 0.02); }
Test(gpu_runs, nccl_on_one_rank) { cuda_runs_compare(&with_nccl, "1", "bf16", 0.02); }
Test(gpu_runs, checkpoints_there_and_back) { cuda_runs_checkpoints(&gpu); }
Test(gpu_runs, profile) { cuda_runs_profile(&gpu); }
