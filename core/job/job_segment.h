/* core/job/job_segment.h - the layout of the job's shared memory, for job*.c, launcher.c and flight.c only.
 *
 * One memfd: this struct, then the parts that share() appends.  Plain fields are written before the ranks exist;
 * everything else is read and written with __atomic and has the one writer its comment names. */
#ifndef PHX__JOB_SEGMENT_H
#define PHX__JOB_SEGMENT_H
#include <phalanx/job.h>
#include <stdbool.h>

#include "base/identity.h"

#define PHX__SEGMENT_MAGIC UINT64_C(0x3158414c414850) /* "PHALAX1" */
#define PHX__SEGMENT_VERSION 2
#define PHX__SHARES_MAX 1024
#define PHX__STOPPED_NS UINT64_C(3800000000) /* a rank may be stopped this long: with the end of the others, 5 s */
#define PHX__FAILED_BY_LAUNCHER (PHX_RANKS_MAX + 1) /* in `failed`; 1 + rank: that rank was first */

/* What a rank brings to an exchange; see phx__exchange(). */
enum { PHX__POST_AGREE = 1, PHX__POST_SHARE, PHX__POST_GROWN, PHX__POST_MAPPED, PHX__POST_BYTES };
typedef struct phx__post {
  int32_t kind;
  int32_t cause; /* errno of a step that failed on this rank, 0 when all is well */
  uint64_t value;
  char name[48];
} phx__post;

typedef struct phx__slot { /* written by its rank only */
  uint64_t round;          /* exchanges this rank has entered */
  uint64_t pad[7];
  phx__post posts[2]; /* of round k in posts[k & 1]: nobody enters k + 2 before everybody has read k */
} phx__slot;

typedef struct phx__share_entry { /* written by rank 0 only, for who looks at the memory afterwards */
  char name[48];
  int64_t bytes, offset;
} phx__share_entry;

typedef struct phx__page {
  phx_liveness alive;
  uint64_t pid_space; /* of its rank: where its pid means this process; 0: not known */
  uint32_t claim;     /* nonzero: another rank has found this one lost, and writes its page */
  uint32_t meets;     /* nonzero: [main] waits for others with a deadline of that wait's own */
  char pad[4096 - sizeof(phx_liveness) - 16];
} phx__page;

typedef struct phx__segment {
  uint64_t magic;
  uint32_t version;
  int32_t size;
  uint64_t nonce;      /* random: tells one job's memory from another's */
  uint64_t created_ns; /* CLOCK_MONOTONIC */
  int32_t launcher_pid;
  int32_t pinned;       /* each rank's affinity mask is its own */
  uint64_t launcher_ns; /* the launcher's heartbeat; 0 under another launcher */
  uint32_t failed;      /* futex: 0, 1 + first failed rank, or PHX__FAILED_BY_LAUNCHER */
  uint32_t bell;        /* futex: rung whenever a slot or `failed` changes */
  int64_t end;          /* bytes of the file in use; rank 0 only */
  char message[512];    /* the launcher's reason, written before `failed` */
  int32_t n_shares;
  int32_t reserved0;
  phx__slot slots[PHX_RANKS_MAX];
  phx__share_entry shares[PHX__SHARES_MAX];
  _Alignas(4096) phx__page pages[PHX_RANKS_MAX];
} phx__segment;

/* [any], and safe in a signal handler: sets *failed to `who` when it is 0, and wakes every sleeper. */
void phx__segment_fail(phx__segment *segment, uint32_t who);
int phx__job_create_segment(int32_t size, phx_error *err); /* [main] a memfd with a sealed name, or -1 */
/* [main] maps the segment behind fd and checks its head: PHX_INVALID when it is not a job's of `size` ranks. */
phx_status phx__segment_map(int fd, int32_t size, phx__segment **out, phx_error *err);
void phx__segment_unmap(phx__segment *segment); /* NULL is fine */

/* What phx__exchange() needs to know of this process. */
typedef struct phx__member {
  phx__segment *segment;
  int fd;
  int32_t rank, size, may_spin;
  double timeout_s;
} phx__member;

/* [main][collective] every rank brings a post; all[r] is what rank r brought.  Returns PHX_COMM when a rank does not
 * come within the timeout, is dead, or the job has failed. */
phx_status phx__exchange(phx__member *me, const phx__post *mine, phx__post *all, phx_error *err);
/* [main][collective] see phx_job.share. */
phx_status phx__segment_share(phx__member *me, const char *name, int64_t bytes, void **bases, phx_error *err);
/* [main][collective] see phx_job.exchange. */
phx_status phx__segment_exchange(phx__member *me, const char *name, const void *mine, int64_t bytes, void *all,
                                 phx_error *err);

/* job_rendezvous.c: [collective] under another launcher, rank 0 makes the segment and hands it to the others. */
phx_status phx__rendezvous(const phx__identity *identity, double timeout_s, int *fd_out, phx_error *err);

/* job_crash.c: [main] SIGSEGV and its kin write a backtrace to stderr and a message to the rank's page. */
void phx__crash_install(const phx_job *job);
#endif
