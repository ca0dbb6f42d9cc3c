/* Whole runs on the cuda device's own sources, emulated on the processor (tests/emulation): every strategy, two ranks
 * that share the device, and checkpoints there and back.  On a GPU: gpu/test_gpu_runs.c. */
#include <criterion/criterion.h>

#include <sched.h>
#include <stdlib.h>
#include <string.h>

#include "cuda_runs.h"
#include "training.h"

static const char *const strategies[] = {"ddp", "fsdp", "zero.stage=2", "zero.stage=3", NULL};
static const cuda_where emulated = {.plugins = "lib/phalanx-emulated", .comm = "comm.plugin=shm", .steps = 2,
                                    .strategies = strategies, .model = {"model.layers=1"}};
static const char *const two[] = {"ddp", "fsdp", NULL};
static const cuda_where wide = {.plugins = "lib/phalanx-emulated", .comm = "comm.plugin=shm", .steps = 1,
                                .strategies = two, .model = {"model.layers=1", "model.width=64", "model.heads=2"}};

Test(cuda_runs, fp32_on_one_rank, .timeout = 300) { cuda_runs_compare(&emulated, "1", "fp32", 1e-4); }
Test(cuda_runs, fp32_on_two_ranks, .timeout = 300) { cuda_runs_compare(&emulated, "2", "fp32", 1e-4); }
Test(cuda_runs, bf16_on_two_ranks, .timeout = 300) { cuda_runs_compare(&emulated, "2", "bf16", 0.02); }
Test(cuda_runs, width_of_whole_vectors, .timeout = 300) { cuda_runs_compare(&wide, "1", "bf16", 0.02); }
Test(cuda_runs, checkpoints_there_and_back, .timeout = 300) { cuda_runs_checkpoints(&emulated); }
Test(cuda_runs, profile, .timeout = 300) { cuda_runs_profile(&emulated); }

/* fault: as PHX_CUDA_DOUBLE has it. */
static void must_say(const char *dir, const char *fault, const char *operation, const char *unit) {
  setenv("PHX_CUDA_DOUBLE", fault, 1);
  command_result r = RUN(dir, 60, "train", "run.ini", "-n", "1", "--steps", "1", "--set", "model.layers=1", "--set",
                         "device.plugin=cuda", "--set", "plugins.path=" PHX_TEST_BUILD "/lib/phalanx-emulated");
  cr_expect_neq(r.status, 0, "%s changed nothing", fault);
  cr_expect(strstr(r.out, "cuda: rank 0: ") && strstr(r.out, operation), "%s:\n%s", fault, r.out);
  cr_expect(strstr(r.out, unit), "%s:\n%s", fault, r.out);
  command_free(&r);
}
Test(cuda_runs, a_failure_names_operation_unit_and_rank, .timeout = 150) {
  char *dir = command_temp_dir();
  training_files(dir, training_odd_model);
  must_say(dir, "fail=cublasLtMatmul:3:719", "linear", "; in stage 1 (");
  must_say(dir, "fail=backward_kernel:1:719", "layer_norm_backward", ", backward");
  must_say(dir, "fail=update_kernel:2:719", "adamw", "; in the update of unit ");
  command_remove_dir(dir);
}

/* Two ranks on one CPU: slow where the CPU computes, and nothing to say where a GPU does. */
Test(cuda_runs, few_cpus_are_no_matter, .timeout = 100) {
  static const char *const devices[] = {"device.plugin=cpu", "device.plugin=cuda"};
  char *dir = command_temp_dir();
  cpu_set_t one;
  CPU_ZERO(&one);
  CPU_SET(sched_getcpu(), &one);
  cr_assert_eq(sched_setaffinity(0, sizeof one, &one), 0);
  training_files(dir, training_odd_model);
  for (int i = 0; i < 2; i++) {
    command_result r = RUN(dir, 60, "train", "run.ini", "-n", "2", "--steps", "1", "--set", "model.layers=1", "--set",
                           devices[i], "--set", "plugins.path=" PHX_TEST_BUILD "/lib/phalanx-emulated", "--set",
                           i ? "cuda.share=yes" : "run.seed=1");
    cr_expect_eq(r.status, 0, "%s:\n%s", devices[i], r.out);
    cr_expect_eq(strstr(r.out, "which is slow") != NULL, i == 0, "%s:\n%s", devices[i], r.out);
    command_free(&r);
  }
  command_remove_dir(dir);
}
