/* core/command/tokenize.c - `phalanx data tokenize`: text files to llm.c token files, by bytes.
 *
 * Tokens are the text's bytes and 256, end of text, between files.  The output is written beside its name and renamed
 * when complete, so a reader never sees half a file.  Invariant: on failure no output was made or changed, but for the
 * first of two when the rename of the second fails, which the message says.  [main] only. */
#include "base/complain.h"
#include "command/commands.h"
#include "engine/data.h"
#include "engine/data_kind.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include "base/regular_file.h"
#include "base/status.h"
#include "base/sys.h"

enum { END_OF_TEXT = 256, CHUNK = 1 << 16, PATH_BYTES = 4096 };

typedef struct arguments {
  char **texts; /* argv's own, moved together */
  int n_texts;
  const char *out, *valid;
  double fraction;
  bool force, help;
} arguments;

typedef struct output {
  const char *path;
  char temporary[PATH_BYTES];
  int fd;
  int64_t expected, tokens; /* to come, written */
  size_t used;
  uint16_t buffer[CHUNK];
} output;

static const char usage[] =
    "usage: phalanx data tokenize TEXT... -o OUT.bin [--valid FRACTION VALID.bin] [--force]\n"
    "\n"
    "Writes the bytes of the text files as tokens (256 = end of text, between files) in llm.c's format.\n"
    "  -o OUT.bin                   the token file to make\n"
    "  --valid FRACTION VALID.bin   put this part of the tokens, the last ones, into VALID.bin instead\n"
    "  --force                      replace files that exist\n";

/* ---- the command line ---- */

/* A value that looks like an option is one: `--valid --force`.  A file of such a name is ./--force. */
static phx_status check_value(const char *option, const char *value, phx_error *err) {
  if (strncmp(value, "--", 2)) return PHX_OK;
  return phx_fail(err, PHX_INVALID, "%s needs a value, and %s is an option (a file of that name is ./%s)", option,
                  value, value);
}

static phx_status parse(int argc, char **argv, arguments *a, phx_error *err) {
  *a = (arguments){.texts = argv};
  bool only_texts = false;
  for (int i = 0; i < argc; i++) {
    if (only_texts || argv[i][0] != '-') {
      a->texts[a->n_texts++] = argv[i];
    } else if (!strcmp(argv[i], "--")) {
      only_texts = true;
    } else if (!strcmp(argv[i], "--help") || !strcmp(argv[i], "-h")) {
      a->help = true;
    } else if (!strcmp(argv[i], "--force")) {
      a->force = true;
    } else if (!strcmp(argv[i], "-o")) {
      if (i + 1 >= argc) return phx_fail(err, PHX_INVALID, "-o needs the name of the token file");
      PHX_TRY(check_value(argv[i], argv[i + 1], err));
      if (a->out) return phx_fail(err, PHX_INVALID, "-o is given twice: %s and %s", a->out, argv[i + 1]);
      a->out = argv[++i];
    } else if (!strcmp(argv[i], "--valid")) {
      if (i + 2 >= argc) return phx_fail(err, PHX_INVALID, "--valid needs a fraction and the name of a token file");
      PHX_TRY(check_value(argv[i], argv[i + 1], err));
      PHX_TRY(check_value(argv[i], argv[i + 2], err));
      if (a->valid) return phx_fail(err, PHX_INVALID, "--valid is given twice: %s and %s", a->valid, argv[i + 2]);
      char *end = NULL;
      a->fraction = strtod(argv[i + 1], &end);
      if (end == argv[i + 1] || *end || !(a->fraction > 0 && a->fraction < 1))
        return phx_fail(err, PHX_INVALID, "--valid %s: the fraction must be a number between 0 and 1, such as 0.1",
                        argv[i + 1]);
      a->valid = argv[i + 2];
      i += 2;
    } else {
      return phx_fail(err, PHX_INVALID, "unknown option %s", argv[i]);
    }
  }
  if (a->help) return PHX_OK;
  if (!a->n_texts) return phx_fail(err, PHX_INVALID, "no text file is named");
  if (!a->out) return phx_fail(err, PHX_INVALID, "-o OUT.bin is missing");
  if (a->valid && !strcmp(a->out, a->valid))
    return phx_fail(err, PHX_INVALID, "-o and --valid name the same file %s", a->out);
  return PHX_OK;
}

/* ---- what will be written ---- */

static phx_status open_text(const char *path, int *fd, struct stat *st, phx_error *err) {
  static const char why[] = "a text is read twice, first for its length: put it into a file";
  PHX_TRY(phx__regular_open(path, "the text file", why, fd, st, err));
  if (st->st_size == 0) return phx_fail(err, PHX_INVALID, "%s is empty", path);
  return PHX_OK;
}

/* Text is what is in no other format that people have at hand: an archive's bytes as tokens teach nothing. */
static phx_status check_text(const char *path, int fd, const struct stat *st, phx_error *err) {
  unsigned char head[512] = {0};
  const size_t most = st->st_size < (off_t)sizeof head ? (size_t)st->st_size : sizeof head;
  ssize_t n;
  while ((n = phx__sys.pread(fd, head, most, 0)) < 0 && errno == EINTR) continue;
  if (n < 0) return phx_fail_errno(err, PHX_IO, errno, "cannot read %s", path);
  int32_t magic = 0;
  if (n >= 4) memcpy(&magic, head, sizeof magic);
  if (magic == PHX__TOKENS_MAGIC)
    return phx_fail(err, PHX_INVALID, "%s is no text: it is a token file already; name it in [data] train", path);
  const char *what = phx__data_mark_of(head, (size_t)n);
  if (!what) return PHX_OK;
  return phx_fail(err, PHX_INVALID, "%s is no text: it is %s; take the text out of it, and name that", path, what);
}

/* Is `path` there (*st filled)?  A file that cannot be looked at counts as there: open says why later. */
static bool exists(const char *path, struct stat *st) {
  memset(st, 0, sizeof *st);
  const int fd = phx__sys.open(path, O_RDONLY | O_NONBLOCK, 0);
  if (fd < 0) return errno != ENOENT && errno != ENOTDIR;
  const bool ok = !phx__sys.fstat(fd, st);
  phx__sys.close(fd);
  return ok;
}

/* Refuses an output that exists (without --force) or is one of the texts; counts the tokens of all texts. */
static phx_status survey(const arguments *a, int64_t *total, phx_error *err) {
  const char *outputs[2] = {a->out, a->valid};
  struct stat made[2] = {0};
  for (int k = 0; k < 2 && outputs[k]; k++) {
    if (strlen(outputs[k]) > PATH_BYTES - 32)
      return phx_fail(err, PHX_INVALID, "the name of an output is longer than %d characters", PATH_BYTES - 32);
    if (exists(outputs[k], &made[k]) && !a->force)
      return phx_fail(err, PHX_INVALID, "%s exists: choose another name, or give --force to replace it", outputs[k]);
    if (made[k].st_mode && !S_ISREG(made[k].st_mode))
      return phx_fail(err, PHX_INVALID, "%s is not a regular file and is not replaced", outputs[k]);
  }
  if (made[0].st_ino && made[0].st_ino == made[1].st_ino && made[0].st_dev == made[1].st_dev)
    return phx_fail(err, PHX_INVALID, "%s and %s are the same file", a->out, a->valid);
  *total = a->n_texts - 1;
  for (int i = 0; i < a->n_texts; i++) {
    struct stat st = {0};
    int fd = -1;
    phx_status status = open_text(a->texts[i], &fd, &st, err);
    if (!status) status = check_text(a->texts[i], fd, &st, err);
    if (fd >= 0) phx__sys.close(fd);
    if (status != PHX_OK) return status;
    for (int k = 0; k < 2; k++)
      if (made[k].st_ino && made[k].st_ino == st.st_ino && made[k].st_dev == st.st_dev)
        return phx_fail(err, PHX_INVALID, "%s is a text to read and would be replaced", a->texts[i]);
    if (__builtin_add_overflow(*total, (int64_t)st.st_size, total) || *total > INT32_MAX)
      return phx_fail(err, PHX_INVALID,
                      "the texts up to %s make more than %d tokens, which is all that one file of llm.c's format can "
                      "count: make several files and name them by a glob in [data] train", a->texts[i], INT32_MAX);
  }
  return PHX_OK;
}

/* ---- writing ---- */

static phx_status write_all(const output *o, const void *bytes, size_t n, phx_error *err) {
  for (size_t done = 0; done < n;) {
    const ssize_t w = phx__sys.write(o->fd, (const char *)bytes + done, n - done);
    if (w < 0 && errno == EINTR) continue;
    if (w <= 0) return phx_fail_errno(err, PHX_STATE, w < 0 ? errno : ENOSPC, "cannot write %s", o->temporary);
    done += (size_t)w;
  }
  return PHX_OK;
}

static phx_status output_open(output *o, const char *path, int64_t expected, phx_error *err) {
  int32_t header[PHX__TOKENS_HEADER / 4] = {PHX__TOKENS_MAGIC, PHX__TOKENS_VERSION, (int32_t)expected};
  o->path = path;
  o->expected = expected;
  snprintf(o->temporary, sizeof o->temporary, "%s.%ld.tmp", path, (long)getpid());
  o->fd = phx__sys.open(o->temporary, O_WRONLY | O_CREAT | O_EXCL, 0666);
  if (o->fd < 0) {
    const int number = errno;
    const bool full = number == ENOSPC || number == EDQUOT;
    const phx_status status =
        phx_fail_errno(err, full ? PHX_STATE : PHX_IO, number, "cannot create %s", o->temporary);
    o->temporary[0] = 0; /* not ours to remove */
    return status;
  }
  return write_all(o, header, sizeof header, err);
}

static phx_status flush(output *o, phx_error *err) {
  const phx_status status = write_all(o, o->buffer, o->used * sizeof *o->buffer, err);
  o->used = 0;
  return status;
}

/* The first output takes what it expects, the second the rest. */
static phx_status put(output *o, uint16_t token, phx_error *err) {
  if (o->tokens == o->expected) o++;
  if (o->fd < 0) return phx_fail(err, PHX_IO, "the texts became longer while they were read");
  o->buffer[o->used++] = token;
  o->tokens++;
  return o->used == CHUNK ? flush(o, err) : PHX_OK;
}

static phx_status copy_text(output *outputs, const char *path, unsigned char *chunk, phx_error *err) {
  struct stat st = {0};
  int fd = -1;
  phx_status status = open_text(path, &fd, &st, err);
  int64_t left = st.st_size;
  while (status == PHX_OK && left > 0) {
    const ssize_t n = phx__sys.read(fd, chunk, left < CHUNK ? (size_t)left : CHUNK);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) status = phx_fail_errno(err, PHX_IO, errno, "cannot read %s", path);
    if (n == 0) status = phx_fail(err, PHX_IO, "%s became shorter while it was read", path);
    for (ssize_t i = 0; i < n && status == PHX_OK; i++) status = put(outputs, chunk[i], err);
    left -= n;
  }
  if (fd >= 0) phx__sys.close(fd);
  return status;
}

static phx_status output_close(output *o, phx_error *err) {
  phx_status status = flush(o, err);
  if (status == PHX_OK && o->tokens != o->expected)
    status = phx_fail(err, PHX_IO, "the texts changed while they were read: %" PRId64 " tokens instead of %" PRId64,
                      o->tokens, o->expected);
  if (status == PHX_OK && phx__sys.fsync(o->fd))
    status = phx_fail_errno(err, PHX_STATE, errno, "cannot write %s", o->temporary);
  const int fd = o->fd;
  o->fd = -1;
  if (phx__sys.close(fd) && status == PHX_OK)
    status = phx_fail_errno(err, PHX_STATE, errno, "cannot write %s", o->temporary);
  return status;
}

/* *valid_tokens: how many of the total go to --valid. */
static phx_status split(const arguments *a, int64_t total, int64_t *valid_tokens, phx_error *err) {
  *valid_tokens = a->valid ? (int64_t)((double)total * a->fraction) : 0;
  if (total < 2 || (a->valid && (*valid_tokens < 2 || total - *valid_tokens < 2)))
    return phx_fail(err, PHX_INVALID, "%" PRId64 " tokens leave %" PRId64 " for training and %" PRId64
                    " for validation; a file needs at least 2", total, total - *valid_tokens, *valid_tokens);
  return PHX_OK;
}

static phx_status tokenize(const arguments *a, phx_error *err) {
  phx_status status = PHX_OK;
  int64_t total = 0, valid_tokens = 0;
  unsigned char *chunk = NULL;
  output *outputs = NULL;
  const int n = a->valid ? 2 : 1;
  PHX_TRY_GOTO(survey(a, &total, err), status, done);
  PHX_TRY_GOTO(split(a, total, &valid_tokens, err), status, done);
  chunk = phx__calloc(1, CHUNK);
  outputs = phx__calloc(2, sizeof *outputs);
  if (!chunk || !outputs) {
    status = phx_fail(err, PHX_NOMEM, "no memory for %zu bytes of buffers", CHUNK + 2 * sizeof *outputs);
    goto done;
  }
  outputs[0].fd = outputs[1].fd = -1;
  PHX_TRY_GOTO(output_open(&outputs[0], a->out, total - valid_tokens, err), status, done);
  if (a->valid) PHX_TRY_GOTO(output_open(&outputs[1], a->valid, valid_tokens, err), status, done);
  for (int i = 0; i < a->n_texts; i++) {
    if (i) PHX_TRY_GOTO(put(outputs, END_OF_TEXT, err), status, done);
    PHX_TRY_GOTO(copy_text(outputs, a->texts[i], chunk, err), status, done);
  }
  for (int i = 0; i < n; i++) PHX_TRY_GOTO(output_close(&outputs[i], err), status, done);
  for (int i = 0; i < n; i++) {
    if (phx__sys.rename(outputs[i].temporary, outputs[i].path)) {
      status = phx_fail_errno(err, PHX_STATE, errno, "cannot rename %s%s", outputs[i].temporary,
                              i ? " (the training file was made)" : "");
      goto done;
    }
    outputs[i].temporary[0] = 0;
  }
  for (int i = 0; i < n; i++) printf("%s: %" PRId64 " tokens\n", outputs[i].path, outputs[i].tokens);
done:
  for (int i = 2; outputs && i-- > 0;) {
    if (outputs[i].fd >= 0) phx__sys.close(outputs[i].fd);
    if (outputs[i].temporary[0]) phx__sys.unlink(outputs[i].temporary);
  }
  phx__free(outputs);
  phx__free(chunk);
  return status;
}

int phx__command_data(int argc, char **argv) {
  phx_error err = PHX_ERROR_INIT;
  arguments a;
  if (argc >= 2 && (!strcmp(argv[1], "--help") || !strcmp(argv[1], "-h"))) {
    fputs(usage, stdout);
    return PHX__EXIT_OK;
  }
  if (argc < 2 || strcmp(argv[1], "tokenize")) {
    phx__complain("data: %s%s", argc < 2 ? "what is to be done?" : "there is no command ", argc < 2 ? "" : argv[1]);
    fputs(usage, stderr);
    return PHX__EXIT_REFUSED;
  }
  phx_status status = parse(argc - 2, argv + 2, &a, &err);
  if (status == PHX_OK && a.help) {
    fputs(usage, stdout);
    return PHX__EXIT_OK;
  }
  if (status == PHX_OK) status = tokenize(&a, &err);
  if (status == PHX_OK) return PHX__EXIT_OK;
  phx__complain("data tokenize: %s", err.message);
  return status == PHX_STATE ? PHX__EXIT_RANK : PHX__EXIT_REFUSED; /* PHX_STATE: it could not be written */
}
