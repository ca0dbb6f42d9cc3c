/* tests/emulation/cudnn_double.h - a libcudnn.so.9 that carries out graphs of operations on the processor, in fp32.
 *
 * It knows the operations of attention only, fuses nothing and keeps the order that they came in.  Tests open it
 * before the device, so that the device's dlopen finds it; cudnn_double_settings() is its one symbol of its own. */
#ifndef PHX__CUDNN_DOUBLE_H
#define PHX__CUDNN_DOUBLE_H
#include <stddef.h>
#include <stdint.h>

typedef struct cudnn_double_state {
  /* for the test to set */
  size_t version;    /* 0: 91900 */
  int64_t workspace; /* what plans ask for */
  int32_t no_handle; /* cudnnCreate fails */
  int32_t no_engine; /* the heuristic knows no engine */
  int32_t noted;     /* its first engine is nondeterministic, a second is not */
  int32_t fail_at;   /* the call of this number, from 1, fails: create, finalize, set, get, set stream, execute */
  /* for the test to read */
  int32_t calls, descriptors, handles, executed;
  int64_t operations; /* of the graph executed last */
} cudnn_double_state;
typedef cudnn_double_state *cudnn_double_settings_entry(void);
#endif
