/* core/command/run_data.c - see run_data.h.
 *
 * Invariant: ranks meet at least every READ_S seconds while one of them reads, so that no time limit is met by a large
 * data set.  Threads: [main]. */
#include "command/run_data.h"

#include <inttypes.h>
#include <math.h>
#include <string.h>
#include <xxhash.h>

#include "base/bytes_text.h"
#include "base/clock.h"
#include "base/job_calls.h"
#include "base/status.h"
#include "plugin/host.h"

#define READ_S 0.5
#define LONG_S 1.0
#define AGAIN_S 60.0 /* between two lines about the same reading, at most */

phx_status phx__run_data_attach(const phx__config *c, const phx__prepared *p, phx__run_data *out, phx_error *err) {
  const uint64_t seed = (uint64_t)c->s.run.seed;
  *out = (phx__run_data){NULL, NULL};
  phx_status status =
      phx__data_attach(c->s.data.train, p->shape.sequence, p->facts.vocabulary, seed, &out->train, err);
  if (!status)
    status = phx__data_check_batch(out->train, p->shape.micro, p->topology.accumulate, p->layout.data_size, err);
  if (!status && c->s.data.valid[0])
    status = phx__data_attach(c->s.data.valid, p->shape.sequence, p->facts.vocabulary, seed, &out->valid, err);
  if (status) phx__run_data_close(out);
  return status;
}

void phx__run_data_close(phx__run_data *data) {
  phx__data_close(data->valid);
  phx__data_close(data->train);
  *data = (phx__run_data){NULL, NULL};
}

static int64_t unread(const phx__run_data *data) {
  return phx__data_unread(data->train) + (data->valid ? phx__data_unread(data->valid) : 0);
}

static phx_status read_some(phx__run_data *data, double seconds, phx_error *err) {
  phx_status status = phx__data_read(data->train, seconds, err);
  if (status || !data->valid || phx__data_unread(data->train) > 0) return status;
  return phx__data_read(data->valid, seconds, err);
}

/* What takes long is said after a second, and again after two, four, ..., at least once a minute: it goes on. */
typedef struct reading {
  double start, next; /* seconds, monotonic */
} reading;

static reading reading_begins(void) {
  const double now = phx__now();
  return (reading){.start = now, .next = now + LONG_S};
}

static void say_long(reading *r, int64_t left) {
  char text[120], size[24];
  const double now = phx__now();
  if (left == 0 || now < r->next) return;
  while (r->next <= now) r->next += fmin(r->next - r->start, AGAIN_S);
  phx__bytes_text(left, size);
  snprintf(text, sizeof text, "reads the token files once, to check and hash them: %s are left", size);
  phx__log(0, "data", PHX_LOG_INFO, text);
}

phx_status phx__run_data_read(phx__run_data *data, phx_error *err) {
  reading r = reading_begins();
  phx_status status = PHX_OK;
  do {
    status = read_some(data, READ_S, err);
    if (!status) say_long(&r, unread(data));
  } while (!status && unread(data) > 0);
  return status;
}

typedef struct identity { /* travels between ranks */
  uint64_t low, high; /* of all files' contents; 0 where this rank did not read them */
  uint64_t shape;     /* of the numbers of tokens */
} identity;

static identity identity_of(const phx__run_data *data, bool reader) {
  identity id = {0, 0, 0};
  const phx__data *both[] = {data->train, data->valid};
  for (int k = 0; k < 2 && both[k]; k++)
    for (int64_t i = 0; i < phx__data_files(both[k]); i++) {
      const phx__data_file f = phx__data_file_at(both[k], i);
      const int64_t place[3] = {k, f.windows, f.scan->bytes};
      const uint64_t contents[3] = {id.low, f.scan->low, f.scan->high};
      id.shape = XXH3_64bits_withSeed(place, sizeof place, id.shape);
      if (!reader) continue;
      id.low = XXH3_64bits_withSeed(contents, sizeof contents, id.high);
      id.high = XXH3_64bits_withSeed(contents, sizeof contents, ~id.low);
    }
  return id;
}

/* Do the machines hold the same files? */
static phx_status compare(const phx__run_data *data, const phx_job *job, bool reader, phx_error *err) {
  identity mine = identity_of(data, reader), all[PHX_RANKS_MAX];
  const phx_status status = job->exchange(job->ctx, "the data", &mine, sizeof mine, all, err);
  for (int32_t r = 1; r < job->size && !status; r++) {
    const bool read = all[r].low || all[r].high;
    if (all[r].shape != all[0].shape || (read && (all[r].low != all[0].low || all[r].high != all[0].high)))
      return phx_fail(err, PHX_INVALID,
                      "the token files that rank %d finds under [data] train or valid are not those of rank 0: copy "
                      "the same files to every machine", r);
  }
  return status;
}

phx_status phx__run_data_meet(phx__run_data *data, const phx_job *job, phx_error *err) {
  const bool reader = job->local_rank == 0;
  reading r = reading_begins();
  int64_t left = 0;
  do {
    if (reader) PHX_TRY(read_some(data, READ_S, err));
    PHX_TRY(phx__job_max(job, reader ? unread(data) : 0, &left, err));
    if (job->rank == 0) say_long(&r, left);
  } while (left > 0);
  return job->size > 1 ? compare(data, job, reader, err) : PHX_OK;
}

static bool same_contents(const phx__data_file *a, const phx__data_file *b) {
  return a->read && b->read && a->scan->bytes == b->scan->bytes && a->scan->low == b->scan->low &&
         a->scan->high == b->scan->high;
}

void phx__run_data_say_same(const phx__run_data *data) {
  char text[1000];
  for (int64_t v = 0; data->valid && v < phx__data_files(data->valid); v++)
    for (int64_t t = 0; t < phx__data_files(data->train); t++) {
      const phx__data_file held = phx__data_file_at(data->valid, v), seen = phx__data_file_at(data->train, t);
      if (!same_contents(&held, &seen)) continue;
      snprintf(text, sizeof text,
               "[data] valid, %.300s, has the contents of [data] train, %.300s: the held-out loss is of what the model "
               "is trained on; hold a part of the text out with phalanx data tokenize --valid", held.path, seen.path);
      phx__log(0, "data", PHX_LOG_WARN, text);
      return; /* once is enough */
    }
}

/* 1234567 as "1,234,567". */
static const char *grouped(int64_t value, char text[32]) {
  char plain[24];
  const int n = snprintf(plain, sizeof plain, "%" PRId64, value);
  int at = 0;
  for (int i = 0; i < n; i++) {
    if (i > 0 && (n - i) % 3 == 0) text[at++] = ',';
    text[at++] = plain[i];
  }
  text[at] = 0;
  return text;
}

static int64_t parameters(const phx_model *model) {
  int64_t n = 0;
  for (uint32_t i = 0; i < model->n_params; i++) n += phx_model_param(model, i)->numel;
  return n;
}

static const char *format_of(const phx__data *data) {
  bool headers = false, raw = false;
  for (int64_t i = 0; i < phx__data_files(data); i++) {
    const bool header = phx__data_file_at(data, i).scan->header > 0;
    headers = headers || header;
    raw = raw || !header;
  }
  if (headers && raw) return "llm.c's and raw uint16";
  return raw ? "raw uint16" : "llm.c's uint16";
}

void phx__run_data_line(const phx__config *config, const phx__prepared *p, const phx__run_data *data, char *text,
                        size_t bytes) {
  char tokens[32], windows[32], params[32], held[96] = "";
  const int64_t step = p->shape.micro * p->topology.accumulate * p->layout.data_size;
  const int64_t n = phx__data_files(data->train);
  const double epochs = (double)config->s.run.steps * (double)step / (double)phx__data_windows(data->train);
  if (data->valid) {
    const int64_t all = phx__data_windows(data->valid), asked = config->s.run.valid_windows;
    grouped(asked > 0 && asked < all ? asked : all, windows);
    snprintf(held, sizeof held, ", %s held out", windows);
  }
  snprintf(text, bytes,
           "%s tokens (%s, %" PRId64 " file%s) make %s sequences of %" PRId64 "%s; %" PRId64 " steps of %" PRId64
           " are %.3g epochs; %s parameters",
           grouped(phx__data_tokens(data->train), tokens), format_of(data->train), n, n == 1 ? "" : "s",
           grouped(phx__data_windows(data->train), windows), phx__data_sequence(data->train), held, config->s.run.steps,
           step, epochs, grouped(parameters(p->model), params));
}
