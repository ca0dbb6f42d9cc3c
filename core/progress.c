/* core/progress.c - see progress.h.  Losses are written with 17 digits: enough to tell any two doubles apart. */
#include "progress.h"

#include <errno.h>
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "status.h"
#include "sys.h"

double phx__now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

void phx__bytes_text(int64_t bytes, char text[24]) {
  static const char *const units[] = {"B", "KiB", "MiB", "GiB", "TiB"};
  double value = (double)bytes;
  int u = 0;
  while (value >= 1024 && u < 4) value /= 1024, u++;
  snprintf(text, 24, u ? "%.1f %s" : "%.0f %s", value, units[u]);
}

void phx__progress_add(phx__progress *p, const char *members) {
  const size_t used = strlen(p->extra), more = strlen(members);
  if (more < sizeof p->extra - used) memcpy(p->extra + used, members, more + 1);
}

/* What waits for a step that does not come. */
static void write_rest(phx__progress *p) {
  if (!p->metrics || !p->extra[0]) return;
  fprintf(p->metrics, "{\"step\":%" PRId64 "%s}\n", p->last, p->extra);
  p->extra[0] = 0;
  p->holds_save = false;
  if (fflush(p->metrics) || ferror(p->metrics))
    phx__log(0, "core", PHX_LOG_WARN, "metrics.jsonl: what the last saves cost was not written");
}

void phx__progress_save(phx__progress *p, const char *members) {
  if (p->holds_save) write_rest(p);
  phx__progress_add(p, members);
  p->holds_save = true;
}

static void keep_metric(void *arg, const char *plugin, const char *name, double value) {
  char number[32] = "null", member[400]; /* JSON has no NaN and no infinity */
  if (isfinite(value)) snprintf(number, sizeof number, "%.17g", value);
  const int n = snprintf(member, sizeof member, ",\"%s.%s\":%s", plugin, name, number);
  if (n > 0 && (size_t)n < sizeof member) phx__progress_add(arg, member);
}

/* Keeps the whole lines of steps up to `last`; written beside and renamed.  No file is fine. */
static phx_status cut_metrics(const char *path, int64_t last, phx_error *err) {
  char part[4300], *line = NULL;
  size_t room = 0;
  int64_t step = 0;
  phx_status status = PHX_OK;
  FILE *in = fopen(path, "re");
  if (!in) return errno == ENOENT ? PHX_OK : phx__fail_errno(err, PHX_IO, errno, "cannot read %s", path);
  snprintf(part, sizeof part, "%s.part", path);
  FILE *out = fopen(part, "we");
  for (ssize_t n; out && (n = getline(&line, &room, in)) > 0;)
    if (line[n - 1] == '\n' && sscanf(line, "{\"step\":%" SCNd64, &step) == 1 && step <= last) fputs(line, out);
  if (!out || ferror(in) || fflush(out) || fsync(fileno(out)) || phx__sys.rename(part, path))
    status = phx__fail_errno(err, PHX_IO, errno, "cannot write %s", path);
  if (out) fclose(out);
  fclose(in);
  free(line);
  return status;
}

phx_status phx__progress_open(phx__progress *p, phx__runtime *rt, int64_t first, phx_error *err) {
  char path[4200];
  *p = (phx__progress){.rt = rt, .first = first, .last = first, .started = phx__now()};
  p->tokens_per_step = rt->prepared->shape.micro * rt->prepared->shape.sequence * rt->prepared->topology.accumulate *
                       rt->prepared->layout.data_size;
  if (rt->job->rank != 0) return PHX_OK;
  rt->strategy_host.metric = keep_metric;
  rt->strategy_host.metric_arg = p;
  p->terminal = isatty(STDOUT_FILENO);
  snprintf(path, sizeof path, "%s/metrics.jsonl", rt->config->s.run.out);
  phx_status status = first > 0 ? cut_metrics(path, first, err) : PHX_OK;
  if (status) return status;
  p->metrics = fopen(path, first > 0 ? "ae" : "we");
  return p->metrics ? PHX_OK : phx__fail_errno(err, PHX_IO, errno, "cannot write %s", path);
}

static void say(phx__progress *p, int64_t step, const phx__step_result *r, double seconds, double valid_loss) {
  const int64_t steps = p->rt->config->s.run.steps;
  char memory[24], valid[40] = "";
  phx__bytes_text(p->rt->book.now_all, memory);
  if (isfinite(valid_loss)) snprintf(valid, sizeof valid, " | held-out %.4f", valid_loss);
  else if (!isnan(valid_loss)) snprintf(valid, sizeof valid, " | held-out not finite");
  if (r->skipped) snprintf(valid, sizeof valid, " | not finite: skipped");
  const double rate = (double)p->tokens_per_step / seconds;
  if (!p->terminal) {
    printf("step %*" PRId64 "/%" PRId64 " | loss %.6f | norm %.4f | lr %.2e | %.1f ms | %.0f tok/s | %s%s\n", 4, step,
           steps, r->loss, r->grad_norm, r->lr, 1e3 * seconds, rate, memory, valid);
    return;
  }
  enum { WIDTH = 24 };
  char bar[WIDTH + 1];
  const int64_t full = step * WIDTH / steps;
  const double left = fmin((phx__now() - p->started) / (double)(step - p->first) * (double)(steps - step), 1e8);
  for (int64_t i = 0; i < WIDTH; i++) bar[i] = i < full ? '#' : '.';
  bar[WIDTH] = 0;
  p->open_line = !valid[0] && step != steps;
  printf("\r\033[K[%s] %" PRId64 "/%" PRId64 " loss %.4f norm %.3f %.0f tok/s %s ETA %d:%02d%s%s", bar, step, steps,
         r->loss, r->grad_norm, rate, memory, (int)left / 60, (int)left % 60, valid,
         p->open_line ? "" : "\n");
}

/* JSON has no infinity. */
static void put_real(FILE *f, const char *name, double value) {
  if (isfinite(value)) fprintf(f, ",\"%s\":%.17g", name, value);
  else fprintf(f, ",\"%s\":null", name);
}

phx_status phx__progress_step(phx__progress *p, int64_t step, const phx__step_result *r, double seconds,
                              int64_t bytes_sent, double valid_loss, const char *hash, phx_error *err) {
  const phx__settings *s = &p->rt->config->s;
  if (!p->metrics) return PHX_OK;
  FILE *f = p->metrics;
  fprintf(f, "{\"step\":%" PRId64, step);
  put_real(f, "loss", r->loss);
  put_real(f, "grad_norm", r->grad_norm);
  fprintf(f, ",\"lr\":%.17g,\"tokens_per_s\":%.6g,\"step_ms\":%.6g,\"bytes\":{", r->lr,
          (double)p->tokens_per_step / seconds, 1e3 * seconds);
  for (int32_t k = 0; k < PHX_MEM_KINDS; k++)
    fprintf(f, "%s\"%s\":%" PRId64, k ? "," : "", phx__memory_name(k), p->rt->book.now[k]);
  fprintf(f, "},\"bytes_sent\":%" PRId64, bytes_sent);
  if (!isnan(valid_loss)) put_real(f, "valid_loss", valid_loss);
  if (r->skipped) fprintf(f, ",\"skipped\":true");
  if (hash) fprintf(f, ",\"state_hash\":\"%s\"", hash);
  fprintf(f, "%s}\n", p->extra);
  p->extra[0] = 0;
  p->holds_save = false;
  p->last = step;
  if (fflush(f) || ferror(f)) return phx__fail_errno(err, PHX_IO, errno, "cannot write %s/metrics.jsonl", s->run.out);
  if (step == p->first + 1 || step % s->run.log_every == 0 || step == s->run.steps || !isnan(valid_loss) ||
      r->skipped) {
    say(p, step, r, seconds, valid_loss);
    fflush(stdout);
  }
  return PHX_OK;
}

void phx__progress_close(phx__progress *p) {
  if (p->open_line) {
    putchar('\n');
    fflush(stdout);
  }
  p->open_line = false;
  write_rest(p);
  if (p->metrics) fclose(p->metrics);
  p->metrics = NULL;
}
