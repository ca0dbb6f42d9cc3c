/* core/command/sample.h - text from a run, a checkpoint or an exported folder (model_source.h).  [main] */
#ifndef PHX__SAMPLE_H
#define PHX__SAMPLE_H
#include <phalanx/base.h>

typedef struct phx__sample_options {
  const char *from;
  const char *prompt;
  int64_t tokens;      /* to generate */
  double temperature;  /* 0: the most likely token */
  int64_t top_k;       /* 0: all */
  int64_t seed;
} phx__sample_options;
/* Prints the prompt and what follows it to stdout: bytes for a byte vocabulary, else token numbers.  Exit status. */
int phx__sample(const phx__sample_options *options);
#endif
