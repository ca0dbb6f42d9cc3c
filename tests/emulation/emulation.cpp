// emulation.cpp - runs kernels on the processor: one block after the other, the threads of a block as fibers.
//
// A thread runs on a fiber's stack until it ends or waits (barrier, shuffle, vote); the scheduler then runs the next.
// One that ends without waiting leaves its stack to the next, so kernels without barriers cost two switches a thread.
// Invariant: a warp's exchange is completed by the last lane of its mask, which fills in every lane's answer.
// Threads: a stream's thread runs its launches alone; all state here is its own (thread_local).
#include <cuda_emulation.h>
#include <cstdio>
#include <cstdlib>
#include <sys/mman.h>
#include <algorithm>
#include <map>
#include <mutex>
#include <vector>
#include "cuda_double.h"
#if defined(__has_feature)
#if __has_feature(address_sanitizer)
#define FIBER_ASAN 1
#elif __has_feature(thread_sanitizer)
#define FIBER_TSAN 1
#endif
#endif
#if defined(__SANITIZE_ADDRESS__)
#define FIBER_ASAN 1
#elif defined(__SANITIZE_THREAD__)
#define FIBER_TSAN 1
#endif
#ifdef FIBER_ASAN
#include <sanitizer/common_interface_defs.h>
#endif
// The thread sanitizer is not told of fibers (its clocks take most of an hour for them): they are one thread to it.
// Its stack of calls holds those of all fibers at once, so what switches or does not return must not be on it.
#ifdef FIBER_TSAN
#define NO_TSAN __attribute__((no_sanitize_thread))
#else
#define NO_TSAN
#endif
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace emulation {
thread_local coordinates here;

namespace {
constexpr size_t kStack = 256 << 10, kFence = 256;
constexpr size_t kSharedMax = 227 << 10, kSharedUsual = 48 << 10, kStaticMax = 48 << 10;
constexpr unsigned kThreadsMax = 1024;
enum state { kFresh, kReady, kWaiting, kEnded };
enum wait_kind { kNothing, kBarrier, kExchange, kVote };

#if defined(__x86_64__)
struct context { void *sp = nullptr; };
extern "C" void emulation_switch(void **save, void *load);
asm(R"(
.text
.type emulation_switch,@function
emulation_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulation_switch,.-emulation_switch
)");
void prepare(context &c, char *stack, void (*entry)()) {
  uintptr_t top = ((uintptr_t)(stack + kStack) & ~(uintptr_t)63) - 64;
  void **sp = (void **)top;
  *--sp = nullptr;  // where entry would return to; keeps the stack aligned as after a call
  *--sp = (void *)entry;
  for (int i = 0; i < 6; i++) *--sp = nullptr;
  c.sp = sp;
}
NO_TSAN void swap(context &from, context &to) { emulation_switch(&from.sp, to.sp); }
#else
struct context { ucontext_t u; };
void prepare(context &c, char *stack, void (*entry)()) {
  getcontext(&c.u);
  c.u.uc_stack.ss_sp = stack;
  c.u.uc_stack.ss_size = kStack;
  c.u.uc_link = nullptr;
  makecontext(&c.u, entry, 0);
}
NO_TSAN void swap(context &from, context &to) { swapcontext(&from.u, &to.u); }
#endif

struct fiber {
  context registers;
  char *stack = nullptr;
  state now = kFresh;
  wait_kind waits = kNothing;
  unsigned mask = 0, from = 0;  // of the exchange it waits in
  uint64_t value = 0;           // given, then received
  uint3 thread{};
  void *fake_stack = nullptr;  // the address sanitizer's
};

struct machine {
  std::vector<fiber> fibers;
  std::vector<char *> stacks;  // free ones
  context scheduler;
  void *scheduler_fake = nullptr;
  const void *scheduler_bottom = nullptr;
  size_t scheduler_size = 0;
  unsigned running = 0, alive = 0, at_barrier = 0;
  int count = 0, counted = 0;  // predicates of the barrier that fills, and of the last
  const std::function<void()> *body = nullptr;
  const char *name = "";
  char *dynamic = nullptr, *fixed = nullptr;
  size_t dynamic_bytes = 0, fixed_used = 0;
  std::vector<std::pair<const void *, char *>> keys;
  ~machine();
};
thread_local machine m;

machine::~machine() {
  for (char *stack : stacks) munmap(stack, kStack);
  free(dynamic);
  free(fixed);
}

[[noreturn]] void die(const char *what) {
  std::fprintf(stderr, "cuda emulation: kernel %s, block (%u, %u, %u), thread %u: %s\n", m.name, here.block.x,
               here.block.y, here.block.z, m.running, what);
  std::abort();
}

char *take_stack() {
  if (!m.stacks.empty()) {
    char *stack = m.stacks.back();
    m.stacks.pop_back();
    return stack;
  }
  void *p = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) std::abort();
  return (char *)p;
}

// ---- switching ----
NO_TSAN void leave_fiber(bool ended) {
  fiber &f = m.fibers[m.running];
#ifdef FIBER_ASAN
  __sanitizer_start_switch_fiber(ended ? nullptr : &f.fake_stack, m.scheduler_bottom, m.scheduler_size);
#endif
  (void)ended;
  swap(f.registers, m.scheduler);
#ifdef FIBER_ASAN
  __sanitizer_finish_switch_fiber(f.fake_stack, &m.scheduler_bottom, &m.scheduler_size);
#endif
}

NO_TSAN void fiber_main() {
#ifdef FIBER_ASAN
  __sanitizer_finish_switch_fiber(nullptr, &m.scheduler_bottom, &m.scheduler_size);
#endif
  (*m.body)();
  m.fibers[m.running].now = kEnded;
  leave_fiber(true);
  std::abort();
}

void run_fiber(unsigned index) {
  fiber &f = m.fibers[index];
  m.running = index;
  here.thread = f.thread;
  if (f.now == kFresh) {
    f.stack = take_stack();
    prepare(f.registers, f.stack, fiber_main);
  }
  f.now = kReady;
#ifdef FIBER_ASAN
  __sanitizer_start_switch_fiber(&m.scheduler_fake, f.stack, kStack);
#endif
  swap(m.scheduler, f.registers);
#ifdef FIBER_ASAN
  __sanitizer_finish_switch_fiber(m.scheduler_fake, nullptr, nullptr);
#endif
}

// ---- waiting ----
void open_barrier_if_full() {
  if (m.at_barrier == 0 || m.at_barrier < m.alive) return;
  m.at_barrier = 0;
  m.counted = m.count;
  m.count = 0;
  for (fiber &f : m.fibers)
    if (f.now == kWaiting && f.waits == kBarrier) {
      f.now = kReady;
      f.value = (uint64_t)m.counted;
    }
}

unsigned warp_size_at(unsigned first) { return (unsigned)std::min<size_t>(32, m.fibers.size() - first); }

// Completes the exchange of `mask` in the warp of `index`, when all of its lanes that still run are there.
void complete_if_full(unsigned index, unsigned mask, wait_kind kind) {
  const unsigned first = index & ~31u, lanes = warp_size_at(first);
  uint64_t given[32];
  unsigned there = 0, ballot = 0;
  for (unsigned l = 0; l < lanes; l++) {
    const fiber &f = m.fibers[first + l];
    if (!(mask >> l & 1u) || f.now == kEnded) continue;
    if (f.now != kWaiting || f.waits == kBarrier) return;
    if (f.waits != kind || f.mask != mask) die("lanes of one mask wait in different exchanges");
    there |= 1u << l;
    given[l] = f.value;
    if (f.value) ballot |= 1u << l;
  }
  for (unsigned l = 0; l < lanes; l++) {
    if (!(there >> l & 1u)) continue;
    fiber &f = m.fibers[first + l];
    f.now = kReady;
    f.value = kind == kVote ? ballot : f.from < 32 && (there >> f.from & 1u) ? given[f.from] : ~(uint64_t)0;
  }
}

uint64_t wait(wait_kind kind, unsigned mask, uint64_t value, unsigned from) {
  const unsigned index = m.running;
  fiber &f = m.fibers[index];
  f.now = kWaiting;
  f.waits = kind;
  f.mask = mask;
  f.value = value;
  f.from = from;
  if (kind == kBarrier) {
    m.at_barrier++;
    open_barrier_if_full();
  } else {
    if (!(mask >> (index & 31u) & 1u)) die("a lane exchanges with a mask that it is not in");
    complete_if_full(index, mask, kind);
  }
  if (f.now == kWaiting) leave_fiber(false);
  f.waits = kNothing;
  f.now = kReady;
  return f.value;
}

void thread_ended(unsigned index) {
  fiber &f = m.fibers[index];
  m.stacks.push_back(f.stack);
  f.stack = nullptr;
  m.alive--;
  open_barrier_if_full();
  const unsigned first = index & ~31u;
  for (unsigned l = 0; l < warp_size_at(first); l++) {
    const fiber &g = m.fibers[first + l];
    if (g.now == kWaiting && (g.waits == kExchange || g.waits == kVote)) complete_if_full(first + l, g.mask, g.waits);
  }
}

// ---- blocks ----
void fence_shared() {
  std::memset(m.dynamic, 0xFF, m.dynamic_bytes);
  std::memset(m.dynamic + m.dynamic_bytes, 0xA5, kFence);
  std::memset(m.fixed, 0xFF, kStaticMax);
  m.fixed_used = 0;
  m.keys.clear();
}

void run_block(unsigned threads, bool down) {
  const dim3 dim = here.block_dim;
  for (unsigned i = 0; i < threads; i++) {
    fiber &f = m.fibers[i];
    f.now = kFresh;
    f.waits = kNothing;
    f.thread = uint3{i % dim.x, i / dim.x % dim.y, i / dim.x / dim.y};
  }
  m.alive = threads;
  m.at_barrier = 0;
  m.count = 0;
  fence_shared();
  while (m.alive) {
    bool moved = false;
    for (unsigned k = 0; k < threads; k++) {
      const unsigned i = down ? threads - 1 - k : k;
      if (m.fibers[i].now != kFresh && m.fibers[i].now != kReady) continue;
      run_fiber(i);
      moved = true;
      if (m.fibers[i].now == kEnded) thread_ended(i);
    }
    if (!moved) die("threads wait for each other: a barrier or an exchange that not all reach");
  }
  for (size_t i = 0; i < kFence; i++)
    if ((unsigned char)m.dynamic[m.dynamic_bytes + i] != 0xA5) die("wrote behind its dynamic shared memory");
}

struct launching {
  dim3 grid, block;
  size_t shared;
  std::function<void()> body;
  const char *name;
};

void run_launch(void *arg) {
  const launching *l = (const launching *)arg;
  const unsigned threads = l->block.x * l->block.y * l->block.z;
  const char *order = std::getenv("PHX_CUDA_DOUBLE_ORDER");
  const bool down = order && std::strcmp(order, "down") == 0;
  if (!m.dynamic) {
    m.dynamic = (char *)std::aligned_alloc(1024, (kSharedMax + kFence + 1023) / 1024 * 1024);
    m.fixed = (char *)std::aligned_alloc(1024, kStaticMax);
    if (!m.dynamic || !m.fixed) std::abort();
  }
  m.fibers.resize(threads);
  m.body = &l->body;
  m.name = l->name;
  m.dynamic_bytes = l->shared;
  here.block_dim = l->block;
  here.grid_dim = l->grid;
  for (unsigned z = 0; z < l->grid.z; z++)
    for (unsigned y = 0; y < l->grid.y; y++)
      for (unsigned x = 0; x < l->grid.x; x++) {
        here.block = uint3{x, y, z};
        run_block(threads, down);
      }
}

void drop_launch(void *arg) { delete (launching *)arg; }
}  // namespace

// ---- what kernels call ----
void barrier() { (void)wait(kBarrier, 0, 0, 0); }
int barrier_count(int predicate) {
  m.count += predicate != 0;
  return (int)wait(kBarrier, 0, 0, 0);
}
uint64_t exchange(unsigned mask, uint64_t value, unsigned from) { return wait(kExchange, mask, value, from); }
unsigned vote(unsigned mask, int predicate) { return (unsigned)wait(kVote, mask, predicate != 0, 0); }
unsigned lane() { return m.running & 31u; }
void *dynamic_shared() { return m.dynamic; }

void *static_shared(const void *key, size_t bytes) {
  for (const auto &known : m.keys)
    if (known.first == key) return known.second;
  char *p = m.fixed + m.fixed_used;
  m.fixed_used += (bytes + 15) / 16 * 16;
  if (m.fixed_used > kStaticMax) die("more than 48 KiB of static shared memory");
  m.keys.emplace_back(key, p);
  return p;
}

// Dynamic shared memory that kernels asked for beyond what every kernel may have.
std::mutex asked_lock;
std::map<const void *, size_t> asked;

cudaError_t allow_shared(const void *kernel, enum cudaFuncAttribute what, int bytes) {
  const cudaError_t entered = cuda_double_enter("cudaFuncSetAttribute");
  if (entered != cudaSuccess) return entered;
  if (what != cudaFuncAttributeMaxDynamicSharedMemorySize || bytes < 0 || (size_t)bytes > kSharedMax)
    return cuda_double_return(cudaErrorInvalidValue);
  const std::lock_guard<std::mutex> guard(asked_lock);
  asked[kernel] = (size_t)bytes;
  return cudaSuccess;
}

static bool may_have(const void *kernel, size_t shared) {
  if (shared <= kSharedUsual) return true;
  const std::lock_guard<std::mutex> guard(asked_lock);
  const auto found = asked.find(kernel);
  return found != asked.end() && shared <= found->second;
}

cudaError_t launch(const char *name, const void *kernel, dim3 grid, dim3 block, size_t shared, cudaStream_t stream,
                   std::function<void()> body) {
  const cudaError_t entered = cuda_double_enter_launch(name);
  if (entered != cudaSuccess) return entered;
  const uint64_t threads = (uint64_t)block.x * block.y * block.z;
  if (threads == 0 || threads > kThreadsMax || block.z > 64 || !grid.x || !grid.y || !grid.z || grid.x > 0x7fffffffu ||
      grid.y > 65535 || grid.z > 65535)
    return cuda_double_return(cudaErrorInvalidConfiguration);
  if (!may_have(kernel, shared)) return cuda_double_return(cudaErrorInvalidValue);
  cuda_double_count_launch();
  return cuda_double_submit(stream, run_launch, drop_launch,
                            new launching{grid, block, shared, std::move(body), name});
}
}  // namespace emulation
