/* tests/support/meddle.h - a strategy between the harness and a real one, which does what a broken host, network or
 * memory would do. */
#ifndef MEDDLE_H
#define MEDDLE_H
#include <phalanx/strategy.h>
#include <stdbool.h>

typedef struct meddle {
  uint32_t lost_flags; /* cleared in every release */
  int32_t lost_stage;  /* ... of this stage; -1: of all */
  bool swap_forward;   /* stage 1's forward is acquired in the place of stage 0's */
  bool skip_backward;  /* stages of frozen units are not passed in backward */
  bool recompute_all;  /* a recomputation before every backward, also of stages whose backward reads no weights */
} meddle;

/* What strategies logged since meddle_plugin, one line each; cut where it gets long. */
const char *meddle_log(void);
/* [static] until the next call; the plugin is PHX_TEST_PLUGINS/phx_strategy_NAME.so. */
const phx_plugin *meddle_plugin(const char *strategy, const meddle *how);
#endif
