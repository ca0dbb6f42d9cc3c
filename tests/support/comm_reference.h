/* comm_reference.h - what every rank brings to a collective of the suite, and what must come out.  Pure; [any] thread.
 *
 * Sanitized tests spend most of their time here, so this file is compiled without their checks: it touches no memory of
 * what is tested. */
#ifndef COMM_REFERENCE_H
#define COMM_REFERENCE_H
#include <phalanx/base.h>

typedef union comm_value { float f; double d; int64_t i; uint64_t u; } comm_value;

/* Element i of rank r, as it lies in memory: phx_dtype_bytes(dtype) bytes at out. */
void comm_reference_element(int32_t dtype, uint64_t seed, int32_t r, int64_t i, void *out);
/* Such bytes as a number (bf16 as a float), and back. */
comm_value comm_reference_widen(int32_t dtype, const void *p);
void comm_reference_narrow(int32_t dtype, comm_value v, void *out);
/* Element i of ranks [first, first + n), reduced in the canonical order (left to right: another one). */
comm_value comm_reference_tree(int32_t dtype, int32_t op, uint64_t seed, int32_t first, int32_t n, int64_t i);
comm_value comm_reference_left_to_right(int32_t dtype, uint64_t seed, int32_t n, int64_t i);
#endif
