/* nccl_double.h - a double of NCCL, on the double of the CUDA runtime (tests/emulation), for tests of plugins/nccl.
 *
 * A rank is a process (or a thread) of this machine; bytes really move, through memory shared by what was forked after
 * double_setup(), or in the file that NCCL_DOUBLE_MEMORY names (made by the first; version 2.30.3).  Communicators are
 * non-blocking, as the plugin asks for.  Reductions add from rank 0 upwards and round bf16 at every addition: unlike
 * the tree of phalanx/comm.h, as NCCL does.  A buffer that is not the device's is refused with ncclInvalidArgument.  At
 * most 8 ranks. */
#ifndef NCCL_DOUBLE_H
#define NCCL_DOUBLE_H
#include <phalanx/device.h>

#define DOUBLE_RANKS 8
enum double_fault {
  DOUBLE_FINE = 0,
  DOUBLE_INIT_HANGS,   /* ncclCommInitRankConfig stays in progress */
  DOUBLE_INIT_FAILS,   /* ... ends with ncclSystemError */
  DOUBLE_SPLIT_FAILS,  /* ncclCommSplit ends with ncclSystemError */
  DOUBLE_OP_HANGS,     /* operation number `at` never ends */
  DOUBLE_ASYNC_ERROR,  /* ... nor this one, and the communicator reports ncclRemoteError */
  DOUBLE_CALL_FAILS,   /* operation number `at` is refused with ncclUnhandledCudaError */
  DOUBLE_MEMORY_FAILS, /* ncclMemAlloc */
  DOUBLE_ID_FAILS,     /* ncclGetUniqueId */
  DOUBLE_REGISTER_FAILS,
  DOUBLE_OTHER_VERSION, /* ncclGetVersion of this rank */
  DOUBLE_CUT,           /* from now on no operation of any rank ends */
  DOUBLE_CALL_BLOCKS    /* the call of operation number `at` returns after `seconds`, with ncclSystemError */
};
typedef struct double_control { /* shared by all ranks; set after double_setup(), before the fork */
  int version;         /* NCCL's code */
  int one_gpu;         /* all ranks have the same */
  int fault, rank, at; /* at: from 1, operations of the rank on any communicator; rank DOUBLE_RANKS: all */
  int seconds;
  int sick;            /* every communicator reports ncclRemoteError, whatever it does; may be set in a rank */
  /* read afterwards; of all ranks */
  int live_comms, live_registrations, live_memory;
  int aborts, splits, groups, operations, late_operations; /* late: on a communicator that was aborted */
} double_control;

/* In what forks the ranks; also sets everything back.  NULL: no memory. */
double_control *double_setup(void);
/* In a rank: which one it is, and a device whose streams are those of the CUDA double. */
const phx_device *double_device_open(int rank);
void double_device_close(const phx_device *device);
#endif
