/* core/checkpoint/safetensors.h - files of tensors in the safetensors format: a strict reader and a streaming writer.
 *
 * Format: 8 bytes little-endian header length, a JSON object {name: {dtype, shape, data_offsets}, "__metadata__":
 * {text: text}}, then the tensors' bytes without holes.  We write headers padded with blanks, so that the first tensor
 * begins at a multiple of PHX__SAFETENSORS_ALIGN.
 *
 * Statuses: PHX_IO is a file that cannot be read or written or that is damaged; PHX_INVALID is a file that is whole
 * but not what was asked for, or tensors that cannot be written; PHX_NOMEM.  Messages name the file, and the tensor if
 * there is one.  Every call [main] or one thread per object. */
#ifndef PHX__SAFETENSORS_H
#define PHX__SAFETENSORS_H
#include "checkpoint/stream.h"

enum {
  PHX__SAFETENSORS_ALIGN = 4096,         /* of the first tensor: direct input and output can be used */
  PHX__SAFETENSORS_HEADER_MOST = 16 << 20, /* bytes; the format allows 100 MB */
  PHX__SAFETENSORS_TENSORS_MOST = 1 << 18,
  PHX__SAFETENSORS_NAME_MOST = 255,      /* bytes */
  PHX__TENSOR_DIMS = 8,
  PHX__CHUNK_BYTES = PHX__STREAM_CHUNK   /* of a checksum */
};

typedef struct phx__tensor {
  const char *name;                /* UTF-8, not empty */
  const char *dtype_name;          /* the format's: "F32", "BOOL", ... [static]; filled by reading and layout */
  int32_t dtype;                   /* PHX_F32, ...; 0: one that Phalanx has no number for */
  uint32_t ndim;                   /* 0: a scalar */
  int64_t shape[PHX__TENSOR_DIMS]; /* (ndim) */
  int64_t numel, bytes;            /* filled by reading and layout */
  int64_t begin;                   /* byte in the file; filled by reading and layout */
} phx__tensor;

/* ---- reading ---- */
typedef struct phx__safetensors { /* read only */
  char *path;
  int fd;
  int64_t file_bytes, data_at; /* data_at: byte of the first tensor */
  phx__tensor *tensors;        /* (n) in the order of their bytes; names are owned */
  uint32_t n;
  char (*metadata)[2][128];    /* (n_metadata) name and value of "__metadata__", cut to 127 bytes */
  uint32_t n_metadata;
  const phx__tensor **by_name; /* (n) sorted */
} phx__safetensors;

/* Opens and checks everything but the tensors' values: every rule of the format holds afterwards. */
phx_status phx__safetensors_open(const char *path, phx__safetensors **out, phx_error *err);
void phx__safetensors_close(phx__safetensors *st); /* NULL is fine */
const phx__tensor *phx__safetensors_find(const phx__safetensors *st, const char *name); /* or NULL */
const char *phx__safetensors_metadata(const phx__safetensors *st, const char *name);    /* or NULL */
/* Bytes [at, at + bytes) of a tensor. */
phx_status phx__safetensors_read(const phx__safetensors *st, const phx__tensor *tensor, int64_t at, int64_t bytes,
                                 void *out, phx_error *err);
/* The rules alone, on a header's text (bytes) in front of data_bytes of tensors.  fd is -1; path is for messages. */
phx_status phx__safetensors_parse(const char *path, const char *text, size_t bytes, int64_t data_bytes,
                                  phx__safetensors **out, phx_error *err);

/* ---- writing ---- */
/* Fills numel, bytes, begin and dtype_name of tensors that have name, dtype, ndim and shape, in this order; and the
 * whole beginning of the file (length and padded header), freed with phx__free.  metadata: names and values in turn,
 * ended with NULL; or NULL. */
phx_status phx__safetensors_layout(const char *path, phx__tensor *tensors, uint32_t n, const char *const *metadata,
                                   char **head, int64_t *head_bytes, int64_t *file_bytes, phx_error *err);

/* Checksums of a file that is being written: XXH3-64 of each PHX__CHUNK_BYTES.  What is given in order, chunk by
 * chunk, is hashed on the way; a chunk whose parts came in another order is read back at the end. */
typedef struct phx__chunks phx__chunks;
phx_status phx__chunks_create(const char *path, int64_t file_bytes, phx__chunks **out, phx_error *err);
void phx__chunks_add(phx__chunks *c, const void *data, int64_t bytes, int64_t at);
/* sums: (phx__chunks_count(file_bytes)); fd is read for chunks that came out of order.  Every byte must have been
 * given. */
phx_status phx__chunks_finish(phx__chunks *c, int fd, uint64_t *sums, phx_error *err);
void phx__chunks_destroy(phx__chunks *c); /* NULL is fine */
int64_t phx__chunks_count(int64_t file_bytes);
uint64_t phx__chunk_sum(const void *data, size_t bytes);

typedef struct phx__safetensors_writer {
  phx__stream_file file;
  phx__stream *stream;  /* NULL once drained */
  phx__tensor *tensors; /* (n) with places; names are the caller's */
  uint32_t n;
  phx__chunks *chunks;  /* or NULL */
} phx__safetensors_writer;

/* Creates the file (an old one is cut), writes the header.  The caller's tensors are copied, their names are not.
 * sums: checksums are kept. */
phx_status phx__safetensors_create(const char *path, const phx__tensor *tensors, uint32_t n,
                                   const char *const *metadata, bool sums, phx__safetensors_writer **out,
                                   phx_error *err);
/* Part of a tensor, at any time and in any order; in order is cheapest.  The data is copied and written by a thread of
 * the writer: a failure may be told by a later call. */
phx_status phx__safetensors_write(phx__safetensors_writer *w, uint32_t tensor, int64_t at, int64_t bytes,
                                  const void *data, phx_error *err);
/* Writes what is left, and flushes; sums (may be NULL without checksums) as phx__chunks_finish.  Call once, then
 * close.  A failed flush is final: the file must be given up. */
phx_status phx__safetensors_finish(phx__safetensors_writer *w, uint64_t *out_sums, phx_error *err);
void phx__safetensors_writer_close(phx__safetensors_writer *w); /* NULL is fine; the file stays */

/* ---- whole transfers, through phx__sys ---- */
phx_status phx__file_read(int fd, const char *path, void *data, int64_t bytes, int64_t at, phx_error *err);
phx_status phx__file_write(int fd, const char *path, const void *data, int64_t bytes, int64_t at, phx_error *err);
/* A regular file, opened for reading; never blocks on anything else. */
phx_status phx__file_open(const char *path, int *fd, int64_t *bytes, phx_error *err);

const char *phx__dtype_name(int32_t dtype); /* "F32", ...; NULL: none */
int32_t phx__dtype_of(const char *name);    /* 0: none */
#endif
