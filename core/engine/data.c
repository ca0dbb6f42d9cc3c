/* core/engine/data.c - see data.h.
 *
 * Attaching looks at headers and sizes; reading goes through every token once, for its largest one and a hash of the
 * file, in as many calls as the caller likes.  What another process of this machine has read is found in data_scan.c.
 *
 * Files are read with pread, not mapped: a file that shrinks while a run uses it gives an error with its name instead
 * of SIGBUS.  One step reads a few kilobytes per rank, which the page cache serves.  Of many files the last OPEN_MOST
 * are open; the others are opened again when they are read.  Before each read the file must still be the one that was
 * attached: device, inode, size and time of change.  Every token is checked again on the way to the embedding, since a
 * file may be changed between two ticks of its file system's clock.
 *
 * The order of an epoch is a permutation computed, not stored: a Feistel network over the next even power of two, keyed
 * by (seed, epoch), walked until it lands inside (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002).
 * Invariant: what a step reads is a pure function of (files, seed, sequence, step, global batch).  [main] only. */
#include "engine/data.h"

#include <errno.h>
#include <fcntl.h>
#include <glob.h>
#include <inttypes.h>
#include <stdbool.h>
#include <string.h>
#include <time.h>
#include <xxhash.h>
#include "base/regular_file.h"
#include "base/rng.h"
#include "base/status.h"
#include "base/sys.h"
#include "engine/data_kind.h"

enum { SCAN_TOKENS = 1 << 17, FEISTEL_ROUNDS = 6, OPEN_MOST = 32 };

typedef struct token_file {
  char *path;
  int fd;               /* -1: not open now */
  int64_t header;       /* bytes before the first token: 0 or PHX__TOKENS_HEADER */
  int64_t tokens;
  int64_t first_window; /* windows of the files before */
  int64_t windows;
  phx__data_scan scan;
  bool read; /* the whole file, by whomever: the scan is complete */
} token_file;

typedef struct open_files { /* the first that was opened is the first to be closed */
  token_file *of[OPEN_MOST];
  size_t next;
} open_files;

struct phx__data {
  token_file *files;
  open_files *open;
  int64_t n_files, sequence, vocabulary, tokens, windows;
  uint64_t seed;
  uint16_t *row; /* (sequence + 1) */
  /* reading: the file in progress, and the bytes of it that were read */
  int64_t reading, done;
  XXH3_state_t *hash;
  uint16_t *buffer; /* (SCAN_TOKENS) */
};

/* ---- opening ---- */

/* Opens, and closes the file that has been open longest. */
static phx_status open_file(open_files *open, token_file *f, struct stat *st, phx_error *err) {
  PHX_TRY(phx__regular_open(f->path, "the token file",
                            "tokens are read again and again, at many places: put them into a file", &f->fd, st, err));
  token_file **place = &open->of[open->next++ % OPEN_MOST];
  if (*place) {
    phx__sys.close((*place)->fd);
    (*place)->fd = -1;
  }
  *place = f;
  return PHX_OK;
}

static phx_status check_same(const token_file *f, const struct stat *st, phx_error *err) {
  const phx__data_scan now = phx__data_scan_of(st, f->header), *was = &f->scan;
  const char *what = "it was written to";
  if (now.device == was->device && now.inode == was->inode && now.bytes == was->bytes &&
      now.modified_s == was->modified_s && now.modified_ns == was->modified_ns)
    return PHX_OK;
  if (now.device != was->device || now.inode != was->inode) what = "another file took its place";
  return phx_fail(err, PHX_IO,
                  "%s is not as it was when the run opened it: %s (%" PRId64 " bytes now, %" PRId64
                  " then); restore the file and start again", f->path, what, now.bytes, was->bytes);
}

/* Before its tokens are read: open, and the same file as ever. */
static phx_status make_ready(const phx__data *data, token_file *f, phx_error *err) {
  struct stat st;
  phx_status status = PHX_OK;
  if (f->fd < 0) status = open_file(data->open, f, &st, err);
  else if (phx__sys.fstat(f->fd, &st)) status = phx_fail_errno(err, PHX_IO, errno, "cannot stat %s", f->path);
  return status ? status : check_same(f, &st, err);
}

static phx_status read_at(const token_file *f, void *out, int64_t bytes, int64_t at, phx_error *err) {
  for (int64_t done = 0; done < bytes;) {
    const ssize_t n = phx__sys.pread(f->fd, (char *)out + done, (size_t)(bytes - done), (off_t)(at + done));
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return phx_fail_errno(err, PHX_IO, errno, "%s: cannot read at byte %" PRId64, f->path, at + done);
    if (n == 0)
      return phx_fail(err, PHX_IO,
                      "%s ends at byte %" PRId64 ", but had %" PRId64
                      " when the run opened it: it was changed; restore "
                      "the file and start again",
                      f->path, at + done, f->header + 2 * f->tokens);
    done += n;
  }
  return PHX_OK;
}

/* Other formats that people have beside these, by their first word. */
static const char *foreign_format(int32_t magic) {
  if (magic == 20240801) return "llm.c's Llama 3 tokens (uint32)";
  if (magic == 20240522) return "llm.c's multiple choice evaluation";
  if (magic == 20240326) return "llm.c's model checkpoint";
  if ((uint32_t)magic == __builtin_bswap32(PHX__TOKENS_MAGIC)) return "llm.c tokens in the other byte order";
  return NULL;
}

/* Raw tokens have no header: is it something else that people have at hand?  look: (PHX__DATA_HEAD) of scratch. */
static phx_status check_kind(const token_file *f, int64_t bytes, unsigned char *look, phx_error *err) {
  const int64_t n = bytes < PHX__DATA_HEAD ? bytes : PHX__DATA_HEAD;
  PHX_TRY(read_at(f, look, n, 0, err));
  const phx__data_kind kind = phx__data_kind_of(look, (size_t)n, bytes);
  if (!kind.what) return PHX_OK;
  return phx_fail(err, PHX_INVALID, "%s is no token file: it is %s; %s", f->path, kind.what, kind.advice);
}

/* Which format, and does the size agree with it? */
static phx_status read_header(token_file *f, int64_t bytes, unsigned char *look, phx_error *err) {
  int32_t head[4] = {0};
  f->header = 0;
  f->tokens = bytes / 2;
  if (bytes >= (int64_t)sizeof head) PHX_TRY(read_at(f, head, sizeof head, 0, err));
  if (head[0] == PHX__TOKENS_MAGIC) {
    if (head[1] != PHX__TOKENS_VERSION)
      return phx_fail(err, PHX_INVALID,
                      "%s: llm.c token file of version %" PRId32 "; only version 1 (uint16) is known", f->path,
                      head[1]);
    const int64_t expected = PHX__TOKENS_HEADER + 2 * (int64_t)head[2];
    if (head[2] < 0 || bytes != expected)
      return phx_fail(err, PHX_INVALID,
                      "%s: its header announces %" PRId32 " tokens, so 1024 + 2 x %" PRId32 " = %" PRId64
                      " bytes, but it has %" PRId64 ": %s; make it again",
                      f->path, head[2], head[2], expected, bytes,
                      bytes < expected ? "it is truncated" : "it is too long");
    f->header = PHX__TOKENS_HEADER;
    f->tokens = head[2];
    return PHX_OK;
  }
  const char *foreign = foreign_format(head[0]);
  if (foreign)
    return phx_fail(err, PHX_INVALID, "%s: this is %s, not a uint16 token file; tokenize the text again", f->path,
                    foreign);
  PHX_TRY(check_kind(f, bytes, look, err));
  if (bytes >= PHX__TOKENS_HEADER && head[1] == PHX__TOKENS_VERSION && head[2] > 0 &&
      bytes == PHX__TOKENS_HEADER + 2 * (int64_t)head[2])
    return phx_fail(err, PHX_INVALID, "%s: wrong magic %" PRId32 " in what looks like llm.c's header, expected %d",
                    f->path, head[0], PHX__TOKENS_MAGIC);
  if (bytes % 2)
    return phx_fail(err, PHX_INVALID,
                    "%s: no llm.c header, and %" PRId64 " bytes are not a whole number of uint16 tokens", f->path,
                    bytes);
  return PHX_OK;
}

static phx_status not_below(const token_file *f, int64_t token, int64_t at, int64_t vocabulary, phx_error *err) {
  return phx_fail(err, PHX_INVALID,
                  "%s: token %" PRId64 " at position %" PRId64 " (byte %" PRId64 ") is not below the vocabulary of %"
                  PRId64 "%s",
                  f->path, token, at, f->header + 2 * at, vocabulary,
                  f->header ? ": set [model] vocab to the tokenizer's" :
                              ": not a raw uint16 token file, or [model] vocab is not the tokenizer's");
}

static phx_status file_attach(token_file *f, const char *path, const phx__data *data, unsigned char *look,
                              phx_error *err) {
  struct stat st;
  f->path = phx__strdup(path);
  if (!f->path) return phx_fail(err, PHX_NOMEM, "%s: no memory to open it", path);
  PHX_TRY(open_file(data->open, f, &st, err));
  if (st.st_size == 0) return phx_fail(err, PHX_INVALID, "%s is empty", path);
  PHX_TRY(read_header(f, st.st_size, look, err));
  if (f->tokens < data->sequence + 1)
    return phx_fail(err, PHX_INVALID,
                    "%s has %" PRId64 " tokens, one sample of sequence = %" PRId64 " needs %" PRId64
                    " (the last is a target): lower [batch] sequence or take more text",
                    path, f->tokens, data->sequence, data->sequence + 1);
  f->windows = (f->tokens - 1) / data->sequence;
  f->scan = phx__data_scan_of(&st, f->header);
  f->scan.most = -1;
  f->read = phx__data_scan_find(&f->scan);
  if (!f->read || f->scan.most < data->vocabulary) return PHX_OK;
  return not_below(f, f->scan.most, f->scan.most_at, data->vocabulary, err);
}

/* Is there a file of that very name?  Then it is not a glob, whatever it contains. */
static bool is_file(const char *path) {
  struct stat st;
  const int fd = phx__sys.open(path, O_RDONLY | O_NONBLOCK | O_NOCTTY, 0);
  const bool yes = fd >= 0 && !phx__sys.fstat(fd, &st) && !S_ISDIR(st.st_mode);
  if (fd >= 0) phx__sys.close(fd);
  return yes;
}

static phx_status find_files(const char *pattern, glob_t *found, phx_error *err) {
  const int rc = glob(pattern, 0, NULL, found); /* sorted by name */
  if (rc == GLOB_NOSPACE) return phx_fail(err, PHX_NOMEM, "[data] no memory to list %s", pattern);
  if (rc || !found->gl_pathc)
    return phx_fail(err, PHX_IO, "[data] there is no file %s; make one with: phalanx data tokenize TEXT... -o OUT.bin",
                    pattern);
  return PHX_OK;
}

phx_status phx__data_attach(const char *pattern, int64_t sequence, int64_t vocabulary, uint64_t seed, phx__data **out,
                            phx_error *err) {
  phx_status status = PHX_OK;
  glob_t found = {0};
  const bool one = is_file(pattern);
  unsigned char *look = NULL;
  phx__data *data = NULL;
  if (sequence < 1 || sequence > INT32_MAX || vocabulary < 1)
    return phx_fail(err, PHX_INVALID, "sequence = %" PRId64 " and vocabulary = %" PRId64 " must be positive", sequence,
                    vocabulary);
  if (!one) PHX_TRY_GOTO(find_files(pattern, &found, err), status, done);
  const size_t n = one ? 1 : found.gl_pathc;
  status = PHX_NOMEM;
  data = phx__calloc(1, sizeof *data);
  look = phx__calloc(PHX__DATA_HEAD, 1);
  if (data) data->files = phx__calloc(n, sizeof *data->files);
  if (data) data->open = phx__calloc(1, sizeof *data->open);
  if (data) data->row = phx__calloc((size_t)sequence + 1, sizeof *data->row);
  if (!data || !look || !data->files || !data->open || !data->row) {
    phx_fail(err, status, "no memory to open %s", pattern);
    goto done;
  }
  data->sequence = sequence;
  data->vocabulary = vocabulary;
  data->seed = seed;
  for (size_t i = 0; i < n; i++) {
    token_file *f = &data->files[i];
    f->fd = -1;
    data->n_files++;
    PHX_TRY_GOTO(file_attach(f, one ? pattern : found.gl_pathv[i], data, look, err), status, done);
    f->first_window = data->windows;
    data->windows += f->windows;
    data->tokens += f->tokens;
  }
  status = PHX_OK;
  *out = data;
  data = NULL;
done:
  phx__data_close(data);
  phx__free(look);
  globfree(&found);
  return status;
}

/* ---- reading everything once ---- */
static phx_status begin_file(phx__data *data, token_file *f, phx_error *err) {
  if (!data->hash) data->hash = XXH3_createState();
  if (!data->buffer) data->buffer = phx__calloc(SCAN_TOKENS, sizeof *data->buffer);
  if (!data->hash || !data->buffer) return phx_fail(err, PHX_NOMEM, "no memory to read %s", f->path);
  XXH3_128bits_reset(data->hash);
  if (f->header) {
    PHX_TRY(make_ready(data, f, err));
    PHX_TRY(read_at(f, data->buffer, f->header, 0, err));
    XXH3_128bits_update(data->hash, data->buffer, (size_t)f->header);
  }
  data->done = f->header;
  return PHX_OK;
}

/* A buffer full of tokens more. */
static phx_status read_more(phx__data *data, token_file *f, phx_error *err) {
  const int64_t at = (data->done - f->header) / 2;
  const int64_t n = f->tokens - at < SCAN_TOKENS ? f->tokens - at : SCAN_TOKENS;
  PHX_TRY(make_ready(data, f, err));
  PHX_TRY(read_at(f, data->buffer, 2 * n, data->done, err));
  uint16_t most = 0;
  for (int64_t i = 0; i < n; i++) most = data->buffer[i] > most ? data->buffer[i] : most;
  if (most > f->scan.most) {
    const bool beyond = most >= data->vocabulary; /* the first such token is told, not the largest */
    int64_t i = 0;
    while (beyond ? data->buffer[i] < data->vocabulary : data->buffer[i] < most) i++;
    if (beyond) return not_below(f, data->buffer[i], at + i, data->vocabulary, err);
    f->scan.most = most;
    f->scan.most_at = at + i;
  }
  XXH3_128bits_update(data->hash, data->buffer, (size_t)(2 * n));
  data->done += 2 * n;
  return PHX_OK;
}

static void end_file(phx__data *data, token_file *f) {
  const XXH128_hash_t h = XXH3_128bits_digest(data->hash);
  f->scan.low = h.low64;
  f->scan.high = h.high64;
  f->read = true;
  phx__data_scan_keep(&f->scan);
  data->done = 0;
}

static double seconds_now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

phx_status phx__data_read(phx__data *data, double seconds, phx_error *err) {
  const double start = seconds_now();
  while (data->reading < data->n_files) {
    token_file *f = &data->files[data->reading];
    phx_status status = PHX_OK;
    if (!f->read && data->done == 0) status = begin_file(data, f, err);
    const int64_t end = f->header + 2 * f->tokens;
    while (status == PHX_OK && !f->read && data->done < end) {
      if (seconds > 0 && seconds_now() - start > seconds) return PHX_OK;
      status = read_more(data, f, err);
    }
    if (status != PHX_OK) return status;
    if (!f->read) end_file(data, f);
    data->reading++;
  }
  phx__free(data->buffer);
  data->buffer = NULL;
  return PHX_OK;
}

int64_t phx__data_unread(const phx__data *data) {
  int64_t bytes = 0;
  for (int64_t i = data->reading; i < data->n_files; i++)
    if (!data->files[i].read) bytes += data->files[i].scan.bytes;
  return bytes - data->done;
}

phx_status phx__data_open(const char *pattern, int64_t sequence, int64_t vocabulary, uint64_t seed, phx__data **out,
                          phx_error *err) {
  phx__data *data = NULL;
  phx_status status = phx__data_attach(pattern, sequence, vocabulary, seed, &data, err);
  if (status == PHX_OK) status = phx__data_read(data, 0, err);
  if (status == PHX_OK) *out = data;
  else phx__data_close(data);
  return status;
}

void phx__data_close(phx__data *data) {
  if (!data) return;
  for (int64_t i = data->n_files; i-- > 0;) {
    if (data->files[i].fd >= 0) phx__sys.close(data->files[i].fd);
    phx__free(data->files[i].path);
  }
  XXH3_freeState(data->hash);
  phx__free(data->buffer);
  phx__free(data->row);
  phx__free(data->open);
  phx__free(data->files);
  phx__free(data);
}

int64_t phx__data_files(const phx__data *data) { return data->n_files; }
int64_t phx__data_tokens(const phx__data *data) { return data->tokens; }
int64_t phx__data_windows(const phx__data *data) { return data->windows; }
int64_t phx__data_sequence(const phx__data *data) { return data->sequence; }

phx__data_file phx__data_file_at(const phx__data *data, int64_t i) {
  const token_file *f = &data->files[i];
  return (phx__data_file){.path = f->path, .windows = f->windows, .read = f->read, .scan = &f->scan};
}

/* ---- the order ---- */

int64_t phx__data_order(const phx__data *data, int64_t epoch, int64_t i) {
  unsigned half = 1; /* bits of each half; the network permutes [0, 4^half) */
  while (half < 31 && (INT64_C(1) << 2 * half) < data->windows) half++;
  const uint64_t mask = (UINT64_C(1) << half) - 1;
  const uint64_t key = phx__splitmix64(phx__splitmix64(data->seed ^ 0x64617461u) ^ (uint64_t)epoch);
  uint64_t x = (uint64_t)i;
  do { /* less than four rounds on average: the domain is at most four times too large */
    uint64_t left = x >> half, right = x & mask;
    for (uint64_t round = 0; round < FEISTEL_ROUNDS; round++) {
      const uint64_t next = left ^ (phx__splitmix64(key ^ phx__splitmix64(right << 8 | round)) & mask);
      left = right;
      right = next;
    }
    x = left << half | right;
  } while (x >= (uint64_t)data->windows);
  return (int64_t)x;
}

/* ---- reading ---- */

phx_status phx__data_window(const phx__data *data, int64_t window, int32_t *tokens, int32_t *targets, phx_error *err) {
  if (window < 0 || window >= data->windows)
    return phx_fail(err, PHX_INVALID, "no window %" PRId64 ": there are only %" PRId64, window, data->windows);
  int64_t low = 0, high = data->n_files - 1; /* the last file whose first window is not behind `window` */
  while (low < high) {
    const int64_t middle = (low + high + 1) / 2;
    if (data->files[middle].first_window <= window) low = middle;
    else high = middle - 1;
  }
  token_file *f = &data->files[low];
  const int64_t n = data->sequence, first = (window - f->first_window) * n;
  PHX_TRY(make_ready(data, f, err));
  PHX_TRY(read_at(f, data->row, 2 * (n + 1), f->header + 2 * first, err));
  for (int64_t i = 0; i <= n; i++) {
    if (data->row[i] >= data->vocabulary)
      return phx_fail(err, PHX_IO,
                      "%s: token %" PRIu16 " at position %" PRId64 " is not below the vocabulary of %" PRId64
                      ", but was when the run opened it: the file was changed",
                      f->path, data->row[i], first + i, data->vocabulary);
    if (i < n) tokens[i] = data->row[i];
    if (i > 0) targets[i - 1] = data->row[i];
  }
  return PHX_OK;
}

phx_status phx__data_check_batch(const phx__data *data, int64_t micro, int32_t accumulate, int32_t data_size,
                                 phx_error *err) {
  int64_t global = 0;
  if (micro < 1 || accumulate < 1 || data_size < 1 || __builtin_mul_overflow(micro, (int64_t)accumulate, &global) ||
      __builtin_mul_overflow(global, (int64_t)data_size, &global))
    return phx_fail(err, PHX_INVALID, "a step of micro %" PRId64 " x accumulate %" PRId32 " x ranks %" PRId32
                    " samples cannot be", micro, accumulate, data_size);
  if (global > data->windows)
    return phx_fail(err, PHX_INVALID,
                    "[batch] a step takes micro %" PRId64 " x accumulate %" PRId32 " x ranks %" PRId32 " = %" PRId64
                    " samples, but %" PRId64 " tokens in %" PRId64 " file(s) make only %" PRId64
                    " of sequence = %" PRId64 ": use a smaller batch or sequence, or more text",
                    micro, accumulate, data_size, global, data->tokens, data->n_files, data->windows, data->sequence);
  return PHX_OK;
}

phx_status phx__data_batch(const phx__data *data, int64_t first, int32_t micro_index, int32_t accumulate,
                           int32_t data_rank, int32_t data_size, int64_t micro, int32_t *tokens, int32_t *targets,
                           phx_error *err) {
  phx_status status = phx__data_check_batch(data, micro, accumulate, data_size, err);
  if (status != PHX_OK) return status;
  const int64_t global = micro * accumulate * data_size;
  if (first < 0 || first > INT64_MAX - global || micro_index < 0 || micro_index >= accumulate || data_rank < 0 ||
      data_rank >= data_size)
    return phx_fail(err, PHX_INTERNAL, "no batch from sample %" PRId64 ", micro-batch %" PRId32 " of %" PRId32
                    ", data rank %" PRId32 " of %" PRId32, first, micro_index, accumulate, data_rank, data_size);
  first += ((int64_t)micro_index * data_size + data_rank) * micro;
  for (int64_t i = 0; i < micro && status == PHX_OK; i++) {
    const int64_t sample = first + i;
    const int64_t window = phx__data_order(data, sample / data->windows, sample % data->windows);
    status = phx__data_window(data, window, tokens + i * data->sequence, targets + i * data->sequence, err);
  }
  return status;
}
