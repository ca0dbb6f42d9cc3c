/* core/checkpoint/stream.h - files moved a chunk at a time through a few buffers, by threads of the stream's own, while
 * the caller hashes and copies; past the page cache (O_DIRECT) where the file system allows it.  What is read is hashed
 * by the thread that read it, and lies in its final place where that can be.
 *
 * A stream either writes one file or reads any number of files.  All calls from one thread; only pread, pwrite and
 * direct of phx__sys are called from the stream's own.  What fits one chunk is moved at once, without a thread. */
#ifndef PHX__STREAM_H
#define PHX__STREAM_H
#include <phalanx/base.h>
#include <stdbool.h>
#include <stdint.h>

enum {
  PHX__STREAM_CHUNK = 1 << 20,
  PHX__STREAM_SLOTS = 4, /* one is filled or emptied, the others wait for the disk */
  PHX__STREAM_READERS = 2,
  PHX__STREAM_ALIGN = 4096,
  PHX__STREAM_HUGE = 2 << 20,
  /* Bytes at most; 2 MiB of them are for alignment. */
  PHX__STREAM_MEMORY = PHX__STREAM_SLOTS * PHX__STREAM_CHUNK + PHX__STREAM_HUGE
};

typedef struct phx__stream_file { /* the owner opens and closes it; stays where it is while a stream uses it */
  int fd;
  char *path;    /* for messages */
  int64_t bytes; /* of the file */
  _Atomic bool direct; /* O_DIRECT is set; only the stream changes it */
  struct { /* the caller's: bytes [at, at + bytes) belong at `to`; whole chunks of them are read to there */
    int64_t at, bytes;
    unsigned char *to;
  } into;
} phx__stream_file;
/* Asks for O_DIRECT; a file system that has none is told of in the log (debug), and no failure. */
void phx__stream_direct(phx__stream_file *file);

typedef struct phx__stream phx__stream;
/* bytes: of all files together; fewer than the buffers means fewer buffers.  threads: transfers at a time, 1 for
 * writing (parts of pages go with O_DIRECT off, which must meet no other transfer), or up to PHX__STREAM_READERS. */
phx_status phx__stream_create(int64_t bytes, int threads, phx__stream **out, phx_error *err);
/* Nothing of `file` is used any more. */
void phx__stream_forget(phx__stream *s, const phx__stream_file *file);
/* Nothing is read to file.into any more, and what was is not given out again. */
void phx__stream_leave(phx__stream *s, const phx__stream_file *file);
void phx__stream_destroy(phx__stream *s); /* NULL is fine; what was not drained may be unwritten */

/* Copies the data, which is written some time before drain ends; in order is cheapest.  An error may be that of an
 * earlier call; after it nothing more is written. */
phx_status phx__stream_write(phx__stream *s, phx__stream_file *file, const void *data, int64_t bytes, int64_t at,
                             phx_error *err);
/* All is written (not flushed).  From here on the file is without O_DIRECT. */
phx_status phx__stream_drain(phx__stream *s, phx__stream_file *file, phx_error *err);

typedef struct phx__stream_data {
  const unsigned char *bytes; /* a buffer, or the place in file.into */
  uint64_t sum;               /* XXH3-64 of the chunk */
} phx__stream_data;
/* A whole chunk; out->bytes is valid until the next call.  Chunks up to `last` are read ahead, as far as there is room,
 * and to their place if file.into names one: it must stay until they were given out, or leave or forget was called. */
phx_status phx__stream_chunk(phx__stream *s, phx__stream_file *file, int64_t chunk, int64_t last,
                             phx__stream_data *out, phx_error *err);
#endif
