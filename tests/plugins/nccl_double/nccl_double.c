/* nccl_double.c - NCCL's calls: see nccl_double.h.  Joining and splitting go on in a thread of their own while the call
 * has returned ncclInProgress; operations return ncclInProgress, too, and are ready at the first question. */
#include <cuda_double.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "inner.h"

double_memory *double_shared;
__thread int double_rank;
static __thread int group_depth;
static __thread work *group;
static __thread cudaStream_t group_stream;
static __thread int operations;

#define CONTROL (&double_shared->control)
#define COUNT(field, by) __atomic_fetch_add(&CONTROL->field, by, __ATOMIC_RELAXED)
static int has_fault(int fault) {
  return CONTROL->fault == fault && (CONTROL->rank == double_rank || CONTROL->rank == DOUBLE_RANKS);
}

double_control *double_setup(void) {
  if (double_shared) munmap(double_shared, sizeof *double_shared);
  double_shared = mmap(NULL, sizeof *double_shared, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS | MAP_NORESERVE,
                       -1, 0);
  if (double_shared == MAP_FAILED) double_shared = NULL;
  if (!double_shared) return NULL;
  CONTROL->version = 22809;
  CONTROL->rank = -1;
  cuda_double_config config = cuda_double_defaults();
  config.devices = DOUBLE_RANKS;
  config.threads = 1;
  config.guard = 0;
  cuda_double_configure(&config);
  return CONTROL;
}

/* In ranks that are commands of their own. */
__attribute__((constructor)) static void attach(void) {
  const char *path = getenv("NCCL_DOUBLE_MEMORY");
  const int fd = path ? open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600) : -1;
  if (fd < 0) return;
  if (ftruncate(fd, sizeof *double_shared) == 0)
    double_shared = mmap(NULL, sizeof *double_shared, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  close(fd);
  if (!double_shared || double_shared == MAP_FAILED) abort();
  CONTROL->version = 23003; /* joins ranks that share a GPU, when it is asked to: the emulation has one */
  CONTROL->rank = -1;
}

/* ---- communicators ---- */

static ncclComm_t comm_new(room *r, int n, int me, int world_rank) {
  ncclComm_t c = calloc(1, sizeof *c);
  if (!c) abort();
  *c = (struct ncclComm){
      .room = r, .n = n, .me = me, .world_rank = world_rank, .references = 1, .state = ncclInProgress};
  COUNT(live_comms, 1);
  return c;
}
void double_release(ncclComm_t c) {
  if (__atomic_sub_fetch(&c->references, 1, __ATOMIC_ACQ_REL) == 0) free(c);
}
static void set_state(ncclComm_t c, int state) { __atomic_store_n(&c->state, state, __ATOMIC_RELEASE); }

static room *room_take(void) {
  for (int i = 0; i < ROOMS; i++) {
    uint32_t none = 0;
    room *r = &double_shared->rooms[i];
    if (!__atomic_compare_exchange_n(&r->used, &none, 1, 0, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE)) continue;
    r->arrived = 0;
    for (int a = 0; a < DOUBLE_RANKS; a++)
      for (int b = 0; b < DOUBLE_RANKS; b++) r->pair[a][b].posted = r->pair[a][b].taken = 0;
    return r;
  }
  fprintf(stderr, "the NCCL double has only %d communicators\n", ROOMS);
  abort();
}
/* `used` is 1 while it is made, then 1 + the number of ranks that have it. */
static void room_join(ncclComm_t c) {
  __atomic_fetch_add(&c->room->used, 1, __ATOMIC_ACQ_REL);
  __atomic_fetch_add(&c->room->arrived, 1, __ATOMIC_ACQ_REL);
  for (int turns = 0; __atomic_load_n(&c->room->arrived, __ATOMIC_ACQUIRE) < (uint32_t)c->n;) {
    if (__atomic_load_n(&c->aborted, __ATOMIC_ACQUIRE)) return;
    double_pause(&turns);
  }
}
static void room_leave(ncclComm_t c) {
  if (__atomic_sub_fetch(&c->room->used, 1, __ATOMIC_ACQ_REL) == 1 &&
      __atomic_load_n(&c->room->arrived, __ATOMIC_ACQUIRE) == (uint32_t)c->n)
    __atomic_store_n(&c->room->used, 0, __ATOMIC_RELEASE);
}

typedef struct helper {
  ncclComm_t comm, *out; /* out: of a split */
  int color, key;
} helper;

static void *init_main(void *arg) {
  helper *h = arg;
  const int hangs = CONTROL->fault == DOUBLE_INIT_HANGS && CONTROL->rank == h->comm->world_rank;
  const int fails = CONTROL->fault == DOUBLE_INIT_FAILS && CONTROL->rank == h->comm->world_rank;
  if (hangs || fails) {
    if (fails) set_state(h->comm, ncclSystemError);
    double_hang(h->comm);
  } else {
    room_join(h->comm);
    set_state(h->comm, ncclSuccess);
  }
  double_release(h->comm);
  free(h);
  return NULL;
}

typedef struct wish {
  int color, key, room, reserved;
} wish;
/* Everybody's bytes to everybody, through the communicator's channels: nothing else is on them now. */
static int gather(ncclComm_t c, wish *all) {
  move moves[2 * DOUBLE_RANKS];
  int n = 0;
  for (int p = 0; p < c->n; p++) {
    if (p == c->me) continue;
    moves[n++] = (move){p, 1, (char *)&all[c->me], sizeof *all, 0};
    moves[n++] = (move){p, 0, (char *)&all[p], sizeof *all, 0};
  }
  return double_move(c, moves, n);
}
static void *split_main(void *arg) {
  helper *h = arg;
  ncclComm_t c = h->comm;
  wish all[DOUBLE_RANKS] = {{0}};
  int n = 0, me = 0, first = -1;
  all[c->me] = (wish){h->color, h->key, 0, 0};
  int failed = gather(c, all);
  for (int p = 0; p < c->n && h->color >= 0; p++) {
    if (all[p].color != h->color) continue;
    n++;
    if (first < 0) first = p;
    me += all[p].key < h->key || (all[p].key == h->key && p < c->me);
  }
  if (first == c->me) all[c->me].room = (int)(room_take() - double_shared->rooms);
  if (!failed) failed = gather(c, all);
  if (!failed && h->color >= 0) {
    ncclComm_t child = comm_new(&double_shared->rooms[all[first].room], n, me, c->world_rank);
    room_join(child);
    set_state(child, ncclSuccess);
    *h->out = child;
  }
  if (!failed) set_state(c, ncclSuccess);
  double_release(c);
  free(h);
  return NULL;
}
static ncclResult_t help(void *(*run)(void *), helper wanted) {
  pthread_t thread;
  helper *h = malloc(sizeof *h);
  *h = wanted;
  __atomic_fetch_add(&h->comm->references, 1, __ATOMIC_ACQ_REL);
  if (pthread_create(&thread, NULL, run, h) != 0) abort();
  pthread_detach(thread);
  return ncclInProgress;
}

ncclResult_t ncclCommInitRankConfig(ncclComm_t *comm, int n, ncclUniqueId id, int rank, ncclConfig_t *config) {
  int number = 0;
  memcpy(&number, id.internal, sizeof number);
  if (n < 1 || n > DOUBLE_RANKS || rank < 0 || rank >= n || config->blocking != 0) return ncclInvalidArgument;
  *comm = comm_new(&double_shared->rooms[number], n, rank, rank);
  return help(init_main, (helper){*comm, NULL, 0, 0});
}
ncclResult_t ncclCommSplit(ncclComm_t comm, int color, int key, ncclComm_t *out, ncclConfig_t *config) {
  if (comm->ended || config->blocking != 0 || (color < 0 && color != NCCL_SPLIT_NOCOLOR)) return ncclInvalidUsage;
  if (has_fault(DOUBLE_SPLIT_FAILS)) return ncclSystemError;
  COUNT(splits, 1);
  set_state(comm, ncclInProgress);
  return help(split_main, (helper){comm, out, color, key});
}
ncclResult_t ncclCommGetAsyncError(ncclComm_t comm, ncclResult_t *state) {
  *state = (ncclResult_t)__atomic_load_n(&comm->state, __ATOMIC_ACQUIRE);
  if (__atomic_load_n(&CONTROL->sick, __ATOMIC_ACQUIRE)) *state = ncclRemoteError;
  return ncclSuccess;
}
ncclResult_t ncclCommFinalize(ncclComm_t comm) {
  if (comm->ended) return ncclInvalidUsage;
  comm->ended = 1;
  return ncclInProgress;
}
static void comm_end(ncclComm_t c) {
  room_leave(c);
  COUNT(live_comms, -1);
  COUNT(live_registrations, -c->registrations); /* go with an aborted communicator */
  double_release(c);
}
ncclResult_t ncclCommDestroy(ncclComm_t comm) {
  if (!comm->ended) return ncclInvalidUsage;
  comm->registrations = 0; /* what is still registered is the plugin's mistake, and stays counted */
  comm_end(comm);
  return ncclSuccess;
}
ncclResult_t ncclCommAbort(ncclComm_t comm) {
  COUNT(aborts, 1);
  __atomic_store_n(&comm->aborted, 1, __ATOMIC_RELEASE);
  comm_end(comm);
  return ncclSuccess;
}

/* ---- memory, version, texts ---- */

ncclResult_t ncclMemAlloc(void **out, size_t bytes) {
  if (has_fault(DOUBLE_MEMORY_FAILS) || cudaMalloc(out, bytes) != cudaSuccess) return ncclUnhandledCudaError;
  COUNT(live_memory, 1);
  return ncclSuccess;
}
ncclResult_t ncclMemFree(void *p) {
  COUNT(live_memory, -1);
  return cudaFree(p) == cudaSuccess ? ncclSuccess : ncclUnhandledCudaError;
}
ncclResult_t ncclGetVersion(int *version) {
  *version = CONTROL->version + (has_fault(DOUBLE_OTHER_VERSION) ? 100 : 0);
  return ncclSuccess;
}
ncclResult_t ncclGetUniqueId(ncclUniqueId *id) {
  if (has_fault(DOUBLE_ID_FAILS)) return ncclSystemError;
  const int number = (int)(room_take() - double_shared->rooms);
  memset(id, 0, sizeof *id);
  memcpy(id->internal, &number, sizeof number);
  return ncclSuccess;
}
ncclResult_t ncclCommRegister(const ncclComm_t comm, void *p, size_t bytes, void **handle) {
  (void)bytes;
  if (has_fault(DOUBLE_REGISTER_FAILS)) return ncclSystemError;
  COUNT(live_registrations, 1);
  comm->registrations++;
  *handle = p;
  return ncclSuccess;
}
ncclResult_t ncclCommDeregister(const ncclComm_t comm, void *handle) {
  (void)handle;
  COUNT(live_registrations, -1);
  comm->registrations--;
  return ncclSuccess;
}
const char *ncclGetErrorString(ncclResult_t code) {
  return code == ncclRemoteError          ? "remote process exited or there was a network error"
         : code == ncclSystemError        ? "unhandled system error"
         : code == ncclInvalidArgument    ? "invalid argument"
         : code == ncclUnhandledCudaError ? "unhandled cuda error"
                                          : "an error of the double";
}
const char *ncclGetLastError(ncclComm_t comm) {
  (void)comm;
  return "the double said so";
}

/* ---- operations ---- */

static int is_device(const void *p) {
  struct cudaPointerAttributes at;
  return !p || (cudaPointerGetAttributes(&at, p) == cudaSuccess && at.type == cudaMemoryTypeDevice);
}
static ncclResult_t launch(work *w, cudaStream_t s) {
  const int number = ++operations;
  COUNT(operations, 1);
  if (__atomic_load_n(&w->comm->aborted, __ATOMIC_ACQUIRE)) COUNT(late_operations, 1);
  if (number == CONTROL->at && (has_fault(DOUBLE_OP_HANGS) || has_fault(DOUBLE_ASYNC_ERROR))) w->fault = CONTROL->fault;
  __atomic_fetch_add(&w->comm->references, 1, __ATOMIC_ACQ_REL);
  if (number == CONTROL->at && has_fault(DOUBLE_CALL_FAILS)) {
    double_drop(w);
    return ncclUnhandledCudaError;
  }
  if (number == CONTROL->at && has_fault(DOUBLE_CALL_BLOCKS)) {
    for (const time_t end = time(NULL) + CONTROL->seconds; time(NULL) < end;) usleep(20000);
    double_drop(w);
    return ncclSystemError;
  }
  cuda_double_submit(s, double_run, double_drop, w);
  return ncclInProgress;
}
static ncclResult_t one(work wanted, cudaStream_t s) {
  if (!is_device(wanted.src) || !is_device(wanted.dst) || wanted.comm->ended) return ncclInvalidArgument;
  work *w = malloc(sizeof *w);
  *w = wanted;
  return launch(w, s);
}

ncclResult_t ncclGroupStart(void) {
  group_depth++;
  return ncclSuccess;
}
ncclResult_t ncclGroupEnd(void) {
  if (group_depth == 0) return ncclInvalidUsage;
  if (--group_depth > 0 || !group) return ncclSuccess;
  work *w = group;
  group = NULL;
  COUNT(groups, 1);
  return launch(w, group_stream);
}
static ncclResult_t pair(ncclComm_t c, int is_send, const void *p, size_t bytes, int peer, cudaStream_t s) {
  if (peer < 0 || peer >= c->n || peer == c->me || !is_device(p) || c->ended) return ncclInvalidArgument;
  if (group && (group->comm != c || group_stream != s)) return ncclInvalidUsage;
  if (!group) {
    group = calloc(1, sizeof *group);
    *group = (work){.comm = c, .kind = DO_MOVES};
    group_stream = s;
  }
  group->moves = realloc(group->moves, (size_t)(group->n_moves + 1) * sizeof(move));
  group->moves[group->n_moves++] = (move){peer, is_send, (char *)(uintptr_t)p, bytes, 0};
  if (group_depth > 0) return ncclSuccess;
  group_depth = 1;
  return ncclGroupEnd();
}
static size_t bytes_of(ncclDataType_t type) {
  return type <= ncclUint8 ? 1 : type == ncclBfloat16 || type == ncclFloat16 ? 2
         : type == ncclInt32 || type == ncclUint32 || type == ncclFloat32   ? 4
                                                                             : 8;
}
ncclResult_t ncclSend(const void *p, size_t count, ncclDataType_t type, int peer, ncclComm_t comm, cudaStream_t s) {
  return pair(comm, 1, p, count * bytes_of(type), peer, s);
}
ncclResult_t ncclRecv(void *p, size_t count, ncclDataType_t type, int peer, ncclComm_t comm, cudaStream_t s) {
  return pair(comm, 0, p, count * bytes_of(type), peer, s);
}
ncclResult_t ncclAllReduce(const void *src, void *dst, size_t count, ncclDataType_t type, ncclRedOp_t op,
                           ncclComm_t comm, cudaStream_t s) {
  return one((work){.comm = comm, .kind = DO_ALL_REDUCE, .src = src, .dst = dst, .count = count,
                    .element = bytes_of(type), .type = type, .op = op}, s);
}
ncclResult_t ncclReduce(const void *src, void *dst, size_t count, ncclDataType_t type, ncclRedOp_t op, int root,
                        ncclComm_t comm, cudaStream_t s) {
  return one((work){.comm = comm, .kind = DO_REDUCE, .src = src, .dst = dst, .count = count,
                    .element = bytes_of(type), .type = type, .op = op, .root = root}, s);
}
ncclResult_t ncclReduceScatter(const void *src, void *dst, size_t count, ncclDataType_t type, ncclRedOp_t op,
                               ncclComm_t comm, cudaStream_t s) {
  return one((work){.comm = comm, .kind = DO_REDUCE_SCATTER, .src = src, .dst = dst, .count = count,
                    .element = bytes_of(type), .type = type, .op = op}, s);
}
ncclResult_t ncclAllGather(const void *src, void *dst, size_t count, ncclDataType_t type, ncclComm_t comm,
                           cudaStream_t s) {
  return one((work){.comm = comm, .kind = DO_ALL_GATHER, .src = src, .dst = dst, .count = count,
                    .element = bytes_of(type), .root = -1}, s);
}
ncclResult_t ncclBroadcast(const void *src, void *dst, size_t count, ncclDataType_t type, int root, ncclComm_t comm,
                           cudaStream_t s) {
  return one((work){.comm = comm, .kind = DO_BROADCAST, .src = src, .dst = dst, .count = count,
                    .element = bytes_of(type), .root = root}, s);
}
