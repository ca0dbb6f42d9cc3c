/* core/engine/gradient_check.h - is a gradient that a strategy hands over the sum of what the ranks computed?  [main]
 *
 * With [run] checked only.  Of some canonical blocks, others in each step (of a small model: all), what each backward
 * pass adds is read beside the strategy, from the views, and summed: over micro-batches, then over ranks.  What the
 * strategy gives to the norm and to the optimizer must be that, but for rounding.  So a gradient that was not reduced,
 * lost a micro-batch or belongs to another block is found, whatever the strategy does in between. */
#ifndef PHX__GRADIENT_CHECK_H
#define PHX__GRADIENT_CHECK_H
#include "engine/runtime.h"

typedef struct phx__gradient_check phx__gradient_check;

phx_status phx__gradient_check_open(phx__runtime *rt, phx__gradient_check **out, phx_error *err);
void phx__gradient_check_close(phx__gradient_check *c); /* NULL is fine */
void phx__gradient_check_begin(phx__gradient_check *c, int64_t step);
/* Around the model's backward pass of a stage, whose view is ready. */
phx_status phx__gradient_check_before(phx__gradient_check *c, const phx_view *view, phx_error *err);
phx_status phx__gradient_check_after(phx__gradient_check *c, const phx_view *view, phx_error *err);
/* [collective] all micro-batches are done. */
phx_status phx__gradient_check_sum(phx__gradient_check *c, phx_error *err);
/* Elements [first, first + numel) of a unit's trainable flat, as handed over in `call`; complete on the stream. */
phx_status phx__gradient_check_given(phx__gradient_check *c, const char *call, uint32_t unit, int64_t first,
                                     int64_t numel, const float *gradient, phx_stream *stream, phx_error *err);
#endif
