/* plugins/cpu/columns.h - sums over rows (bias gradients) whose bits do not depend on the number of threads.
 *
 * Each column is summed by one thread: ROWS rows at a time in order, then added to the total.  Kernel files only. */
#ifndef PHX__CPU_COLUMNS_H
#define PHX__CPU_COLUMNS_H
#include <stdint.h>
#include "simd.h"

enum { PHX__COLUMN_ROWS = 16 };

/* total[j] (fresh: =, else +=) sum over r < rows of x[r * ld + j], j in [first, last); rows <= PHX__COLUMN_ROWS. */
PHX__INLINE void phx__column_sums(int32_t dtype, float *restrict total, const void *restrict x, int64_t ld,
                                  int64_t rows, int64_t first, int64_t last, int fresh) {
  if (rows == PHX__COLUMN_ROWS) { /* known count: the inner loop is unrolled and columns are vectorised */
    for (int64_t j = first; j < last; j++) {
      float sum = phx__get(dtype, x, j);
      for (int r = 1; r < PHX__COLUMN_ROWS; r++) sum += phx__get(dtype, x, r * ld + j);
      total[j] = fresh ? sum : total[j] + sum;
    }
    return;
  }
  for (int64_t j = first; j < last; j++) {
    float sum = phx__get(dtype, x, j);
    for (int64_t r = 1; r < rows; r++) sum += phx__get(dtype, x, r * ld + j);
    total[j] = fresh ? sum : total[j] + sum;
  }
}
#endif
