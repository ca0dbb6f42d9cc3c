/* plugins/cpu/plugin.c - the cpu device's descriptor: creation, choice of the instruction set, memory of its own.
 *
 * The best instruction set of the machine is taken; PHALANX_ISA = base | avx2 | avx512 asks for a lower one (tests, or
 * equal bits on unequal machines) and is refused when the machine lacks it.  [main] */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "cpu.h"

enum { THREADS_MAX = 1024 };
/* What dnnl_sgemm takes from malloc for the time of a call, at most (measured: 15.2 MiB at M = 1024, N = 50304, K =
 * 768, and 0.6 MiB a further thread): in the plan, though not held between calls. */
static int64_t packing_bytes(int32_t threads) {
  return ((int64_t)16 << 20) + ((int64_t)1 << 20) * (threads - 1);
}

struct phx_device_self {
  phx__cpu cpu;
};

static const char *const isa_names[] = {"base", "avx2", "avx512"};

static int32_t machine_isa(void) {
  __builtin_cpu_init();
  const int v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
                 __builtin_cpu_supports("bmi2");
  const int v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                 __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                 __builtin_cpu_supports("avx512vl");
  if (v4) return PHX__CPU_AVX512;
  return v3 ? PHX__CPU_AVX2 : PHX__CPU_BASE;
}

static const char *asked_isa(void) {
  const char *asked = getenv("PHALANX_ISA");
  return asked && *asked ? asked : NULL;
}

static phx_status choose_isa(int32_t *out, phx_error *err) {
  const char *asked = asked_isa();
  const int32_t machine = machine_isa();
  int32_t isa = machine;
  if (asked)
    for (isa = PHX__CPU_AVX512; isa >= PHX__CPU_BASE; isa--)
      if (strcmp(asked, isa_names[isa]) == 0) break;
  if (isa < PHX__CPU_BASE)
    return phx_fail(err, PHX_INVALID, "cpu: PHALANX_ISA is \"%s\"; choose base, avx2 or avx512", asked);
  if (isa > machine)
    return phx_fail(err, PHX_UNSUPPORTED, "cpu: PHALANX_ISA is %s, but this machine has only %s", asked,
                    isa_names[machine]);
  *out = isa;
  return PHX_OK;
}

/* oneDNN has limits of its own (ONEDNN_MAX_CPU_ISA); asking for them settles them, so the processor is asked first. */
static int32_t multiplies_bf16(int32_t isa) {
  return isa == PHX__CPU_AVX512 && __builtin_cpu_supports("avx512bf16") && phx__cpu_product_has_bf16();
}

/* Measured on a Zen 4 core with bf16 forbidden (tests/bench/bench_ops --only bf16): 1.02 to 1.12 times with AVX-512,
 * and with AVX2 1.04 to 1.12, weight gradients 1.4. */
#define COST                                                                                                      \
  "products are widened to fp32: it saves memory and no time (products take 1.1 times as long as in fp32, weight " \
  "gradients with avx2 1.4 times)"
static const char *device_cost(int32_t dtype) {
  int32_t isa;
  if (dtype != PHX_BF16 || choose_isa(&isa, NULL) != PHX_OK || multiplies_bf16(isa)) return NULL;
  if (machine_isa() == PHX__CPU_AVX512 && __builtin_cpu_supports("avx512bf16"))
    return "PHALANX_ISA or ONEDNN_MAX_CPU_ISA forbids this processor's bf16 instructions: " COST;
  return "this processor has no bf16 instructions: " COST;
}

static phx_status device_probe(phx_error *err) {
  (void)err; /* every x86-64 runs the base set */
  return PHX_OK;
}

static const char *shown(const char *variable) {
  const char *value = getenv(variable);
  return value ? value : "not set";
}

static void warn(const phx__cpu *cpu, const char *text) {
  if (cpu->host->log) cpu->host->log(cpu->host->ctx, PHX_LOG_WARN, text);
}

/* OpenMP's threads, which may be fewer than asked for: that is said, with what may be the cause. */
static void take_threads(phx__cpu *cpu, int32_t asked) {
  int32_t cpus = 0, available = 0;
  char text[400];
  cpu->threads = phx__cpu_team(asked, &cpus, &available);
  if (cpu->threads < asked) {
    snprintf(text, sizeof text,
             "%d threads were asked for and OpenMP gives %d, so this rank computes with %d (OMP_THREAD_LIMIT is %.20s)",
             asked, cpu->threads, cpu->threads, shown("OMP_THREAD_LIMIT"));
    warn(cpu, text);
  }
  if (cpus < available && (cpus < cpu->threads || cpu->host->local_size > 1)) {
    snprintf(text, sizeof text,
             "OpenMP keeps %d thread%s on %d of %d CPUs, where other threads or ranks may be, too: that is slow "
             "(OMP_PROC_BIND is %.40s, OMP_PLACES is %.80s, GOMP_CPU_AFFINITY is %.80s)",
             cpu->threads, cpu->threads == 1 ? "" : "s", cpus, available, shown("OMP_PROC_BIND"), shown("OMP_PLACES"),
             shown("GOMP_CPU_AFFINITY"));
    warn(cpu, text);
  }
}

static phx_status device_create(const phx_host *host, const void *config, int32_t threads, phx_device_self **out,
                                phx_error *err) {
  static const phx__cpu_kernels *const sets[] = {&phx__cpu_kernels_base, &phx__cpu_kernels_avx2,
                                                 &phx__cpu_kernels_avx512};
  int32_t version[3];
  (void)config;
  if (threads < 1 || threads > THREADS_MAX)
    return phx_fail(err, PHX_INVALID, "cpu: threads is %d; choose 1 to %d", threads, THREADS_MAX);
  phx_device_self *self = calloc(1, sizeof *self);
  if (!self) return phx_fail(err, PHX_NOMEM, "cpu: no memory for the device");
  phx__cpu *cpu = &self->cpu;
  phx_status status = choose_isa(&cpu->isa, err);
  if (status == PHX_OK && asked_isa()) status = phx__cpu_product_isa(cpu->isa, err);
  if (status != PHX_OK) {
    free(self);
    return status;
  }
  cpu->host = host;
  take_threads(cpu, threads);
  cpu->kernels = sets[cpu->isa];
  cpu->bf16 = multiplies_bf16(cpu->isa);
  const int64_t attention = cpu->kernels->attention_scratch(cpu->threads);
  cpu->scratch_bytes = attention > PHX__CPU_SCRATCH_LEAST ? phx_align_bytes(attention) : PHX__CPU_SCRATCH_LEAST;
  phx__cpu_product_version(version);
  snprintf(cpu->name, sizeof cpu->name, "cpu (%s%s, %d thread%s, oneDNN %d.%d.%d)", isa_names[cpu->isa],
           cpu->bf16 ? " with bf16" : "", cpu->threads, cpu->threads == 1 ? "" : "s", version[0], version[1],
           version[2]);
  phx__cpu_device_init(cpu);
  cpu->ops = cpu->kernels->ops;
  cpu->ops.ctx = cpu;
  cpu->ops.scratch_bytes = cpu->scratch_bytes + packing_bytes(cpu->threads);
  *out = self;
  return PHX_OK;
}

static void device_destroy(phx_device_self *self) {
  if (!self) return;
  phx__cpu_product_bf16_end(&self->cpu);
  phx__cpu_parallel_end(&self->cpu);
  phx__cpu_free(self->cpu.scratch, self->cpu.scratch_bytes);
  free(self);
}

static const phx_device *device_device(phx_device_self *self) {
  return &self->cpu.device;
}
static const phx_ops *device_ops(phx_device_self *self) {
  return &self->cpu.ops;
}

/* The first alloc takes the scratch too: from then on operations allocate nothing of their own. */
static phx_status device_alloc(phx_device_self *self, int32_t space, int64_t bytes, void **out, phx_error *err) {
  void *p, *scratch;
  if (space < PHX_SPACE_DEVICE || space > PHX_SPACE_PINNED)
    return phx_fail(err, PHX_INVALID, "cpu: alloc in space %d", space);
  PHX_TRY(phx__cpu_alloc(&self->cpu, bytes, &p, err));
  phx_status status = phx__cpu_scratch(&self->cpu, &scratch, err);
  if (status != PHX_OK)
    phx__cpu_free(p, bytes);
  else
    *out = p;
  return status;
}

static void device_free(phx_device_self *self, int32_t space, void *p, int64_t bytes) {
  (void)self;
  (void)space;
  phx__cpu_free(p, bytes);
}

static const phx_device_table table = {.struct_size = sizeof(phx_device_table),
                                       .probe = device_probe,
                                       .create = device_create,
                                       .destroy = device_destroy,
                                       .device = device_device,
                                       .ops = device_ops,
                                       .alloc = device_alloc,
                                       .free = device_free,
                                       .cost = device_cost};

static const phx_plugin plugin = {.struct_size = sizeof(phx_plugin),
                                  .kind = PHX_KIND_DEVICE,
                                  .table_major = PHX_ABI_MAJOR,
                                  .table_minor = PHX_ABI_MINOR,
                                  .id = "cpu",
                                  .version = "0.1.0",
                                  .summary = "x86-64 processors: own kernels and oneDNN products",
                                  .vendor = "Phalanx",
                                  .license = "unspecified",
                                  .build = __VERSION__,
                                  .provides = PHX_CAP_DETERMINISTIC | PHX_CAP_BF16 | PHX_CAP_HOST_MEMORY,
                                  .option_stride = sizeof(phx_option),
                                  .table = &table,
                                  .preference = 10};

const phx_plugin *phx_plugin_v1(void) {
  return &plugin;
}
