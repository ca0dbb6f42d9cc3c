/* core/checkpoint/turned_file.h - a matrix that comes row by row and stands column by column in a file.  One thread.
 *
 * A part of the rows is kept until it fills a buffer of a few MiB, then written: for each column one piece as long as
 * there are rows.  Parts may come in any order; those that follow each other are cheapest. */
#ifndef PHX__TURNED_FILE_H
#define PHX__TURNED_FILE_H
#include <phalanx/base.h>

typedef struct phx__turned_file {
  int fd;
  const char *path;       /* for messages */
  int64_t rows, columns;  /* of the matrix that is kept; 0: none */
  int64_t place;          /* its byte in the file */
  int64_t first, n;       /* elements that are kept */
  float *band, *line;
} phx__turned_file;

phx_status phx__turned_open(phx__turned_file *t, int fd, const char *path, phx_error *err);
void phx__turned_close(phx__turned_file *t); /* of zeros is fine */
/* Elements [first, first + n) of a matrix (rows, columns) whose turned form begins at byte `place`. */
phx_status phx__turned_write(phx__turned_file *t, const int64_t shape[2], int64_t place, int64_t first, int64_t n,
                             const float *data, phx_error *err);
/* What is kept is written. */
phx_status phx__turned_flush(phx__turned_file *t, phx_error *err);
#endif
