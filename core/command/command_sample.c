/* core/command/command_sample.c - `phalanx sample RUN|CHECKPOINT|FOLDER`: text from a model.  [main] only. */
#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/complain.h"
#include "base/status.h"
#include "command/cli.h"
#include "command/commands.h"
#include "command/sample.h"

static const char *const known[] = {"--prompt", "--tokens", "--temperature", "--top-k", "--seed", NULL};

static int parse_whole(const char *flag, const char *text, int64_t low, int64_t high, int64_t *out) {
  char *end;
  errno = 0;
  const long long value = strtoll(text, &end, 10);
  if (errno || end == text || *end || value < low || value > high) {
    phx__complain("%s = %s: must be a whole number from %lld to %lld", flag, text, (long long)low,
            (long long)high);
    return 0;
  }
  *out = value;
  return 1;
}

static int parse_temperature(const char *text, double *out) {
  char *end;
  errno = 0;
  const double value = strtod(text, &end);
  if (errno || end == text || *end || !(value >= 0 && value <= 100)) {
    phx__complain("--temperature = %s: must be a number from 0 to 100", text);
    return 0;
  }
  *out = value;
  return 1;
}

int phx__command_sample(int argc, char **argv) {
  phx__sample_options o = {.prompt = "", .tokens = 256, .temperature = 0.8, .top_k = 40, .seed = 1337};
  for (int i = 1; i < argc; i++) {
    if (argv[i][0] != '-') {
      if (o.from) {
        phx__complain("two models: '%s' and '%s'", o.from, argv[i]);
        return PHX__EXIT_REFUSED;
      }
      o.from = argv[i];
      continue;
    }
    int flag = 0;
    while (known[flag] && strcmp(known[flag], argv[i])) flag++;
    if (!known[flag]) return phx__cli_unknown("flag", argv[i], known);
    const char *value = argv[++i];
    if (!value) {
      phx__complain("%s needs a value", known[flag]);
      return PHX__EXIT_REFUSED;
    }
    if (flag != 0 && !strncmp(value, "--", 2)) { /* a prompt may be any text */
      phx__complain("%s needs a value, and %s is another flag", known[flag], value);
      return PHX__EXIT_REFUSED;
    }
    int ok = 1;
    switch (flag) {
      case 0: o.prompt = value; break;
      case 1: ok = parse_whole(known[flag], value, 1, 1 << 20, &o.tokens); break;
      case 2: ok = parse_temperature(value, &o.temperature); break;
      case 3: ok = parse_whole(known[flag], value, 0, 1 << 20, &o.top_k); break;
      case 4: ok = parse_whole(known[flag], value, 0, INT64_MAX, &o.seed); break;
    }
    if (!ok) return PHX__EXIT_REFUSED;
  }
  if (!o.from) {
    phx__complain("sample needs a run (its run.out), a checkpoint, or an exported folder");
    return PHX__EXIT_REFUSED;
  }
  return phx__sample(&o);
}
