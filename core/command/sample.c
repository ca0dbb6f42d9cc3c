/* core/command/sample.c - see sample.h.
 *
 * The model runs on one rank in EVALUATE passes over the last `context` tokens; nothing is cached between tokens, so
 * that sampling uses the very path that training uses. */
#include "command/sample.h"

#include <errno.h>
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/complain.h"
#include "base/rng.h"
#include "base/status.h"
#include "base/sys.h"
#include "checkpoint/elements.h"
#include "checkpoint/model_config.h"
#include "checkpoint/weights.h"
#include "engine/engine.h"
#include "engine/prepare.h"
#include "engine/runtime_open.h"
#include "job/job.h"
#include "plugin/config_load.h"

enum { END_OF_TEXT = 256, BYTE_VOCABULARY = 257 };
enum { GPT2_END_OF_TEXT = 50256, GPT2_VOCABULARY = 50257 };

typedef struct candidate {
  float logit;
  int32_t token;
} candidate;

static int by_logit(const void *a, const void *b) {
  const candidate *x = a, *y = b;
  if (x->logit != y->logit) return x->logit < y->logit ? 1 : -1;
  return x->token - y->token;
}

/* Softmax of the top k at a temperature, inverted at a uniform number. */
static int32_t choose(candidate *c, int64_t n, const phx__sample_options *o, uint64_t index) {
  qsort(c, (size_t)n, sizeof *c, by_logit);
  if (o->temperature == 0) return c[0].token;
  const int64_t k = o->top_k > 0 && o->top_k < n ? o->top_k : n;
  double sum = 0, at = 0;
  for (int64_t i = 0; i < k; i++) sum += exp((c[i].logit - c[0].logit) / o->temperature);
  const double u = phx__rng_uniform((uint64_t)o->seed, phx__rng_stream("sample"), index) * sum;
  for (int64_t i = 0; i < k; i++)
    if ((at += exp((c[i].logit - c[0].logit) / o->temperature)) > u) return c[i].token;
  return c[k - 1].token;
}

static void show(int32_t token, bool bytes) {
  if (!bytes) printf("%" PRId32 " ", token);
  else if (token < END_OF_TEXT) putchar(token);
  else putchar('\n');
}

/* End of text stands before every text. */
static int32_t first_token(int64_t vocabulary) {
  if (vocabulary == BYTE_VOCABULARY) return END_OF_TEXT;
  return vocabulary == GPT2_VOCABULARY ? GPT2_END_OF_TEXT : 0;
}

static phx_status generate(phx__engine *e, const phx__sample_options *o, phx_error *err) {
  phx_status status = PHX_OK;
  const int64_t vocabulary = e->rt->prepared->facts.vocabulary, context = e->rt->prepared->shape.sequence;
  const bool bytes = vocabulary == BYTE_VOCABULARY;
  const int64_t prompt = (int64_t)strlen(o->prompt);
  int64_t n = 0;
  int32_t *tokens = phx__calloc((size_t)(prompt + o->tokens + 1), sizeof *tokens);
  const float *logits = NULL;
  candidate *candidates = phx__calloc((size_t)vocabulary, sizeof *candidates);
  if (!tokens || !candidates) {
    status = phx_fail(err, PHX_NOMEM, "no memory to sample");
    goto done;
  }
  if (!bytes && prompt) {
    status = phx_fail(err, PHX_UNSUPPORTED,
                      "--prompt: the model's vocabulary of %" PRId64 " is not the byte tokenizer's %d, and no other "
                      "tokenizer is known: without a prompt the numbers of tokens are printed",
                      vocabulary, BYTE_VOCABULARY);
    goto done;
  }
  tokens[n++] = first_token(vocabulary);
  for (int64_t i = 0; i < prompt; i++) tokens[n++] = (unsigned char)o->prompt[i];
  fputs(o->prompt, stdout);
  for (int64_t i = 0; i < o->tokens; i++) {
    const int64_t length = n < context ? n : context;
    PHX_TRY_GOTO(phx__engine_logits(e, tokens + n - length, length, &logits, err), status, done);
    for (int64_t t = 0; t < vocabulary; t++) candidates[t] = (candidate){logits[t], (int32_t)t};
    tokens[n] = choose(candidates, vocabulary, o, (uint64_t)i);
    show(tokens[n++], bytes);
    fflush(stdout);
  }
  if (putchar('\n') == EOF || fflush(stdout) || ferror(stdout))
    status = phx_fail_errno(err, PHX_IO, errno, "cannot write the text");
done:
  phx__free(candidates);
  phx__free(tokens);
  return status;
}

/* What the caller of the command can tell apart: refused (2), failed here (3), damaged weights (4). */
static int exit_of(phx_status status) {
  if (status == PHX_INVALID || status == PHX_UNSUPPORTED) return PHX__EXIT_REFUSED;
  return status == PHX_IO ? PHX__EXIT_DAMAGED : PHX__EXIT_RANK;
}

static int open_and_generate(const phx__config *config, phx__source *source, const phx__sample_options *o,
                             phx_error *err) {
  int exit_status = PHX__EXIT_REFUSED;
  const phx_job *job = NULL;
  phx__prepared *prepared = NULL;
  phx__runtime *rt = NULL;
  phx__engine *engine = NULL;
  phx_status status = phx__job_open(config->s.run.timeout, &job, err);
  if (!status) status = phx__prepare(config, 0, 1, 0, 1, 1, 0, &prepared, err);
  if (status) return exit_status;
  status = phx__runtime_open(config, job, prepared, &rt, err);
  if (!status) status = phx__engine_create(rt, &engine, err);
  exit_status = status ? PHX__EXIT_RANK : PHX__EXIT_OK;
  if (!status && (status = phx__source_explain(source, phx__weights_fill(rt, source, err), err)))
    exit_status = exit_of(status);
  if (!status && (status = generate(engine, o, err)))
    exit_status = status == PHX_UNSUPPORTED ? PHX__EXIT_REFUSED : PHX__EXIT_RANK;
  phx__engine_destroy(engine);
  phx__runtime_close(rt);
  return exit_status;
}

static phx_status load_config(const phx__source *source, phx__config **out, phx_error *err) {
  static const phx__override one_rank[] = {{"run.ranks=1", "sample"},
                                           {"run.strategy=ddp", "sample"},
                                           {"optimizer.name=sgd", "sample"}, /* nothing is trained: it has no states */
                                           {"precision.reduce=fp32", "sample"}, /* nothing is reduced, or announced */
                                           {"batch.total=0", "sample"}};
  char ini[PHX__TOOL_PATH] = "";
  if (source->run[0]) snprintf(ini, sizeof ini, "%.4000s/config.ini", source->run);
  return phx__model_config(source, ini, one_rank, sizeof one_rank / sizeof *one_rank, out, err);
}

int phx__sample(const phx__sample_options *o) {
  phx_error err = PHX_ERROR_INIT;
  phx__config *config = NULL;
  phx__source *source = NULL;
  setenv("PHALANX_LOG", "warn", 0); /* the text is what is wanted */
  phx_status status = phx__source_open(o->from, &source, &err);
  int exit_status = status ? exit_of(status) : PHX__EXIT_OK;
  if (!status) {
    source->finite = true;
    status = load_config(source, &config, &err);
    exit_status = status ? PHX__EXIT_REFUSED : open_and_generate(config, source, o, &err);
  }
  phx__config_free(config);
  phx__source_close(source);
  if (exit_status) phx__complain("%s", err.message);
  return exit_status;
}
