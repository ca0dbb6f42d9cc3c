/* tests/support/checkpoint_fixture.h - a small checkpoint of a GPT-2 on disk, with values from a formula, written with
 * the core's format modules but not with its saving: slices are spread over ranks in an odd way. */
#ifndef CHECKPOINT_FIXTURE_H
#define CHECKPOINT_FIXTURE_H
#include "checkpoint/manifest.h"

typedef struct checkpoint_fixture {
  int layers, width, vocab, context, heads;
  int ranks;       /* files */
  int64_t step;
  int64_t pieces;  /* blocks of a slice at most; 0: a slice per rank and flat */
  bool masters;    /* weights stand as masters */
  bool privates;   /* each rank has a private slice */
} checkpoint_fixture;

/* The default: two layers of width 12 on two ranks, step 3. */
checkpoint_fixture checkpoint_fixture_small(void);
/* Weight, m (state 0) or v (state 1) of an element; of state -1: the weight. */
float checkpoint_fixture_value(const checkpoint_fixture *f, int state, uint32_t param, int64_t element);
/* DIR is made; ends the test program with a message when something fails. */
void checkpoint_fixture_write(const checkpoint_fixture *f, const char *dir);
/* RUN/checkpoints/step-%08d and `latest`. */
void checkpoint_fixture_run(const checkpoint_fixture *f, const char *run);
/* Names and shapes, in order; freed with phx__layout_free. */
phx_model *checkpoint_fixture_model(const checkpoint_fixture *f);
#endif
